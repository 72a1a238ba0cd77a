// Linear with few tokens, and with the norm and the residual beside it.

#include "tests/ops/linear_neighbours.h"

#include <gtest/gtest.h>

#include <vector>

namespace tenon {
namespace {

using testing::Fewer;
using testing::LinearCall;
using testing::LinearMode;
using testing::LinearModeName;
using testing::LinearShape;
using testing::Normal;
using testing::TestTensor;

class LinearNeighboursTest : public testing::LinearNeighboursTestBase {};

TEST_P(LinearNeighboursTest, NeighboursGiveTheBitsOfSeparateOperations) {
  struct Case {
    LinearShape shape;
    bool float_out = false;
    bool float_norm_weight = false;
    int64_t padding = 0;
  };
  for (const Case& test : Fewer<Case>({{{1, 72, 2048}},
                                       {{3, 520, 2048}, true},
                                       {{1, 40, 4096}},
                                       {{2, 13, 136}, false, false, 8},
                                       {{8, 264, 2048}},
                                       {{7, 136, 4096}, false, true},
                                       {{16, 72, 2048}, true},
                                       {{13, 72, 520}},
                                       {{2, 24, 5120}},
                                       {{1, 16, 12296}},
                                       {{5, 24, 111}},
                                       {{40, 72, 328}}},
                                      4)) {
    const auto [tokens, out_features, in_features] = test.shape;
    const LinearCall call(device(), dtype(), test.shape,
                          {true, test.float_out, test.padding, 0});
    const TestTensor norm_weight(
        device(), test.float_norm_weight ? DType::kFloat32 : dtype(),
        {in_features}, Normal(in_features, 33, 1.0f));
    RmsNormParams norm;
    norm.weight = norm_weight.view();
    norm.epsilon = 1e-6f;
    for (NormRounding rounding :
         {NormRounding::kFloat32Multiply, NormRounding::kCastThenMultiply}) {
      norm.rounding = rounding;
      for (LinearMode mode : Modes()) {
        SCOPED_TRACE(StrCat(tokens, "x", out_features, "x", in_features, " ",
                            LinearModeName(mode)));
        ExpectBitsOfSeparateOperations(call.params(), norm, mode);
        call.ExpectOnlyOutChanged();
        if (HasFailure()) return;
      }
    }
  }
}

// More tiles than the ring of stages has room for, and rows past a tile's end.
TEST_P(LinearNeighboursTest, FewTokensMatchTheirRowsAlone) {
  if (device().type == DeviceType::kCpu || dtype() != DType::kBFloat16) {
    GTEST_SKIP() << "for the streaming kernel";
  }
  for (LinearShape shape : Fewer<LinearShape>({{8, 6605, 2048},
                                               {16, 2001, 2056},
                                               {4, 2213, 4104},
                                               {2, 40, 8192}})) {
    SCOPED_TRACE(
        StrCat(shape.tokens, "x", shape.out_features, "x", shape.in_features));
    const LinearCall all(device(), dtype(), shape, {true, true, 0, 0});
    const std::vector<double> expected = OutOf(all, LinearMode::kDefault);
    for (int64_t first : {int64_t{0}, shape.tokens - 1}) {
      ExpectTokensAlone(all.params(), first, 1, LinearMode::kDefault, expected);
    }
    Run(all.params(), LinearMode::kBatchInvariant);
    EXPECT_LT(testing::RelativeFrobeniusError(all.Values(), expected), 1e-5);
  }
}

TEST_P(LinearNeighboursTest, TermsGiveTheBitsOfASeparateSum) {
  ExpectBitsOfSeparateSums(
      [&](LinearShape shape) {
        return LinearCall(device(), dtype(), shape, {true, false, 0, 0});
      },
      Modes());
}

INSTANTIATE_TEST_SUITE_P(Targets, LinearNeighboursTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
