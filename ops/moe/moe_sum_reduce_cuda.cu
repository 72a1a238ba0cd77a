#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_sum_reduce_backend.h"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // in flight per thread

// A thread per kVec elements of out; see LaunchOverRows.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    MoeSumReduceKernel(MoeSumReduceParams p) {
  using V = Vec<T, kVec>;
  cuda::WaitForPreviousKernels();
  const int64_t token = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  if (token >= p.out.shape[0]) return;
  const int num_vecs = static_cast<int>(p.out.shape[1]) / kVec;
  const int top_k = static_cast<int>(p.x.shape[1]);
  const T* x = p.x.As<const T>() + token * p.x.stride[0];
  auto* out = reinterpret_cast<V*>(p.out.As<T>() + token * p.out.stride[0]);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < num_vecs;
       i += gridDim.y * blockDim.x) {
    float sum[kVec];
    for (int first = 0; first < top_k; first += kLoads) {
      V terms[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (first + j >= top_k) break;
        terms[j] =
            reinterpret_cast<const V*>(x + (first + j) * p.x.stride[1])[i];
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (first + j >= top_k) break;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          const float term = cuda::ToFloat(terms[j].v[v]);
          sum[v] = first + j == 0 ? term : sum[v] + term;
        }
      }
    }
    V result;
#pragma unroll
    for (int v = 0; v < kVec; ++v) result.v[v] = cuda::FromFloat<T>(sum[v]);
    out[i] = result;
  }
}

template <class T>
Status LaunchMoeSumReduce(const MoeSumReduceParams& p, Stream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide =
      cuda::RowsAreWholeChunks(p.x) && cuda::RowsAreWholeChunks(p.out);
  auto* const kernel =
      wide ? MoeSumReduceKernel<T, kWide> : MoeSumReduceKernel<T, 1>;
  return cuda::LaunchOverRows("MoeSumReduce", stream, p.out.shape[0],
                              p.out.shape[1] / (wide ? kWide : 1), kThreads,
                              kernel, p);
}

}  // namespace

Status MoeSumReduceCuda(const MoeSumReduceParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return LaunchMoeSumReduce<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
