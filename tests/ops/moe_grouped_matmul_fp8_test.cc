#include <cmath>
#include <limits>

#include "tests/ops/moe_grouped_matmul_fixture.h"

// MoeGroupedMatmul with weights of float8_e4m3.

namespace tenon::moe_grouped_matmul_test {
namespace {

constexpr Experts kScalings[] = {Experts::kFp8Blocks, Experts::kFp8Rows};

class MoeGroupedMatmulFp8Test : public Fixture {};

TEST_P(MoeGroupedMatmulFp8Test, MatchesReference) {
  for (Experts experts : kScalings) {
    for (Problem problem : Fewer<Problem>(
             {RandomProblem(1, 1, 1, 9, 1), RandomProblem(1, 8, 16, 64, 192),
              RandomProblem(3, 2, 5, 13, 7), RandomProblem(13, 8, 16, 40, 192),
              RandomProblem(111, 1, 3, 130, 72),
              RandomProblem(40, 4, 16, 65, 111),
              RandomProblem(30, 2, 2, 272, 640),
              RandomProblem(70, 4, 2, 96, 200),
              RandomProblem(150, 2, 2, 136, 64)},
             4)) {
      problem.experts = experts;
      ExpectMatches(problem);
      problem.slots_per_row = 1;
      problem.bias = problem.routing = true;
      problem.x_padding = 3;
      problem.weight_padding = 5;
      problem.expert_padding = 1;
      problem.out_padding = 7;
      ExpectMatches(problem);
      problem.x_padding = problem.weight_padding = problem.expert_padding =
          problem.out_padding = 16;
      ExpectMatches(problem);
    }
  }
}

TEST_P(MoeGroupedMatmulFp8Test, UnequalLoads) {
  Problem problem;
  problem.num_experts = 9;
  problem.rows = 144;
  problem.cols = 192;
  for (Experts experts : kScalings) {
    problem.experts = experts;
    for (int64_t count : {1, 16, 17, 130}) {
      for (int64_t expert : {0, 8}) {  // all others are empty
        problem.ids.assign(static_cast<size_t>(count), expert);
        problem.ids[count / 2] = -1;
        ExpectMatches(problem);
      }
    }
  }
}

// Every row of x but one is NaN in one call, and a number in the other.
TEST_P(MoeGroupedMatmulFp8Test, RowsDoNotDependOnOthers) {
  Problem problem;
  problem.num_experts = 3;
  problem.rows = 80;
  problem.cols = 272;
  for (Experts experts : kScalings) {
    for (int64_t count : {9, 400}) {
      problem.experts = experts;
      problem.ids = RandomIds(count, 3);
      const int64_t kept = count / 2;
      Call call(device(), dtype(), problem);
      Run(call);
      const std::vector<double> all = call.out().Values();
      const std::vector<double> row(all.begin() + kept * 80,
                                    all.begin() + (kept + 1) * 80);
      const std::vector<double> values = call.x().InitialValues();
      std::vector<float> x(values.size(),
                           std::numeric_limits<float>::quiet_NaN());
      std::copy_n(values.begin() + kept * 272, 272, x.begin() + kept * 272);
      const TestTensor others(device(), dtype(), {count, 272}, x);
      call.params().x = others.view();
      Run(call);
      const std::vector<double> out = call.out().Values();
      EXPECT_EQ(std::vector<double>(out.begin() + kept * 80,
                                    out.begin() + (kept + 1) * 80),
                row);
      EXPECT_TRUE(std::isnan(out[0])) << "a NaN stays in its row";
      // Alone: other kernels may be chosen.
      Problem one = problem;
      one.ids.assign(1, problem.ids[kept]);
      Call single(device(), dtype(), one);
      single.params().x = Rows(others.view(), kept, 1);
      Run(single);
      EXPECT_EQ(single.out().Values(), row);
    }
  }
}

TEST_P(MoeGroupedMatmulFp8Test, SameCallSameBits) {
  Problem problem = RandomProblem(129, 4, 9, 136, 192);
  problem.experts = Experts::kFp8Blocks;
  ExpectSameBitsAgain(problem);
}

TEST_P(MoeGroupedMatmulFp8Test, RejectsBadScales) {
  Problem problem;
  problem.num_experts = 2;
  problem.rows = 130;
  problem.cols = 40;
  problem.ids = {0, 1};
  problem.experts = Experts::kFp8Blocks;
  Call call(device(), dtype(), problem);
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeGroupedMatmulParams p = call.params();
    change(p, p.weights.scales);
    parts.push_back("MoeGroupedMatmul");
    testing::ExpectInvalid(MoeGroupedMatmul(p, stream()), parts);
  };
  using Params = MoeGroupedMatmulParams;
  expect({"weights of float8_e4m3 has no scales"},
         [](Params&, ExpertScales& s) { s.data = nullptr; });
  expect({"weights.scales", "aligned"}, [](Params&, ExpertScales& s) {
    s.data = reinterpret_cast<const float*>(
        reinterpret_cast<const char*>(s.data) + 2);
  });
  expect({"weights.scales", "block_rows 64", "block_cols 128"},
         [](Params&, ExpertScales& s) { s.block_rows = 64; });
  expect({"weights.scales", "block_rows 1 ", "block_cols 128"},
         [](Params&, ExpertScales& s) { s.block_rows = 1; });
  expect({"weights.scales", "row_stride 0", "at least 1"},
         [](Params&, ExpertScales& s) { s.row_stride = 0; });
  expect({"weights.scales", "expert_stride -1"},
         [](Params&, ExpertScales& s) { s.expert_stride = -1; });
  expect({"out overlaps weights.scales"}, [](Params& p, ExpertScales& s) {
    p.out.data = const_cast<float*>(s.data);
  });
  expect({"workspace overlaps weights.scales"}, [](Params& p, ExpertScales& s) {
    s.data = static_cast<const float*>(p.workspace);
  });
  expect({"weights of dtype", "has scales"}, [&](Params& p, ExpertScales&) {
    p.weights.dtype = dtype();
    p.weights.cols = p.x.shape[1] = 8;
  });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeGroupedMatmulFp8Test,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_grouped_matmul_test
