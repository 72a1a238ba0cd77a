#ifndef TENON_ENGINE_SAFETENSORS_H_
#define TENON_ENGINE_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// A tensor of a safetensors file, as it lies there.
struct StoredTensor {
  std::string name;
  // Into the file's bytes; a scalar has shape [1]. Element types that no op
  // knows, such as F64, have dtype kInvalid.
  TensorView view;
  std::string stored_dtype;  // as written, such as "BF16"
  int64_t bytes = 0;
};

// The tensors of a file of the safetensors format, in the order of their data:
//   8 bytes  length of the header, little-endian
//   header   JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}}
//   data     the tensors' bytes, without gaps
// Checked in full, as the bytes may come from anywhere: header within the file
// and the format's limit of 100 MB; every dtype known and shape representable;
// every data range in the file, as long as its shape says, aligned to its
// elements; no overlap, no gap, nothing left over, no name twice. DataLoss for
// anything else, naming `source` and the tensor. "__metadata__" is skipped.
//
// Views last as long as `data`.
StatusOr<std::vector<StoredTensor>> ParseSafetensors(const char* data,
                                                     size_t size,
                                                     const std::string& source);

// Text of a shape for messages: "[2, 3]".
std::string ShapeToString(const TensorView& view);

}  // namespace tenon

#endif  // TENON_ENGINE_SAFETENSORS_H_
