#ifndef TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
#define TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_

#include <cstdint>
#include <cstring>

#include "ops/core/core_cuda.cuh"
#include "ops/qk_norm/qk_norm_params_cuda.cuh"

// The kernel of QkNorm for views that can be moved 16 bytes at a time.
//
// A lane has two chunks of 16 bytes of a head, half a head apart, so that
// rotation partners are on one lane; a head of 128 bfloat16 elements is on 8
// lanes. A warp works on 32 / lanes heads at a time (a step), all of them of Q,
// of K or of V, and takes up to kMaxSteps steps of the same tokens.
//
// It waits for memory twice, for everything and then for the angles, and has to
// have all loads under way before it does. The compiler moves a load down to
// its use and a use up to its load, past other loads: hence the volatile loads,
// and the branches (marked) and __syncwarp() that keep what is above and below
// them apart. docs/kernels/qk_norm.md has what this is worth.

namespace tenon::qk_norm {

constexpr int kMaxWarps = 4;   // of a block
constexpr int kMinBlocks = 6;  // of a multiprocessor: at most 80 registers

template <class T>
struct Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  // Words, so that elements are not held one to a register.
  uint32_t words[4];
};

__device__ __forceinline__ uint32_t LoadWord(const void* from) {
  uint32_t word;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}
// kOnce: leaves the L1 to weights and angles.
template <bool kOnce = false, class T>
__device__ __forceinline__ Chunk<T> LoadChunk(const T* from) {
  Chunk<T> x;
  uint32_t* const w = x.words;
  if constexpr (kOnce) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from));
  }
  return x;
}
template <class T>
__device__ __forceinline__ void StoreChunk(const Chunk<T>& x, T* to) {
  const uint32_t* const w = x.words;
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
}

// Between a chunk's elements and floats, a word at a time.
__device__ __forceinline__ void Widen(const Chunk<float>& x, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(x.words[i]);
}
__device__ __forceinline__ void Widen(const Chunk<__half>& x, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &x.words[i], sizeof(pair));
    const float2 f = __half22float2(pair);
    to[2 * i] = f.x;
    to[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ void Widen(const Chunk<__nv_bfloat16>& x,
                                      float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(x.words[i] << 16);
    to[2 * i + 1] = __uint_as_float(x.words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void Round(const float* from, Chunk<float>* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x->words[i] = __float_as_uint(from[i]);
}
__device__ __forceinline__ void Round(const float* from, Chunk<__half>* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&x->words[i], &pair, sizeof(pair));
  }
}
__device__ __forceinline__ void Round(const float* from,
                                      Chunk<__nv_bfloat16>* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair =
        __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&x->words[i], &pair, sizeof(pair));
  }
}

// The sum of squares of a head, in the order of the other kernel: leaves of 8
// elements, then pairs of leaves, pairs of pairs and so on.
template <int kLanes, class T>
__device__ __forceinline__ float SumOfSquares(const float* x) {
  constexpr int kSize = Chunk<T>::kSize;
  // float32 has half a leaf in each chunk, the others a whole one.
  constexpr int kLeaves = 2 * kSize / 8;
  float sums[kLeaves];
#pragma unroll
  for (int leaf = 0; leaf < kLeaves; ++leaf) {
    sums[leaf] = 0.0f;
#pragma unroll
    for (int j = 8 * leaf; j < 8 * leaf + 8; ++j) {
      sums[leaf] = __fmaf_rn(x[j], x[j], sums[leaf]);
    }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) {
      sums[leaf] += __shfl_xor_sync(~0u, sums[leaf], mask);
    }
  }
  return kLeaves == 1 ? sums[0] : sums[0] + sums[kLeaves - 1];
}

