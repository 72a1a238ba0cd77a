// Linear with float8_e4m3 weights and few tokens, and with the norm and the
// residual beside it.

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "ops/linear/linear.h"
#include "ops/rms_norm/rms_norm.h"
#include "tests/ops/linear_fp8_fixture.h"
#include "tests/testing/compare.h"

namespace tenon {
namespace {

using testing::LinearFp8Call;
using testing::LinearMode;
using testing::LinearModeName;
using testing::LinearShape;
using testing::Normal;
using testing::TestTensor;

class LinearFp8NeighboursTest : public testing::LinearFp8TestBase {};

// norm and residual change launches, but no bit: for every kernel, with
// residual apart from out and being out.
TEST_P(LinearFp8NeighboursTest, NeighboursGiveTheBitsOfSeparateOperations) {
  struct Case {
    LinearShape shape;
    testing::LinearFp8Options options;
    NormRounding rounding = NormRounding::kFloat32Multiply;
  };
  for (const Case& test :
       std::vector<Case>{{{1, 72, 2048}, {false, false, false, 0}},
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
                          NormRounding::kCastThenMultiply}}) {
    const auto [tokens, out_features, in_features] = test.shape;
    const LinearFp8Call call(device(), dtype(), test.shape, test.options);
    const LinearParams params = call.params();
    const auto matrix = [&](DType type, int64_t cols, uint64_t seed) {
      return TestTensor(device(), type, {tokens, cols},
                        {cols + test.options.padding, 1},
                        Normal(tokens * cols, seed));
    };
    const TestTensor norm_weight(device(), dtype(), {in_features},
                                 Normal(in_features, 33, 1.0f));
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(StrCat(tokens, "x", out_features, "x", in_features, " ",
                          LinearModeName(mode)));
      RmsNormParams norm;
      const TestTensor normed = matrix(dtype(), in_features, 35);
      norm.x = params.x;
      norm.weight = norm_weight.view();
      norm.out = normed.view();
      norm.epsilon = 1e-6f;
      norm.rounding = test.rounding;
      ASSERT_TRUE(RmsNorm(norm, stream()).ok());
      LinearParams p = params;
      p.x = normed.view();
      const DType out_dtype = p.out.dtype;
      const TestTensor product = matrix(out_dtype, out_features, 36);
      p.out = product.view();
      Run(p, mode);
      const TestTensor residual = matrix(out_dtype, out_features, 37);
      std::vector<double> sum = residual.InitialValues();
      const std::vector<double> terms = product.Values();
      for (size_t i = 0; i < sum.size(); ++i) {
        sum[i] = testing::RoundTo(out_dtype, static_cast<float>(sum[i]) +
                                                 static_cast<float>(terms[i]));
      }

      const TestTensor fused_normed = matrix(dtype(), in_features, 38);
      const TestTensor out = matrix(out_dtype, out_features, 39);
      p.x = params.x;
      p.norm.weight = norm.weight;
      p.norm.out = fused_normed.view();
      p.norm.epsilon = norm.epsilon;
      p.norm.rounding = norm.rounding;
      p.out = out.view();
      p.weights_are_constant = true;
      Run(p, mode);
      EXPECT_EQ(fused_normed.Values(), normed.Values());
      EXPECT_EQ(out.Values(), terms);
      EXPECT_EQ(fused_normed.NumStrayWrites(), 0);

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

// The kernels for few tokens, above all the streaming one, against the tiles,
// which take more: with more tiles than its ring of stages has room for, rows
// past a tile's end, tiles of two blocks of scales in one instruction, several
// passes over the depth.
TEST_P(LinearFp8NeighboursTest, FewTokensHaveTheBitsOfMany) {
  if (device().type == DeviceType::kCpu || dtype() == DType::kFloat32) {
    GTEST_SKIP() << "for the kernels of CUDA";
  }
  constexpr int64_t kMany = 40;
  for (LinearShape shape :
       {LinearShape{kMany, 36011, 144}, LinearShape{kMany, 3333, 2064},
        LinearShape{kMany, 2213, 4112}, LinearShape{kMany, 40, 12304}}) {
    for (bool per_channel : {false, true}) {
      const LinearFp8Call all(device(), dtype(), shape,
                              {per_channel, true, true, 0});
      const std::vector<double> expected =
          OutOf(all, LinearMode::kBatchInvariant);
      for (int64_t tokens : {1, 3, 4, 5, 16}) {
        SCOPED_TRACE(StrCat(tokens, "x", shape.out_features, "x",
                            shape.in_features, per_channel ? " channels" : ""));
        const int64_t first = kMany - tokens;
        const TestTensor out(device(), DType::kFloat32,
                             {tokens, shape.out_features});
        LinearParams p = all.params();
        p.x = Rows(p.x, first, tokens);
        p.out = out.view();
        p.weights_are_constant = true;
        Run(p, LinearMode::kDefault);
        const std::vector<double> actual = out.Values();
        ASSERT_EQ(
            std::memcmp(actual.data(), &expected[first * shape.out_features],
                        actual.size() * sizeof(double)),
            0);
      }
    }
  }
}

TEST_P(LinearFp8NeighboursTest, TermsGiveTheBitsOfASeparateSum) {
  for (LinearShape shape : std::vector<LinearShape>{{1, 136, 2048},
                                                    {1, 24, 4096},
                                                    {1, 40, 336},
                                                    {1, 13, 111},
                                                    {3, 72, 2048}}) {
    const LinearFp8Call call(device(), dtype(), shape, {false, true, false, 0});
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

INSTANTIATE_TEST_SUITE_P(Targets, LinearFp8NeighboursTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
