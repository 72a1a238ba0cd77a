#ifndef TENON_ABI_TENSORS_H_
#define TENON_ABI_TENSORS_H_

#include "abi/tenon.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon::abi {

enum class TensorData {
  kUsed,
  kIgnored,  // by queries: a tensor may have none, and the view's is not real
};

// Reads a caller's tensor, trusting nothing but its pointers, which need not
// even be aligned. The view has less than 2^63 elements, strides that are not
// negative, and an extent that fits the address space; data is aligned to its
// element. Strides that no element is reached by (of dimensions with one
// element, of tensors with none) may be anything, as DLPack's producers leave
// them, and are replaced. Messages begin with `name`: "x.shape[1] is -3, ...".
Status ReadTensor(const char* name, const DLTensor* tensor, TensorData data,
                  TensorView* view);

}  // namespace tenon::abi

#endif  // TENON_ABI_TENSORS_H_
