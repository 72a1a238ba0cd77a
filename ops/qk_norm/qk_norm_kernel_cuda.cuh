#ifndef TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
#define TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_

#include <cstdint>
#include <cstring>

#include "ops/core/core_cuda.cuh"

// The kernel of QkNorm; qk_norm_cuda.cu launches it.

namespace tenon::qk_norm {

using cuda::Vec;

// A lane holds 8 elements of a head, so that a head of 64, 128 or 256 elements
// lies on 8, 16 or 32 lanes and a warp works on 4, 2 or 1 heads at a time: one
// step. A warp takes up to kMaxSteps steps of one token's Q, K or V heads: all
// its loads are under way together, and it reads weights and angles once.
constexpr int kPerLane = 8;
constexpr int kMaxSteps = 4;
constexpr int kMaxWarps = 4;  // of a block

enum Role { kQ = 0, kK = 1, kV = 2 };

struct HeadArray {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  int32_t count;
  int32_t first_warp;  // of a token's warps, the first with these heads
};

struct CacheArray {
  void* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
  float scale;
};

struct KernelParams {
  int64_t tokens;
  HeadArray heads[3];  // by Role
  int32_t num_warps;   // of a token
  int32_t num_steps;   // of each warp, at most kMaxSteps
  int32_t log2_lanes;  // of a head

  const void* weight[2];  // by Role
  bool float_weight[2];
  bool cast_first;
  float epsilon;
  float inv_head_dim;

  int32_t rotary_dim;  // 0: no rotation
  bool wide_positions;
  const void* positions;
  const float* cos_sin;
  int64_t cos_sin_stride;
  int64_t max_positions;

  const int64_t* slots;  // null: no cache write
  int64_t num_slots;
  int64_t page_size;
  bool fp8_cache;
  CacheArray cache[2];  // of K and V
};

// A lane's 8 elements of a head, as they lie in memory: vector i of 16 bytes of
// a head is part i / lanes of lane i % lanes. The same for views that can be
// moved by vectors and others, so that both add up in the same order.
template <class T>
struct LaneData {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kParts = kPerLane / kVec;
  static constexpr int kWords = kPerLane * sizeof(T) / 4;
  // Words, so that elements are not held one to a register.
  uint32_t words[kWords];
};

// Where a lane's parts lie in a head.
struct Lanes {
  int log2;     // of the lanes of a head
  int in_head;  // this lane's number among them

  template <class T>
  __device__ __forceinline__ int First(int part) const {
    return ((part << log2) + in_head) * LaneData<T>::kVec;
  }
};

// From and to a head in memory, by 16 bytes (kVector) or by elements.
template <bool kVector, class T>
__device__ __forceinline__ LaneData<T> Load(const T* head, Lanes lanes) {
  using Data = LaneData<T>;
  Data x;
#pragma unroll
  for (int part = 0; part < Data::kParts; ++part) {
    const T* const from = head + lanes.First<T>(part);
    Vec<T, Data::kVec> v;
    if constexpr (kVector) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      memcpy(x.words + 4 * part, &bits, 16);
    } else {
#pragma unroll
      for (int j = 0; j < Data::kVec; ++j) v.v[j] = from[j];
      memcpy(x.words + 4 * part, &v, 16);
    }
  }
  return x;
}
template <bool kVector, class T>
__device__ __forceinline__ void Store(const LaneData<T>& x, T* head,
                                      Lanes lanes) {
  using Data = LaneData<T>;
#pragma unroll
  for (int part = 0; part < Data::kParts; ++part) {
    T* const to = head + lanes.First<T>(part);
    if constexpr (kVector) {
      const uint32_t* const w = x.words + 4 * part;
      *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
      Vec<T, Data::kVec> v;
      memcpy(&v, x.words + 4 * part, 16);
#pragma unroll
      for (int j = 0; j < Data::kVec; ++j) to[j] = v.v[j];
    }
  }
}

