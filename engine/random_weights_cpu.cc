#include "engine/random_weights_backend.h"
#include "ops/core/cpu_thread_pool.h"

namespace tenon {
namespace {

template <class T>
void Fill(const RandomPart& part, Stream stream) {
  T* data = static_cast<T*>(part.data);
  const int64_t cols = part.cols.size;
  const int64_t grain = (int64_t{1} << 16) / cols + 1;
  ParallelFor(stream, part.rows.size, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        data[row * cols + col] = FromFloat<T>(RandomWeightAt(part, row, col));
      }
    }
  });
}

void FillScales(const RandomPart& part) {
  for (int64_t r = 0; r < part.scale_rows; ++r) {
    for (int64_t c = 0; c < part.scale_stride; ++c) {
      part.scales[r * part.scale_stride + c] = RandomScaleEntry(part, r, c);
    }
  }
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
    case DType::kFloat8E4M3:
      Fill<Float8E4M3>(part, stream);
      FillScales(part);
      break;
    default:
      Fill<BFloat16>(part, stream);
      break;
  }
  return Status();
}

}  // namespace tenon
