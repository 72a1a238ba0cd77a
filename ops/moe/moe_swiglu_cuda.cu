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

// A thread per kVec elements of out; see LaunchOverRows.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) MoeSwiGluKernel(MoeSwiGluParams p) {
  using V = Vec<T, kVec>;
  cuda::WaitForPreviousKernels();
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
  const bool wide =
      cuda::RowsAreWholeChunks(p.x) && cuda::RowsAreWholeChunks(p.out);
  auto* const kernel = wide ? MoeSwiGluKernel<T, kWide> : MoeSwiGluKernel<T, 1>;
  return cuda::LaunchOverRows("MoeSwiGlu", stream, p.out.shape[0],
                              p.out.shape[1] / (wide ? kWide : 1), kThreads,
                              kernel, p);
}

}  // namespace

Status MoeSwiGluCuda(const MoeSwiGluParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return LaunchMoeSwiGlu<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
