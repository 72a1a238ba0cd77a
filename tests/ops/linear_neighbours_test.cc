// Linear with few tokens, and with the norm and the residual beside it.

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "ops/linear/linear.h"
#include "ops/rms_norm/rms_norm.h"
#include "tests/ops/linear_fixture.h"
#include "tests/testing/compare.h"

namespace tenon {
namespace {

using testing::LinearCall;
using testing::LinearMode;
using testing::LinearModeName;
using testing::LinearShape;
using testing::Normal;
using testing::TestTensor;

class LinearNeighboursTest : public testing::LinearTestBase {};

// norm and residual change launches, but no bit: for every kernel, with
// residual apart from out and being out.
TEST_P(LinearNeighboursTest, NeighboursGiveTheBitsOfSeparateOperations) {
  struct Case {
    LinearShape shape;
    bool float_out = false;
    bool float_norm_weight = false;
    int64_t padding = 0;
  };
  for (const Case& test : std::vector<Case>{{{1, 72, 2048}},
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
                                            {{40, 72, 328}}}) {
    const auto [tokens, out_features, in_features] = test.shape;
    const DType out_dtype = test.float_out ? DType::kFloat32 : dtype();
    const auto matrix = [&](DType type, int64_t cols, uint64_t seed) {
      return TestTensor(device(), type, {tokens, cols},
                        {cols + test.padding, 1}, Normal(tokens * cols, seed));
    };
    const TestTensor x = matrix(dtype(), in_features, 31);
    const TestTensor weight(device(), dtype(), {out_features, in_features},
                            Normal(out_features * in_features, 32));
    const TestTensor norm_weight(
        device(), test.float_norm_weight ? DType::kFloat32 : dtype(),
        {in_features}, Normal(in_features, 33, 1.0f));
    const TestTensor bias(device(), dtype(), {out_features},
                          Normal(out_features, 34));
    for (NormRounding rounding :
         {NormRounding::kFloat32Multiply, NormRounding::kCastThenMultiply}) {
      for (LinearMode mode : Modes()) {
        SCOPED_TRACE(StrCat(tokens, "x", out_features, "x", in_features, " ",
                            LinearModeName(mode)));
        RmsNormParams norm;
        const TestTensor normed = matrix(dtype(), in_features, 35);
        norm.x = x.view();
        norm.weight = norm_weight.view();
        norm.out = normed.view();
        norm.epsilon = 1e-6f;
        norm.rounding = rounding;
        ASSERT_TRUE(RmsNorm(norm, stream()).ok());
        LinearParams p;
        p.x = normed.view();
        p.weight = weight.view();
        p.bias = bias.view();
        const TestTensor product = matrix(out_dtype, out_features, 36);
        p.out = product.view();
        Run(p, mode);
        const TestTensor residual = matrix(out_dtype, out_features, 37);
        std::vector<double> sum = residual.InitialValues();
        const std::vector<double> terms = product.Values();
        for (size_t i = 0; i < sum.size(); ++i) {
          sum[i] =
              testing::RoundTo(out_dtype, static_cast<float>(sum[i]) +
                                              static_cast<float>(terms[i]));
        }

        const TestTensor fused_normed = matrix(dtype(), in_features, 38);
        const TestTensor out = matrix(out_dtype, out_features, 39);
        p.x = x.view();
        p.norm.weight = norm.weight;
        p.norm.out = fused_normed.view();
        p.norm.epsilon = norm.epsilon;
        p.norm.rounding = rounding;
        p.out = out.view();
        p.weights_are_constant = true;
        Run(p, mode);
        EXPECT_EQ(fused_normed.Values(), normed.Values());
        EXPECT_EQ(out.Values(), terms);
        EXPECT_EQ(fused_normed.NumStrayWrites(), 0);
        EXPECT_EQ(x.Bytes(), x.InitialBytes());

        p.residual = residual.view();
        Run(p, mode);
        EXPECT_EQ(out.Values(), sum);
        EXPECT_EQ(out.NumStrayWrites(), 0);
        EXPECT_EQ(residual.Bytes(), residual.InitialBytes());
        p.weights_are_constant = false;
        p.out = residual.view();
        Run(p, mode);
        EXPECT_EQ(residual.Values(), sum);
        EXPECT_EQ(residual.NumStrayWrites(), 0);
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
  for (LinearShape shape :
       {LinearShape{8, 6605, 2048}, LinearShape{16, 2001, 2056},
        LinearShape{4, 2213, 4104}, LinearShape{2, 40, 8192}}) {
    SCOPED_TRACE(
        StrCat(shape.tokens, "x", shape.out_features, "x", shape.in_features));
    const LinearCall all(device(), dtype(), shape, {true, true, 0, 0});
    const std::vector<double> expected = OutOf(all, LinearMode::kDefault);
    for (int64_t first : {int64_t{0}, shape.tokens - 1}) {
      const TestTensor out(device(), DType::kFloat32, {1, shape.out_features});
      LinearParams p = all.params();
      p.x = Rows(p.x, first, 1);
      p.out = out.view();
      Run(p, LinearMode::kDefault);
      const std::vector<double> actual = out.Values();
      EXPECT_EQ(
          std::memcmp(actual.data(), &expected[first * shape.out_features],
                      actual.size() * sizeof(double)),
          0);
    }
    Run(all.params(), LinearMode::kBatchInvariant);
    EXPECT_LT(testing::RelativeFrobeniusError(all.Values(), expected), 1e-5);
  }
}

TEST_P(LinearNeighboursTest, TermsGiveTheBitsOfASeparateSum) {
  for (LinearShape shape : std::vector<LinearShape>{{1, 136, 2048},
                                                    {1, 24, 4096},
                                                    {1, 40, 336},
                                                    {1, 13, 111},
                                                    {3, 72, 2048}}) {
    const LinearCall call(device(), dtype(), shape, {true, false, 0, 0});
    for (int64_t count : {1, 8, 11}) {
      for (LinearMode mode : Modes()) {
        SCOPED_TRACE(StrCat(shape.tokens, "x", shape.out_features, "x",
                            shape.in_features, ", ", count, " terms, ",
                            LinearModeName(mode)));
        ExpectBitsOfSeparateSum(call.params(), call.X(), count, mode);
        if (HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, LinearNeighboursTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
