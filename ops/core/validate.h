#ifndef TENON_OPS_CORE_VALIDATE_H_
#define TENON_OPS_CORE_VALIDATE_H_

#include <cstdint>
#include <initializer_list>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

// Checks shared by the ops. Every failure is an InvalidArgument that names op,
// field and value, such as
//   "RmsNorm: weight has shape [64], expected [128]".

namespace tenon {

// A set of dtypes; build it with DTypes({...}).
using DTypeSet = uint32_t;
constexpr DTypeSet DTypes(std::initializer_list<DType> dtypes) {
  DTypeSet set = 0;
  for (DType dtype : dtypes) set |= 1u << static_cast<int>(dtype);
  return set;
}
inline constexpr DTypeSet kFloatDTypes =
    DTypes({DType::kFloat32, DType::kFloat16, DType::kBFloat16});

// Stands for any size in an expected shape.
inline constexpr int64_t kAnySize = -1;

// Requires `view` to be given, on `device`, of rank shape.size() and of that
// shape, with a dtype of `dtypes`, non-null data aligned to its element unless
// empty, non-negative strides, innermost stride 1, and an extent in bytes that
// fits 63 bits.
Status CheckTensor(const char* op, const char* field, const TensorView& view,
                   std::initializer_list<int64_t> shape, DTypeSet dtypes,
                   Device device);

// As above for a tensor that is written: additionally no two elements may share
// memory.
Status CheckOutput(const char* op, const char* field, const TensorView& view,
                   std::initializer_list<int64_t> shape, DTypeSet dtypes,
                   Device device);

// Requires low <= value <= high.
Status CheckRange(const char* op, const char* field, int64_t value, int64_t low,
                  int64_t high);

// Requires finite low <= value <= high.
Status CheckFinite(const char* op, const char* field, double value, double low,
                   double high);

// A tensor of a call, with its name for messages.
struct NamedView {
  const char* name;
  const TensorView& view;
};

// Requires that `view`, which is written, share no memory with any of `others`.
Status CheckSeparate(const char* op, const NamedView& view,
                     std::initializer_list<NamedView> others);

// Requires `size` >= `needed` bytes of scratch memory, 256-byte aligned (64 on
// the CPU) and apart from `tensors`, all those of the call.
Status CheckWorkspace(const char* op, void* workspace, size_t size,
                      size_t needed, Device device,
                      std::initializer_list<NamedView> tensors);

// False when the two views certainly share no byte: the ranges they span are
// apart, or they interleave at a common stride, as column slices of one matrix
// do.
bool MemoryOverlaps(const TensorView& a, const TensorView& b);

// The error of an op that this build, or this device, has no backend for.
Status NoBackendError(const char* op, Device device);

}  // namespace tenon

#endif  // TENON_OPS_CORE_VALIDATE_H_
