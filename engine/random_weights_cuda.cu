#include <algorithm>

#include "engine/random_weights_backend.h"
#include "ops/core/core_cuda.cuh"

namespace tenon {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU; each strides over the part.
constexpr int64_t kMaxBlocks = 4096;

template <class T>
__global__ void __launch_bounds__(kThreads) FillRandomKernel(RandomPart part) {
  T* data = static_cast<T*>(part.data);
  const int64_t count = part.rows * part.cols;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / part.cols;
    const int64_t element =
        part.first_element + row * part.full_cols + (i - row * part.cols);
    data[i] = cuda::FromFloat<T>(RandomWeight(part.key, element, part.is_norm));
  }
}

template <class T>
Status Launch(const RandomPart& part, Stream stream) {
  const int64_t blocks = std::min(
      cuda::CeilDiv(part.rows * part.cols, int64_t{kThreads}), kMaxBlocks);
  return cuda::Launch("RandomWeights", stream,
                      dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                      FillRandomKernel<T>, part);
}

}  // namespace

Status FillRandomCuda(const RandomPart& part, Stream stream) {
  const cuda::DeviceGuard guard(part.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(part.dtype, [&](auto zero) {
    return Launch<decltype(zero)>(part, stream);
  });
}

}  // namespace tenon
