#include "abi/tensors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace tenon::abi {
namespace {

// Stands for data that is not accessed. Not null, and aligned for anything.
void* const kNoData = reinterpret_cast<void*>(uintptr_t{4096});

// Wherever the caller's arrays begin, aligned or not.
int64_t Load(const int64_t* values, int index) {
  int64_t value;
  std::memcpy(&value, values + index, sizeof(value));
  return value;
}

constexpr uint32_t TypeKey(uint32_t code, uint32_t bits, uint32_t lanes) {
  return code | bits << 8 | lanes << 16;
}

DType DTypeOf(DLDataType type) {
  switch (TypeKey(type.code, type.bits, type.lanes)) {
    case TypeKey(TENON_DL_FLOAT, 32, 1):
      return DType::kFloat32;
    case TypeKey(TENON_DL_FLOAT, 16, 1):
      return DType::kFloat16;
    case TypeKey(TENON_DL_BFLOAT, 16, 1):
      return DType::kBFloat16;
    case TypeKey(TENON_DL_FLOAT8_E4M3FN, 8, 1):
      return DType::kFloat8E4M3;
    case TypeKey(TENON_DL_INT, 32, 1):
      return DType::kInt32;
    case TypeKey(TENON_DL_INT, 64, 1):
      return DType::kInt64;
    case TypeKey(TENON_DL_UINT, 8, 1):
      return DType::kUInt8;
    default:
      return DType::kInvalid;
  }
}

Status ReadDType(const char* name, DLDataType type, DType* dtype) {
  *dtype = DTypeOf(type);
  if (*dtype != DType::kInvalid) return Status();
  return InvalidArgumentError(
      name, ".dtype is {code ", int{type.code}, ", bits ", int{type.bits},
      ", lanes ", type.lanes,
      "}, expected float32, float16, bfloat16, float8_e4m3fn, int32, int64 or "
      "uint8 of one lane");
}

Status ReadDevice(const char* name, DLDevice from, Device* device) {
  const int32_t type = from.device_type;
  switch (type) {
    case TENON_DL_CPU:
      if (from.device_id != 0) {
        return InvalidArgumentError(name, ".device.device_id is ",
                                    from.device_id, ", expected 0 on the CPU");
      }
      [[fallthrough]];
    case TENON_DL_CUDA_HOST:
      *device = {DeviceType::kCpu, 0};
      return Status();
    case TENON_DL_CUDA:
      if (from.device_id < 0) {
        return InvalidArgumentError(name, ".device.device_id is ",
                                    from.device_id, ", expected >= 0");
      }
      *device = {DeviceType::kCuda, from.device_id};
      return Status();
    default:
      return InvalidArgumentError(name, ".device.device_type is ", type,
                                  ", expected 1 (CPU), 2 (CUDA) or 3 (CUDA "
                                  "host)");
  }
}

Status ReadShape(const char* name, const DLTensor& tensor, TensorView* view,
                 bool* is_empty) {
  if (tensor.ndim < 1 || tensor.ndim > kMaxRank) {
    return InvalidArgumentError(name, ".ndim is ", tensor.ndim,
                                ", expected 1 to ", kMaxRank);
  }
  if (tensor.shape == nullptr) {
    return InvalidArgumentError(name, ".shape is null");
  }
  view->rank = tensor.ndim;
  *is_empty = false;
  for (int i = 0; i < view->rank; ++i) {
    view->shape[i] = Load(tensor.shape, i);
    if (view->shape[i] < 0) {
      return InvalidArgumentError(name, ".shape[", i, "] is ", view->shape[i],
                                  ", expected >= 0");
    }
    if (view->shape[i] == 0) *is_empty = true;
  }
  return Status();
}

Status TooLargeError(const char* name, const char* what) {
  return InvalidArgumentError(name, ".shape and ", name, ".strides make ", what,
                              " than fit 63 bits");
}

// Fills in the strides. *bytes: from the first to past the last element.
Status ReadStrides(const char* name, const int64_t* strides, TensorView* view,
                   int64_t* bytes) {
  int64_t elements = 1;
  int64_t last = 0;     // offset of the last element
  int64_t compact = 1;  // stride that puts this dimension around inner ones
  for (int i = view->rank - 1; i >= 0; --i) {
    const int64_t size = std::max<int64_t>(view->shape[i], 1);
    int64_t& stride = view->stride[i];
    stride = strides == nullptr || size == 1 ? compact : Load(strides, i);
    if (stride < 0) {
      return InvalidArgumentError(name, ".strides[", i, "] is ", stride,
                                  ", expected >= 0");
    }
    if (__builtin_mul_overflow(elements, size, &elements)) {
      return TooLargeError(name, "more elements");
    }
    int64_t step;
    if (__builtin_mul_overflow(size, stride, &compact) ||
        __builtin_mul_overflow(size - 1, stride, &step) ||
        __builtin_add_overflow(last, step, &last)) {
      return TooLargeError(name, "more bytes");
    }
  }
  if (last == std::numeric_limits<int64_t>::max() ||
      __builtin_mul_overflow(
          last + 1, static_cast<int64_t>(DTypeSize(view->dtype)), bytes)) {
    return TooLargeError(name, "more bytes");
  }
  return Status();
}

Status ReadData(const char* name, const DLTensor& tensor, int64_t bytes,
                TensorView* view) {
  if (tensor.data == nullptr) {
    return InvalidArgumentError(name, ".data is null");
  }
  uint64_t begin, end;
  if (__builtin_add_overflow(reinterpret_cast<uintptr_t>(tensor.data),
                             tensor.byte_offset, &begin) ||
      __builtin_add_overflow(begin, static_cast<uint64_t>(bytes), &end) ||
      end > uint64_t{std::numeric_limits<int64_t>::max()}) {
    return InvalidArgumentError(name, " with data ", tensor.data,
                                ", byte_offset ", tensor.byte_offset, " and ",
                                bytes, " bytes ends past the address space");
  }
  const size_t size = DTypeSize(view->dtype);
  if ((begin & (size - 1)) != 0) {
    return InvalidArgumentError(
        name, ".data is ", tensor.data, " with byte_offset ",
        tensor.byte_offset, ", not aligned to its ", size, "-byte elements");
  }
  view->data = reinterpret_cast<void*>(begin);
  return Status();
}

}  // namespace

Status ReadTensor(const char* name, const DLTensor* from, TensorData data,
                  TensorView* view) {
  DLTensor tensor;
  std::memcpy(&tensor, static_cast<const void*>(from), sizeof(tensor));
  bool is_empty;
  int64_t bytes;
  TENON_RETURN_IF_ERROR(ReadDevice(name, tensor.device, &view->device));
  TENON_RETURN_IF_ERROR(ReadDType(name, tensor.dtype, &view->dtype));
  TENON_RETURN_IF_ERROR(ReadShape(name, tensor, view, &is_empty));
  TENON_RETURN_IF_ERROR(
      ReadStrides(name, is_empty ? nullptr : tensor.strides, view, &bytes));
  if (!is_empty && data == TensorData::kUsed) {
    return ReadData(name, tensor, bytes, view);
  }
  view->data = kNoData;
  return Status();
}

}  // namespace tenon::abi
