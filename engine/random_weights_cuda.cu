#include <algorithm>

#include "engine/random_weights_backend.h"
#include "ops/core/core_cuda.cuh"

namespace tenon {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU; each strides over the part.
constexpr int64_t kMaxBlocks = 4096;

// Stored as its bits: CUDA's class converts in other ways as well.
struct Fp8 {
  __nv_fp8_storage_t bits;
};

template <class T>
__device__ T Rounded(float value) {
  return cuda::FromFloat<T>(value);
}
template <>
__device__ Fp8 Rounded<Fp8>(float value) {
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
}

template <class T>
__global__ void __launch_bounds__(kThreads) FillRandomKernel(RandomPart part) {
  T* data = static_cast<T*>(part.data);
  const int64_t count = part.rows.size * part.cols.size;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / part.cols.size;
    const int64_t col = i - row * part.cols.size;
    data[i] = Rounded<T>(RandomWeightAt(part, row, col));
  }
}

__global__ void __launch_bounds__(kThreads) FillScalesKernel(RandomPart part) {
  const int64_t count = part.scale_rows * part.scale_stride;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / part.scale_stride;
    part.scales[i] = RandomScaleEntry(part, row, i - row * part.scale_stride);
  }
}

template <class Kernel>
Status Launch(Kernel kernel, const RandomPart& part, int64_t count,
              Stream stream) {
  const int64_t blocks =
      std::min(cuda::CeilDiv(count, int64_t{kThreads}), kMaxBlocks);
  return cuda::Launch("RandomWeights", stream,
                      dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                      kernel, part);
}

}  // namespace

Status FillRandomCuda(const RandomPart& part, Stream stream) {
  const cuda::DeviceGuard guard(part.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const int64_t count = part.rows.size * part.cols.size;
  if (part.dtype == DType::kFloat8E4M3) {
    TENON_RETURN_IF_ERROR(Launch(FillRandomKernel<Fp8>, part, count, stream));
    return Launch(FillScalesKernel, part, part.scale_rows * part.scale_stride,
                  stream);
  }
  return cuda::WithFloatType(part.dtype, [&](auto zero) {
    return Launch(FillRandomKernel<decltype(zero)>, part, count, stream);
  });
}

}  // namespace tenon