// Between a lane's elements and floats, a word at a time.
__device__ __forceinline__ void Widen(const LaneData<float>& x, float* to) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) to[i] = __uint_as_float(x.words[i]);
}
__device__ __forceinline__ void Widen(const LaneData<__half>& x, float* to) {
#pragma unroll
  for (int i = 0; i < kPerLane / 2; ++i) {
    __half2 pair;
    memcpy(&pair, &x.words[i], sizeof(pair));
    const float2 f = __half22float2(pair);
    to[2 * i] = f.x;
    to[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ void Widen(const LaneData<__nv_bfloat16>& x,
                                      float* to) {
#pragma unroll
  for (int i = 0; i < kPerLane / 2; ++i) {
    to[2 * i] = __uint_as_float(x.words[i] << 16);
    to[2 * i + 1] = __uint_as_float(x.words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void Round(const float* from, LaneData<float>* x) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x->words[i] = __float_as_uint(from[i]);
}
__device__ __forceinline__ void Round(const float* from, LaneData<__half>* x) {
#pragma unroll
  for (int i = 0; i < kPerLane / 2; ++i) {
    const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&x->words[i], &pair, sizeof(pair));
  }
}
__device__ __forceinline__ void Round(const float* from,
                                      LaneData<__nv_bfloat16>* x) {
#pragma unroll
  for (int i = 0; i < kPerLane / 2; ++i) {
    const __nv_bfloat162 pair =
        __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    memcpy(&x->words[i], &pair, sizeof(pair));
  }
}

// Where the K and V of a token go in the cache; page -1: nowhere.
struct Slot {
  int64_t page = -1;
  int64_t offset = 0;
};

__device__ __forceinline__ Slot FindSlot(const KernelParams& p, int64_t token) {
  if (p.slots == nullptr) return Slot();
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_slots) return Slot();
  // Divisions of 64 bits take long, and caches that need them are rare.
  const int64_t page =
      p.num_slots <= UINT32_MAX
          ? static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.page_size)
          : slot / p.page_size;
  return {page, slot - page * p.page_size};
}

// The cosines and sines of a token, null where it is not rotated.
__device__ __forceinline__ const float* CosSin(const KernelParams& p,
                                               int64_t token) {
  if (p.rotary_dim == 0) return nullptr;
  const int64_t position =
      p.wide_positions ? static_cast<const int64_t*>(p.positions)[token]
                       : static_cast<const int32_t*>(p.positions)[token];
  if (position < 0 || position >= p.max_positions) return nullptr;
  return p.cos_sin + position * p.cos_sin_stride;
}

// The angles of a lane's elements; the sine with the sign of the formula.
struct Angles {
  float cos[kPerLane];
  float sin[kPerLane];
};

template <bool kVector, class T>
__device__ __forceinline__ void ReadAngles(const KernelParams& p,
                                           const float* from, Lanes lanes,
                                           Angles* angles) {
  constexpr int kVec = LaneData<T>::kVec;
  const int half = p.rotary_dim / 2;
#pragma unroll
  for (int part = 0; part < LaneData<T>::kParts; ++part) {
    const int first = lanes.First<T>(part);
    float* const c = angles->cos + part * kVec;
    float* const s = angles->sin + part * kVec;
    if constexpr (kVector) {
      if (first >= p.rotary_dim) continue;
      const float* const at = from + (first < half ? first : first - half);
#pragma unroll
      for (int j = 0; j < kVec; j += 4) {
        const float4 cosines = __ldg(reinterpret_cast<const float4*>(at + j));
        const float4 sines =
            __ldg(reinterpret_cast<const float4*>(at + half + j));
        memcpy(c + j, &cosines, sizeof(cosines));
        memcpy(s + j, &sines, sizeof(sines));
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) s[j] = first < half ? -s[j] : s[j];
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int i = first + j;
        if (i >= p.rotary_dim) continue;
        c[j] = from[i < half ? i : i - half];
        s[j] = i < half ? -from[half + i] : from[i];
      }
    }
  }
}

// The norm's weights of a lane's elements.
template <bool kVector, class T>
__device__ __forceinline__ void ReadWeight(const KernelParams& p, Role role,
                                           Lanes lanes, float* weight) {
  constexpr int kVec = LaneData<T>::kVec;
  if (!p.float_weight[role]) {
    Widen(Load<kVector>(static_cast<const T*>(p.weight[role]), lanes), weight);
    return;
  }
  const float* const from = static_cast<const float*>(p.weight[role]);
#pragma unroll
  for (int part = 0; part < LaneData<T>::kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      weight[part * kVec + j] = from[lanes.First<T>(part) + j];
    }
  }
}

