#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/ops/moe_fixture.h"

// Moe with experts of float8_e4m3.

namespace tenon::moe_test {
namespace {

constexpr Experts kScalings[] = {Experts::kFp8Blocks, Experts::kFp8Rows};

class MoeFp8Test : public Fixture {
 protected:
  // Problems of a size that shows something, but for what the test changes.
  static Problem Usual(Experts experts, int64_t tokens) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 272;
    problem.intermediate = 192;
    problem.num_experts = 5;
    problem.top_k = 2;
    problem.experts = experts;
    return problem;
  }
};

TEST_P(MoeFp8Test, MatchesReference) {
  for (Experts experts : kScalings) {
    // Tokens, hidden, intermediate, experts, top_k.
    for (Problem problem :
         Fewer<Problem>({{1, 1, 1, 1, 1},
                         {2, 64, 48, 16, 8},
                         {3, 13, 7, 5, 2},  // elements must be read one by one
                         {8, 130, 129, 4,
                          4},  // and here, with blocks of one row or column
                         {8, 256, 64, 16, 4},
                         {13, 128, 192, 24, 8},
                         {111, 144, 64, 8, 4},
                         {300, 32, 96, 2, 2}},
                        5)) {
      problem.experts = experts;
      for (int64_t padding : Fewer<int64_t>({0, 5, 16}, 2)) {
        problem.padding = padding;
        ExpectMatches(problem, 20);
      }
    }
  }
}

// The widths of published models and of a rank's part of them.
TEST_P(MoeFp8Test, ModelShapes) {
  for (Experts experts : kScalings) {
    for (int64_t intermediate : Fewer<int64_t>({64, 192, 768})) {
      if (!on_cuda() && intermediate == 768) continue;
      Problem problem;
      problem.hidden = 2048;
      problem.intermediate = intermediate;
      problem.num_experts = 3;
      problem.top_k = 2;
      problem.experts = experts;
      problem.tokens = on_cuda() ? SmallOr(60, 300) : 13;
      ExpectMatches(problem, on_cuda() ? 8 : 2);
    }
  }
}

TEST_P(MoeFp8Test, UnequalLoads) {
  for (Experts experts : kScalings) {
    for (int64_t tokens : {1, 8, 65, 200}) {
      Problem problem = Usual(experts, tokens);
      problem.num_experts = 7;
      problem.ids.assign(static_cast<size_t>(2 * tokens), 6);  // even twice
      ExpectMatches(problem, 20);
      problem.ids[1] = 0;
      ExpectMatches(problem, 20);
    }
  }
}

TEST_P(MoeFp8Test, SkippedIdsContributeNothing) {
  for (Experts experts : kScalings) {
    for (int64_t tokens : {6, 90}) {
      Problem problem = Usual(experts, tokens);
      problem.top_k = 3;
      problem.ids = UniformIntegers(3 * tokens, 6, -2, 6);
      std::fill_n(problem.ids.begin() + 3, 3, -1);  // token 1: none at all
      ExpectMatches(problem, 30);
      Call call(device(), dtype(), problem);
      Run(call);
      EXPECT_EQ(Row(call.out().Values(), 1, problem.hidden),
                std::vector<double>(problem.hidden, 0.0));
    }
  }
}

TEST_P(MoeFp8Test, InPlaceIsOutOfPlace) {
  for (Experts experts : kScalings) {
    for (int64_t tokens : {1, 60, 700}) {
      Problem problem = Usual(experts, tokens);
      problem.padding = 16;
      ExpectInPlaceIsOutOfPlace(problem);
    }
  }
}

TEST_P(MoeFp8Test, ChunkEdge) {
  for (Experts experts : kScalings) {
    Problem problem;
    problem.tokens = on_cuda() ? kMoeChunkTokens + 1 : 600;
    problem.hidden = 32;
    problem.intermediate = 16;
    problem.num_experts = 5;
    problem.top_k = 2;
    problem.period = 97;
    problem.experts = experts;
    ExpectEqualBitsForEqualTokens(problem);
  }
}

TEST_P(MoeFp8Test, RowDoesNotDependOnTheirNumber) {
  for (Experts experts : kScalings) {
    ExpectTokensIgnoreTheirNumber(Usual(experts, 900));
  }
}

// Every row but one is NaN in one call, and a number in the other.
TEST_P(MoeFp8Test, RowDoesNotDependOnTheirContent) {
  for (Experts experts : kScalings) {
    for (int64_t tokens : {7, 150}) {
      const Problem problem = Usual(experts, tokens);
      const int64_t kept = tokens / 2;
      Call call(device(), dtype(), problem);
      Run(call);
      const std::vector<double> expected =
          Row(call.out().Values(), kept, problem.hidden);
      const std::vector<double> values = call.x().InitialValues();
      std::vector<float> x(values.size(),
                           std::numeric_limits<float>::quiet_NaN());
      std::copy_n(values.begin() + kept * problem.hidden, problem.hidden,
                  x.begin() + kept * problem.hidden);
      const TestTensor others(device(), dtype(), {tokens, problem.hidden}, x);
      call.params().x = others.view();
      Run(call);
      const std::vector<double> out = call.out().Values();
      EXPECT_EQ(Row(out, kept, problem.hidden), expected);
      EXPECT_TRUE(std::isnan(out[0])) << "a NaN stays in its row";
    }
  }
}

// Also of zeros alone, whose scale has a floor.
TEST_P(MoeFp8Test, RowsOfZeros) {
  for (Experts experts : kScalings) {
    const Problem problem = Usual(experts, 3);
    Call call(device(), dtype(), problem);
    const TestTensor zeros(device(), dtype(), {3, problem.hidden},
                           std::vector<float>(3 * problem.hidden, 0.0f));
    call.params().x = zeros.view();
    Run(call);
    EXPECT_EQ(call.out().Values(),
              std::vector<double>(3 * problem.hidden, 0.0));
  }
}

TEST_P(MoeFp8Test, SameCallSameBits) {
  for (Experts experts : kScalings) {
    for (int64_t tokens : {8, 129}) {
      ExpectSameBitsAgain(Usual(experts, tokens));
    }
  }
}

// Tables of pointers, as for a mapped checkpoint, on the CPU.
TEST_P(MoeFp8Test, TablesOfMatrices) {
  if (on_cuda()) GTEST_SKIP() << "tables are of the CPU";
  Call call(device(), dtype(), Usual(Experts::kFp8Blocks, 20));
  Run(call);
  const std::vector<uint8_t> bytes = call.out().Bytes();
  std::vector<const void*> tables[3];
  ExpertMatrices* const matrices[] = {&call.params().gate, &call.params().up,
                                      &call.params().down};
  for (int i = 0; i < 3; ++i) {
    ExpertMatrices& m = *matrices[i];
    for (int64_t e = 0; e < m.num_experts; ++e) {
      tables[i].push_back(ExpertRow(m, e, 0));
    }
    m.data = nullptr;
    m.table = tables[i].data();
  }
  Run(call);
  EXPECT_EQ(call.out().Bytes(), bytes);
}

TEST_P(MoeFp8Test, GraphReplay) {
  if (!on_cuda()) GTEST_SKIP() << "graphs are of CUDA";
  for (int64_t tokens : {1, 8, 100, 3000}) {
    ExpectSameBitsInAGraph(Usual(Experts::kFp8Blocks, tokens));
  }
}

TEST_P(MoeFp8Test, ZeroTokensIsOk) {
  Call call(device(), dtype(), Usual(Experts::kFp8Blocks, 0));
  EXPECT_TRUE(Moe(call.params(), stream()).ok());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeFp8Test,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