// Normalises a lane's part of a head. Executed by whole warps.
template <int kLanes, class T>
__device__ __forceinline__ void Normalize(const KernelParams& p,
                                          const float* weight, Chunk<T>* x) {
  constexpr int kSize = Chunk<T>::kSize;
  float f[2 * kSize];
  Widen(x[0], f);
  Widen(x[1], f + kSize);
  const float inv_rms = InvRms(p, SumOfSquares<kLanes, T>(f));
#pragma unroll
  for (int j = 0; j < 2 * kSize; ++j) f[j] *= inv_rms;
  if (p.cast_first) {
    Round(f, &x[0]);
    Round(f + kSize, &x[1]);
    Widen(x[0], f);
    Widen(x[1], f + kSize);
  }
#pragma unroll
  for (int j = 0; j < 2 * kSize; ++j) f[j] *= weight[j];
  Round(f, &x[0]);
  Round(f + kSize, &x[1]);
}

// x * cos + other * sin
template <class T>
__device__ __forceinline__ void RotateChunk(const float* x, const float* other,
                                            const float* cos, const float* sin,
                                            float sign, Chunk<T>* to) {
  float f[Chunk<T>::kSize];
#pragma unroll
  for (int j = 0; j < Chunk<T>::kSize; ++j) {
    f[j] = __fmaf_rn(x[j], cos[j], __fmul_rn(other[j], sign * sin[j]));
  }
  Round(f, to);
}

// The angles of a lane's first chunk.
template <class T>
struct Angles {
  float cos[Chunk<T>::kSize];
  float sin[Chunk<T>::kSize];
  bool rotate;  // whether it has any
};

// Rotates a lane's part of a head, as rounded by the norm. Where all of a head
// is rotated the partners are a lane's two chunks, else the first chunks of two
// lanes. Executed by whole warps.
template <int kLanes, class T>
__device__ __forceinline__ void Rotate(const KernelParams& p, int lane,
                                       const Angles<T>& angles, Chunk<T>* x) {
  float f[Chunk<T>::kSize];
  float g[Chunk<T>::kSize];
  if (p.rotary_lanes == kLanes) {
    if (!angles.rotate) return;
    Widen(x[0], f);
    Widen(x[1], g);
    RotateChunk(f, g, angles.cos, angles.sin, -1.0f, &x[0]);
    RotateChunk(g, f, angles.cos, angles.sin, 1.0f, &x[1]);
    return;
  }
  const bool upper = lane >= p.rotary_lanes;
  const int partner = upper ? lane - p.rotary_lanes : lane + p.rotary_lanes;
  Chunk<T> other;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    other.words[i] = __shfl_sync(~0u, x[0].words[i], partner, kLanes);
  }
  if (!angles.rotate) return;
  Widen(x[0], f);
  Widen(other, g);
  RotateChunk(f, g, angles.cos, angles.sin, upper ? 1.0f : -1.0f, &x[0]);
}

// x / scale. A quotient of this range has no overflow or underflow on its way
// (the host has seen to scale), so that two corrections make it the nearest
// float; any other is saturated or becomes a zero of its sign.
__device__ __forceinline__ float Divide(float x, const CacheArray& cache) {
  const float q = x * cache.inv_scale;
  float r = __fmaf_rn(__fmaf_rn(-q, cache.scale, x), cache.inv_scale, q);
  r = __fmaf_rn(__fmaf_rn(-r, cache.scale, x), cache.inv_scale, r);
  return fabsf(q) >= 1.0f / 2048 && fabsf(q) < 1024.0f ? r : q;
}

template <class T>
__device__ __forceinline__ void WriteCache(const KernelParams& p,
                                           const CacheArray& cache, int64_t to,
                                           const Chunk<T>& x) {
  if (!p.fp8_cache) {
    StoreChunk(x, static_cast<T*>(cache.data) + to);
    return;
  }
  constexpr int kPairs = Chunk<T>::kSize / 2;
  float f[2 * kPairs];
  Widen(x, f);
  cuda::Vec<__nv_fp8x2_storage_t, kPairs> quantized;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    quantized.v[j] = __nv_cvt_float2_to_fp8x2(
        {Divide(f[2 * j], cache), Divide(f[2 * j + 1], cache)}, __NV_SATFINITE,
        __NV_E4M3);
  }
  uint8_t* const at = static_cast<uint8_t*>(cache.data) + to;
  *reinterpret_cast<decltype(quantized)*>(at) = quantized;
}