// Rotates a lane's elements of a head, as rounded by the norm. Partners lie
// half a rotary_dim apart and so on other lanes. Where whole vectors are
// partners (kVector) they are exchanged by shuffles, else by elements through
// `staged`, the head's place in shared memory. Executed by whole warps.
template <bool kVector, class T>
__device__ __forceinline__ void Rotate(const KernelParams& p,
                                       const Angles& angles, Lanes lanes,
                                       T* staged, LaneData<T>* x) {
  using Data = LaneData<T>;
  constexpr int kVec = Data::kVec;
  const int half = p.rotary_dim / 2;
  Data other;
  if constexpr (kVector) {
#pragma unroll
    for (int part = 0; part < Data::kParts; ++part) {
      const int first = lanes.First<T>(part);
      const int partner = (first < half ? first + half : first - half) / kVec;
#pragma unroll
      for (int from = 0; from < Data::kParts; ++from) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t word = __shfl_sync(~0u, x->words[4 * from + w],
                                            partner, 1 << lanes.log2);
          if (Data::kParts == 1 || partner >> lanes.log2 == from) {
            other.words[4 * part + w] = word;
          }
        }
      }
    }
  } else {
    __syncwarp();  // the previous step's reads are done
    Store<false>(*x, staged, lanes);
    __syncwarp();
    T elements[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = lanes.First<T>(j / kVec) + j % kVec;
      elements[j] = staged[i >= p.rotary_dim ? i
                           : i < half        ? i + half
                                             : i - half];
    }
    memcpy(other.words, elements, sizeof(elements));
  }
  float f[kPerLane];
  float g[kPerLane];
  Widen(*x, f);
  Widen(other, g);
#pragma unroll
  for (int part = 0; part < Data::kParts; ++part) {
    const int first = lanes.First<T>(part);
    if (first >= p.rotary_dim) continue;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (!kVector && first + j >= p.rotary_dim) continue;
      const int i = part * kVec + j;
      f[i] = f[i] * angles.cos[i] + g[i] * angles.sin[i];
    }
  }
  Round(f, x);
}

// Writes a lane's elements of a head that begins at `to` in the cache.
template <bool kVector, class T>
__device__ __forceinline__ void WriteCache(const KernelParams& p,
                                           const CacheArray& cache, int64_t to,
                                           Lanes lanes, const LaneData<T>& x) {
  if (!p.fp8_cache) {
    Store<kVector>(x, static_cast<T*>(cache.data) + to, lanes);
    return;
  }
  constexpr int kVec = LaneData<T>::kVec;
  float f[kPerLane];
  Widen(x, f);
#pragma unroll
  for (int part = 0; part < LaneData<T>::kParts; ++part) {
    Vec<uint8_t, kVec> quantized;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      quantized.v[j] = __nv_cvt_float_to_fp8(f[part * kVec + j] / cache.scale,
                                             __NV_SATFINITE, __NV_E4M3);
    }
    uint8_t* const at =
        static_cast<uint8_t*>(cache.data) + to + lanes.First<T>(part);
    if constexpr (kVector) {
      *reinterpret_cast<Vec<uint8_t, kVec>*>(at) = quantized;
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) at[j] = quantized.v[j];
    }
  }
}

