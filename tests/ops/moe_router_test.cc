#include "ops/moe/moe_router.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "tests/reference/moe_router_reference.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::TestTensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

MoeRouterParams Options(int32_t top_k, bool renormalize = false) {
  MoeRouterParams options;
  options.top_k = top_k;
  options.renormalize = renormalize;
  return options;
}

MoeRouterParams Grouped(MoeScoring scoring, int32_t top_k, int32_t groups,
                        int32_t selected, MoeGroupScore group_score) {
  MoeRouterParams options = Options(top_k, true);
  options.scoring = scoring;
  options.num_expert_groups = groups;
  options.num_selected_groups = selected;
  options.group_score = group_score;
  return options;
}

class MoeRouterTest : public testing::OpTest {
 protected:
  struct Result {
    std::vector<int64_t> ids;
    std::vector<double> weights;
  };

  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  TestTensor Logits(int64_t tokens, int64_t num_experts,
                    const std::vector<float>& values, int64_t padding = 0) {
    return TestTensor(device(), dtype(), {tokens, num_experts},
                      {num_experts + padding, 1}, values);
  }

  Result Run(MoeRouterParams p, const TestTensor& logits,
             const TestTensor* bias = nullptr) {
    const int64_t tokens = logits.view().shape[0];
    const int64_t columns = p.top_k + p.num_fused_shared_experts;
    TestTensor weights(device(), DType::kFloat32, {tokens, columns},
                       {columns + 3, 1}, {});
    TestTensor ids(device(), DType::kInt32, {tokens, columns}, {columns + 5, 1},
                   {});
    p.logits = logits.view();
    if (bias != nullptr) p.correction_bias = bias->view();
    p.topk_weights = weights.view();
    p.topk_ids = ids.view();
    const Status status = MoeRouter(p, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
    EXPECT_EQ(weights.NumStrayWrites(), 0);
    EXPECT_EQ(ids.NumStrayWrites(), 0);
    return {ids.Integers(), weights.Values()};
  }

  // Compares with the reference: ids exactly and in order, weights to 1e-6.
  // Skips tokens with biased scores that float32 cannot tell apart, which must
  // be few.
  void RunAndCheck(const MoeRouterParams& p, const TestTensor& logits,
                   const TestTensor* bias = nullptr) {
    const Result actual = Run(p, logits, bias);
    reference::MoeRouterOptions o;
    o.top_k = p.top_k;
    o.sigmoid = p.scoring == MoeScoring::kSigmoid;
    o.renormalize = p.renormalize;
    o.scaling_factor = p.routed_scaling_factor;
    o.num_groups = p.num_expert_groups;
    o.num_selected_groups = p.num_selected_groups;
    o.group_top2_sum = p.group_score == MoeGroupScore::kTop2Sum;
    o.num_shared_experts = p.num_fused_shared_experts;
    const std::vector<double> values = logits.InitialValues();
    const std::vector<double> biases =
        bias != nullptr ? bias->InitialValues() : std::vector<double>();
    const int64_t num_experts = logits.view().shape[1];
    const int64_t columns = p.top_k + p.num_fused_shared_experts;
    const int64_t tokens = logits.view().shape[0];
    int64_t unclear = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const reference::MoeRouting expected =
          reference::MoeRoute({values.begin() + t * num_experts,
                               values.begin() + (t + 1) * num_experts},
                              biases, o);
      if (expected.margin < 5e-7) {
        ++unclear;
        continue;
      }
      const auto ids = actual.ids.begin() + t * columns;
      ASSERT_EQ(std::vector<int64_t>(ids, ids + columns), expected.ids)
          << "token " << t;
      for (int64_t j = 0; j < columns; ++j) {
        ASSERT_NEAR(actual.weights[t * columns + j], expected.weights[j], 1e-6)
            << "token " << t << " choice " << j;
      }
    }
    EXPECT_LE(unclear, 1 + tokens / 100);
  }
};

TEST_P(MoeRouterTest, Acceptance11_SoftmaxTopK) {
  const int64_t many = on_cuda() ? 8192 : 150;
  for (const auto& [tokens, num_experts, top_k] :
       std::vector<std::tuple<int64_t, int64_t, int32_t>>{{many, 1024, 8},
                                                          {many, 256, 5},
                                                          {many, 127, 5},
                                                          {many, 128, 8},
                                                          {111, 160, 8},
                                                          {13, 128, 8},
                                                          {1, 128, 8},
                                                          {5, 257, 32},
                                                          {3, 33, 32},
                                                          {4, 8, 8},
                                                          {2, 1, 1}}) {
    for (bool renormalize : {false, true}) {
      SCOPED_TRACE(StrCat(tokens, "x", num_experts, " top ", top_k,
                          renormalize ? " renormalized" : ""));
      const TestTensor logits =
          Logits(tokens, num_experts, Normal(tokens * num_experts, 1, 0, 3), 7);
      RunAndCheck(Options(top_k, renormalize), logits);
    }
  }
}

