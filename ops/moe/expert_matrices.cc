#include "ops/moe/expert_matrices.h"

#include "ops/core/validate.h"

namespace tenon {
namespace {

bool IsAligned(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % DTypeSize(dtype) == 0;
}

Status CheckPointers(const char* op, const char* field,
                     const ExpertMatrices& m) {
  if ((m.data == nullptr) == (m.table == nullptr)) {
    return InvalidArgumentError(op, ": ", field, " has ",
                                m.data == nullptr ? "neither" : "both",
                                " of data and table, expected one");
  }
  if (m.table != nullptr && m.device.type != DeviceType::kCpu) {
    return InvalidArgumentError(op, ": ", field, " has a table on ",
                                DeviceTypeName(m.device.type),
                                ", expected data");
  }
  for (int64_t e = 0; m.table != nullptr && e < m.num_experts; ++e) {
    if (m.table[e] == nullptr || !IsAligned(m.table[e], m.dtype)) {
      return InvalidArgumentError(op, ": ", field, " table entry ", e,
                                  " is null or not aligned to its elements");
    }
  }
  if (!IsAligned(m.data, m.dtype)) {
    return InvalidArgumentError(op, ": ", field,
                                " has data that is not aligned to its ",
                                DTypeName(m.dtype), " elements");
  }
  return Status();
}

// Of rows [num_experts, rows, cols]. The last element must lie within 2^63
// bytes of the first.
Status CheckStrides(const char* op, const char* field, const char* part,
                    const TensorView& m) {
  const int64_t expert_stride = m.stride[0], row_stride = m.stride[1];
  if (row_stride < m.shape[2]) {
    return InvalidArgumentError(op, ": ", field, part, " has row_stride ",
                                row_stride, ", expected at least ", m.shape[2]);
  }
  if (expert_stride < 0) {
    return InvalidArgumentError(op, ": ", field, part, " has expert_stride ",
                                expert_stride, ", expected >= 0");
  }
  int64_t experts, rows, elements, bytes;
  if (__builtin_mul_overflow(m.shape[0], expert_stride, &experts) ||
      __builtin_mul_overflow(m.shape[1], row_stride, &rows) ||
      __builtin_add_overflow(experts, rows, &elements) ||
      __builtin_mul_overflow(elements, static_cast<int64_t>(DTypeSize(m.dtype)),
                             &bytes)) {
    return InvalidArgumentError(op, ": ", field, part, " with row_stride ",
                                row_stride, " and expert_stride ",
                                expert_stride, " spans more than 2^63 bytes");
  }
  return Status();
}

Status CheckScales(const char* op, const char* field, const ExpertMatrices& m) {
  const ExpertScales& s = m.scales;
  if (!IsFp8(m)) {
    if (s.data == nullptr) return Status();
    return InvalidArgumentError(op, ": ", field, " of dtype ",
                                DTypeName(m.dtype),
                                " has scales, which belong to float8_e4m3");
  }
  if (s.data == nullptr) {
    return InvalidArgumentError(op, ": ", field, " of float8_e4m3 has no ",
                                "scales");
  }
  if (!IsAligned(s.data, DType::kFloat32)) {
    return InvalidArgumentError(op, ": ", field, ".scales has data that is ",
                                "not aligned to its float32 elements");
  }
  const bool of_blocks = s.block_rows == kFp8Block && s.block_cols == kFp8Block;
  const bool of_rows = s.block_rows == 1 && s.block_cols == 0;
  if (!of_blocks && !of_rows) {
    return InvalidArgumentError(op, ": ", field, ".scales has block_rows ",
                                s.block_rows, " and block_cols ", s.block_cols,
                                ", expected 128 and 128, or 1 and 0");
  }
  return CheckStrides(op, field, ".scales", ScalesViewOf(m));
}

}  // namespace

TensorView ViewOf(const ExpertMatrices& m) {
  if (m.table != nullptr) return TensorView();
  return {const_cast<void*>(m.data),
          m.dtype,
          m.device,
          3,
          {m.num_experts, m.rows, m.cols},
          {m.expert_stride, m.row_stride, 1}};
}

TensorView ScalesViewOf(const ExpertMatrices& m) {
  const ExpertScales& s = m.scales;
  if (s.data == nullptr || s.block_rows <= 0) return TensorView();
  const int64_t rows = (m.rows + s.block_rows - 1) / s.block_rows;
  const int64_t cols =
      s.block_cols <= 0 ? 1 : (m.cols + s.block_cols - 1) / s.block_cols;
  return {const_cast<float*>(s.data),
          DType::kFloat32,
          m.device,
          3,
          {m.num_experts, rows, cols},
          {s.expert_stride, s.row_stride, 1}};
}

Status CheckExpertMatrices(const char* op, const char* field,
                           const ExpertMatrices& m, int64_t num_experts,
                           int64_t rows, int64_t cols, DType dtype,
                           Device device) {
  if (m.num_experts != num_experts || m.rows != rows || m.cols != cols) {
    return InvalidArgumentError(op, ": ", field, " has shape [", m.num_experts,
                                ", ", m.rows, ", ", m.cols, "], expected [",
                                num_experts, ", ", rows, ", ", cols, "]");
  }
  if (m.dtype != dtype) {
    return InvalidArgumentError(op, ": ", field, " has dtype ",
                                DTypeName(m.dtype), ", expected ",
                                DTypeName(dtype));
  }
  if (m.device != device) {
    return InvalidArgumentError(op, ": ", field, " is on ",
                                DeviceTypeName(m.device.type), ":",
                                m.device.index, ", expected ",
                                DeviceTypeName(device.type), ":", device.index);
  }
  TENON_RETURN_IF_ERROR(CheckPointers(op, field, m));
  const TensorView strides = {nullptr,
                              m.dtype,
                              m.device,
                              3,
                              {m.num_experts, m.rows, m.cols},
                              {m.expert_stride, m.row_stride, 1}};
  TENON_RETURN_IF_ERROR(CheckStrides(op, field, "", strides));
  return CheckScales(op, field, m);
}

}  // namespace tenon
