#include "ops/core/validate.h"

#include <cmath>
#include <string>

namespace tenon {
namespace {

// Writes an expected shape's "any size" as *.
std::string ExpectedText(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (int64_t dim : shape) {
    if (text.size() > 1) text += ", ";
    text += dim == kAnySize ? "*" : std::to_string(dim);
  }
  return text + "]";
}

std::string ShapeText(const int64_t* shape, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

std::string DTypeSetText(DTypeSet set) {
  std::string text;
  for (int i = 1; i < 32; ++i) {
    if ((set >> i & 1u) == 0) continue;
    if (!text.empty()) text += " or ";
    text += DTypeName(static_cast<DType>(i));
  }
  return text;
}

std::string DeviceText(Device device) {
  return StrCat(DeviceTypeName(device.type), ":", device.index);
}

// Bytes from the first to past the last element, or -1 when that overflows.
int64_t ExtentBytes(const TensorView& view) {
  int64_t last = 0;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return 0;
    int64_t step;
    if (__builtin_mul_overflow(view.shape[i] - 1, view.stride[i], &step) ||
        __builtin_add_overflow(last, step, &last)) {
      return -1;
    }
  }
  int64_t bytes;
  if (__builtin_add_overflow(last, int64_t{1}, &last) ||
      __builtin_mul_overflow(last, static_cast<int64_t>(DTypeSize(view.dtype)),
                             &bytes)) {
    return -1;
  }
  return bytes;
}

// Whether every element has memory of its own: sorted by stride, each dimension
// must step past all that the smaller ones span. (Sufficient, and necessary for
// the nested layouts that tensors have.)
bool ElementsAreDistinct(const TensorView& view) {
  int order[kMaxRank] = {};
  for (int i = 0; i < view.rank; ++i) {
    int j = i;
    for (; j > 0 && view.stride[order[j - 1]] > view.stride[i]; --j) {
      order[j] = order[j - 1];
    }
    order[j] = i;
  }
  int64_t span = 1;
  for (int i = 0; i < view.rank; ++i) {
    const int dim = order[i];
    if (view.shape[dim] <= 1) continue;
    if (view.stride[dim] < span) return false;
    span += (view.shape[dim] - 1) * view.stride[dim];
  }
  return true;
}

// Not NumElements() == 0: that product may overflow in a view with strides of
// 0.
bool IsEmpty(const TensorView& view) {
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return true;
  }
  return !view.present();
}

// Bytes spanned modulo `period` bytes: dimensions that step by multiples of it
// add nothing.
int64_t SpanModulo(const TensorView& view, int64_t period) {
  const int64_t element = static_cast<int64_t>(DTypeSize(view.dtype));
  int64_t span = element;
  for (int i = 0; i < view.rank; ++i) {
    const int64_t step = view.stride[i] * element;
    if (step % period != 0) span += (view.shape[i] - 1) * step;
  }
  return span;
}

// Whether the bytes of `a` and `b` fall into different parts of every period.
bool AreDisjointModulo(const TensorView& a, const TensorView& b,
                       int64_t period) {
  const int64_t a_span = SpanModulo(a, period);
  const int64_t b_span = SpanModulo(b, period);
  const int64_t distance =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data) -
                           reinterpret_cast<uintptr_t>(a.data));
  const int64_t offset = (distance % period + period) % period;
  return offset >= a_span && b_span <= period - offset;
}

}  // namespace

