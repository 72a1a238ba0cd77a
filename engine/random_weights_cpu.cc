#include "engine/random_weights_backend.h"
#include "ops/core/cpu_thread_pool.h"

namespace tenon {
namespace {

template <class T>
void Fill(const RandomPart& part, Stream stream) {
  T* data = static_cast<T*>(part.data);
  const int64_t grain = (int64_t{1} << 16) / part.cols + 1;
  ParallelFor(stream, part.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = part.first_element + row * part.full_cols;
      T* out = data + row * part.cols;
      for (int64_t col = 0; col < part.cols; ++col) {
        out[col] =
            FromFloat<T>(RandomWeight(part.key, first + col, part.is_norm));
      }
    }
  });
}

}  // namespace

Status FillRandomCpu(const RandomPart& part, Stream stream) {
  switch (part.dtype) {
    case DType::kFloat32:
      Fill<float>(part, stream);
      break;
    case DType::kFloat16:
      Fill<Float16>(part, stream);
      break;
    default:
      Fill<BFloat16>(part, stream);
      break;
  }
  return Status();
}

}  // namespace tenon