// Block (32, warps of a token, tokens); grid (tokens, blocks of a token). Lanes
// without a head go through the shuffles with the others. kLog2Lanes: of a
// head, where everything can be moved by vectors; 0: any head, by elements.
template <class T, int kLog2Lanes, bool kRotary>
__global__ void __launch_bounds__(32 * kMaxWarps)
    QkNormKernel(const __grid_constant__ KernelParams p) {
  constexpr bool kVector = kLog2Lanes > 0;
  const int log2_lanes = kVector ? kLog2Lanes : p.log2_lanes;
  const Lanes lanes = {log2_lanes,
                       static_cast<int>(threadIdx.x & ((1 << log2_lanes) - 1))};
  const int heads_per_step = 32 >> log2_lanes;
  const int warp = blockIdx.y * blockDim.y + threadIdx.y;
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  cuda::WaitForPreviousKernels();
  if (token >= p.tokens || warp >= p.num_warps) return;

  const Role role = warp < p.heads[kK].first_warp   ? kQ
                    : warp < p.heads[kV].first_warp ? kK
                                                    : kV;
  const HeadArray& heads = p.heads[role];
  const int first_head =
      (warp - heads.first_warp) * p.num_steps * heads_per_step +
      (threadIdx.x >> log2_lanes);
  T* const head = static_cast<T*>(heads.data) + token * heads.token_stride +
                  first_head * heads.head_stride;
  const int64_t step_stride = heads_per_step * heads.head_stride;
  const auto is_active = [&](int step) {
    return step < p.num_steps &&
           first_head + step * heads_per_step < heads.count;
  };

  // Everything is read before anything is computed: one trip to memory.
  LaneData<T> x[kMaxSteps] = {};
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    if (is_active(step))
      x[step] = Load<kVector>(head + step * step_stride, lanes);
  }
  float weight[kPerLane];
  if (role != kV) ReadWeight<kVector, T>(p, role, lanes, weight);
  const Slot slot = role == kQ ? Slot() : FindSlot(p, token);
  const float* const cos_sin =
      kRotary && role != kV ? CosSin(p, token) : nullptr;
  Angles angles;
  if (cos_sin != nullptr) ReadAngles<kVector, T>(p, cos_sin, lanes, &angles);
  const CacheArray& cache = p.cache[role == kV];
  const int64_t cache_at = slot.page * cache.page_stride +
                           slot.offset * cache.slot_stride +
                           first_head * cache.head_stride;

#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    if (step >= p.num_steps) break;
    if (role != kV) {
      float f[kPerLane];
      Widen(x[step], f);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += f[j] * f[j];
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) {
        if (mask >> log2_lanes != 0) break;
        sum += __shfl_xor_sync(~0u, sum, mask);
      }
      const float inv_rms = __frsqrt_rn(sum * p.inv_head_dim + p.epsilon);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) f[j] *= inv_rms;
      if (p.cast_first) {
        Round(f, &x[step]);
        Widen(x[step], f);
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) f[j] *= weight[j];
      Round(f, &x[step]);
      if (cos_sin != nullptr) {
        T* staged_head = nullptr;
        if constexpr (!kVector) {
          __shared__ T staged[kMaxWarps][32 * kPerLane];
          staged_head = staged[threadIdx.z * blockDim.y + threadIdx.y] +
                        (threadIdx.x - lanes.in_head) * kPerLane;
        }
        Rotate<kVector>(p, angles, lanes, staged_head, &x[step]);
      }
    }
    if (!is_active(step)) continue;
    if (role != kV) Store<kVector>(x[step], head + step * step_stride, lanes);
    if (slot.page >= 0) {
      WriteCache<kVector>(p, cache,
                          cache_at + step * heads_per_step * cache.head_stride,
                          lanes, x[step]);
    }
  }
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