Status CheckTensor(const char* op, const char* field, const TensorView& view,
                   std::initializer_list<int64_t> shape, DTypeSet dtypes,
                   Device device) {
  const int rank = static_cast<int>(shape.size());
  if (!view.present()) {
    return InvalidArgumentError(op, ": ", field, " is missing");
  }
  if (view.rank != rank) {
    return InvalidArgumentError(op, ": ", field, " has rank ", view.rank,
                                ", expected ", rank);
  }
  const int dtype = static_cast<int>(view.dtype);
  if (dtype <= 0 || dtype >= 32 || (dtypes >> dtype & 1u) == 0) {
    return InvalidArgumentError(op, ": ", field, " has dtype ",
                                DTypeName(view.dtype), ", expected ",
                                DTypeSetText(dtypes));
  }
  if (view.device != device) {
    return InvalidArgumentError(op, ": ", field, " is on ",
                                DeviceText(view.device), ", expected ",
                                DeviceText(device));
  }
  for (int i = 0; i < rank; ++i) {
    const int64_t expected = shape.begin()[i];
    if (view.shape[i] < 0 ||
        (expected != kAnySize && view.shape[i] != expected)) {
      return InvalidArgumentError(op, ": ", field, " has shape ",
                                  ShapeText(view.shape, rank), ", expected ",
                                  ExpectedText(shape));
    }
    if (view.stride[i] < 0) {
      return InvalidArgumentError(op, ": ", field, " has stride ",
                                  view.stride[i], " in dimension ", i,
                                  ", expected >= 0");
    }
  }
  if (rank > 0 && view.shape[rank - 1] > 1 && view.stride[rank - 1] != 1) {
    return InvalidArgumentError(op, ": ", field, " has innermost stride ",
                                view.stride[rank - 1], ", expected 1");
  }
  const int64_t extent = ExtentBytes(view);
  if (extent < 0) {
    return InvalidArgumentError(op, ": ", field, " with shape ",
                                ShapeText(view.shape, rank), " and strides ",
                                ShapeText(view.stride, rank),
                                " spans more than 2^63 bytes");
  }
  if (extent > 0 && view.data == nullptr) {
    return InvalidArgumentError(op, ": ", field, " has null data");
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(view.data);
  if (extent > 0 && address % DTypeSize(view.dtype) != 0) {
    return InvalidArgumentError(op, ": ", field,
                                " has data that is not aligned to its ",
                                DTypeName(view.dtype), " elements");
  }
  return Status();
}

Status CheckOutput(const char* op, const char* field, const TensorView& view,
                   std::initializer_list<int64_t> shape, DTypeSet dtypes,
                   Device device) {
  TENON_RETURN_IF_ERROR(CheckTensor(op, field, view, shape, dtypes, device));
  if (!IsEmpty(view) && !ElementsAreDistinct(view)) {
    return InvalidArgumentError(op, ": ", field,
                                " has elements that share memory: shape ",
                                ShapeText(view.shape, view.rank), ", strides ",
                                ShapeText(view.stride, view.rank));
  }
  return Status();
}

Status CheckRange(const char* op, const char* field, int64_t value, int64_t low,
                  int64_t high) {
  if (value >= low && value <= high) return Status();
  return InvalidArgumentError(op, ": ", field, " is ", value, ", expected ",
                              low, " to ", high);
}

Status CheckFinite(const char* op, const char* field, double value, double low,
                   double high) {
  if (std::isfinite(value) && value >= low && value <= high) return Status();
  return InvalidArgumentError(op, ": ", field, " is ", value, ", expected ",
                              low, " to ", high);
}

Status CheckSeparate(const char* op, const NamedView& view,
                     std::initializer_list<NamedView> others) {
  for (const NamedView& other : others) {
    if (MemoryOverlaps(view.view, other.view)) {
      return InvalidArgumentError(op, ": ", view.name, " overlaps ",
                                  other.name);
    }
  }
  return Status();
}

Status CheckWorkspace(const char* op, void* workspace, size_t size,
                      size_t needed, Device device,
                      std::initializer_list<NamedView> tensors) {
  if (needed == 0) return Status();
  if (workspace == nullptr) {
    return InvalidArgumentError(op, ": workspace is null, expected ", needed,
                                " bytes");
  }
  if (size < needed) {
    return InvalidArgumentError(op, ": workspace_size is ", size,
                                ", expected at least ", needed);
  }
  const uintptr_t alignment = device.type == DeviceType::kCuda ? 256 : 64;
  if (reinterpret_cast<uintptr_t>(workspace) % alignment != 0) {
    return InvalidArgumentError(op, ": workspace is not aligned to ", alignment,
                                " bytes");
  }
  const TensorView scratch = MakeTensor(workspace, DType::kUInt8, device,
                                        {static_cast<int64_t>(needed)});
  return CheckSeparate(op, {"workspace", scratch}, tensors);
}

bool MemoryOverlaps(const TensorView& a, const TensorView& b) {
  if (a.device != b.device || IsEmpty(a) || IsEmpty(b)) return false;
  const uintptr_t a_begin = reinterpret_cast<uintptr_t>(a.data);
  const uintptr_t b_begin = reinterpret_cast<uintptr_t>(b.data);
  if (a_begin >= b_begin + static_cast<uintptr_t>(ExtentBytes(b)) ||
      b_begin >= a_begin + static_cast<uintptr_t>(ExtentBytes(a))) {
    return false;
  }
  for (const TensorView* view : {&a, &b}) {
    for (int i = 0; i < view->rank; ++i) {
      const int64_t period =
          view->stride[i] * static_cast<int64_t>(DTypeSize(view->dtype));
      if (view->shape[i] > 1 && period > 0 && AreDisjointModulo(a, b, period)) {
        return false;
      }
    }
  }
  return true;
}

Status NoBackendError(const char* op, Device device) {
  return UnimplementedError(op, ": this build has no backend for ",
                            DeviceText(device));
}

}  // namespace tenon
