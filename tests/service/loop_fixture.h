#ifndef TENON_TESTS_SERVICE_LOOP_FIXTURE_H_
#define TENON_TESTS_SERVICE_LOOP_FIXTURE_H_

#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "service/step_loop.h"

namespace tenon::service {

// A call with its request and response; waits for the answer.
template <class Base, class Request, class Response>
class WaitingCall : public Base {
 public:
  WaitingCall() {
    Base::request = &own_request;
    Base::response = &own_response;
  }
  void Finish(const Failure& failure) override { done_.set_value(failure); }
  Failure Wait() { return done_.get_future().get(); }

  Request own_request;
  Response own_response;

 private:
  std::promise<Failure> done_;
};

using WaitingCreate = WaitingCall<CreateCall, v1::CreateSequencesRequest,
                                  v1::CreateSequencesResponse>;
using WaitingStep = WaitingCall<StepCall, v1::StepRequest, v1::StepResponse>;
using WaitingFork =
    WaitingCall<ForkCall, v1::ForkSequencesRequest, v1::ForkSequencesResponse>;
using WaitingRelease = WaitingCall<ReleaseCall, v1::ReleaseSequencesRequest,
                                   v1::ReleaseSequencesResponse>;
using WaitingAbort =
    WaitingCall<AbortCall, v1::AbortRequest, v1::AbortResponse>;

class WaitingGenerate : public GenerateCall {
 public:
  WaitingGenerate() { request = &own_request; }
  void Emit(uint32_t token, const StepRowResult&,
            v1::RowStatus row_status) override {
    tokens.push_back(token);
    status = row_status;
    if (static_cast<int>(tokens.size()) == cancel_after) cancelled = true;
  }
  void Finish(const Failure& failure) override { done_.set_value(failure); }
  Failure Wait() { return done_.get_future().get(); }

  v1::GenerateRequest own_request;
  std::vector<uint32_t> tokens;
  v1::RowStatus status = v1::ROW_STATUS_UNSPECIFIED;
  int cancel_after = -1;

 private:
  std::promise<Failure> done_;
};

constexpr int32_t kTestVocab = 131;

inline std::vector<uint32_t> TestPrompt(int32_t count, int32_t seed) {
  std::vector<uint32_t> tokens;
  for (int32_t i = 0; i < count; ++i) {
    tokens.push_back(
        static_cast<uint32_t>((seed * 53 + i * 29 + i * i * 7) % kTestVocab));
  }
  return tokens;
}

inline void FillNew(int32_t prompt_tokens, int32_t seed,
                    v1::NewSequence* sequence) {
  for (uint32_t token : TestPrompt(prompt_tokens, seed)) {
    sequence->add_prompt(token);
  }
  sequence->mutable_sampling()->set_temperature(1.0f);
  sequence->mutable_sampling()->set_seed(static_cast<uint64_t>(seed));
  sequence->set_ignore_eos(true);
}

inline std::shared_ptr<const Model> TestModel() {
  static const std::shared_ptr<const Model> model = [] {
    auto loaded =
        Model::Load("tests/golden/qwen3_moe_tiny", {DeviceType::kCpu, 0});
    EXPECT_TRUE(loaded.ok()) << loaded.status().message();
    return *std::move(loaded);
  }();
  return model;
}

inline SessionOptions TestEngineOptions(const Limits& limits) {
  SessionOptions options;
  StepLoop::SetEngineLimits(limits, &options);
  options.max_context = 64;
  options.page_size = 8;
  options.num_pages = 128;
  options.batch_invariant = true;
  options.num_threads = 1;
  return options;
}

inline Limits TestLimits() {
  Limits limits;
  limits.rows_per_step = 16;
  limits.sequences = 24;
  limits.sessions = 8;
  limits.prefill_tokens_per_step = 16;
  return limits;
}

inline std::unique_ptr<Session> TestEngine(
    const SessionOptions& options,
    const std::shared_ptr<const Model>& model = TestModel()) {
  auto session = Session::Create(model, options);
  EXPECT_TRUE(session.ok()) << session.status().message();
  return *std::move(session);
}

// What the engine gives without a service: the first token and those of
// `steps` steps.
inline std::vector<uint32_t> ExpectedTokens(int32_t prompt_tokens, int32_t seed,
                                            int32_t steps) {
  Limits limits = TestLimits();
  limits.prefill_tokens_per_step = 64;
  const std::unique_ptr<Session> engine = TestEngine(TestEngineOptions(limits));
  std::vector<int32_t> input;
  for (uint32_t token : TestPrompt(prompt_tokens, seed)) {
    input.push_back(static_cast<int32_t>(token));
  }
  StepRow row;
  row.sequence = *engine->CreateSequence();
  row.sampling.temperature = 1.0f;
  row.sampling.seed = static_cast<uint64_t>(seed);
  std::vector<uint32_t> tokens;
  std::vector<StepRowResult> results;
  for (int32_t i = 0; i <= steps; ++i) {
    row.tokens = input.data();
    row.num_tokens = static_cast<int32_t>(input.size());
    const Status status = engine->Step({row}, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    tokens.push_back(static_cast<uint32_t>(results[0].token));
    input.assign(1, results[0].token);
  }
  return tokens;
}

}  // namespace tenon::service

#endif  // TENON_TESTS_SERVICE_LOOP_FIXTURE_H_
