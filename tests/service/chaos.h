#ifndef TENON_TESTS_SERVICE_CHAOS_H_
#define TENON_TESTS_SERVICE_CHAOS_H_

#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/service/loop_fixture.h"

namespace tenon::service {

// How a call is disturbed.
struct Fault {
  bool cancel = false;  // at some moment, maybe before or after its effect
  int delay_us = 0;     // until then
  bool stream = false;  // for transports that have streams
};

// A way to reach a service. Codes are those of gRPC.
class ChaosTransport {
 public:
  virtual ~ChaosTransport() = default;
  virtual int Create(const v1::CreateSequencesRequest& request,
                     v1::CreateSequencesResponse* response, Fault fault) = 0;
  virtual int Step(const v1::StepRequest& request, v1::StepResponse* response,
                   Fault fault) = 0;
  // The same step twice at once.
  virtual void StepTwice(const v1::StepRequest& request, int codes[2],
                         v1::StepResponse responses[2]) = 0;
  virtual int Fork(const v1::ForkSequencesRequest& request,
                   v1::ForkSequencesResponse* response) = 0;
  virtual int Release(const v1::ReleaseSequencesRequest& request) = 0;
  // Cancels after `cancel_after` tokens (never: -1).
  virtual int Generate(const v1::GenerateRequest& request, int cancel_after,
                       std::vector<uint32_t>* tokens) = 0;
};

using MakeTransport = std::function<std::unique_ptr<ChaosTransport>()>;

constexpr int32_t kChaosSeeds = 24;
constexpr int32_t kChaosSteps = 24;  // at most, of one sequence

inline int32_t ChaosPrompt(int32_t seed) { return 2 + seed * 7 % 31; }

// What an undisturbed engine draws: of each seed something else, so that a
// token of another sequence is found out.
inline const std::vector<std::vector<uint32_t>>& ChaosExpected() {
  static const std::vector<std::vector<uint32_t>> expected = [] {
    std::vector<std::vector<uint32_t>> all;
    for (int32_t seed = 0; seed < kChaosSeeds; ++seed) {
      all.push_back(ExpectedTokens(ChaosPrompt(seed), seed, kChaosSteps));
    }
    return all;
  }();
  return expected;
}

// A client that does all that clients do, disturbed and out of order.
class ChaosClient {
 public:
  ChaosClient(const MakeTransport& make, uint64_t seed,
              std::atomic<int64_t>* steps_left)
      : make_(make), random_(seed), steps_left_(steps_left) {}

  void Run() {
    transport_ = make_();
    while (*steps_left_ > 0 && !::testing::Test::HasFailure()) {
      if (Chance(10)) {
        RunGenerate();
      } else {
        RunSession();
      }
      if (Chance(10)) transport_ = make_();  // as if killed and restarted
    }
    transport_.reset();
  }

 private:
  struct Row {
    uint64_t handle = 0;
    int32_t seed = 0;
  };

  int Uniform(int below) {
    return std::uniform_int_distribution<int>(0, below - 1)(random_);
  }
  bool Chance(int percent) { return Uniform(100) < percent; }
  Fault RandomFault() {
    Fault fault;
    fault.cancel = Chance(20);
    fault.delay_us = Uniform(4) == 0 ? Uniform(3000) : Uniform(300);
    fault.stream = Chance(50);
    return fault;
  }

  static bool MayRetry(int code) {
    return code == static_cast<int>(StatusCode::kCancelled) ||
           code == static_cast<int>(StatusCode::kDeadlineExceeded) ||
           code == static_cast<int>(StatusCode::kResourceExhausted);
  }

  void RunGenerate() {
    const int32_t seed = Uniform(kChaosSeeds);
    v1::GenerateRequest request;
    FillNew(ChaosPrompt(seed), seed, request.mutable_sequence());
    request.mutable_sequence()->set_max_tokens(
        static_cast<uint32_t>(1 + Uniform(kChaosSteps)));
    std::vector<uint32_t> tokens;
    const int code = transport_->Generate(
        request, Chance(50) ? Uniform(kChaosSteps) : -1, &tokens);
    ASSERT_TRUE(code == 0 || MayRetry(code)) << code;
    const std::vector<uint32_t>& expected = ChaosExpected()[Index(seed)];
    ASSERT_LE(tokens.size(), expected.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      ASSERT_EQ(tokens[i], expected[i]) << "seed " << seed << " at " << i;
    }
    if (code == 0) {
      ASSERT_EQ(tokens.size(), request.sequence().max_tokens());
    }
  }

  static size_t Index(int32_t i) { return static_cast<size_t>(i); }

  bool CreateRows() {
    v1::CreateSequencesRequest request;
    rows_.clear();
    const int count = 1 + Uniform(3);
    for (int i = 0; i < count; ++i) {
      rows_.push_back({0, Uniform(kChaosSeeds)});
      v1::NewSequence* sequence = request.add_sequences();
      FillNew(ChaosPrompt(rows_.back().seed), rows_.back().seed, sequence);
      sequence->set_max_tokens(kChaosSteps + 1);
    }
    request.set_lease_ms(kLeaseMs);
    v1::CreateSequencesResponse response;
    const int code = transport_->Create(request, &response, RandomFault());
    if (code != 0) {
      EXPECT_TRUE(MayRetry(code)) << code;
      return false;
    }
    session_ = response.session_id();
    for (int i = 0; i < count; ++i) {
      rows_[Index(i)].handle = response.seq(i);
      EXPECT_EQ(response.token(i),
                ChaosExpected()[Index(rows_[Index(i)].seed)][0]);
    }
    return true;
  }

