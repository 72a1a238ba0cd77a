#ifndef TENON_OPS_MOE_EXPERT_MATRICES_H_
#define TENON_OPS_MOE_EXPERT_MATRICES_H_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// Side of a block of weights with one scale.
inline constexpr int32_t kFp8Block = 128;

// The scales of float8_e4m3 matrices: element (r, c) of expert e's matrix
// stands for element * data[e * expert_stride + r / block_rows * row_stride + c
// / block_cols]. Blocks of 128 x 128, the last ones of rows and columns partial
// where 128 does not divide; or one scale per row (per-channel weights), which
// is block_rows 1, block_cols 0 and no column term. On the matrices' device.
struct ExpertScales {
  const float* data = nullptr;
  int64_t expert_stride = 0;  // in floats
  int64_t row_stride = 0;     // in floats, between rows of blocks
  int32_t block_rows = 0;
  int32_t block_cols = 0;
};

// One matrix [rows, cols] per expert, all of one dtype and row stride. Either a
// base pointer and a distance between experts, as in a tensor [num_experts,
// rows, cols], or (on the CPU only) a table with one pointer per expert, as in
// a mapped checkpoint that keeps every expert's matrix on its own.
struct ExpertMatrices {
  const void* data = nullptr;
  int64_t expert_stride = 0;           // in elements
  const void* const* table = nullptr;  // [num_experts], instead of data
  int64_t num_experts = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // in elements, >= cols
  DType dtype = DType::kInvalid;
  Device device;
  ExpertScales scales;  // of float8_e4m3 matrices, which must have them
};

// Row `row` of one expert's matrix, in host memory or as a device address.
inline const void* ExpertRow(const ExpertMatrices& matrices, int64_t expert,
                             int64_t row) {
  const void* base =
      matrices.table != nullptr ? matrices.table[expert] : matrices.data;
  const int64_t offset =
      row * matrices.row_stride +
      (matrices.table != nullptr ? 0 : expert * matrices.expert_stride);
  return static_cast<const char*>(base) +
         offset * static_cast<int64_t>(DTypeSize(matrices.dtype));
}

// All of a contiguous or strided [num_experts, rows, cols] tensor, or `count`
// rows of each expert from `first_row` on (such as the gate or the up half of a
// packed w13).
inline ExpertMatrices MakeExpertMatrices(const TensorView& weights,
                                         int64_t first_row, int64_t count) {
  ExpertMatrices m;
  m.data = weights.data;
  m.expert_stride = weights.stride[0];
  m.num_experts = weights.shape[0];
  m.rows = count;
  m.cols = weights.shape[2];
  m.row_stride = weights.stride[1];
  m.dtype = weights.dtype;
  m.device = weights.device;
  if (first_row != 0) m.data = ExpertRow(m, 0, first_row);
  return m;
}
inline ExpertMatrices MakeExpertMatrices(const TensorView& weights) {
  return MakeExpertMatrices(weights, 0, weights.shape[1]);
}

// Scales in a tensor: [num_experts, ceil(rows / 128), ceil(cols / 128)] of
// blocks, [num_experts, rows] of rows.
inline ExpertScales MakeExpertScales(const TensorView& scales) {
  ExpertScales s;
  s.data = scales.As<const float>();
  s.expert_stride = scales.stride[0];
  s.row_stride = scales.stride[1];
  s.block_rows = scales.rank == 3 ? kFp8Block : 1;
  s.block_cols = scales.rank == 3 ? kFp8Block : 0;
  return s;
}

inline bool IsFp8(const ExpertMatrices& matrices) {
  return matrices.dtype == DType::kFloat8E4M3;
}

// The matrices as one tensor [num_experts, rows, cols]; not present for a
// table.
TensorView ViewOf(const ExpertMatrices& matrices);

// Their scales as one tensor; not present where there are none.
TensorView ScalesViewOf(const ExpertMatrices& matrices);

// Requires `matrices` to have the given shape, dtype and device, pointers and
// strides that can be used, and scales exactly where the dtype is float8_e4m3.
// InvalidArgument names op, field and value.
Status CheckExpertMatrices(const char* op, const char* field,
                           const ExpertMatrices& matrices, int64_t num_experts,
                           int64_t rows, int64_t cols, DType dtype,
                           Device device);

// The dtype that matrices beside a tensor `x` have to have: x's, unless they
// are float8_e4m3.
inline DType ExpertDType(const ExpertMatrices& matrices, const TensorView& x) {
  return IsFp8(matrices) ? matrices.dtype : x.dtype;
}

}  // namespace tenon

#endif  // TENON_OPS_MOE_EXPERT_MATRICES_H_