// A lane's part of the heads of a warp.
template <class T>
struct Part {
  Role role;
  int lane;  // of a head
  int steps;
  int64_t token;
  int first_head;  // of this lane; step i has the one kStepHeads * i further
  int num_heads;   // from there on; none or less: there is nothing to write
  T* at[kMaxSteps];
  const T* weight_at;
};

// Lanes without a head read what another one reads, and write nothing.
template <int kLanes, class T>
__device__ __forceinline__ Part<T> FindPart(const KernelParams& p, int warp,
                                            int64_t tile) {
  constexpr int kStepHeads = 32 / kLanes;
  Part<T> part;
  part.role = RoleOf(p, warp);
  part.lane = threadIdx.x % kLanes;
  const HeadArray& heads = p.heads[part.role];
  part.steps = heads.steps;
  const int unit = (warp - heads.first_warp) * heads.steps * kStepHeads +
                   threadIdx.x / kLanes;
  const int tile_token = static_cast<uint32_t>(unit) * heads.reciprocal >> 16;
  part.first_head = unit - tile_token * heads.count;
  part.token = tile * p.tile_tokens + tile_token;
  const bool exists = tile_token < p.tile_tokens && part.token < p.tokens;
  if (!exists) part.token = 0;
  part.num_heads = exists ? heads.count - part.first_head : 0;
  part.at[0] = static_cast<T*>(heads.data) + part.token * heads.token_stride +
               (part.num_heads > 0 ? part.first_head : 0) * heads.head_stride +
               part.lane * Chunk<T>::kSize;
#pragma unroll
  for (int step = 1; step < kMaxSteps; ++step) {
    const bool has_head =
        step < heads.steps && step * kStepHeads < part.num_heads;
    part.at[step] = has_head
                        ? part.at[step - 1] + kStepHeads * heads.head_stride
                        : part.at[0];
  }
  part.weight_at =
      static_cast<const T*>(heads.weight) + part.lane * Chunk<T>::kSize;
  return part;
}

// Reads the angles of a position into the L2: a hint, so that it may be a
// position that the kernel ahead is about to change.
__device__ __forceinline__ void PrefetchAngles(const KernelParams& p,
                                               uint64_t position, int lane) {
  constexpr int kFloats = 16;
  if (position >= p.max_positions || lane * kFloats >= p.rotary_dim) return;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(
      p.cos_sin + position * p.cos_sin_stride + lane * kFloats));
}

// Reads a lane's part of a warp's heads.
template <int kHeadDim, class T>
__device__ __forceinline__ void LoadPart(const Part<T>& part,
                                         Chunk<T> (*x)[2]) {
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    x[step][0] = LoadChunk<true>(part.at[step]);
    x[step][1] = LoadChunk<true>(part.at[step] + kHeadDim / 2);
  }
}

template <int kHeadDim, class T>
__device__ __forceinline__ void StorePart(const Part<T>& part,
                                          const Chunk<T> (*x)[2]) {
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    StoreChunk(x[step][0], part.at[step]);
    StoreChunk(x[step][1], part.at[step] + kHeadDim / 2);
  }
}

// Writes a lane's part of a warp's heads into the cache.
template <int kHeadDim, class T>
__device__ __forceinline__ void CachePart(const KernelParams& p,
                                          const Part<T>& part, int64_t slot,
                                          const Chunk<T> (*x)[2]) {
  constexpr int kStepHeads = 64 * Chunk<T>::kSize / kHeadDim;
  const CacheArray& cache = p.cache[part.role == kV];
  const int64_t slot_offset = SlotOffset(p, cache, slot);
  if (slot_offset < 0) return;
  const int64_t to = slot_offset + part.first_head * cache.head_stride +
                     part.lane * Chunk<T>::kSize;
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    if (step >= part.steps || step * kStepHeads >= part.num_heads) break;
    const int64_t head = to + step * kStepHeads * cache.head_stride;
    WriteCache(p, cache, head, x[step][0]);
    WriteCache(p, cache, head + kHeadDim / 2, x[step][1]);
  }
}

