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
constexpr int kMaxWarps = 8;  // of a block

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

// Moves a vector by one access where all views allow it (kVector), else by
// elements.
template <bool kVector, class T, int N>
__device__ __forceinline__ Vec<T, N> Load(const T* from) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
  } else {
    Vec<T, N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v.v[j] = from[j];
    return v;
  }
}
template <bool kVector, class T, int N>
__device__ __forceinline__ void Store(const Vec<T, N>& v, T* to) {
  if constexpr (kVector) {
    *reinterpret_cast<Vec<T, N>*>(to) = v;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = v.v[j];
  }
}

// N floats from memory of any float dtype that this kernel only reads.
template <bool kVector, int N, class W>
__device__ __forceinline__ void LoadFloats(const W* from, float* to) {
  constexpr int kVec = 16 / sizeof(W);
#pragma unroll
  for (int i = 0; i < N; i += kVec) {
    Vec<W, kVec> v;
    if constexpr (kVector) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from + i));
      memcpy(&v, &bits, sizeof(v));
    } else {
      v = Load<false, W, kVec>(from + i);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[i + j] = cuda::ToFloat(v.v[j]);
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

// A lane's part of a head: vector i of a head is part i / lanes of lane
// i % lanes. The same for aligned and unaligned views, so that both add up in
// the same order.
template <class T>
struct Layout {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kParts = kPerLane / kVec;
  using Part = Vec<T, kVec>;
};

// Between a lane's parts and its floats, by pairs where the hardware has that.
__device__ __forceinline__ void RoundPair(float a, float b, float* to) {
  to[0] = a;
  to[1] = b;
}
__device__ __forceinline__ void RoundPair(float a, float b, __half* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}
__device__ __forceinline__ void RoundPair(float a, float b, __nv_bfloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}
template <class T, int N, int kParts>
__device__ __forceinline__ void Round(const float* from,
                                      Vec<T, N> (&to)[kParts]) {
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2) {
    RoundPair(from[i], from[i + 1], to[i / N].v + i % N);
  }
}
template <class T, int N, int kParts>
__device__ __forceinline__ void Widen(const Vec<T, N> (&from)[kParts],
                                      float* to) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    to[i] = cuda::ToFloat(from[i / N].v[i % N]);
}

// The angles of a lane's elements; the sine with the sign of the formula.
template <class T, bool kVector>
struct Angles {
  float cos[kPerLane];
  float sin[kPerLane];

  __device__ __forceinline__ void Read(const KernelParams& p, const float* from,
                                       int lane_in_head) {
    constexpr int kVec = Layout<T>::kVec;
    const int half = p.rotary_dim / 2;
#pragma unroll
    for (int part = 0; part < Layout<T>::kParts; ++part) {
      const int first = ((part << p.log2_lanes) + lane_in_head) * kVec;
      float* const c = cos + part * kVec;
      float* const s = sin + part * kVec;
      if constexpr (kVector) {
        if (first >= p.rotary_dim) continue;
        const int angle = first < half ? first : first - half;
        LoadFloats<true, kVec>(from + angle, c);
        LoadFloats<true, kVec>(from + half + angle, s);
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
};

// The norm's weights of a lane's elements.
template <class T, bool kVector>
__device__ __forceinline__ void ReadWeight(const KernelParams& p, Role role,
                                           int lane_in_head, float* weight) {
  constexpr int kVec = Layout<T>::kVec;
  const void* const from = p.weight[role];
#pragma unroll
  for (int part = 0; part < Layout<T>::kParts; ++part) {
    const int first = ((part << p.log2_lanes) + lane_in_head) * kVec;
    float* const to = weight + part * kVec;
    if (p.float_weight[role]) {
      LoadFloats<kVector, kVec>(static_cast<const float*>(from) + first, to);
    } else {
      LoadFloats<kVector, kVec>(static_cast<const T*>(from) + first, to);
    }
  }
}

// Elements of rotation partners, which lie half a rotary_dim apart and so on
// other lanes. Executed by whole warps. Where whole vectors are partners they
// are exchanged by shuffles, else by elements through `staged`, which is the
// head's part of shared memory.
template <class T, bool kVector>
__device__ __forceinline__ void ExchangePartners(
    const KernelParams& p, int lane_in_head, const typename Layout<T>::Part* x,
    typename Layout<T>::Part* staged, typename Layout<T>::Part* other) {
  constexpr int kVec = Layout<T>::kVec;
  constexpr int kParts = Layout<T>::kParts;
  const int lanes = 1 << p.log2_lanes;
  const int half = p.rotary_dim / 2;
  if constexpr (kVector) {
    constexpr int kWords = sizeof(x[0]) / sizeof(uint32_t);
    uint32_t words[kParts][kWords];
    memcpy(words, x, sizeof(words));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int vector = part * lanes + lane_in_head;
      const int partner = vector * kVec >= p.rotary_dim ? vector
                          : vector * kVec < half        ? vector + half / kVec
                                                        : vector - half / kVec;
      uint32_t received[kWords];
#pragma unroll
      for (int from = 0; from < kParts; ++from) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint32_t word =
              __shfl_sync(~0u, words[from][w], partner & (lanes - 1), lanes);
          if (partner >> p.log2_lanes == from) received[w] = word;
        }
      }
      memcpy(&other[part], received, sizeof(received));
    }
  } else {
    __syncwarp();  // the previous step's reads are done
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      staged[part * lanes + lane_in_head] = x[part];
    }
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int i = (part * lanes + lane_in_head) * kVec + j;
        if (i < p.rotary_dim) {
          other[part].v[j] = staged->v[i < half ? i + half : i - half];
        }
      }
    }
  }
}