TEST_P(MoeRouterTest, Acceptance11_RenormalizedWeightsSumToOne) {
  const Result result =
      Run(Options(8, true), Logits(111, 128, Normal(111 * 128, 2)));
  for (int64_t t = 0; t < 111; ++t) {
    double sum = 0.0;
    for (int64_t j = 0; j < 8; ++j) sum += result.weights[t * 8 + j];
    EXPECT_NEAR(sum, 1.0, 1e-6);
  }
}

TEST_P(MoeRouterTest, Acceptance11_TiesGoToTheLowestId) {
  for (int64_t num_experts : {127, 128, 160, 256, 1024}) {
    SCOPED_TRACE(num_experts);
    // Few distinct values, all of which every dtype holds exactly.
    std::vector<float> values = Normal(40 * num_experts, 3);
    for (float& v : values) v = std::round(v * 2) / 2;
    RunAndCheck(Options(8), Logits(40, num_experts, values));
    const TestTensor equal =
        Logits(2, num_experts, std::vector<float>(2 * num_experts, -1.5f));
    EXPECT_EQ(Run(Options(4), equal).ids,
              (std::vector<int64_t>{0, 1, 2, 3, 0, 1, 2, 3}));
  }
}

TEST_P(MoeRouterTest, Acceptance11_SignedZerosAreEqual) {
  std::vector<float> values(64, -1.0f);
  values[40] = -0.0f;
  values[50] = 0.0f;
  EXPECT_EQ(Run(Options(2), Logits(1, 64, values)).ids,
            (std::vector<int64_t>{40, 50}));
}

TEST_P(MoeRouterTest, Acceptance11_OrderIsThatOfTheLogits) {
  // Scores of the small logits are 0 in float32, those of large ones all 1.
  std::vector<float> values(128, -1000.0f);
  values[5] = -300.0f;
  values[100] = -200.0f;
  values[127] = 50.0f;
  MoeRouterParams options = Options(3);
  EXPECT_EQ(Run(options, Logits(1, 128, values)).ids,
            (std::vector<int64_t>{127, 100, 5}));
  for (float& v : values) v += 500.0f;
  options.scoring = MoeScoring::kSigmoid;
  EXPECT_EQ(Run(options, Logits(1, 128, values)).ids,
            (std::vector<int64_t>{127, 100, 5}));
}

TEST_P(MoeRouterTest, Acceptance12_ScalingFactor) {
  const TestTensor logits = Logits(37, 128, Normal(37 * 128, 4));
  for (bool renormalize : {false, true}) {
    MoeRouterParams options = Options(8, renormalize);
    const Result plain = Run(options, logits);
    options.routed_scaling_factor = 2.5f;
    const Result scaled = Run(options, logits);
    EXPECT_EQ(scaled.ids, plain.ids);
    for (size_t i = 0; i < plain.weights.size(); ++i) {
      EXPECT_EQ(scaled.weights[i], static_cast<float>(plain.weights[i]) * 2.5f);
    }
  }
}

TEST_P(MoeRouterTest, Acceptance13_GroupedSigmoidWithBias) {
  for (const auto& [num_experts, selected, groups, top_k] :
       std::vector<std::tuple<int64_t, int32_t, int32_t, int32_t>>{
           {256, 4, 8, 8},
           {160, 3, 8, 6},
           {160, 1, 1, 8},
           {60, 5, 12, 7},
           {1024, 20, 64, 32}}) {
    const TestTensor bias(device(), DType::kFloat32, {num_experts},
                          Normal(num_experts, 5, 0.0f, 0.1f));
    for (int64_t tokens : std::vector<int64_t>{1, 64, on_cuda() ? 8192 : 222}) {
      for (MoeGroupScore score :
           {MoeGroupScore::kMax, MoeGroupScore::kTop2Sum}) {
        SCOPED_TRACE(StrCat(tokens, "x", num_experts, " groups ", selected,
                            " of ", groups, " by ", static_cast<int>(score)));
        const TestTensor logits =
            Logits(tokens, num_experts, Normal(tokens * num_experts, 6));
        RunAndCheck(
            Grouped(MoeScoring::kSigmoid, top_k, groups, selected, score),
            logits, &bias);
      }
    }
  }
}

