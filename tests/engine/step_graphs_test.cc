// Decode steps in buckets: padding that changes nothing, and CUDA graphs that
// give the same bits as the same steps launched one by one.

#include "engine/step_graphs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/session.h"
#include "ops/core/device_info.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

TEST(DecodeBucketsTest, HoldEveryNumberOfRows) {
  for (const int32_t max_rows : {1, 2, 3, 8, 9, 33, 64, 100, 256, 300, 512}) {
    SCOPED_TRACE(max_rows);
    const DecodeBuckets buckets(max_rows);
    EXPECT_EQ(buckets.sizes().back(), max_rows);
    for (int32_t rows = 1; rows <= max_rows; ++rows) {
      const int32_t bucket = buckets.Find(rows);
      ASSERT_GE(bucket, rows);
      ASSERT_LE(bucket, max_rows);
      ASSERT_LE(bucket, rows < 8 ? 2 * rows - 1 + (rows == 1)
                                 : rows + (rows < 65    ? 7
                                           : rows < 257 ? 15
                                                        : 31));
    }
    EXPECT_EQ(buckets.Find(max_rows + 1), 0);
  }
  EXPECT_EQ(DecodeBuckets(40).sizes(),
            std::vector<int32_t>({1, 2, 4, 8, 16, 24, 32, 40}));
  EXPECT_EQ(DecodeBuckets(5).sizes(), std::vector<int32_t>({1, 2, 4, 5}));
  EXPECT_EQ(DecodeBuckets(1 << 20).sizes().back(), 512);
  EXPECT_EQ(DecodeBuckets().Find(1), 0);
}

class StepGraphsTest : public ::testing::TestWithParam<const char*> {
 protected:
  static constexpr int32_t kMaxSequences = 11;
  static constexpr int32_t kMaxContext = 96;

  void SetUp() override {
    if (NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device";
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(GetParam(), {DeviceType::kCuda, 0});
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
  }

  std::unique_ptr<Session> MakeSession(bool graphs, bool batch_invariant) {
    SessionOptions options;
    options.max_sequences = kMaxSequences;
    options.max_tokens = 64;
    options.max_context = kMaxContext;
    options.cuda_graphs = graphs;
    options.batch_invariant = batch_invariant;
    options.count_experts = true;
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    EXPECT_TRUE(session.ok()) << session.status().message();
    return session.ok() ? *std::move(session) : nullptr;
  }

  std::shared_ptr<const Model> model_;
};

// A simulated host: sequences come with a prompt, go on with what was drawn,
// and leave at times of their own.
class Traffic {
 public:
  Traffic(Session* session, int32_t max_sequences, int32_t max_length)
      : session_(session),
        vocab_(static_cast<int32_t>(session->model().config.vocab_size)),
        max_sequences_(max_sequences),
        max_length_(max_length) {}

  // Everything that a step gave, for comparing.
  struct Trace {
    std::vector<int32_t> tokens;
    std::vector<float> numbers;  // log-probabilities and logits
    std::vector<int32_t> experts;
  };

  void Step(Trace* trace) {
    Join();
    if (live_.empty()) return;
    std::vector<StepRow> rows;
    std::vector<float> logits(static_cast<size_t>(vocab_), 0.0f);
    for (Live& live : live_) {
      StepRow row;
      row.sequence = live.sequence;
      row.tokens = live.next.data();
      row.num_tokens = static_cast<int32_t>(live.next.size());
      row.sampling.temperature = live.seed % 3 == 0 ? 0.0f : 0.9f;
      row.sampling.top_k = live.seed % 5 == 0 ? 7 : 0;
      row.sampling.seed = live.seed;
      rows.push_back(row);
    }
    StepRow& with_logits = rows[Random() % rows.size()];
    with_logits.logits_mode = LogitsMode::kLast;
    with_logits.logits = logits.data();
    std::vector<StepRowResult> results;
    StepStats stats;
    const Status status = session_->Step(rows, &results, &stats);
    ASSERT_TRUE(status.ok()) << status.message();
    for (size_t i = 0; i < live_.size(); ++i) {
      ASSERT_EQ(results[i].status, SampleStatus::kOk);
      trace->tokens.push_back(results[i].token);
      trace->numbers.push_back(results[i].logprob);
      live_[i].next = {results[i].token};
    }
    trace->numbers.insert(trace->numbers.end(), logits.begin(), logits.end());
    trace->experts.insert(trace->experts.end(), stats.distinct_experts.begin(),
                          stats.distinct_experts.end());
    Leave();
  }

 private:
  struct Live {
    SequenceId sequence;
    uint64_t seed = 0;
    int32_t steps_left = 0;
    std::vector<int32_t> next;
  };

  uint32_t Random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }

  void Join() {
    // Long spells without a newcomer: those steps are decode steps.
    if (!live_.empty() && Random() % 6 != 0) return;
    const int32_t room = max_sequences_ - static_cast<int32_t>(live_.size());
    if (room == 0) return;
    for (uint32_t n = Random() % std::min(room, 5) + 1; n > 0; --n) {
      StatusOr<SequenceId> sequence = session_->CreateSequence();
      ASSERT_TRUE(sequence.ok()) << sequence.status().message();
      Live live;
      live.sequence = *sequence;
      live.seed = Random();
      live.next.resize(Random() % 9 + 1);
      for (int32_t& token : live.next) {
        token = static_cast<int32_t>(Random() % vocab_);
      }
      live.steps_left = static_cast<int32_t>(Random() % (max_length_ - 10)) + 1;
      live_.push_back(live);
    }
  }

  void Leave() {
    for (size_t i = live_.size(); i-- > 0;) {
      if (--live_[i].steps_left > 0) continue;
      ASSERT_TRUE(session_->ReleaseSequence(live_[i].sequence).ok());
      live_.erase(live_.begin() + static_cast<ptrdiff_t>(i));
    }
  }

  Session* session_;
  int32_t vocab_;
  int32_t max_sequences_;
  int32_t max_length_;
  uint64_t state_ = 7;
  std::vector<Live> live_;
};

TEST_P(StepGraphsTest, GraphsOnAndOffGiveTheSameBits) {
  for (const bool batch_invariant : {false, true}) {
    SCOPED_TRACE(batch_invariant);
    const std::unique_ptr<Session> on = MakeSession(true, batch_invariant);
    const std::unique_ptr<Session> off = MakeSession(false, batch_invariant);
    ASSERT_TRUE(on != nullptr && off != nullptr);
    EXPECT_EQ(on->num_graphs(), 5);  // 1, 2, 4, 8, 11
    EXPECT_EQ(off->num_graphs(), 0);
    Traffic traffic_on(on.get(), kMaxSequences, kMaxContext);
    Traffic traffic_off(off.get(), kMaxSequences, kMaxContext);
    for (int step = 0; step < 400; ++step) {
      Traffic::Trace trace_on;
      Traffic::Trace trace_off;
      traffic_on.Step(&trace_on);
      traffic_off.Step(&trace_off);
      ASSERT_FALSE(HasFailure());
      ASSERT_EQ(trace_on.tokens, trace_off.tokens) << "step " << step;
      ASSERT_EQ(trace_on.numbers, trace_off.numbers) << "step " << step;
      ASSERT_EQ(trace_on.experts, trace_off.experts) << "step " << step;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, StepGraphsTest,
                         ::testing::Values("tests/golden/qwen3_moe_tiny",
                                           "tests/golden/qwen3_dense_tiny",
                                           "tests/golden/qwen3_moe_tiny_fp8"),
                         [](const auto& info) {
                           return std::string(info.param).substr(13);
                         });

}  // namespace
}  // namespace tenon
