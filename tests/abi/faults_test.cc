// Whatever the system refuses, the answer is a status: nothing ends the
// process, nothing leaks, and a session goes on as if nothing had happened, or
// says that it cannot.

#include "tests/abi/faults.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/abi/engine_fixture.h"
#include "tests/abi/moe_kernels_json.h"

namespace tenon::testing {
namespace {

struct Plan {
  FaultKind kind;
  FaultMode mode;
};

std::string PlanName(const Plan& plan) {
  const char* kinds[] = {"memory", "system", "cuda"};
  return std::string(kinds[static_cast<int>(plan.kind)]) +
         (plan.mode == FaultMode::kOnce ? "_once" : "_on");
}

// A code that tells of a refusal.
bool IsRefusal(int32_t code) {
  return code == TENON_RESOURCE_EXHAUSTED || code == TENON_UNAVAILABLE;
}

// The result of a call during which faults struck.
struct Outcome {
  int32_t code = TENON_OK;
  std::string message;
  int64_t calls = 0;  // that could fail
};

template <class Function>
Outcome RunWithFault(const Plan& plan, int64_t first, Function&& call) {
  Outcome outcome;
  tenon_error error = Make<tenon_error>();
  {
    const Faults faults(plan.kind, plan.mode, first);
    outcome.code = call(&error);
    outcome.calls = faults.calls();
  }
  outcome.message = error.message;
  if (outcome.code != TENON_OK) {
    EXPECT_TRUE(IsRefusal(outcome.code))
        << outcome.code << " " << outcome.message;
    EXPECT_FALSE(outcome.message.empty());
    EXPECT_GT(outcome.calls, first) << "it failed without a fault";
  }
  return outcome;
}

// A session's work on two sequences, one of which is a fork, so that a step
// copies pages, beside the chunk of a prompt, or its only token.
class Work {
 public:
  explicit Work(tenon_session session, int32_t prompt_tokens = 7)
      : session_(session), prompt_(Prompt(prompt_tokens, 2)) {
    parent_ = NewSequence(session);
    const std::vector<int32_t> begin = Prompt(11, 1);  // ends inside a page
    sampling_.mirostat_tau = 3.0f;  // a step that fails leaves its state
    sampling_.mirostat_eta = 0.3f;
    Step(session, {Row(parent_, begin, &sampling_)});
    tenon_sequence fork = 0;
    ExpectOk([&](tenon_error* e) {
      return tenon_sequence_fork(session, parent_, &fork, e);
    });
    logits_.resize(prompt_.size() * kTinyVocab);
    rows_ = {Row(fork, one_, &sampling_),
             Row(NewSequence(session), prompt_, &sampling_)};
    rows_[1].logits = logits_.data();
    rows_[1].logits_mode = TENON_LOGITS_ALL;
    args_ = StepArgs(rows_, &tokens_);
    args_.distinct_experts = experts_;
  }
  ~Work() {
    for (tenon_sequence sequence :
         {parent_, rows_[0].sequence, rows_[1].sequence}) {
      tenon_sequence_release(session_, sequence, nullptr);
    }
  }

  int32_t Run(tenon_error* error) {
    return tenon_session_step(session_, &args_, error);
  }

  // What it does undisturbed, and then a few tokens more.
  std::vector<float> Finish() {
    ExpectOk([&](tenon_error* e) { return Run(e); });
    std::vector<float> all(logits_);
    for (size_t i = 0; i < rows_.size(); ++i) {
      const std::vector<int32_t> more =
          Generate(session_, rows_[i].sequence, {tokens_[i]}, 4, sampling_);
      all.push_back(static_cast<float>(tokens_[i]));
      all.insert(all.end(), more.begin(), more.end());
    }
    return all;
  }

  void ExpectUnchanged() {
    EXPECT_EQ(LengthOf(session_, parent_), 11);
    EXPECT_EQ(LengthOf(session_, rows_[0].sequence), 11);
    EXPECT_EQ(LengthOf(session_, rows_[1].sequence), 0);
    EXPECT_EQ(tokens_, std::vector<int32_t>({-7, -7}));
  }

 private:
  tenon_session session_;
  tenon_sequence parent_;
  const std::vector<int32_t> one_ = {5};
  const std::vector<int32_t> prompt_;
  tenon_sampling_params sampling_ = Seeded(9);
  std::vector<float> logits_;
  std::vector<tenon_step_row> rows_;
  std::vector<int32_t> tokens_;
  int32_t experts_[16];
  tenon_step_args args_;
};

class FaultsTest : public DeviceTest {
 protected:
  // Beside memory. (The CUDA runtime's own files and threads are not ours.)
  FaultKind OtherKind() const {
    return GetParam() == TENON_DEVICE_CPU ? FaultKind::kSystem
                                          : FaultKind::kCuda;
  }

