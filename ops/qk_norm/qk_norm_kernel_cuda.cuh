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
// step. A warp takes up to kMaxSteps steps of one token: all its loads are
// under way together, and it reads the token's angles once. Nothing is shared
// between warps.
constexpr int kPerLane = 8;
constexpr int kMaxSteps = 4;
constexpr int kMaxWarps = 8;  // of a block

enum Role { kQ = 0, kK = 1, kV = 2 };

struct HeadArray {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
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
  int32_t first_k;     // Q, K and V heads are numbered through
  int32_t first_v;
  int32_t num_heads;
  int32_t log2_lanes;  // of a head
  int32_t num_steps;   // of each warp, at most kMaxSteps

  const void* weight[2];
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

// One head as a lane sees it.
struct Head {
  bool active;  // false past the last head
  Role role;
  int index;  // within the role
};

__device__ __forceinline__ Head FindHead(const KernelParams& p, int number) {
  Head head;
  head.active = number < p.num_heads;
  head.role = number < p.first_k ? kQ : number < p.first_v ? kK : kV;
  head.index = number - (head.role == kQ   ? 0
                         : head.role == kK ? p.first_k
                                           : p.first_v);
  return head;
}

template <class T>
__device__ __forceinline__ T* HeadData(const KernelParams& p, const Head& head,
                                       int64_t token) {
  const HeadArray& heads = p.heads[head.role];
  return static_cast<T*>(heads.data) + token * heads.token_stride +
         head.index * heads.head_stride;
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
                                           int first, float* weight) {
  constexpr int kVec = Layout<T>::kVec;
  const void* const from = role == kQ ? p.weight[kQ] : p.weight[kK];
  if (role == kQ ? p.float_weight[kQ] : p.float_weight[kK]) {
    LoadFloats<kVector, kVec>(static_cast<const float*>(from) + first, weight);
  } else {
    LoadFloats<kVector, kVec>(static_cast<const T*>(from) + first, weight);
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

// Writes the vector that begins at element `first` of a head into its slot.
template <class T, bool kVector>
__device__ __forceinline__ void WriteCache(const KernelParams& p,
                                           const Head& head, const Slot& slot,
                                           int first,
                                           const typename Layout<T>::Part& x) {
  constexpr int kVec = Layout<T>::kVec;
  const CacheArray& cache = head.role == kK ? p.cache[0] : p.cache[1];
  const int64_t offset = slot.page * cache.page_stride +
                         slot.offset * cache.slot_stride +
                         head.index * cache.head_stride + first;
  if (!p.fp8_cache) {
    Store<kVector>(x, static_cast<T*>(cache.data) + offset);
    return;
  }
  Vec<uint8_t, kVec> quantized;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    quantized.v[j] = __nv_cvt_float_to_fp8(cuda::ToFloat(x.v[j]) / cache.scale,
                                           __NV_SATFINITE, __NV_E4M3);
  }
  Store<kVector>(quantized, static_cast<uint8_t*>(cache.data) + offset);
}

// Block (32, warps of a token, tokens); grid (tokens, blocks of a token). Lanes
// without a head, or with one of V, go through the shuffles with the others.
template <class T, bool kVector, bool kRotary>
__global__ void __launch_bounds__(32 * kMaxWarps)
    QkNormKernel(const __grid_constant__ KernelParams p) {
  using Part = typename Layout<T>::Part;
  constexpr int kVec = Layout<T>::kVec;
  constexpr int kParts = Layout<T>::kParts;
  const int lane = threadIdx.x;
  const int lane_in_head = lane & ((1 << p.log2_lanes) - 1);
  const int lane_head = lane >> p.log2_lanes;
  const int heads_per_step = 32 >> p.log2_lanes;
  const int first_head =
      (blockIdx.y * blockDim.y + threadIdx.y) * p.num_steps * heads_per_step;
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  cuda::WaitForPreviousKernels();
  if (token >= p.tokens || first_head >= p.num_heads) return;
  const auto first_of = [&](int part) {
    return ((part << p.log2_lanes) + lane_in_head) * kVec;
  };

  // Everything is read before anything is computed: one trip to memory.
  const auto head_of = [&](int step) {
    return FindHead(p, first_head + step * heads_per_step + lane_head);
  };
  Part x[kMaxSteps][kParts] = {};
#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    const Head head = head_of(step);
    if (step >= p.num_steps || !head.active) break;
    const T* const from = HeadData<T>(p, head, token);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      x[step][part] = Load<kVector, T, kVec>(from + first_of(part));
    }
  }
  float weight[kPerLane];
  const auto read_weight = [&](Role role) {
    if (role == kV) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ReadWeight<T, kVector>(p, role, first_of(part), weight + part * kVec);
    }
  };
  read_weight(head_of(0).role);
  const Slot slot = FindSlot(p, token);
  const float* const cos_sin = kRotary ? CosSin(p, token) : nullptr;
  Angles<T, kVector> angles;
  if (cos_sin != nullptr) angles.Read(p, cos_sin, lane_in_head);

#pragma unroll
  for (int step = 0; step < kMaxSteps; ++step) {
    // The same for all lanes of the warp.
    if (step >= p.num_steps ||
        first_head + step * heads_per_step >= p.num_heads) {
      break;
    }
    const Head head = head_of(step);
    const bool normalize = head.active && head.role != kV;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float f = cuda::ToFloat(x[step][part].v[j]);
        sum += f * f;
      }
    }
    for (int mask = 1; mask < 1 << p.log2_lanes; mask *= 2) {
      sum += __shfl_xor_sync(~0u, sum, mask);
    }
    const float inv_rms = __frsqrt_rn(sum * p.inv_head_dim + p.epsilon);
    if (normalize) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          float f = cuda::ToFloat(x[step][part].v[j]) * inv_rms;
          if (p.cast_first) f = cuda::ToFloat(cuda::FromFloat<T>(f));
          x[step][part].v[j] = cuda::FromFloat<T>(f * weight[part * kVec + j]);
        }
      }
    }
    if (step + 1 < p.num_steps) {
      const Role next = head_of(step + 1).role;
      if (next != head.role) read_weight(next);
    }
    if (cos_sin != nullptr) {
      Part* staged_head = nullptr;
      if constexpr (!kVector) {
        __shared__ Part staged[kMaxWarps][32 * kParts];
        staged_head = staged[threadIdx.z * blockDim.y + threadIdx.y] +
                      (lane_head << p.log2_lanes) * kParts;
      }
      Part other[kParts];
      ExchangePartners<T, kVector>(p, lane_in_head, x[step], staged_head,
                                   other);
      if (normalize) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            if (first_of(part) + j >= p.rotary_dim) continue;
            x[step][part].v[j] = cuda::FromFloat<T>(
                cuda::ToFloat(x[step][part].v[j]) *
                    angles.cos[part * kVec + j] +
                cuda::ToFloat(other[part].v[j]) * angles.sin[part * kVec + j]);
          }
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (normalize) {
        Store<kVector>(x[step][part],
                       HeadData<T>(p, head, token) + first_of(part));
      }
      if (head.active && head.role != kQ && slot.page >= 0) {
        WriteCache<T, kVector>(p, head, slot, first_of(part), x[step][part]);
      }
    }
  }
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
