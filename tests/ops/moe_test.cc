#include "ops/moe/moe.h"

#include <gtest/gtest.h>

#include "tests/ops/moe_fixture.h"
#include "tests/testing/shapes.h"

namespace tenon::moe_test {
namespace {

class MoeTest : public Fixture {};

TEST_P(MoeTest, MatchesReference) {
  // Tokens, hidden, intermediate, experts, top_k.
  for (Problem problem : Fewer<Problem>(
           {{1, 1, 1, 1, 1},
            {1, 64, 48, 16, 8},
            {3, 13, 7, 5, 2},   // elements must be read one by one
            {8, 64, 33, 4, 4},  // so here, for the down projection
            {13, 96, 192, 160, 8},
            {16, 72, 40, 3, 8},  // several tiles of an expert, unscheduled
            {40, 64, 32, 3, 32},
            {111, 128, 64, 8, 4},
            {130, 40, 24, 1, 2}},
           5)) {
    for (int64_t padding : Fewer<int64_t>({0, 5, 8}, 2)) {
      problem.padding = padding;
      ExpectMatches(problem);
    }
  }
}

// The widths of the models; the CPU and small tests take smaller ones.
TEST_P(MoeTest, ModelShapes) {
  const std::vector<testing::ModelShape> shapes(
      std::begin(testing::kModelShapes), std::end(testing::kModelShapes));
  for (const testing::ModelShape& shape : Fewer(shapes)) {
    SCOPED_TRACE(shape.name);
    Problem problem;
    const bool full = on_cuda() && !testing::SmallTests();
    problem.hidden = full ? shape.hidden : shape.hidden / 4;
    problem.intermediate = full ? shape.intermediate : 96;
    problem.num_experts = 4;
    problem.top_k = on_cuda() ? shape.top_k : 2;
    problem.tokens = on_cuda() ? SmallOr(60, 500) : 3;
    Call call(device(), dtype(), problem);
    const std::vector<double> expected = call.Expected({0});
    for (int64_t tokens : {int64_t{1}, problem.tokens / 40 + 1,
                           problem.tokens / 5 + 1, problem.tokens}) {
      SCOPED_TRACE(tokens);
      MoeParams p = call.params();
      p.x = Rows(p.x, 0, tokens);
      p.topk_ids = Rows(p.topk_ids, 0, tokens);
      p.topk_weights = Rows(p.topk_weights, 0, tokens);
      p.out = Rows(p.out, 0, tokens);
      ASSERT_TRUE(Moe(p, stream()).ok());
      Finish();
      EXPECT_LT(RelativeFrobeniusError(
                    Row(call.out().Values(), 0, problem.hidden), expected),
                MaxError());
    }
  }
}

TEST_P(MoeTest, EveryTileHeight) {
  Problem problem;
  problem.hidden = 136;
  problem.intermediate = 72;
  problem.top_k = 3;
  problem.num_experts = 6;
  for (int64_t tokens : {23, 110, 600}) {
    problem.tokens = tokens;
    ExpectMatches(problem);
  }
}

TEST_P(MoeTest, UnequalLoads) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 32;
  problem.num_experts = 7;
  problem.top_k = 2;
  for (int64_t tokens : {5, 40, 64, 65, 200}) {
    problem.tokens = tokens;
    problem.ids.assign(static_cast<size_t>(2 * tokens), 6);  // even twice
    ExpectMatches(problem);
    problem.ids[3] = 0;
    ExpectMatches(problem);
  }
}

TEST_P(MoeTest, SkippedIdsContributeNothing) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 40;
  problem.num_experts = 4;
  problem.top_k = 3;
  for (int64_t tokens : {6, 90}) {
    problem.tokens = tokens;
    problem.ids = UniformIntegers(3 * tokens, 6, -2, 5);
    std::fill_n(problem.ids.begin() + 3, 3, -1);  // token 1: none at all
    ExpectMatches(problem);
    Call call(device(), dtype(), problem);
    Run(call);
    EXPECT_EQ(Row(call.out().Values(), 1, 64), std::vector<double>(64, 0.0));
  }
}

