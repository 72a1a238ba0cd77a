#ifndef TENON_TESTS_OPS_LINEAR_NEIGHBOURS_H_
#define TENON_TESTS_OPS_LINEAR_NEIGHBOURS_H_

#include <vector>

#include "ops/rms_norm/rms_norm.h"
#include "tests/ops/linear_fixture.h"
#include "tests/testing/compare.h"

// Calls of Linear with the norm and the residual beside them.

namespace tenon::testing {

class LinearNeighboursTestBase : public LinearTestBase {
 protected:
  // p, whose x holds `x`, with a norm and `count` terms of each token, some of
  // which do not count, gives the bits of the same with the sum for x.
  void ExpectBitsOfSeparateSum(LinearParams p, const std::vector<double>& x,
                               int64_t count, LinearMode mode) {
    const int64_t tokens = p.x.shape[0];
    const int64_t cols = p.x.shape[1];
    constexpr int32_t kNumIds = 7;
    const TestTensor rows(device(), dtype(), {tokens, count, cols},
                          Normal(tokens * count * cols, 51));
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < tokens * count; ++i) ids.push_back(i * 5 % 11 - 2);
    const TestTensor id_tensor =
        TestTensor::FromIntegers(device(), DType::kInt32, {tokens, count}, ids);
    const std::vector<double> terms = rows.InitialValues();
    std::vector<float> sums;
    for (int64_t i = 0; i < tokens * cols; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = i / cols * count + j;
        if (ids[row] < 0 || ids[row] >= kNumIds) continue;
        sum += static_cast<float>(terms[row * cols + i % cols]);
      }
      sum =
          static_cast<float>(RoundTo(dtype(), sum)) + static_cast<float>(x[i]);
      sums.push_back(static_cast<float>(RoundTo(dtype(), sum)));
    }
    const TestTensor sum(device(), dtype(), {tokens, cols}, sums);
    const TestTensor norm_weight(device(), dtype(), {cols},
                                 Normal(cols, 52, 1.0f));
    const TestTensor normed[2] = {{device(), dtype(), {tokens, cols}},
                                  {device(), dtype(), {tokens, cols}}};
    const TestTensor out(device(), p.out.dtype, {tokens, p.out.shape[1]});
    const TestTensor fused(device(), p.out.dtype, {tokens, p.out.shape[1]});
    const TestTensor fused_sum(device(), dtype(), {tokens, cols});
    p.norm.weight = norm_weight.view();
    p.norm.epsilon = 1e-6f;
    p.weights_are_constant = true;
    LinearParams separate = p;
    separate.x = sum.view();
    separate.norm.out = normed[0].view();
    separate.out = out.view();
    Run(separate, mode);
    p.norm.out = normed[1].view();
    p.out = fused.view();
    p.terms = {rows.view(), id_tensor.view(), kNumIds, fused_sum.view()};
    Run(p, mode);
    EXPECT_EQ(fused_sum.Values(), sum.Values());
    EXPECT_EQ(normed[1].Values(), normed[0].Values());
    EXPECT_EQ(fused.Values(), out.Values());
    EXPECT_EQ(fused_sum.NumStrayWrites() + normed[1].NumStrayWrites() +
                  fused.NumStrayWrites(),
              0);
    EXPECT_EQ(rows.Bytes(), rows.InitialBytes());
  }

  // The same for the calls that `make` makes of shapes, in these modes.
  template <class Make>
  void ExpectBitsOfSeparateSums(const Make& make,
                                const std::vector<LinearMode>& modes) {
    for (LinearShape shape : Fewer<LinearShape>({{1, 136, 2048},
                                                 {1, 24, 4096},
                                                 {1, 40, 336},
                                                 {1, 13, 111},
                                                 {3, 72, 2048}},
                                                3)) {
      const auto call = make(shape);
      for (int64_t count : Fewer<int64_t>({1, 8, 11})) {
        for (LinearMode mode : modes) {
          SCOPED_TRACE(StrCat(shape.tokens, "x", shape.out_features, "x",
                              shape.in_features, ", ", count, " terms, ",
                              LinearModeName(mode)));
          ExpectBitsOfSeparateSum(call.params(), call.X(), count, mode);
          if (HasFailure()) return;
        }
      }
    }
  }

  // That norm and residual change a call's launches, but no bit: with residual
  // apart from out and being out. `norm` lacks x and out.
  void ExpectBitsOfSeparateOperations(const LinearParams& call,
                                      RmsNormParams norm, LinearMode mode) {
    const DType out_dtype = call.out.dtype;
    const TestTensor normed = Like(call.x, 35);
    norm.x = call.x;
    norm.out = normed.view();
    ASSERT_TRUE(RmsNorm(norm, stream()).ok());
    const TestTensor product = Like(call.out, 36);
    LinearParams p = call;
    p.x = normed.view();
    p.out = product.view();
    Run(p, mode);
    const std::vector<double> terms = product.Values();
    const TestTensor residual = Like(call.out, 37);
    std::vector<double> sum = residual.InitialValues();
    for (size_t i = 0; i < sum.size(); ++i) {
      sum[i] = RoundTo(
          out_dtype, static_cast<float>(sum[i]) + static_cast<float>(terms[i]));
    }

    const TestTensor fused_normed = Like(call.x, 38);
    const TestTensor out = Like(call.out, 39);
    p.x = call.x;
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
  }

 private:
  // Of the same dtype, shape and strides.
  static TestTensor Like(const TensorView& matrix, uint64_t seed) {
    const int64_t rows = matrix.shape[0];
    const int64_t cols = matrix.shape[1];
    return TestTensor(matrix.device, matrix.dtype, {rows, cols},
                      {matrix.stride[0], 1}, Normal(rows * cols, seed));
  }
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_LINEAR_NEIGHBOURS_H_
