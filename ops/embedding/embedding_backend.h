#ifndef TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_
#define TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_

#include "ops/embedding/embedding.h"

namespace tenon {

// The row of the table that a token is; outside it: zeros.
constexpr int64_t EmbeddingId(const EmbeddingParams& p, int64_t token) {
  const int64_t id = p.ids.dtype == DType::kInt64
                         ? p.ids.As<const int64_t>()[token]
                         : p.ids.As<const int32_t>()[token];
  if (!p.previous.present() || id > -2) return id;
  const int64_t place = -2 - id;
  return place < p.previous.shape[0] ? p.previous.As<const int32_t>()[place]
                                     : -1;
}

// Backends trust `params`: Embedding() has validated them.
Status EmbeddingCpu(const EmbeddingParams& params, Stream stream);
Status EmbeddingCuda(const EmbeddingParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_
