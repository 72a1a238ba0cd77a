#ifndef TENON_OPS_QK_NORM_QK_NORM_ELEMENT_KERNEL_CUDA_CUH_
#define TENON_OPS_QK_NORM_QK_NORM_ELEMENT_KERNEL_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/qk_norm/qk_norm_params_cuda.cuh"

// The kernel of QkNorm for any views, an element at a time: a warp for each
// head. Its results have the bits of the other kernel's.

namespace tenon::qk_norm {

constexpr int kElementWarps = 4;  // of a block

// The sum of squares of a head in shared memory. A leaf is 8 elements: a lane's
// chunk in the other kernel, or in float32 its two half a head apart.
template <class T>
__device__ __forceinline__ float SumOfSquares(const T* head, int head_dim) {
  const int lane = threadIdx.x;
  const int leaves = head_dim / 8;
  float sum = 0.0f;
  for (int j = 0; j < 8 && lane < leaves; ++j) {
    const float f = cuda::ToFloat(
        head[sizeof(T) == 4 ? j / 4 * head_dim / 2 + lane * 4 + j % 4
                            : lane * 8 + j]);
    sum = __fmaf_rn(f, f, sum);
  }
  for (int mask = 1; mask < leaves; mask *= 2) {
    sum += __shfl_xor_sync(~0u, sum, mask);
  }
  return __shfl_sync(~0u, sum, 0);
}

template <class T>
__device__ __forceinline__ float Weight(const KernelParams& p, Role role,
                                        int i) {
  if (p.float_weight[role])
    return static_cast<const float*>(p.heads[role].weight)[i];
  return cuda::ToFloat(static_cast<const T*>(p.heads[role].weight)[i]);
}

// The cosines and sines of a token, null where it is not rotated.
__device__ __forceinline__ const float* CosSin(const KernelParams& p,
                                               int64_t token) {
  if (p.rotary_dim == 0) return nullptr;
  const char* const at = PositionAt(p, token);
  const uint64_t position = p.wide_positions
                                ? *reinterpret_cast<const uint64_t*>(at)
                                : *reinterpret_cast<const uint32_t*>(at);
  if (position >= p.max_positions) return nullptr;
  return p.cos_sin + position * p.cos_sin_stride;
}

// Element i of a normalised head, rotated.
template <class T>
__device__ __forceinline__ T Rotated(const T* head, const float* cos_sin,
                                     int half, int i) {
  const int pair = i < half ? i : i - half;
  const float sin = cos_sin[half + pair];
  const float other = cuda::ToFloat(head[i < half ? i + half : pair]);
  return cuda::FromFloat<T>(__fmaf_rn(cuda::ToFloat(head[i]), cos_sin[pair],
                                      __fmul_rn(other, i < half ? -sin : sin)));
}

// Block (32, kElementWarps); grid (tokens, blocks of a token). A tile is a
// token, and a warp has one head of it.
template <class T>
__global__ void __launch_bounds__(32 * kElementWarps)
    QkNormElementKernel(const __grid_constant__ KernelParams p) {
  __shared__ T staged[kElementWarps][kMaxHeadDim];
  cuda::WaitForPreviousKernels();
  const int warp = blockIdx.y * kElementWarps + threadIdx.y;
  if (warp >= p.num_warps) return;
  const int64_t token = blockIdx.x;
  const Role role = RoleOf(p, warp);
  const HeadArray& heads = p.heads[role];
  const int head = warp - heads.first_warp;
  T* const data = static_cast<T*>(heads.data) + token * heads.token_stride +
                  head * heads.head_stride;
  T* const x = staged[threadIdx.y];
  const int lane = threadIdx.x;
  for (int i = lane; i < p.head_dim; i += 32) x[i] = data[i];
  __syncwarp();

  const float* cos_sin = nullptr;
  if (role != kV) {
    const float inv_rms = InvRms(p, SumOfSquares(x, p.head_dim));
    for (int i = lane; i < p.head_dim; i += 32) {
      float f = cuda::ToFloat(x[i]) * inv_rms;
      if (p.cast_first) f = cuda::ToFloat(cuda::FromFloat<T>(f));
      x[i] = cuda::FromFloat<T>(f * Weight<T>(p, role, i));
    }
    __syncwarp();
    cos_sin = CosSin(p, token);
  }
  const CacheArray& cache = p.cache[role == kV];
  const int64_t slot_offset = role == kQ || p.slots == nullptr
                                  ? -1
                                  : SlotOffset(p, cache, p.slots[token]);
  const int64_t to = slot_offset + head * cache.head_stride;
  for (int i = lane; i < p.head_dim; i += 32) {
    const T v = cos_sin != nullptr && i < p.rotary_dim
                    ? Rotated(x, cos_sin, p.rotary_dim / 2, i)
                    : x[i];
    if (role != kV) data[i] = v;
    if (slot_offset < 0) continue;
    if (p.fp8_cache) {
      static_cast<uint8_t*>(cache.data)[to + i] = __nv_cvt_float_to_fp8(
          cuda::ToFloat(v) / cache.scale, __NV_SATFINITE, __NV_E4M3);
    } else {
      static_cast<T*>(cache.data)[to + i] = v;
    }
  }
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_ELEMENT_KERNEL_CUDA_CUH_