// Block (32, warps); grid (blocks of a tile, tiles, tiles / gridDim.y).
template <class T, int kHeadDim, bool kRotary>
__global__ void __launch_bounds__(32 * kMaxWarps, kMinBlocks)
    QkNormKernel(const __grid_constant__ KernelParams p) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr int kLanes = kHeadDim / (2 * kSize);
  constexpr int kStepHeads = 32 / kLanes;
  constexpr int kHalf = kHeadDim / 2;
  // Before the wait: attention behind it may load what it has long known.
  cuda::LetNextKernelStart();
  const int warp = blockIdx.x * blockDim.y + threadIdx.y;
  if (warp >= p.num_warps) return;
  const Part<T> part = FindPart<kLanes, T>(
      p, warp, int64_t{blockIdx.z} * gridDim.y + blockIdx.y);
  const int lane = part.lane;
  const bool caches = part.role != kQ && p.slots != nullptr;
  const int64_t* const slot_at = caches ? p.slots + part.token : nullptr;
  const char* position_at = nullptr;
  int angle_lane = lane;  // the lane of the first half with the same angles
  if constexpr (kRotary) {
    position_at = PositionAt(p, part.token);
    if (lane >= p.rotary_lanes) {
      angle_lane = lane < 2 * p.rotary_lanes ? lane - p.rotary_lanes : 0;
    }
    if (p.prefetch) PrefetchAngles(p, LoadWord(position_at), lane);
  }
  // Keeps the above in front of the wait; never true.
  if (part.at[0] == nullptr || part.at[kMaxSteps - 1] == nullptr ||
      part.weight_at == nullptr || (kRotary && position_at == nullptr) ||
      p.epsilon == 0.0f) {
    return;
  }
  cuda::WaitBeforeReading();

  Chunk<T> x[kMaxSteps][2];
  int64_t slot = -1;
  if (part.role == kV) {
    slot = *slot_at;
    LoadPart<kHeadDim>(part, x);
    return CachePart<kHeadDim>(p, part, slot, x);
  }
  uint64_t position = 0;
  if constexpr (kRotary) {
    position = LoadWord(position_at);
    if (p.wide_positions) position |= uint64_t{LoadWord(position_at + 4)} << 32;
  }
  LoadPart<kHeadDim>(part, x);
  const Chunk<T> packed[] = {LoadChunk(part.weight_at),
                             LoadChunk(part.weight_at + kHalf)};
  if (caches) slot = *slot_at;

  Angles<T> angles;
  if constexpr (kRotary) {
    const bool in_table = position < p.max_positions;
    angles.rotate = in_table && lane < 2 * p.rotary_lanes;
    const float* const at = p.cos_sin +
                            (in_table ? position : 0) * p.cos_sin_stride +
                            angle_lane * kSize;
    const float* const sin_at = at + p.rotary_dim / 2;
    // Keeps the norm behind the loads of the angles, and the loads of x in
    // front of the wait for the position; never true.
    if (at == nullptr || sin_at == nullptr) return StorePart<kHeadDim>(part, x);
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      Widen(LoadChunk(at + j), angles.cos + j);
      Widen(LoadChunk(sin_at + j), angles.sin + j);
    }
  }
  __syncwarp();  // all loads are under way
  float weight[2 * kSize];
  Widen(packed[0], weight);
  Widen(packed[1], weight + kSize);
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    if (step > 0 && step >= part.steps) break;
    Normalize<kLanes>(p, weight, x[step]);
    if constexpr (kRotary) Rotate<kLanes>(p, lane, angles, x[step]);
    if (step * kStepHeads >= part.num_heads) continue;
    StoreChunk(x[step][0], part.at[step]);
    StoreChunk(x[step][1], part.at[step] + kHalf);
  }
  if (caches) CachePart<kHeadDim>(p, part, slot, x);
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
