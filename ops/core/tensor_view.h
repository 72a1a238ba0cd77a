#ifndef TENON_OPS_CORE_TENSOR_VIEW_H_
#define TENON_OPS_CORE_TENSOR_VIEW_H_

#include <cstdint>
#include <initializer_list>

#include "ops/core/dtype.h"

namespace tenon {

enum class DeviceType : int32_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
};

inline bool operator==(Device a, Device b) {
  return a.type == b.type && a.index == b.index;
}
inline bool operator!=(Device a, Device b) { return !(a == b); }

constexpr const char* DeviceTypeName(DeviceType type) {
  return type == DeviceType::kCpu ? "cpu" : "cuda";
}

inline constexpr int kMaxRank = 4;

// A non-owning strided window onto memory of one device. Plain data: copied
// into kernels as it is. An op never writes through a view that its header
// lists as an input, so views of constant memory are fine there. rank == 0
// means "not given", for optional tensors.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kInvalid;
  Device device;
  int32_t rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  // constexpr, so that device code may call them too.
  constexpr bool present() const { return rank != 0; }
  template <class T>
  constexpr T* As() const {
    return static_cast<T*>(data);
  }
};

// A row-major contiguous view.
inline TensorView MakeTensor(const void* data, DType dtype, Device device,
                             std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.device = device;
  for (int64_t dim : shape) view.shape[view.rank++] = dim;
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

// The same with rows `row_stride` elements apart.
inline TensorView MakeMatrix(const void* data, DType dtype, Device device,
                             int64_t rows, int64_t cols, int64_t row_stride) {
  TensorView view = MakeTensor(data, dtype, device, {rows, cols});
  view.stride[0] = row_stride;
  return view;
}

inline int64_t NumElements(const TensorView& view) {
  int64_t count = 1;
  for (int i = 0; i < view.rank; ++i) count *= view.shape[i];
  return view.present() ? count : 0;
}

// Columns [first, first + count) of a matrix, sharing its memory.
inline TensorView Columns(const TensorView& matrix, int64_t first,
                          int64_t count) {
  TensorView view = matrix;
  view.data = static_cast<char*>(matrix.data) +
              first * static_cast<int64_t>(DTypeSize(matrix.dtype));
  view.shape[1] = count;
  return view;
}

// Entries [first, first + count) along dimension 0, sharing the memory.
inline TensorView Rows(const TensorView& tensor, int64_t first, int64_t count) {
  TensorView view = tensor;
  view.data =
      static_cast<char*>(tensor.data) +
      first * tensor.stride[0] * static_cast<int64_t>(DTypeSize(tensor.dtype));
  view.shape[0] = count;
  return view;
}

}  // namespace tenon

#endif  // TENON_OPS_CORE_TENSOR_VIEW_H_