TEST_P(MoeRouterTest, Acceptance13_SoftmaxScores) {
  const TestTensor logits = Logits(100, 256, Normal(100 * 256, 7, 0, 2));
  const TestTensor bias(device(), DType::kFloat32, {256},
                        Normal(256, 8, 0.0f, 0.05f));
  RunAndCheck(Options(8), logits, &bias);
  RunAndCheck(Grouped(MoeScoring::kSoftmax, 8, 8, 4, MoeGroupScore::kMax),
              logits, &bias);
  RunAndCheck(Grouped(MoeScoring::kSoftmax, 8, 8, 8, MoeGroupScore::kMax),
              logits);
}

TEST_P(MoeRouterTest, Acceptance13_NegativeChoiceScores) {
  // Every choice is negative, so a dropped group must be worse than any number,
  // not just 0.
  const TestTensor logits = Logits(50, 64, Normal(50 * 64, 9));
  const TestTensor bias(device(), DType::kFloat32, {64},
                        Normal(64, 10, -1e8f, 0.0f));
  const TestTensor small_bias(device(), DType::kFloat32, {64},
                              Normal(64, 10, -5.0f, 1.0f));
  for (MoeGroupScore score : {MoeGroupScore::kMax, MoeGroupScore::kTop2Sum}) {
    const MoeRouterParams options =
        Grouped(MoeScoring::kSigmoid, 8, 8, 1, score);
    RunAndCheck(options, logits, &small_bias);
    // All choices round to -1e8: the first group wins, and fills all places.
    const Result result = Run(options, logits, &bias);
    for (size_t i = 0; i < result.ids.size(); ++i) {
      EXPECT_EQ(result.ids[i], static_cast<int64_t>(i % 8));
    }
  }
}

TEST_P(MoeRouterTest, Acceptance13_GroupsWithoutBias) {
  const TestTensor logits = Logits(60, 128, Normal(60 * 128, 11));
  RunAndCheck(Grouped(MoeScoring::kSigmoid, 8, 128, 16, MoeGroupScore::kMax),
              logits);
  RunAndCheck(Grouped(MoeScoring::kSigmoid, 8, 64, 5, MoeGroupScore::kTop2Sum),
              logits);
  // Equal groups: the first ones are kept.
  const TestTensor equal = Logits(1, 128, std::vector<float>(128, 0.25f));
  EXPECT_EQ(
      Run(Grouped(MoeScoring::kSigmoid, 6, 32, 2, MoeGroupScore::kTop2Sum),
          equal)
          .ids,
      (std::vector<int64_t>{0, 1, 2, 3, 4, 5}));
}

TEST_P(MoeRouterTest, Acceptance14_SharedExpertsAreAppended) {
  const TestTensor logits = Logits(21, 160, Normal(21 * 160, 12));
  for (int32_t shared : {1, 3, 40}) {
    MoeRouterParams options = Options(8, true);
    options.scoring = MoeScoring::kSigmoid;
    options.routed_scaling_factor = 2.5f;
    options.num_fused_shared_experts = shared;
    RunAndCheck(options, logits);
  }
}

TEST_P(MoeRouterTest, NanLogitsComeLast) {
  std::vector<float> values = Normal(3 * 64, 13);
  for (int e : {0, 7, 63}) values[e] = NAN;
  for (int e = 0; e < 64; ++e) values[64 + e] = e == 20 ? -kInfinity : NAN;
  for (int e = 0; e < 64; ++e) values[128 + e] = NAN;
  const TestTensor logits = Logits(3, 64, values);
  const TestTensor bias(device(), DType::kFloat32, {64},
                        std::vector<float>(64, 0.5f));
  for (MoeScoring scoring : {MoeScoring::kSoftmax, MoeScoring::kSigmoid}) {
    for (int32_t groups : {1, 8}) {
      for (const TestTensor* b :
           {&bias, static_cast<const TestTensor*>(nullptr)}) {
        SCOPED_TRACE(StrCat("scoring ", static_cast<int>(scoring), " groups ",
                            groups, b != nullptr ? " biased" : ""));
        const MoeRouterParams options =
            Grouped(scoring, 32, groups, groups, MoeGroupScore::kMax);
        const Result result = Run(options, logits, b);
        for (int t = 0; t < 3; ++t) {
          const auto ids = result.ids.begin() + t * 32;
          EXPECT_EQ(std::set<int64_t>(ids, ids + 32).size(), 32u);
        }
        for (int64_t id : {0, 7, 63}) {
          EXPECT_EQ(std::count(result.ids.begin(), result.ids.begin() + 32, id),
                    0);
        }
        EXPECT_EQ(result.ids[32], 20);
        EXPECT_EQ(result.ids[33], 0);
        EXPECT_EQ(result.ids[64], 0);
        EXPECT_EQ(result.ids[95], 31);
        for (double weight : result.weights) {
          EXPECT_GE(weight, 0.0);
          EXPECT_LE(weight, 1.0);
        }
        RunAndCheck(options, logits, b);
      }
    }
  }
}