TEST_P(MoeTest, Acceptance22_InPlaceIsOutOfPlace) {
  for (int64_t tokens : {1, 7, 60, 700}) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 72;
    problem.intermediate = 40;
    problem.num_experts = 9;
    problem.top_k = 4;
    problem.padding = 8;
    ExpectInPlaceIsOutOfPlace(problem);
  }
}

TEST_P(MoeTest, ResidualGivesTheBitsOfASeparateAddition) {
  for (int64_t tokens : {1, 7, 60, 700}) {
    for (int64_t hidden : {72, 60}) {
      SCOPED_TRACE(StrCat(tokens, " tokens, ", hidden));
      Problem problem;
      problem.tokens = tokens;
      problem.hidden = hidden;
      problem.intermediate = 40;
      problem.num_experts = 9;
      problem.top_k = 4;
      problem.padding = 8;
      Call call(device(), dtype(), problem);
      Run(call);
      const testing::TestTensor residual(device(), dtype(), {tokens, hidden},
                                         {hidden + 3, 1},
                                         testing::Normal(tokens * hidden, 41));
      std::vector<double> expected = residual.InitialValues();
      const std::vector<double> terms = call.out().Values();
      for (size_t i = 0; i < expected.size(); ++i) {
        expected[i] =
            testing::RoundTo(dtype(), static_cast<float>(expected[i]) +
                                          static_cast<float>(terms[i]));
      }
      call.params().residual = residual.view();
      Run(call);
      EXPECT_EQ(call.out().Values(), expected);
      EXPECT_EQ(residual.Bytes(), residual.InitialBytes());
      call.params().out = residual.view();
      Run(call);
      EXPECT_EQ(residual.Values(), expected);
      EXPECT_EQ(residual.NumStrayWrites(), 0);
    }
  }
}

// Rows that nobody has summed up yet: summed here, they are out.
TEST_P(MoeTest, RowsAreWhatIsSummed) {
  for (int64_t tokens : {1, 7, 60}) {
    SCOPED_TRACE(tokens);
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 72;
    problem.intermediate = 40;
    problem.num_experts = 9;
    problem.top_k = 4;
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<double> expected = call.out().Values();
    const testing::TestTensor rows(device(), dtype(),
                                   {tokens, problem.top_k, problem.hidden});
    MoeParams& p = call.params();
    p.rows = rows.view();
    p.out = TensorView();
    Run(call);
    EXPECT_EQ(rows.NumStrayWrites(), 0);
    const std::vector<double> values = rows.Values();
    for (size_t i = 0; i < expected.size(); ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < problem.top_k; ++j) {
        const double term =
            values[(i / problem.hidden * problem.top_k + j) * problem.hidden +
                   i % problem.hidden];
        // Not written where the id is none of an expert.
        if (!std::isnan(term)) sum += static_cast<float>(term);
      }
      ASSERT_EQ(testing::RoundTo(dtype(), sum), expected[i]) << i;
    }
  }
}

// Against the first period of the same call, and that against the reference.
TEST_P(MoeTest, Acceptance22_ChunkEdge) {
  for (int64_t tokens : Fewer<int64_t>(
           {kMoeChunkTokens - 1, kMoeChunkTokens, kMoeChunkTokens + 1})) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 16;
    problem.intermediate = 8;
    problem.num_experts = 5;
    problem.top_k = 2;
    problem.period = 97;
    ExpectEqualBitsForEqualTokens(problem);
    if (tokens > kMoeChunkTokens) ExpectInPlaceIsOutOfPlace(problem);
  }
}

TEST_P(MoeTest, Acceptance22_RowDoesNotDependOnTheOthers) {
  Problem problem;
  problem.hidden = 200;
  problem.intermediate = 104;
  problem.num_experts = 3;
  problem.top_k = 2;
  problem.tokens = 900;
  ExpectTokensIgnoreTheirNumber(problem);
}

