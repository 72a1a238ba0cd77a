#include "ops/core/core_cuda.cuh"
#include "tests/ops/launch_kernel.h"

namespace tenon::testing {
namespace {

constexpr int kThreads = 128;
constexpr int kStaticWords = 1024;

// One block.
__global__ void __launch_bounds__(kThreads)
    SharedKernel(unsigned words, int64_t* sum) {
  extern __shared__ int32_t dynamic_words[];
  __shared__ int32_t static_words[kStaticWords];
  for (unsigned i = threadIdx.x; i < words; i += kThreads) dynamic_words[i] = 4;
  for (int i = threadIdx.x; i < kStaticWords; i += kThreads) {
    static_words[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t bytes = 0;
  for (unsigned i = 0; i < words; ++i) bytes += dynamic_words[i];
  for (int i = 0; i < kStaticWords; ++i) bytes += static_words[i];
  *sum += bytes;
}

}  // namespace

Status LaunchWithShared(Stream stream, size_t bytes, int64_t* sum) {
  return cuda::Launch("LaunchWithShared", stream, dim3(1), dim3(kThreads),
                      bytes, SharedKernel,
                      static_cast<unsigned>(bytes / sizeof(int32_t)), sum);
}

StatusOr<size_t> SharedLimit() {
  cudaFuncAttributes attributes;
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaFuncGetAttributes(&attributes, SharedKernel), "SharedLimit"));
  return static_cast<size_t>(attributes.maxDynamicSharedSizeBytes);
}

}  // namespace tenon::testing