  void RunSession() {
    if (!CreateRows()) return;
    const uint64_t steps = static_cast<uint64_t>(Uniform(kChaosSteps));
    uint64_t step = 0;
    while (step<steps&& * steps_left_> 0) {
      if (Chance(3)) ForkOne();
      // Some steps leave sequences out; those then are behind.
      ASSERT_NO_FATAL_FAILURE(RunStep(step + 1));
      if (lost_) return;
      ++step;
      if (Chance(15)) Disturb(step);
      if (Chance(1)) return;  // without a word: the lease ends it
    }
    v1::ReleaseSequencesRequest request;
    request.set_session_id(session_);
    if (Chance(50)) {
      for (const Row& row : rows_) request.add_seq(row.handle);
    }
    request.set_end_session(Chance(70));
    const int code = transport_->Release(request);
    ASSERT_TRUE(code == 0 || MayRetry(code)) << code;
  }

  v1::StepRequest MakeStep(uint64_t id) const {
    v1::StepRequest request;
    request.set_session_id(session_);
    request.set_step_id(id);
    for (const Row& row : rows_) request.add_seq(row.handle);
    return request;
  }

  void CheckReply(uint64_t id, const v1::StepResponse& response) {
    ASSERT_EQ(response.step_id(), id);
    ASSERT_EQ(response.token_size(), static_cast<int>(rows_.size()));
    for (size_t i = 0; i < rows_.size(); ++i) {
      ASSERT_EQ(response.token(static_cast<int>(i)),
                ChaosExpected()[Index(rows_[i].seed)][id])
          << "seed " << rows_[i].seed << " at step " << id;
    }
  }

  // Repeats a step until it is answered.
  void RunStep(uint64_t id) {
    --*steps_left_;
    lost_ = false;
    const v1::StepRequest request = MakeStep(id);
    if (Chance(5)) {
      int codes[2];
      v1::StepResponse responses[2];
      transport_->StepTwice(request, codes, responses);
      for (int i = 0; i < 2; ++i) {
        if (codes[i] == 0) {
          ASSERT_NO_FATAL_FAILURE(CheckReply(id, responses[i]));
        }
      }
    }
    for (int attempt = 0; attempt < 1000; ++attempt) {
      v1::StepResponse response;
      const Fault fault = RandomFault();
      const int code = transport_->Step(request, &response, fault);
      if (code == 0) return CheckReply(id, response);
      // A client that was held up for longer than its lease.
      lost_ = code == static_cast<int>(StatusCode::kNotFound);
      if (lost_) return;
      ASSERT_TRUE(MayRetry(code)) << code;
    }
    FAIL() << "a step never came through";
  }

  // Things that must not have an effect.
  void Disturb(uint64_t step) {
    v1::StepResponse response;
    v1::StepRequest request = MakeStep(step);
    const int kind = Uniform(5);
    if (kind == 0) {  // a replay
      const int code = transport_->Step(request, &response, Fault());
      if (code == 0) CheckReply(step, response);
      return;
    }
    StatusCode expected = StatusCode::kOk;
    if (kind == 1) {  // out of order
      request = MakeStep(step + 2);
      expected = StatusCode::kFailedPrecondition;
    } else if (kind == 2) {  // another content
      request.add_seq(request.seq(0) + 1);
      expected = StatusCode::kAborted;
    } else if (kind == 3) {  // a guess
      request = MakeStep(step + 1);
      request.set_seq(0, request.seq(0) ^ (1u << Uniform(31)));
      expected = StatusCode::kNotFound;
    } else {  // a row twice
      request = MakeStep(step + 1);
      request.add_seq(request.seq(0));
      expected = StatusCode::kInvalidArgument;
    }
    const int code = transport_->Step(request, &response, Fault());
    EXPECT_TRUE(code == static_cast<int>(expected) ||
                code == static_cast<int>(StatusCode::kNotFound) ||
                MayRetry(code))
        << code << " for disturbance " << kind;
  }

  void ForkOne() {
    if (rows_.size() > 3) return;
    v1::ForkSequencesRequest request;
    v1::ForkSequencesResponse response;
    request.set_session_id(session_);
    const Row origin = rows_[Index(Uniform(static_cast<int>(rows_.size())))];
    request.add_seq(origin.handle);
    if (transport_->Fork(request, &response) == 0) {
      rows_.push_back({response.seq(0), origin.seed});
    }
  }

  static constexpr uint32_t kLeaseMs = 2000;

  MakeTransport make_;
  std::unique_ptr<ChaosTransport> transport_;
  std::mt19937_64 random_;
  std::atomic<int64_t>* steps_left_;
  uint64_t session_ = 0;
  std::vector<Row> rows_;
  bool lost_ = false;
};

inline Limits ChaosLimits() {
  Limits limits;
  limits.rows_per_step = 12;
  limits.sequences = 60;
  limits.sessions = 64;
  limits.prefill_tokens_per_step = 24;
  return limits;
}

constexpr int64_t kChaosPages = 300;

// Steps of all clients together: --steps=N, or the default.
inline int64_t ChaosStepsWanted(int64_t fallback) {
  const std::vector<std::string> arguments = ::testing::internal::GetArgvs();
  for (const std::string& argument : arguments) {
    if (argument.rfind("--steps=", 0) == 0) {
      return std::atoll(argument.c_str() + 8);
    }
  }
  return fallback;
}

inline void RunChaos(const MakeTransport& make, int num_clients,
                     int64_t num_steps) {
  ChaosExpected();
  std::atomic<int64_t> steps_left{num_steps};
  std::vector<std::thread> threads;
  for (int i = 0; i < num_clients; ++i) {
    threads.emplace_back([&, i] {
      ChaosClient(make, 1000 + static_cast<uint64_t>(i), &steps_left).Run();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace tenon::service

#endif  // TENON_TESTS_SERVICE_CHAOS_H_
