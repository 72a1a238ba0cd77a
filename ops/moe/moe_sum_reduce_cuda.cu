#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_sum_reduce_backend.h"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // in flight per thread

// A thread per kVec elements of out. Blocks are (threads of a row, rows); the
// grid is (rows, columns), as only its first dimension has no small limit.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    MoeSumReduceKernel(MoeSumReduceParams p) {
  using V = Vec<T, kVec>;
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
  const bool wide = p.out.shape[1] % kWide == 0 &&
                    cuda::RowsAreAligned(p.x, 16) &&
                    cuda::RowsAreAligned(p.out, 16);
  const int64_t num_vecs = p.out.shape[1] / (wide ? kWide : 1);
  const unsigned columns = static_cast<unsigned>(
      std::min<int64_t>(cuda::CeilDiv(num_vecs, int64_t{32}) * 32, kThreads));
  const dim3 block(columns, kThreads / columns);
  const dim3 grid(
      static_cast<unsigned>(cuda::CeilDiv(p.out.shape[0], int64_t{block.y})),
      static_cast<unsigned>(
          std::min<int64_t>(cuda::CeilDiv(num_vecs, int64_t{columns}), 65535)));
  auto* const kernel =
      wide ? MoeSumReduceKernel<T, kWide> : MoeSumReduceKernel<T, 1>;
  return cuda::Launch("MoeSumReduce", stream, grid, block, 0, kernel, p);
}

}  // namespace

Status MoeSumReduceCuda(const MoeSumReduceParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  switch (p.x.dtype) {
    case DType::kFloat32:
      return LaunchMoeSumReduce<float>(p, stream);
    case DType::kFloat16:
      return LaunchMoeSumReduce<__half>(p, stream);
    default:
      return LaunchMoeSumReduce<__nv_bfloat16>(p, stream);
  }
}

}  // namespace tenon
