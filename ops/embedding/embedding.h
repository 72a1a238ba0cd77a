#ifndef TENON_OPS_EMBEDDING_EMBEDDING_H_
#define TENON_OPS_EMBEDDING_EMBEDDING_H_

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// out[t] = table[ids[t]], bit for bit. An id outside [0, vocab) gives a row of
// zeros: device memory cannot be checked before the launch.
//
// With `previous`, ids that an earlier op left in device memory can be named by
// where they are: an id of -2 - i stands for previous[i], and for a row of
// zeros where there is no such entry.
//
// Shapes: ids [tokens] int32 or int64; previous [any] int32, optional; table
// [vocab, hidden], out [tokens, hidden], both float32, float16 or bfloat16,
// alike. Rows of table and out may be strided. out overlaps no input.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero tokens is OK.
struct EmbeddingParams {
  TensorView ids;
  TensorView table;
  TensorView out;
  TensorView previous = {};  // optional
};

Status Embedding(const EmbeddingParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_EMBEDDING_EMBEDDING_H_