TEST_P(MoeRouterTest, NanGroupsAreKeptLast) {
  std::vector<float> values = Normal(32, 14);
  for (int e = 0; e < 16; ++e) values[e] = NAN;
  const TestTensor logits = Logits(1, 32, values);
  for (MoeGroupScore score : {MoeGroupScore::kMax, MoeGroupScore::kTop2Sum}) {
    const Result result =
        Run(Grouped(MoeScoring::kSigmoid, 12, 4, 3, score), logits);
    const std::set<int64_t> ids(result.ids.begin(), result.ids.end());
    EXPECT_EQ(ids.size(), 12u);
    EXPECT_EQ(std::count_if(ids.begin(), ids.end(),
                            [](int64_t id) { return id >= 16; }),
              12);
    const Result all =
        Run(Grouped(MoeScoring::kSigmoid, 17, 4, 3, score), logits);
    EXPECT_EQ(all.ids.back(), 0);
  }
}

TEST_P(MoeRouterTest, InfiniteLogits) {
  std::vector<float> values = Normal(4 * 40, 15);
  for (int e = 0; e < 40; e += 2) values[e] = -kInfinity;
  values[40 + 9] = kInfinity;
  values[40 + 3] = kInfinity;
  for (int e = 0; e < 40; ++e) values[80 + e] = -kInfinity;
  for (int e = 0; e < 40; ++e) values[120 + e] = kInfinity;
  const TestTensor logits = Logits(4, 40, values);
  for (MoeScoring scoring : {MoeScoring::kSoftmax, MoeScoring::kSigmoid}) {
    MoeRouterParams options = Options(30, true);
    options.scoring = scoring;
    RunAndCheck(options, logits);
    const Result result = Run(options, logits);
    EXPECT_EQ(result.ids[30], 3);
    EXPECT_EQ(result.ids[31], 9);
    EXPECT_EQ(result.ids[60], 0);
    for (double weight : result.weights) EXPECT_TRUE(std::isfinite(weight));
  }
}

TEST_P(MoeRouterTest, RowDoesNotDependOnTheOthers) {
  const TestTensor logits = Logits(67, 160, Normal(67 * 160, 16));
  MoeRouterParams p =
      Grouped(MoeScoring::kSoftmax, 8, 4, 2, MoeGroupScore::kTop2Sum);
  const Result all = Run(p, logits);
  const Result again = Run(p, logits);
  EXPECT_EQ(again.ids, all.ids);
  EXPECT_EQ(again.weights, all.weights);
  TestTensor weights(device(), DType::kFloat32, {1, 8});
  TestTensor ids(device(), DType::kInt32, {1, 8});
  p.logits = Rows(logits.view(), 41, 1);
  p.topk_weights = weights.view();
  p.topk_ids = ids.view();
  ASSERT_TRUE(MoeRouter(p, stream()).ok());
  Finish();
  EXPECT_EQ(ids.Integers(), std::vector<int64_t>(all.ids.begin() + 41 * 8,
                                                 all.ids.begin() + 42 * 8));
  EXPECT_EQ(weights.Values(),
            std::vector<double>(all.weights.begin() + 41 * 8,
                                all.weights.begin() + 42 * 8));
}

TEST_P(MoeRouterTest, PaddingChoosesNoExpert) {
  constexpr int64_t kTokens = 13;
  for (const int64_t num_experts : {8, 128, 200, 1000}) {
    SCOPED_TRACE(num_experts);
    const TestTensor logits =
        Logits(kTokens, num_experts, Normal(kTokens * num_experts, 9, 0, 3), 7);
    MoeRouterParams options = Options(5, true);
    options.num_fused_shared_experts = 2;
    const Result expected = Run(options, logits);
    std::vector<int64_t> marks(kTokens);
    for (int64_t t = 0; t < kTokens; ++t) marks[t] = t % 3 == 1 ? -t : t;
    const TestTensor padding =
        TestTensor::FromIntegers(device(), DType::kInt32, {kTokens}, marks);
    options.padding = padding.view();
    const Result actual = Run(options, logits);
    for (int64_t i = 0; i < kTokens * 7; ++i) {
      const bool is_padding = i / 7 % 3 == 1;
      EXPECT_EQ(actual.ids[i], is_padding ? -1 : expected.ids[i]);
      EXPECT_EQ(actual.weights[i], is_padding ? 0.0 : expected.weights[i]);
    }
  }
}

