#ifndef TENON_TESTS_SERVICE_STEP_LOOP_FIXTURE_H_
#define TENON_TESTS_SERVICE_STEP_LOOP_FIXTURE_H_

#include <memory>
#include <vector>

#include "service/step_loop.h"
#include "tests/service/loop_fixture.h"

namespace tenon::service {

// A loop over the test's engine, run by its callers or by a thread of its own
// (the parameter), and clients of it.
class StepLoopTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override { Start(TestLimits()); }

  void Start(const Limits& limits, int64_t num_pages = 128) {
    loop_.reset();
    SessionOptions engine = TestEngineOptions(limits);
    engine.num_pages = num_pages;
    StepLoopOptions options;
    options.limits = limits;
    options.run_inline = GetParam();
    loop_ = std::make_unique<StepLoop>(TestEngine(engine), options);
    pages_ = num_pages;
  }

  // A session with `count` sequences of different prompts and seeds.
  struct Client {
    uint64_t session = 0;
    uint64_t step = 0;
    std::vector<uint64_t> seqs;
    std::vector<std::vector<uint32_t>> tokens;
  };

  Client MakeClient(int32_t count, int32_t first_seed,
                    uint32_t max_tokens = 20) {
    WaitingCreate create;
    for (int32_t i = 0; i < count; ++i) {
      v1::NewSequence* sequence = create.own_request.add_sequences();
      FillNew(PromptSize(first_seed + i), first_seed + i, sequence);
      sequence->set_max_tokens(max_tokens);
    }
    loop_->Submit(&create);
    const Failure failure = create.Wait();
    EXPECT_TRUE(failure.ok()) << failure.message;
    const v1::CreateSequencesResponse& response = create.own_response;
    Client client{response.session_id(), 0, {}, {}};
    for (int i = 0; i < response.seq_size(); ++i) {
      client.seqs.push_back(response.seq(i));
      client.tokens.push_back({response.token(i)});
    }
    return client;
  }

  static int32_t PromptSize(int32_t seed) { return 3 + seed * 5 % 23; }

  static void FillStep(const Client& client, uint64_t step_id,
                       v1::StepRequest* request) {
    request->set_session_id(client.session);
    request->set_step_id(step_id);
    for (uint64_t seq : client.seqs) request->add_seq(seq);
  }

  Failure Step(Client* client) {
    WaitingStep step;
    FillStep(*client, client->step + 1, &step.own_request);
    loop_->Submit(&step);
    const Failure failure = step.Wait();
    if (!failure.ok()) return failure;
    ++client->step;
    for (int i = 0; i < step.own_response.token_size(); ++i) {
      client->tokens[static_cast<size_t>(i)].push_back(
          step.own_response.token(i));
    }
    return failure;
  }

  Failure Send(const v1::StepRequest& request,
               v1::StepResponse* response = nullptr) {
    WaitingStep step;
    step.own_request = request;
    loop_->Submit(&step);
    const Failure failure = step.Wait();
    if (response != nullptr) *response = step.own_response;
    return failure;
  }

  uint32_t Release(const Client& client) {
    WaitingRelease release;
    release.own_request.set_session_id(client.session);
    for (uint64_t seq : client.seqs) release.own_request.add_seq(seq);
    release.own_request.set_end_session(true);
    loop_->Submit(&release);
    EXPECT_TRUE(release.Wait().ok());
    return release.own_response.released();
  }

  void ExpectAllFree() {
    const Metrics& metrics = loop_->metrics();
    EXPECT_EQ(metrics.free_pages, pages_);
    EXPECT_EQ(metrics.engine_free_pages, pages_);
    EXPECT_EQ(metrics.active_sequences, 0);
    EXPECT_EQ(metrics.queued_requests, 0);
    EXPECT_EQ(metrics.queued_rows, 0);
  }

  std::unique_ptr<StepLoop> loop_;
  int64_t pages_ = 0;
};

}  // namespace tenon::service

#endif  // TENON_TESTS_SERVICE_STEP_LOOP_FIXTURE_H_