// Writes a lane's part of a head to `to` in the cache.
template <class T, bool kVector>
__device__ __forceinline__ void WriteCache(const KernelParams& p,
                                           const CacheArray& cache, int64_t to,
                                           int lane_in_head,
                                           const typename Layout<T>::Part* x) {
  constexpr int kVec = Layout<T>::kVec;
#pragma unroll
  for (int part = 0; part < Layout<T>::kParts; ++part) {
    const int64_t at = to + ((part << p.log2_lanes) + lane_in_head) * kVec;
    if (!p.fp8_cache) {
      Store<kVector>(x[part], static_cast<T*>(cache.data) + at);
      continue;
    }
    Vec<uint8_t, kVec> quantized;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      quantized.v[j] = __nv_cvt_float_to_fp8(
          cuda::ToFloat(x[part].v[j]) / cache.scale, __NV_SATFINITE, __NV_E4M3);
    }
    Store<kVector>(quantized, static_cast<uint8_t*>(cache.data) + at);
  }
}

// Block (32, warps of a token, tokens); grid (tokens, blocks of a token). Lanes
// without a head go through the shuffles with the others.
template <class T, bool kVector, bool kRotary>
__global__ void __launch_bounds__(32 * kMaxWarps)
    QkNormKernel(const __grid_constant__ KernelParams p) {
  using Part = typename Layout<T>::Part;
  constexpr int kVec = Layout<T>::kVec;
  constexpr int kParts = Layout<T>::kParts;
  const int lanes = 1 << p.log2_lanes;
  const int lane_in_head = threadIdx.x & (lanes - 1);
  const int heads_per_step = 32 >> p.log2_lanes;
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
      (threadIdx.x >> p.log2_lanes);
  T* const data = static_cast<T*>(heads.data) + token * heads.token_stride +
                  first_head * heads.head_stride + lane_in_head * kVec;
  const int64_t step_stride = heads_per_step * heads.head_stride;
  const auto is_active = [&](int step) {
    return step < p.num_steps &&
           first_head + step * heads_per_step < heads.count;
  };

  // Everything is read before anything is computed: one trip to memory.
  Part x[kMaxSteps][kParts];
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      x[step][part] = Part();
      if (!is_active(step)) continue;
      x[step][part] = Load<kVector, T, kVec>(data + step * step_stride +
                                             part * lanes * kVec);
    }
  }
  float weight[kPerLane];
  if (role != kV) ReadWeight<T, kVector>(p, role, lane_in_head, weight);
  const Slot slot = role == kQ ? Slot() : FindSlot(p, token);
  const float* const cos_sin =
      kRotary && role != kV ? CosSin(p, token) : nullptr;
  Angles<T, kVector> angles;
  if (cos_sin != nullptr) angles.Read(p, cos_sin, lane_in_head);
  const CacheArray& cache = p.cache[role == kV];
  const int64_t cache_at = slot.page * cache.page_stride +
                           slot.offset * cache.slot_stride +
                           first_head * cache.head_stride;

#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    if (step >= p.num_steps) break;
    const bool active = is_active(step);
    if (role != kV) {
      float f[kPerLane];
      Widen(x[step], f);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += f[j] * f[j];
      for (int mask = 1; mask < lanes; mask *= 2) {
        sum += __shfl_xor_sync(~0u, sum, mask);
      }
      const float inv_rms = __frsqrt_rn(sum * p.inv_head_dim + p.epsilon);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) f[j] *= inv_rms;
      if (p.cast_first) {
        Round(f, x[step]);
        Widen(x[step], f);
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) f[j] *= weight[j];
      Round(f, x[step]);
      if (cos_sin != nullptr) {
        Part* staged_head = nullptr;
        if constexpr (!kVector) {
          __shared__ Part staged[kMaxWarps][32 * kParts];
          staged_head = staged[threadIdx.z * blockDim.y + threadIdx.y] +
                        (threadIdx.x - lane_in_head) * kParts;
        }
        Part other[kParts];
        ExchangePartners<T, kVector>(p, lane_in_head, x[step], staged_head,
                                     other);
        Widen(x[step], f);
        float g[kPerLane];
        Widen(other, g);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          const int i = ((j / kVec << p.log2_lanes) + lane_in_head) * kVec +
                        (kVector ? 0 : j % kVec);
          if (i < p.rotary_dim)
            f[j] = f[j] * angles.cos[j] + g[j] * angles.sin[j];
        }
        Round(f, x[step]);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!active) continue;
        Store<kVector>(x[step][part],
                       data + step * step_stride + part * lanes * kVec);
      }
    }
    if (active && slot.page >= 0) {
      WriteCache<T, kVector>(
          p, cache, cache_at + step * heads_per_step * cache.head_stride,
          lane_in_head, x[step]);
    }
  }
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