TEST_P(MoeRouterTest, ZeroTokensIsOk) {
  const Result result = Run(Options(8), Logits(0, 128, {}));
  EXPECT_TRUE(result.ids.empty());
}

TEST_P(MoeRouterTest, RejectsBadArguments) {
  const TestTensor logits = Logits(4, 64, Normal(4 * 64, 17));
  const TestTensor bias(device(), DType::kFloat32, {64}, Normal(64, 18));
  TestTensor weights(device(), DType::kFloat32, {4, 8});
  TestTensor ids(device(), DType::kInt32, {4, 8});
  MoeRouterParams good = Options(8);
  good.logits = logits.view();
  good.correction_bias = bias.view();
  good.topk_weights = weights.view();
  good.topk_ids = ids.view();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeRouterParams p = good;
    change(p);
    parts.push_back("MoeRouter: ");
    testing::ExpectInvalid(MoeRouter(p, stream()), parts);
  };
  using P = MoeRouterParams;
  expect({"logits is missing"}, [](P& p) { p.logits = TensorView(); });
  expect({"logits", "int32"}, [](P& p) { p.logits.dtype = DType::kInt32; });
  expect({"logits", "rank 1"}, [](P& p) { p.logits.rank = 1; });
  expect({"logits", "null data"}, [](P& p) { p.logits.data = nullptr; });
  expect({"num_experts", "is 0"}, [](P& p) { p.logits.shape[1] = 0; });
  expect({"num_experts", "is 1025", "1 to 1024"},
         [](P& p) { p.logits.shape[1] = 1025; });
  expect({"top_k is 0"}, [](P& p) { p.top_k = 0; });
  expect({"top_k is 33"}, [](P& p) { p.top_k = 33; });
  expect({"scoring is 2"},
         [](P& p) { p.scoring = static_cast<MoeScoring>(2); });
  expect({"group_score is -1"},
         [](P& p) { p.group_score = static_cast<MoeGroupScore>(-1); });
  expect({"num_expert_groups is 0"}, [](P& p) { p.num_expert_groups = 0; });
  expect({"num_expert_groups is 5", "divisor of the 64"},
         [](P& p) { p.num_expert_groups = 5; });
  expect({"num_expert_groups is 64", "group_score of two"},
         [](P& p) { p.num_expert_groups = 64; });
  expect({"num_selected_groups is 2, expected 1 to 1"},
         [](P& p) { p.num_selected_groups = 2; });
  expect({"num_selected_groups is 0"}, [](P& p) { p.num_selected_groups = 0; });
  expect({"top_k", "selected groups", "8, expected 1 to 4"},
         [](P& p) { p.num_expert_groups = 16; });
  expect({"routed_scaling_factor is nan"},
         [](P& p) { p.routed_scaling_factor = NAN; });
  expect({"routed_scaling_factor is inf"},
         [](P& p) { p.routed_scaling_factor = kInfinity; });
  expect({"num_fused_shared_experts is -1"},
         [](P& p) { p.num_fused_shared_experts = -1; });
  expect({"correction_bias", "[63]"},
         [](P& p) { p.correction_bias.shape[0] = 63; });
  expect({"correction_bias", "bfloat16"},
         [](P& p) { p.correction_bias.dtype = DType::kBFloat16; });
  expect({"topk_weights", "[4, 8], expected [4, 9]"},
         [](P& p) { p.num_fused_shared_experts = 1; });
  expect({"topk_weights", "int32"},
         [](P& p) { p.topk_weights.dtype = DType::kInt32; });
  expect({"topk_ids", "int64"}, [](P& p) { p.topk_ids.dtype = DType::kInt64; });
  expect({"topk_ids", "[3, 8]"}, [](P& p) { p.topk_ids.shape[0] = 3; });
  expect({"topk_ids", "share memory"}, [](P& p) { p.topk_ids.stride[0] = 7; });
  expect({"topk_ids is on cuda:7"}, [](P& p) {
    p.topk_ids.device = {DeviceType::kCuda, 7};
  });
  expect({"topk_ids overlaps topk_weights"},
         [](P& p) { p.topk_ids.data = p.topk_weights.data; });
  expect({"topk_weights overlaps logits"},
         [](P& p) { p.topk_weights.data = p.logits.data; });
  expect({"topk_ids overlaps correction_bias"},
         [](P& p) { p.topk_ids.data = p.correction_bias.data; });
  EXPECT_EQ(weights.Bytes(), weights.InitialBytes());
  EXPECT_EQ(ids.Bytes(), ids.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeRouterTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
