#ifndef TENON_OPS_SAMPLER_SAMPLER_TILE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TILE_CUDA_CUH_

#include <cstring>

#include "ops/core/core_cuda.cuh"
#include "ops/sampler/row_plan.h"

// How both CUDA kernels of the sampler read logits: one warp per sub-tile, each
// lane a run of consecutive ids.

namespace tenon::cuda {

inline constexpr int kIdsPerLane = kSubTile / 32;

// The logits of one row.
template <class T>
struct DeviceLogits {
  const T* data;
  int vocab;
  bool aligned;  // rows begin at multiples of 16 bytes
};

// A lane's part of a sub-tile, as stored: converting only where it is used
// leaves loads in flight.
template <class T>
struct alignas(16) LanePart {
  T x[kIdsPerLane];
};

// The id of a lane's first logit.
__device__ __forceinline__ int FirstIdOfLane(int tile) {
  return tile * kSubTile + static_cast<int>(threadIdx.x % 32) * kIdsPerLane;
}

// -inf past the end of the vocabulary.
template <class T>
__device__ __forceinline__ LanePart<T> LoadPart(const DeviceLogits<T>& logits,
                                                int tile) {
  LanePart<T> part;
  const int first = FirstIdOfLane(tile);
  if (logits.aligned && first + kIdsPerLane <= logits.vocab) {
    constexpr int kLoads = sizeof(part) / sizeof(uint4);
    const auto* from = reinterpret_cast<const uint4*>(logits.data + first);
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = __ldg(from + i);
    memcpy(&part, words, sizeof(part));
  } else {
#pragma unroll
    for (int j = 0; j < kIdsPerLane; ++j) {
      part.x[j] = first + j < logits.vocab ? logits.data[first + j]
                                           : FromFloat<T>(-INFINITY);
    }
  }
  return part;
}

// The larger one, NaN where either is.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float WarpMaxOrNan(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value = MaxOrNan(value, __shfl_xor_sync(~0u, value, mask));
  }
  return value;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TILE_CUDA_CUH_
