#include "abi/tensors.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace tenon::abi {
namespace {

// What is wrong with a tensor. Reading and telling are apart, so that reading,
// a good part of what a small call costs, stays small.
enum class Fault {
  kNone,
  kDeviceType,
  kDeviceId,
  kDType,
  kRank,
  kNoShape,
  kShape,
  kStride,
  kSize,
  kNoData,
  kAddress,
  kAlignment,
};

// Stands for data that is not accessed. Not null, and aligned for anything.
void* const kNoData = reinterpret_cast<void*>(uintptr_t{4096});

// A value wherever it lies, aligned or not.
template <class T>
T Load(const void* from, size_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + offset, sizeof(value));
  return value;
}

int64_t LoadDim(const int64_t* dims, int index) {
  return Load<int64_t>(dims, static_cast<size_t>(index) * sizeof(int64_t));
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

Fault ReadDevice(const DLTensor* from, Device* device) {
  constexpr size_t kDevice = offsetof(DLTensor, device);
  const auto type =
      Load<int32_t>(from, kDevice + offsetof(DLDevice, device_type));
  const auto id = Load<int32_t>(from, kDevice + offsetof(DLDevice, device_id));
  switch (type) {
    case TENON_DL_CPU:
      *device = {DeviceType::kCpu, 0};
      return id == 0 ? Fault::kNone : Fault::kDeviceId;
    case TENON_DL_CUDA:
      *device = {DeviceType::kCuda, id};
      return id >= 0 ? Fault::kNone : Fault::kDeviceId;
    case TENON_DL_CUDA_HOST:
      *device = {DeviceType::kCpu, 0};
      return Fault::kNone;
    default:
      return Fault::kDeviceType;
  }
}

// Shape and strides of a view with elements of `element` bytes. *bytes: from
// the first to past the last element; 0 for an empty tensor. The rank is a
// constant so that the loops vanish.
template <int kRank>
Fault ReadDims(const int64_t* shape, const int64_t* strides, int64_t element,
               TensorView* view, int64_t* bytes) {
  int64_t signs = 0;
  bool is_empty = false;
  for (int i = 0; i < kRank; ++i) {
    const int64_t size = LoadDim(shape, i);
    view->shape[i] = size;
    signs |= size;
    is_empty |= size == 0;
  }
  if (signs < 0) return Fault::kShape;
  if (is_empty) strides = nullptr;

  int64_t elements = 1;
  int64_t last = 0;     // offset of the last element
  int64_t compact = 1;  // stride that puts this dimension around inner ones
  for (int i = kRank - 1; i >= 0; --i) {
    const int64_t size = std::max<int64_t>(LoadDim(shape, i), 1);
    const int64_t stride =
        strides == nullptr || size == 1 ? compact : LoadDim(strides, i);
    view->stride[i] = stride;
    if (stride < 0) return Fault::kStride;
    if (__builtin_mul_overflow(elements, size, &elements) ||
        __builtin_mul_overflow(size, stride, &compact) ||
        __builtin_add_overflow(last, compact - stride, &last)) {
      return Fault::kSize;
    }
  }
  if (__builtin_add_overflow(last, int64_t{1}, &last) ||
      __builtin_mul_overflow(last, element, bytes)) {
    return Fault::kSize;
  }
  if (is_empty) *bytes = 0;
  return Fault::kNone;
}

Fault ReadLayout(const DLTensor* from, int64_t element, TensorView* view,
                 int64_t* bytes) {
  const auto* shape = Load<const int64_t*>(from, offsetof(DLTensor, shape));
  const auto* strides = Load<const int64_t*>(from, offsetof(DLTensor, strides));
  view->rank = Load<int32_t>(from, offsetof(DLTensor, ndim));
  if (shape == nullptr) {
    return view->rank < 1 || view->rank > kMaxRank ? Fault::kRank
                                                   : Fault::kNoShape;
  }
  static_assert(kMaxRank == 4);
  switch (view->rank) {
    case 1:
      return ReadDims<1>(shape, strides, element, view, bytes);
    case 2:
      return ReadDims<2>(shape, strides, element, view, bytes);
    case 3:
      return ReadDims<3>(shape, strides, element, view, bytes);
    case 4:
      return ReadDims<4>(shape, strides, element, view, bytes);
    default:
      return Fault::kRank;
  }
}

Fault ReadData(const DLTensor* from, int64_t element, int64_t bytes,
               void** to) {
  const auto data = Load<uintptr_t>(from, offsetof(DLTensor, data));
  const auto offset = Load<uint64_t>(from, offsetof(DLTensor, byte_offset));
  if (data == 0) return Fault::kNoData;
  uint64_t begin, end;
  if (__builtin_add_overflow(data, offset, &begin) ||
      __builtin_add_overflow(begin, static_cast<uint64_t>(bytes), &end) ||
      end > uint64_t{std::numeric_limits<int64_t>::max()}) {
    return Fault::kAddress;
  }
  if ((begin & static_cast<uint64_t>(element - 1)) != 0) {
    return Fault::kAlignment;
  }
  *to = reinterpret_cast<void*>(begin);
  return Fault::kNone;
}

Fault Read(const DLTensor* from, TensorData data, TensorView* view) {
  Fault fault = ReadDevice(from, &view->device);
  if (fault != Fault::kNone) return fault;
  const auto type = Load<DLDataType>(from, offsetof(DLTensor, dtype));
  view->dtype = DTypeOf(type);
  if (view->dtype == DType::kInvalid) return Fault::kDType;
  const int64_t element = type.bits / 8;
  int64_t bytes;
  fault = ReadLayout(from, element, view, &bytes);
  if (fault != Fault::kNone) return fault;
  view->data = kNoData;
  if (bytes == 0 || data == TensorData::kIgnored) return Fault::kNone;
  return ReadData(from, element, bytes, &view->data);
}

// Of the last negative one; a stride of a single element does not count.
Status NegativeError(const char* name, const char* field, const int64_t* dims,
                     const DLTensor& tensor) {
  int i = tensor.ndim - 1;
  while (i > 0 && (LoadDim(dims, i) >= 0 || LoadDim(tensor.shape, i) == 1)) --i;
  return InvalidArgumentError(name, ".", field, "[", i, "] is ",
                              LoadDim(dims, i), ", expected >= 0");
}

__attribute__((noinline, cold)) Status ToStatus(Fault fault, const char* name,
                                                const DLTensor& tensor) {
  const int32_t device_type = tensor.device.device_type;
  switch (fault) {
    case Fault::kNone:
      return Status();
    case Fault::kDeviceType:
      return InvalidArgumentError(
          name, ".device.device_type is ", device_type,
          ", expected 1 (CPU), 2 (CUDA) or 3 (CUDA host)");
    case Fault::kDeviceId:
      return InvalidArgumentError(
          name, ".device.device_id is ", tensor.device.device_id,
          device_type == TENON_DL_CPU ? ", expected 0 on the CPU"
                                      : ", expected >= 0");
    case Fault::kDType:
      return InvalidArgumentError(
          name, ".dtype is {code ", int{tensor.dtype.code}, ", bits ",
          int{tensor.dtype.bits}, ", lanes ", tensor.dtype.lanes,
          "}, expected float32, float16, bfloat16, float8_e4m3fn, int32, int64 "
          "or uint8 of one lane");
    case Fault::kRank:
      return InvalidArgumentError(name, ".ndim is ", tensor.ndim,
                                  ", expected 1 to ", kMaxRank);
    case Fault::kNoShape:
      return InvalidArgumentError(name, ".shape is null");
    case Fault::kShape:
      return NegativeError(name, "shape", tensor.shape, tensor);
    case Fault::kStride:
      return NegativeError(name, "strides", tensor.strides, tensor);
    case Fault::kSize:
      return InvalidArgumentError(name, ".shape and ", name,
                                  ".strides make more elements or bytes than "
                                  "fit 63 bits");
    case Fault::kNoData:
      return InvalidArgumentError(name, ".data is null");
    case Fault::kAddress:
      return InvalidArgumentError(name, " with data ", tensor.data,
                                  " and byte_offset ", tensor.byte_offset,
                                  " ends past the address space");
    case Fault::kAlignment:
      return InvalidArgumentError(name, ".data is ", tensor.data,
                                  " with byte_offset ", tensor.byte_offset,
                                  ", not aligned to its elements");
  }
  return InternalError(name, " cannot be read");
}

}  // namespace

Status ReadTensor(const char* name, const DLTensor* from, TensorData data,
                  TensorView* view) {
  const Fault fault = Read(from, data, view);
  if (fault == Fault::kNone) return Status();
  return ToStatus(fault, name, Load<DLTensor>(from, 0));
}

}  // namespace tenon::abi
