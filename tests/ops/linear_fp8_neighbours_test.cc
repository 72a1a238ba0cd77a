// Linear with float8_e4m3 weights and few tokens, and with the norm and the
// residual beside it.

#include <gtest/gtest.h>

#include <vector>

#include "tests/ops/linear_fp8_fixture.h"
#include "tests/ops/linear_neighbours.h"

namespace tenon {
namespace {

using testing::Fewer;
using testing::LinearFp8Call;
using testing::LinearMode;
using testing::LinearModeName;
using testing::LinearShape;
using testing::Normal;
using testing::TestTensor;

class LinearFp8NeighboursTest : public testing::LinearNeighboursTestBase {};

TEST_P(LinearFp8NeighboursTest, NeighboursGiveTheBitsOfSeparateOperations) {
  struct Case {
    LinearShape shape;
    testing::LinearFp8Options options;
    NormRounding rounding = NormRounding::kFloat32Multiply;
  };
  for (const Case& test :
       Fewer<Case>({{{1, 72, 2048}, {false, false, false, 0}},
                    {{3, 520, 2048}, {true, true, true, 0}},
                    {{8, 264, 2048}, {false, true, false, 16}},
                    {{1, 40, 4096}, {false, false, true, 0}},
                    {{7, 136, 4096}, {true, false, false, 0}},
                    {{2, 13, 144}, {false, true, false, 16}},
                    {{4, 24, 5120}, {false, false, false, 0}},
                    {{1, 24, 12288}, {true, true, false, 0}},
                    {{16, 72, 2048}, {false, false, true, 0}},
                    {{13, 72, 528}, {true, true, false, 0}},
                    {{4, 48, 2048},
                     {false, false, false, 0},
                     NormRounding::kCastThenMultiply},
                    {{5, 24, 111}, {false, true, false, 0}},
                    {{40, 72, 336}, {true, true, false, 0}},
                    {{9, 72, 640}, {true, true, true, 16}},
                    {{33, 24, 2048}, {false, false, false, 0}},
                    {{16, 24, 5120}, {false, false, true, 0}},
                    {{9, 24, 8192}, {false, false, false, 0}},
                    {{9, 24, 8320}, {false, false, false, 0}},
                    {{64, 200, 512},
                     {false, true, false, 16},
                     NormRounding::kCastThenMultiply}},
                   6)) {
    const auto [tokens, out_features, in_features] = test.shape;
    const LinearFp8Call call(device(), dtype(), test.shape, test.options);
    const TestTensor norm_weight(device(), dtype(), {in_features},
                                 Normal(in_features, 33, 1.0f));
    RmsNormParams norm;
    norm.weight = norm_weight.view();
    norm.epsilon = 1e-6f;
    norm.rounding = test.rounding;
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(StrCat(tokens, "x", out_features, "x", in_features, " ",
                          LinearModeName(mode)));
      ExpectBitsOfSeparateOperations(call.params(), norm, mode);
      call.ExpectOnlyOutChanged();
      if (HasFailure()) return;
    }
  }
}

// The kernels for few tokens, above all the streaming one, against the tiles,
// which take more: with more tiles than its ring of stages has room for, rows
// past a tile's end, tiles of two blocks of scales in one instruction, several
// passes over the depth.
TEST_P(LinearFp8NeighboursTest, FewTokensHaveTheBitsOfMany) {
  if (device().type == DeviceType::kCpu || dtype() == DType::kFloat32) {
    GTEST_SKIP() << "for the kernels of CUDA";
  }
  constexpr int64_t kMany = 40;
  for (LinearShape shape : Fewer<LinearShape>({{kMany, 36011, 144},
                                               {kMany, 3333, 2064},
                                               {kMany, 2213, 4112},
                                               {kMany, 40, 12304}})) {
    for (bool per_channel : {false, true}) {
      const LinearFp8Call all(device(), dtype(), shape,
                              {per_channel, true, true, 0});
      const std::vector<double> expected =
          OutOf(all, LinearMode::kBatchInvariant);
      for (int64_t tokens : Fewer<int64_t>({1, 3, 4, 5, 16}, 3)) {
        SCOPED_TRACE(StrCat(tokens, "x", shape.out_features, "x",
                            shape.in_features, per_channel ? " channels" : ""));
        LinearParams p = all.params();
        p.weights_are_constant = true;
        ExpectTokensAlone(p, kMany - tokens, tokens, LinearMode::kDefault,
                          expected);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(LinearFp8NeighboursTest, TermsGiveTheBitsOfASeparateSum) {
  ExpectBitsOfSeparateSums(
      [&](LinearShape shape) {
        return LinearFp8Call(device(), dtype(), shape, {false, true, false, 0});
      },
      Modes());
}

INSTANTIATE_TEST_SUITE_P(Targets, LinearFp8NeighboursTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
