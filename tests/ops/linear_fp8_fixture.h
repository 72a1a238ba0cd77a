#ifndef TENON_TESTS_OPS_LINEAR_FP8_FIXTURE_H_
#define TENON_TESTS_OPS_LINEAR_FP8_FIXTURE_H_

#include <cmath>
#include <vector>

#include "ops/quantize/fp8_scale.h"
#include "tests/ops/linear_fixture.h"
#include "tests/reference/quantize_reference.h"

// Calls of Linear with float8_e4m3 weights.

namespace tenon::testing {

struct LinearFp8Options {
  bool per_channel = false;
  bool bias = false;
  bool float_out = false;
  int64_t padding = 0;  // elements between rows; odd ones make them unaligned
};

// Positive scales, far from each other, so that a wrong one shows.
inline std::vector<float> Fp8TestScales(int64_t count, uint64_t seed) {
  std::vector<float> scales = Normal(count, seed);
  for (float& s : scales) s = std::exp2(s) / 64;
  return scales;
}

// The tensors of one call.
class LinearFp8Call {
 public:
  LinearFp8Call(Device device, DType dtype, LinearShape s, LinearFp8Options o,
                uint64_t seed = 1)
      : x_(Matrix(device, dtype, s.tokens, s.in_features, o.padding,
                  Normal(s.tokens * s.in_features, seed))),
        weight_(Matrix(
            device, DType::kFloat8E4M3, s.out_features, s.in_features,
            o.padding,
            Normal(s.out_features * s.in_features, seed + 1, 0.0f, 30.0f))),
        out_(Matrix(device, o.float_out ? DType::kFloat32 : dtype, s.tokens,
                    s.out_features, o.padding, {})),
        shape_(s),
        options_(o) {
    if (o.bias) {
      bias_ = TestTensor(device, dtype, {s.out_features},
                         Normal(s.out_features, seed + 2));
    }
    if (o.per_channel) {
      scales_ = TestTensor(device, DType::kFloat32, {s.out_features},
                           Fp8TestScales(s.out_features, seed + 3));
      return;
    }
    const int64_t rows = NumFp8Groups(s.out_features);
    const int64_t cols = NumFp8Groups(s.in_features);
    // As cuBLASLt likes them.
    scales_ = TestTensor(device, DType::kFloat32, {rows, cols},
                         {(cols + 3) / 4 * 4, 1},
                         Fp8TestScales(rows * cols, seed + 3));
  }

  LinearParams params() const {
    LinearParams p;
    p.x = x_.view();
    p.weight = weight_.view();
    p.weight_scales = scales_.view();
    p.bias = bias_.view();
    p.out = out_.view();
    return p;
  }

  std::vector<double> Values() const { return out_.Values(); }
  std::vector<double> X() const { return x_.InitialValues(); }

  // Of x and weight as quantised.
  reference::LinearResult Expected() const {
    const auto [tokens, rows, cols] = shape_;
    std::vector<double> weight = weight_.InitialValues();
    const std::vector<double> scales = scales_.InitialValues();
    for (int64_t i = 0; i < rows * cols; ++i) {
      const int64_t row = i / cols;
      weight[i] *=
          options_.per_channel
              ? scales[row]
              : scales[row / 128 * NumFp8Groups(cols) + i % cols / 128];
    }
    const std::vector<double> x =
        reference::QuantizeFp8(x_.InitialValues(), tokens, cols, 1, 128)
            .Dequantized();
    return reference::Linear(
        x, weight,
        options_.bias ? bias_.InitialValues() : std::vector<double>(), tokens,
        rows, cols);
  }

  void ExpectOnlyOutChanged() const {
    EXPECT_EQ(x_.Bytes(), x_.InitialBytes());
    EXPECT_EQ(weight_.Bytes(), weight_.InitialBytes());
    EXPECT_EQ(scales_.Bytes(), scales_.InitialBytes());
    EXPECT_EQ(out_.NumStrayWrites(), 0);
  }

 private:
  static TestTensor Matrix(Device device, DType dtype, int64_t rows,
                           int64_t cols, int64_t padding,
                           const std::vector<float>& values) {
    return TestTensor(device, dtype, {rows, cols}, {cols + padding, 1}, values);
  }

  TestTensor x_;
  TestTensor weight_;
  TestTensor scales_;
  TestTensor bias_;
  TestTensor out_;
  LinearShape shape_;
  LinearFp8Options options_;
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_LINEAR_FP8_FIXTURE_H_
