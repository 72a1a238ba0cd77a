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
