// What a session does between its creation and its end allocates nothing.

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/abi/engine_fixture.h"
#include "tests/abi/faults.h"

namespace tenon::testing {
namespace {

// How often body() asked for memory.
template <class Body>
int64_t Allocations(Body&& body) {
  const Faults memory(FaultKind::kMemory, FaultMode::kNone);
  body();
  return memory.calls();
}

TEST(AllocationTest, IsCounted) {
  std::vector<int>* vector = nullptr;
  EXPECT_EQ(Allocations([&] { vector = new std::vector<int>(5); }), 2);
  delete vector;
  EXPECT_GT(Allocations([] { LoadModel(TENON_DEVICE_CPU); }), 10);
}

class SessionAllocationTest : public SessionTest {};

TEST_P(SessionAllocationTest, StepsAllocateNothing) {
  tenon_session_options options = SmallSession();
  options.num_threads = 2;
  session_ = NewSession(model_, options);
  const tenon_sampling_params sampling[] = {Seeded(1), Greedy(), Seeded(2)};
  std::vector<int32_t> prompts[] = {Prompt(13, 1), Prompt(9, 2), Prompt(3, 3)};
  std::vector<tenon_step_row> rows;
  for (int i = 0; i < 3; ++i) {
    rows.push_back(Row(NewSequence(session_), prompts[i], &sampling[i]));
  }
  std::vector<float> logits(kTinyVocab);
  rows[1].logits = logits.data();
  rows[1].logits_mode = TENON_LOGITS_LAST;
  std::vector<int32_t> tokens;
  tenon_step_args args = StepArgs(rows, &tokens);
  float logprobs[3];
  int32_t statuses[3];
  int32_t experts[16];
  double microseconds;
  args.logprobs = logprobs;
  args.statuses = statuses;
  args.distinct_experts = experts;
  args.microseconds = &microseconds;
  auto error = Make<tenon_error>();
  // The first step is the prompts', the others decode.
  for (int step = 0; step < 12; ++step) {
    int32_t code = -1;
    EXPECT_EQ(Allocations(
                  [&] { code = tenon_session_step(session_, &args, &error); }),
              0)
        << "step " << step;
    ASSERT_EQ(code, TENON_OK) << error.message;
    for (int i = 0; i < 3; ++i) {
      rows[i].tokens = &tokens[i];
      rows[i].num_tokens = 1;
    }
  }
}

TEST_P(SessionAllocationTest, StepsInFlightAllocateNothing) {
  tenon_sampling_params sampling = Seeded(1);
  sampling.mirostat_tau = 3.0f;
  sampling.mirostat_eta = 0.1f;
  const std::vector<int32_t> prompt = Prompt(13, 1);
  tenon_step_row row = Row(NewSequence(session_), prompt, &sampling);
  auto args = Make<tenon_step_args>();
  args.num_rows = 1;
  args.rows = &row;
  int32_t token, experts[16];
  float mu;
  double microseconds;
  auto results = Make<tenon_step_results>();
  results.num_rows = 1;
  results.tokens = &token;
  results.mirostat_mu = &mu;
  results.distinct_experts = experts;
  results.microseconds = &microseconds;
  int32_t worst = TENON_OK;
  EXPECT_EQ(Allocations([&] {
              for (int step = 0; step < 12; ++step) {
                const int32_t enqueued =
                    tenon_session_enqueue_step(session_, &args, nullptr);
                row.tokens = nullptr;
                row.num_tokens = 1;
                row.flags = TENON_ROW_CONTINUES;
                if (step > 0) {
                  worst = std::max(worst, tenon_session_wait_step(
                                              session_, &results, nullptr));
                }
                worst = std::max(worst, enqueued);
              }
            }),
            0);
  EXPECT_EQ(worst, TENON_OK);
}

TEST_P(SessionAllocationTest, SequencesAllocateNothing) {
  const std::vector<int32_t> prompt = Prompt(13, 1);
  const tenon_sampling_params greedy = Greedy();
  int32_t worst = TENON_OK;
  tenon_sequence first = NewSequence(session_);
  Step(session_, {Row(first, prompt, &greedy)});
  EXPECT_EQ(Allocations([&] {
              const auto run = [&](int32_t code) {
                worst = std::max(worst, code);
              };
              tenon_sequence other = 0;
              int32_t length = 0;
              auto info = Make<tenon_session_info>();
              run(tenon_sequence_create(session_, &other, nullptr));
              run(tenon_sequence_release(session_, other, nullptr));
              run(tenon_sequence_fork(session_, first, &other, nullptr));
              run(tenon_sequence_truncate(session_, other, 11, nullptr));
              run(tenon_sequence_length(session_, other, &length, nullptr));
              run(tenon_session_query(session_, &info, nullptr));
              run(tenon_sequence_release(session_, other, nullptr));
            }),
            0);
  EXPECT_EQ(worst, TENON_OK);
}

TENON_FOR_EACH_DEVICE(SessionAllocationTest);

}  // namespace
}  // namespace tenon::testing