// One expert four times: the first row swallows the second, the third cancels
// it, and the fourth remains. In any other order of the choices it does not.
TEST_P(MoeTest, SumsInTheOrderOfChoices) {
  Problem problem;
  problem.hidden = 8;
  problem.intermediate = 16;
  problem.top_k = 4;
  problem.ids = {0, 0, 0, 0};
  Call call(device(), dtype(), problem);
  const TestTensor only_last(device(), DType::kFloat32, {1, 4},
                             {0.0f, 0.0f, 0.0f, 0x1p-11f});
  call.params().topk_weights = only_last.view();
  Run(call);
  const std::vector<double> expected = call.out().Values();
  for (double v : expected) EXPECT_NE(v, 0.0);
  const TestTensor weights(device(), DType::kFloat32, {1, 4},
                           {0x1p14f, 0x1p-11f, -0x1p14f, 0x1p-11f});
  call.params().topk_weights = weights.view();
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
}

TEST_P(MoeTest, SameCallSameBits) {
  Problem problem;
  problem.hidden = 136;
  problem.intermediate = 72;
  problem.num_experts = 9;
  problem.top_k = 4;
  for (int64_t tokens : {8, 50, 129}) {
    problem.tokens = tokens;
    ExpectSameBitsAgain(problem);
  }
}

// Gate and up from tensors of their own, with other strides, and on the CPU
// from tables of pointers.
TEST_P(MoeTest, SeparateMatrices) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 40;
  problem.num_experts = 4;
  problem.top_k = 2;
  problem.tokens = 20;
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<double> expected = call.out().Values();
  const std::vector<double> w13 = call.w13().InitialValues();
  std::vector<float> up;
  for (int64_t e = 0; e < 4; ++e) {
    const auto begin = w13.begin() + (2 * e + 1) * 40 * 64;
    up.insert(up.end(), begin, begin + 40 * 64);
  }
  const TestTensor separate(device(), dtype(), {4, 40, 64}, {40 * 72, 72, 1},
                            up);
  call.params().up = MakeExpertMatrices(separate.view());
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
  if (on_cuda()) return;
  std::vector<const void*> table;
  for (int64_t e = 0; e < 4; ++e) {
    table.push_back(ExpertRow(call.params().up, e, 0));
  }
  call.params().up.data = nullptr;
  call.params().up.table = table.data();
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
}

TEST_P(MoeTest, Acceptance22_GraphReplay) {
  if (!on_cuda()) GTEST_SKIP() << "graphs are of CUDA";
  for (int64_t tokens : Fewer<int64_t>({1, 8, 100, 3000}, 3)) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 128;
    problem.intermediate = 64;
    problem.num_experts = 16;
    problem.top_k = 8;
    ExpectSameBitsInAGraph(problem);
  }
}

TEST_P(MoeTest, Acceptance22_ZeroTokensIsOk) {
  Problem problem;
  problem.tokens = 0;
  problem.hidden = 16;
  problem.intermediate = 8;
  problem.num_experts = 4;
  problem.top_k = 2;
  Call call(device(), dtype(), problem);
  EXPECT_TRUE(Moe(call.params(), stream()).ok());
}

TEST_P(MoeTest, Acceptance22_WorkspaceQuery) {
  Problem problem;
  problem.hidden = 16;
  problem.intermediate = 8;
  problem.num_experts = 64;
  problem.top_k = 8;
  problem.tokens = 1;
  Call call(device(), dtype(), problem);
  size_t previous = 0;
  MoeParams p = call.params();
  for (int64_t tokens = 1; tokens < 3 * kMoeChunkTokens;
       tokens += tokens / 7 + 1) {
    p.x.shape[0] = p.out.shape[0] = tokens;
    p.topk_ids.shape[0] = p.topk_weights.shape[0] = tokens;
    const size_t bytes = MoeWorkspaceBytes(p);
    ASSERT_GE(bytes, previous) << tokens;
    previous = bytes;
  }
  p.x.shape[0] = p.out.shape[0] = 100 * kMoeChunkTokens;
  p.topk_ids.shape[0] = p.topk_weights.shape[0] = 100 * kMoeChunkTokens;
  EXPECT_EQ(MoeWorkspaceBytes(p), previous);  // bounded by the chunk
  EXPECT_EQ(MoeWorkspaceBytes(MoeParams()), 0u);
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
