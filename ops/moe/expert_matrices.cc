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

// The last element must lie within 2^63 bytes of the first.
Status CheckStrides(const char* op, const char* field,
                    const ExpertMatrices& m) {
  if (m.row_stride < m.cols) {
    return InvalidArgumentError(op, ": ", field, " has row_stride ",
                                m.row_stride, ", expected at least ", m.cols);
  }
  if (m.expert_stride < 0) {
    return InvalidArgumentError(op, ": ", field, " has expert_stride ",
                                m.expert_stride, ", expected >= 0");
  }
  int64_t experts, rows, elements, bytes;
  if (__builtin_mul_overflow(m.num_experts, m.expert_stride, &experts) ||
      __builtin_mul_overflow(m.rows, m.row_stride, &rows) ||
      __builtin_add_overflow(experts, rows, &elements) ||
      __builtin_mul_overflow(elements, static_cast<int64_t>(DTypeSize(m.dtype)),
                             &bytes)) {
    return InvalidArgumentError(op, ": ", field, " with row_stride ",
                                m.row_stride, " and expert_stride ",
                                m.expert_stride, " spans more than 2^63 bytes");
  }
  return Status();
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
  return CheckStrides(op, field, m);
}

}  // namespace tenon