  std::vector<Plan> Plans() const {
    std::vector<Plan> plans;
    for (FaultKind kind : {FaultKind::kMemory, OtherKind()}) {
      plans.push_back({kind, FaultMode::kOnce});
      plans.push_back({kind, FaultMode::kOn});
    }
    return plans;
  }

  // Calls body(plan, k), which tells how many calls could have failed, for k =
  // 0, 1, ... until there is no call k, and expects that it leaves nothing
  // behind. Returns how many faults there were of the first plan.
  template <class Body>
  int64_t ForEachFault(Body&& body) {
    int64_t num_faults = -1;
    for (const Plan& plan : Plans()) {
      SCOPED_TRACE(PlanName(plan));
      int64_t first = 0;
      // The many launches of steps that are captured are much alike.
      for (bool struck = true; struck; first += first < 400 ? 1 : 19) {
        const int64_t memory = NumHeld(FaultKind::kMemory);
        const int64_t other = NumHeld(OtherKind());
        struck = body(plan, first) > first;
        EXPECT_EQ(NumHeld(FaultKind::kMemory), memory) << "memory leaked";
        EXPECT_EQ(NumHeld(OtherKind()), other) << "something leaked";
        if (HasFailure()) {
          ADD_FAILURE() << "with fault " << first;
          return 0;
        }
      }
      if (num_faults < 0) num_faults = first - 1;
    }
    return num_faults;
  }

  tenon_session_options Options() const {
    tenon_session_options options = SmallSession();
    if (GetParam() == TENON_DEVICE_CPU) options.num_threads = 3;
    return options;
  }

  void StepThroughFaults(int32_t prompt_tokens);

