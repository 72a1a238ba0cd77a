// Against Hugging Face transformers: checkpoints that it made, logits and
// greedy tokens that it computed (tests/golden/README.md).

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tests/engine/golden_fixture.h"

namespace tenon {
namespace {

using testing::GoldenCase;
using testing::GoldenTest;

TEST_P(GoldenTest, LogitsAndGreedyTokensMatchTransformers) {
  const bool exact = model_->weights.dtype == DType::kFloat32;
  for (bool batch_invariant : {false, true}) {
    SCOPED_TRACE(batch_invariant ? "batch-invariant" : "default");
    const std::unique_ptr<Session> session = MakeSession(batch_invariant);
    ASSERT_NE(session, nullptr);
    const Run run = Generate(session.get(), 96);
    if (exact) {
      EXPECT_LT(testing::RelativeFrobeniusError(Doubles(run.logits),
                                                Doubles(logits_)),
                1e-5);
    } else {
      // bf16 activations against float32 ones on the same weights. The median
      // row, as two experts that are nearly tied may swap in single rows.
      EXPECT_LT(MedianRowError(run.logits, logits_), 2.5e-2);
    }
    if (!exact) continue;
    double largest = 0.0;
    double difference = 0.0;
    for (size_t i = 0; i < logits_.size(); ++i) {
      largest = std::max<double>(largest, std::fabs(logits_[i]));
      difference =
          std::max<double>(difference, std::fabs(run.logits[i] - logits_[i]));
    }
    EXPECT_LT(difference / largest, 1e-4);
    EXPECT_EQ(run.greedy, greedy_);
  }
}

TEST_P(GoldenTest, ChunksOfThePromptAreBitEqualWhenBatchInvariant) {
  const std::unique_ptr<Session> session = MakeSession(true);
  ASSERT_NE(session, nullptr);
  const Run whole = Generate(session.get(), 96);
  for (int32_t chunk : {7, 1}) {
    SCOPED_TRACE(chunk);
    const Run run = Generate(session.get(), chunk);
    EXPECT_EQ(std::memcmp(run.logits.data(), whole.logits.data(),
                          whole.logits.size() * sizeof(float)),
              0);
    EXPECT_EQ(run.greedy, whole.greedy);
  }
}

TEST_P(GoldenTest, ChunksOfThePromptGiveTheSameGreedyTokens) {
  if (model_->weights.dtype != DType::kFloat32) {
    GTEST_SKIP() << "close logits may swap in bf16";
  }
  const std::unique_ptr<Session> session = MakeSession(false);
  ASSERT_NE(session, nullptr);
  for (int32_t chunk : {7, 1}) {
    EXPECT_EQ(Generate(session.get(), chunk).greedy, greedy_) << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, GoldenTest,
    ::testing::Values(GoldenCase{"qwen3_moe_tiny", DeviceType::kCpu},
                      GoldenCase{"qwen3_dense_tiny", DeviceType::kCpu},
                      GoldenCase{"qwen3_moe_sharded", DeviceType::kCpu},
                      GoldenCase{"qwen3_moe_tiny", DeviceType::kCuda},
                      GoldenCase{"qwen3_dense_tiny", DeviceType::kCuda},
                      GoldenCase{"qwen3_moe_sharded", DeviceType::kCuda}),
    testing::GoldenCaseName);

}  // namespace
}  // namespace tenon
