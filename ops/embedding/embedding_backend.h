#ifndef TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_
#define TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_

#include "ops/embedding/embedding.h"

namespace tenon {

// Backends trust `params`: Embedding() has validated them.
Status EmbeddingCpu(const EmbeddingParams& params, Stream stream);
Status EmbeddingCuda(const EmbeddingParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_EMBEDDING_EMBEDDING_BACKEND_H_