  std::vector<float> Expected(tenon_model model) const {
    const Owned session = NewSession(model, Options());
    return Work(session).Finish();
  }
};

TEST_P(FaultsTest, Load) {
  const std::vector<float> expected = Expected(LoadModel(GetParam()));
  for (const char* directory : {kTinyModel, "tests/golden/qwen3_moe_sharded"}) {
    const auto args = LoadArgs(GetParam(), directory);
    const int64_t num_faults =
        ForEachFault([&](const Plan& plan, int64_t first) {
          tenon_model handle = 0;
          const Outcome outcome =
              RunWithFault(plan, first, [&](tenon_error* error) {
                return tenon_model_load(&args, &handle, error);
              });
          const Owned model(handle, tenon_model_destroy);
          EXPECT_EQ(handle != 0, outcome.code == TENON_OK);
          if (handle != 0 && directory == kTinyModel) {
            EXPECT_EQ(Expected(model), expected) << "a fault was not noticed";
          }
          return outcome.calls;
        });
    EXPECT_GT(num_faults, 100);
  }
}

TEST_P(FaultsTest, CreateRandomModel) {
  const std::string config = TinyConfig();
  const auto args = RandomArgs(GetParam(), config.c_str());
  tenon_model undisturbed = 0;
  ASSERT_EQ(tenon_model_create_random(&args, &undisturbed, nullptr), TENON_OK);
  const std::vector<float> expected =
      Expected(Owned(undisturbed, tenon_model_destroy));
  ForEachFault([&](const Plan& plan, int64_t first) {
    tenon_model handle = 0;
    const Outcome outcome = RunWithFault(plan, first, [&](tenon_error* error) {
      return tenon_model_create_random(&args, &handle, error);
    });
    const Owned model(handle, tenon_model_destroy);
    EXPECT_EQ(handle != 0, outcome.code == TENON_OK);
    if (handle != 0) {
      EXPECT_EQ(Expected(model), expected) << "a fault was not noticed";
    }
    return outcome.calls;
  });
}

TEST_P(FaultsTest, CreateContext) {
  auto options = Make<tenon_context_options>();
  options.device_type = GetParam();
  if (GetParam() == TENON_DEVICE_CPU) options.num_threads = 3;
  ForEachFault([&](const Plan& plan, int64_t first) {
    tenon_context handle = 0;
    const Outcome outcome = RunWithFault(plan, first, [&](tenon_error* error) {
      const int32_t code = tenon_context_create(&options, &handle, error);
      if (code != TENON_OK) return code;
      return tenon_context_set_moe_kernels(handle, kMoeKernelsJson, error);
    });
    auto info = Make<tenon_context_info>();
    if (outcome.code == TENON_OK) {
      EXPECT_EQ(tenon_context_query(handle, &info, nullptr), TENON_OK);
      EXPECT_EQ(info.num_moe_kernels, 1);
    }
    EXPECT_EQ(tenon_context_destroy(handle, nullptr), TENON_OK);
    return outcome.calls;
  });
}

TEST_P(FaultsTest, CreateSession) {
  const Owned model = LoadModel(GetParam());
  const std::vector<float> expected = Expected(model);
  const tenon_session_options options = Options();
  ForEachFault([&](const Plan& plan, int64_t first) {
    tenon_session handle = 0;
    const Outcome outcome = RunWithFault(plan, first, [&](tenon_error* error) {
      return tenon_session_create(model, &options, &handle, error);
    });
    const Owned session(handle, tenon_session_destroy);
    EXPECT_EQ(handle != 0, outcome.code == TENON_OK);
    if (handle != 0) {
      EXPECT_EQ(Work(session).Finish(), expected);
    }
    return outcome.calls;
  });
}

// Sessions go on after a fault, or are broken for good.
void FaultsTest::StepThroughFaults(int32_t prompt_tokens) {
  const Owned model = LoadModel(GetParam());
  // Not batch-invariant, so that cuBLASLt has a part where there is one: it
  // remembers algorithms, for which a first step allocates.
  tenon_session_options options = Options();
  options.flags = TENON_SESSION_COUNT_EXPERTS;
  const std::vector<float> expected = [&] {
    const Owned session = NewSession(model, options);
    return Work(session, prompt_tokens).Finish();
  }();
  ForEachFault([&](const Plan& plan, int64_t first) {
    const Owned session = NewSession(model, options);
    Work work(session, prompt_tokens);
    const Outcome outcome = RunWithFault(
        plan, first, [&](tenon_error* error) { return work.Run(error); });
    if (outcome.code == TENON_OK) return outcome.calls;
    auto info = Make<tenon_session_info>();
    if (plan.kind == FaultKind::kCuda && plan.mode == FaultMode::kOn) {
      for (int i = 0; i < 2; ++i) {
        ExpectError(TENON_UNAVAILABLE, {"session is ", "unable to go on"},
                    [&](tenon_error* e) {
                      return tenon_session_query(session, &info, e);
                    });
        ExpectError(TENON_UNAVAILABLE, {"session is ", "unable to go on"},
                    [&](tenon_error* e) { return work.Run(e); });
      }
    } else {
      work.ExpectUnchanged();
      EXPECT_EQ(work.Finish(), expected);
    }
    return outcome.calls;
  });
}

TEST_P(FaultsTest, Step) { StepThroughFaults(7); }

// One token in each row: on CUDA a graph.
TEST_P(FaultsTest, DecodeStep) { StepThroughFaults(1); }

// The messages of errors need memory too.
TEST_P(FaultsTest, RejectedArguments) {
  const Owned model = LoadModel(GetParam());
  const Owned session = NewSession(model, Options());
  const std::vector<float> expected = Expected(model);
  const tenon_sequence sequence = NewSequence(session);
  const std::vector<int32_t> tokens[] = {Prompt(5, 1), {1, 2, kTinyVocab}};
  const tenon_sampling_params greedy = Greedy();
  const std::vector<tenon_step_row> rows[] = {
      {Row(sequence, tokens[1], &greedy)},                   // a token
      {Row(sequence, tokens[0], &greedy),                    // twice
       Row(sequence, tokens[0], &greedy)},                   //
      {Row(sequence, tokens[0], &greedy), tenon_step_row()}  // not a row
  };
  for (const std::vector<tenon_step_row>& bad : rows) {
    std::vector<int32_t> out;
    const tenon_step_args args = StepArgs(bad, &out);
    ForEachFault([&](const Plan& plan, int64_t first) {
      Outcome outcome;
      auto error = Make<tenon_error>();
      {
        const Faults faults(plan.kind, plan.mode, first);
        outcome.code = tenon_session_step(session, &args, &error);
        outcome.calls = faults.calls();
      }
      EXPECT_TRUE(outcome.code == TENON_INVALID_ARGUMENT ||
                  outcome.code == TENON_RESOURCE_EXHAUSTED)
          << outcome.code;
      EXPECT_STRNE(error.message, "");
      EXPECT_EQ(LengthOf(session, sequence), 0);
      return outcome.calls;
    });
  }
  EXPECT_EQ(tenon_sequence_release(session, sequence, nullptr), TENON_OK);
  EXPECT_EQ(Work(session).Finish(), expected);
}

TENON_FOR_EACH_DEVICE(FaultsTest);

}  // namespace
}  // namespace tenon::testing
