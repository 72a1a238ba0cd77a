#include <cstring>

#include "ops/core/cpu_thread_pool.h"
#include "ops/embedding/embedding_backend.h"

namespace tenon {

Status EmbeddingCpu(const EmbeddingParams& p, Stream stream) {
  const int64_t element = static_cast<int64_t>(DTypeSize(p.out.dtype));
  const int64_t row_bytes = p.out.shape[1] * element;
  // Rows of about 64 KiB a piece, so that threads are worth waking.
  const int64_t grain = 65536 / row_bytes + 1;
  ParallelFor(stream, p.out.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t id = EmbeddingId(p, row);
      char* out = p.out.As<char>() + row * p.out.stride[0] * element;
      if (id < 0 || id >= p.table.shape[0]) {
        std::memset(out, 0, static_cast<size_t>(row_bytes));
        continue;
      }
      const char* from =
          p.table.As<const char>() + id * p.table.stride[0] * element;
      std::memcpy(out, from, static_cast<size_t>(row_bytes));
    }
  });
  return Status();
}

}  // namespace tenon
