#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_swiglu_backend.h"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ T Activate(const MoeSwiGluParams& p, T gate, T up) {
  float g = cuda::ToFloat(gate);
  float u = cuda::ToFloat(up);
  if (p.limit > 0.0f) {
    // Written so that NaN stays NaN.
    g = g > p.limit ? p.limit : g;
    u = u > p.limit ? p.limit : u < -p.limit ? -p.limit : u;
    return cuda::FromFloat<T>((u + 1.0f) * (g / (1.0f + expf(-p.alpha * g))));
  }
  const T silu = cuda::FromFloat<T>(g / (1.0f + expf(-g)));
  return cuda::FromFloat<T>(cuda::ToFloat(silu) * u);
}

// A thread per kVec elements of out. Blocks are (threads of a row, rows); the
// grid is (rows, columns), as only its first dimension has no small limit.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) MoeSwiGluKernel(MoeSwiGluParams p) {
  using V = Vec<T, kVec>;
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  const int num_vecs = static_cast<int>(p.out.shape[1]) / kVec;
  if (row >= p.out.shape[0]) return;
  const auto* x =
      reinterpret_cast<const V*>(p.x.As<const T>() + row * p.x.stride[0]);
  auto* out = reinterpret_cast<V*>(p.out.As<T>() + row * p.out.stride[0]);
  const bool interleaved = p.layout == SwiGluLayout::kInterleaved;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < num_vecs;
       i += gridDim.y * blockDim.x) {
    // Gates and ups, or the two halves of the pairs.
    const V a = x[interleaved ? 2 * i : i];
    const V b = x[interleaved ? 2 * i + 1 : num_vecs + i];
    V result;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      T gate = a.v[j];
      T up = b.v[j];
      if (interleaved) {
        gate = 2 * j < kVec ? a.v[2 * j % kVec] : b.v[2 * j % kVec];
        up = 2 * j + 1 < kVec ? a.v[(2 * j + 1) % kVec]
                              : b.v[(2 * j + 1) % kVec];
      }
      result.v[j] = Activate(p, gate, up);
    }
    out[i] = result;
  }
}

template <class T>
Status LaunchMoeSwiGlu(const MoeSwiGluParams& p, Stream stream) {
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
  auto* const kernel = wide ? MoeSwiGluKernel<T, kWide> : MoeSwiGluKernel<T, 1>;
  return cuda::Launch("MoeSwiGlu", stream, grid, block, 0, kernel, p);
}

}  // namespace

Status MoeSwiGluCuda(const MoeSwiGluParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  switch (p.x.dtype) {
    case DType::kFloat32:
      return LaunchMoeSwiGlu<float>(p, stream);
    case DType::kFloat16:
      return LaunchMoeSwiGlu<__half>(p, stream);
    default:
      return LaunchMoeSwiGlu<__nv_bfloat16>(p, stream);
  }
}

}  // namespace tenon
