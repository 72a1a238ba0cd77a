#ifndef TENON_TESTS_OPS_EXPERT_WEIGHTS_H_
#define TENON_TESTS_OPS_EXPERT_WEIGHTS_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/moe/expert_matrices.h"
#include "tests/reference/quantize_reference.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

// Random matrices of experts, of fp8 too, for the suites of the MoE ops.

namespace tenon::moe_test {

// What the experts' matrices are of.
enum class Experts { kAsX, kFp8Blocks, kFp8Rows };

inline bool IsFp8(Experts experts) { return experts != Experts::kAsX; }

// A row of activations as fp8 keeps it.
inline std::vector<double> Quantised(const std::vector<double>& row) {
  const auto cols = static_cast<int64_t>(row.size());
  return reference::QuantizeFp8(row, 1, cols, 1, 128).Dequantized();
}

// Matrices of all experts with their scales, if they are fp8.
class Weights {
 public:
  Weights() = default;
  Weights(Device device, DType dtype, Experts experts,
          std::vector<int64_t> shape, int64_t padding, uint64_t seed)
      : Weights(device, dtype, experts, shape,
                {shape[1] * (shape[2] + padding), shape[2] + padding, 1},
                padding, seed) {}
  // With strides of the elements.
  Weights(Device device, DType dtype, Experts experts,
          std::vector<int64_t> shape, std::vector<int64_t> strides,
          int64_t padding, uint64_t seed)
      : experts_(experts) {
    const int64_t count = shape[0] * shape[1] * shape[2];
    const float stddev = 1.0f / std::sqrt(static_cast<float>(shape[2]));
    if (experts == Experts::kAsX) {
      elements_ =
          testing::TestTensor(device, dtype, shape, strides,
                              testing::Normal(count, seed, 0.0f, stddev));
      return;
    }
    elements_ = testing::TestTensor(device, DType::kFloat8E4M3, shape, strides,
                                    testing::Normal(count, seed, 0.0f, 100.0f));
    const bool blocks = experts == Experts::kFp8Blocks;
    const int64_t rows = blocks ? (shape[1] + 127) / 128 : shape[1];
    const int64_t cols = blocks ? (shape[2] + 127) / 128 : 1;
    const int64_t row_stride = cols + padding;
    scales_ =
        testing::TestTensor(device, DType::kFloat32, {shape[0], rows, cols},
                            {rows * row_stride + padding, row_stride, 1},
                            testing::Normal(shape[0] * rows * cols, seed + 100,
                                            stddev / 100.0f, stddev / 400.0f));
  }

  ExpertMatrices matrices() const {
    ExpertMatrices m = MakeExpertMatrices(elements_.view());
    if (experts_ == Experts::kAsX) return m;
    m.scales = MakeExpertScales(scales_.view());
    if (experts_ == Experts::kFp8Rows) {
      m.scales.block_rows = 1;
      m.scales.block_cols = 0;
    }
    return m;
  }

  // What the elements stand for.
  std::vector<double> Values() const {
    std::vector<double> values = elements_.InitialValues();
    if (experts_ == Experts::kAsX) return values;
    const std::vector<double> scales = scales_.InitialValues();
    const TensorView& view = elements_.view();
    const TensorView& of_scales = scales_.view();
    const bool blocks = experts_ == Experts::kFp8Blocks;
    const int64_t rows = view.shape[1], cols = view.shape[2];
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      const int64_t r = i / cols % rows, c = i % cols;
      const int64_t block = blocks ? r / 128 * of_scales.shape[2] + c / 128 : r;
      values[i] *=
          scales[i / cols / rows * of_scales.shape[1] * of_scales.shape[2] +
                 block];
    }
    return values;
  }

  const testing::TestTensor& elements() const { return elements_; }
  const testing::TestTensor& scales() const { return scales_; }

 private:
  Experts experts_ = Experts::kAsX;
  testing::TestTensor elements_, scales_;
};

}  // namespace tenon::moe_test

#endif  // TENON_TESTS_OPS_EXPERT_WEIGHTS_H_
