#ifndef TENON_OPS_EMBEDDING_EMBEDDING_H_
#define TENON_OPS_EMBEDDING_EMBEDDING_H_

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// out[t] = table[ids[t]], bit for bit. An id outside [0, vocab) gives a row of
// zeros: device memory cannot be checked before the launch.
//
// Shapes: ids [tokens] int32 or int64; table [vocab, hidden], out [tokens,
// hidden], both float32, float16 or bfloat16, alike. Rows of table and out may
// be strided. out overlaps neither input.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero tokens is OK.
struct EmbeddingParams {
  TensorView ids;
  TensorView table;
  TensorView out;
};

Status Embedding(const EmbeddingParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_EMBEDDING_EMBEDDING_H_
