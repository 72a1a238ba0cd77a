#ifndef TENON_OPS_QK_NORM_QK_NORM_PARAMS_CUDA_CUH_
#define TENON_OPS_QK_NORM_QK_NORM_PARAMS_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"

// What the kernels of QkNorm are given, and what they share.

namespace tenon::qk_norm {

constexpr int kMaxSteps = 2;  // of a warp
constexpr int kMaxHeadDim = 256;

enum Role { kQ = 0, kK = 1, kV = 2 };

struct HeadArray {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  const void* weight;  // of V: of K, not used
  int32_t count;
  int32_t first_warp;   // of a tile's warps, the first with these heads
  int32_t steps;        // of each of its warps, 1 to kMaxSteps
  uint32_t reciprocal;  // 2^16 / count, rounded up; 0: a tile is one token
};

struct CacheArray {
  void* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
  float scale;
  float inv_scale;
};

// In the order of use: the first read of each 64 bytes takes as long as a trip
// to the L2.
struct KernelParams {
  int64_t tokens;
  int32_t num_warps;    // of a tile
  int32_t tile_tokens;  // a tile is the heads of so many tokens
  int32_t first_k_warp;
  int32_t first_v_warp;
  float inv_head_dim;
  float epsilon;
  const int64_t* slots;  // null: no cache write
  const void* positions;
  HeadArray heads[3];  // by Role

  int32_t rotary_dim;    // 0: no rotation
  int32_t rotary_lanes;  // with a chunk of its first half
  bool cast_first;
  bool prefetch;  // angles, while the kernel ahead still runs
  bool wide_positions;
  const float* cos_sin;
  int64_t cos_sin_stride;
  uint64_t max_positions;  // at most 2^31 unless wide_positions

  bool fp8_cache;
  int64_t num_slots;
  int64_t page_size;
  CacheArray cache[2];  // of K and V

  // Read by the element kernel.
  int32_t head_dim;
  bool float_weight[2];  // by Role
};

__device__ __forceinline__ Role RoleOf(const KernelParams& p, int warp) {
  return warp < p.first_k_warp ? kQ : warp < p.first_v_warp ? kK : kV;
}

__device__ __forceinline__ float InvRms(const KernelParams& p, float sum) {
  return __frsqrt_rn(__fmaf_rn(sum, p.inv_head_dim, p.epsilon));
}

// Where the position of a token is.
__device__ __forceinline__ const char* PositionAt(const KernelParams& p,
                                                  int64_t token) {
  return static_cast<const char*>(p.positions) +
         token * (p.wide_positions ? 8 : 4);
}

// Where the heads of a slot begin in a cache, in elements; -1: nowhere.
__device__ __forceinline__ int64_t SlotOffset(const KernelParams& p,
                                              const CacheArray& cache,
                                              int64_t slot) {
  if (slot < 0 || slot >= p.num_slots) return -1;
  // Divisions of 64 bits take long, and caches that need them are rare.
  const int64_t page =
      p.num_slots <= UINT32_MAX
          ? static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.page_size)
          : slot / p.page_size;
  return page * cache.page_stride +
         (slot - page * p.page_size) * cache.slot_stride;
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_PARAMS_CUDA_CUH_
