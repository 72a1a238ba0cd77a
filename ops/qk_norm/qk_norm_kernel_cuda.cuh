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
// step. A block works on one token at a time, and has the next one's elements
// under way meanwhile.
constexpr int kPerLane = 8;
constexpr int kMaxWarps = 16;
constexpr int kMaxSteps = 2;  // of one warp; their loads are under way together

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
  int32_t num_steps;   // of each warp

  const void* weight[2];
  bool float_weight[2];
  bool cast_first;
  float epsilon;
  float inv_head_dim;

  int32_t rotary_dim;  // 0: no rotation
  bool vector_rotary;  // pairs and angles can be read 16 bytes at a time
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

// Moves a vector by one access where views are aligned, else by elements.
template <bool kAligned, class T, int N>
__device__ __forceinline__ Vec<T, N> Load(const T* from) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
  } else {
    Vec<T, N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v.v[j] = from[j];
    return v;
  }
}
template <bool kAligned, class T, int N>
__device__ __forceinline__ void Store(const Vec<T, N>& v, T* to) {
  if constexpr (kAligned) {
    *reinterpret_cast<Vec<T, N>*>(to) = v;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = v.v[j];
  }
}

// N floats from memory of any float dtype that this kernel only reads.
template <bool kAligned, int N, class W>
__device__ __forceinline__ void LoadFloats(const W* from, float* to) {
  constexpr int kVec = 16 / sizeof(W);
#pragma unroll
  for (int i = 0; i < N; i += kVec) {
    Vec<W, kVec> v;
    if constexpr (kAligned) {
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

// The slot of a token, -1 where nothing is to be written.
__device__ __forceinline__ int64_t SlotOf(const KernelParams& p,
                                          int64_t token) {
  if (p.slots == nullptr) return -1;
  const int64_t slot = p.slots[token];
  return slot < p.num_slots ? slot : -1;
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
template <class T>
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
      if (p.vector_rotary) {
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

// x <- x * inv_rms * weight, rounded to T.
template <class T, bool kAligned>
__device__ __forceinline__ void ApplyWeight(const KernelParams& p, Role role,
                                            float inv_rms, int first,
                                            typename Layout<T>::Part* x) {
  constexpr int kVec = Layout<T>::kVec;
  float weight[kVec];
  if (p.float_weight[role]) {
    LoadFloats<kAligned, kVec>(
        static_cast<const float*>(p.weight[role]) + first, weight);
  } else {
    LoadFloats<kAligned, kVec>(static_cast<const T*>(p.weight[role]) + first,
                               weight);
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    float f = cuda::ToFloat(x->v[j]) * inv_rms;
    if (p.cast_first) f = cuda::ToFloat(cuda::FromFloat<T>(f));
    x->v[j] = cuda::FromFloat<T>(f * weight[j]);
  }
}

// Rotates the vector that begins at element `first` of a head. `head` holds the
// whole head, as pairs lie on different lanes.
template <class T>
__device__ __forceinline__ void Rotate(const KernelParams& p, const T* head,
                                       int first, const float* cos,
                                       const float* sin,
                                       typename Layout<T>::Part* x) {
  constexpr int kVec = Layout<T>::kVec;
  const int half = p.rotary_dim / 2;
  typename Layout<T>::Part other = *x;
  if (p.vector_rotary) {
    if (first >= p.rotary_dim) return;
    other = Load<true, T, kVec>(head +
                                (first < half ? first + half : first - half));
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const int i = first + j;
      if (i < p.rotary_dim) other.v[j] = head[i < half ? i + half : i - half];
    }
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (first + j < p.rotary_dim) {
      x->v[j] = cuda::FromFloat<T>(cuda::ToFloat(x->v[j]) * cos[j] +
                                   cuda::ToFloat(other.v[j]) * sin[j]);
    }
  }
}

// Writes the vector that begins at element `first` of a head into its slot.
template <class T, bool kAligned>
__device__ __forceinline__ void WriteCache(const KernelParams& p,
                                           const Head& head, int64_t slot,
                                           int first,
                                           const typename Layout<T>::Part& x) {
  constexpr int kVec = Layout<T>::kVec;
  const CacheArray& cache = p.cache[head.role - kK];
  const int64_t page = slot / p.page_size;
  const int64_t offset = page * cache.page_stride +
                         (slot - page * p.page_size) * cache.slot_stride +
                         head.index * cache.head_stride + first;
  if (!p.fp8_cache) {
    Store<kAligned>(x, static_cast<T*>(cache.data) + offset);
    return;
  }
  Vec<uint8_t, kVec> quantized;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    quantized.v[j] = __nv_cvt_float_to_fp8(cuda::ToFloat(x.v[j]) / cache.scale,
                                           __NV_SATFINITE, __NV_E4M3);
  }
  Store<kAligned>(quantized, static_cast<uint8_t*>(cache.data) + offset);
}

// Block (32, warps); grid (blocks that share the tokens, blocks of one token).
// The warps of a token take its steps in turn. Lanes without a head, or with
// one of V, go through the shuffles and barriers with the others.
template <class T, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    QkNormKernel(const __grid_constant__ KernelParams p) {
  using Part = typename Layout<T>::Part;
  constexpr int kVec = Layout<T>::kVec;
  constexpr int kParts = Layout<T>::kParts;
  __shared__ Part staged[kMaxWarps][32 * kParts];
  const int lane = threadIdx.x;
  const int lane_in_head = lane & ((1 << p.log2_lanes) - 1);
  const int lane_head = lane >> p.log2_lanes;
  const int heads_per_step = 32 >> p.log2_lanes;
  const int first_head =
      (blockIdx.y * blockDim.y + threadIdx.y) * heads_per_step;
  const int step_stride = gridDim.y * blockDim.y * heads_per_step;
  Part* const staged_head =
      staged[threadIdx.y] + (lane_head << p.log2_lanes) * kParts;
  const auto part_index = [&](int part) {
    return (part << p.log2_lanes) + lane_in_head;
  };

  const auto load = [&](int64_t token, Part(&to)[kMaxSteps][kParts]) {
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      if (step >= p.num_steps || token >= p.tokens) break;
      const Head head =
          FindHead(p, first_head + step * step_stride + lane_head);
      if (!head.active) continue;
      const T* const from = HeadData<T>(p, head, token);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        to[step][part] =
            Load<kAligned, T, kVec>(from + part_index(part) * kVec);
      }
    }
  };

  Part next[kMaxSteps][kParts] = {};
  load(blockIdx.x, next);
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    Part x[kMaxSteps][kParts];
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        x[step][part] = next[step][part];
      }
    }
    load(token + gridDim.x, next);
    const int64_t slot = SlotOf(p, token);
    const float* const cos_sin = CosSin(p, token);
    Angles<T> angles;
    if (cos_sin != nullptr) angles.Read(p, cos_sin, lane_in_head);

#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      // The same for all lanes of the warp.
      if (step >= p.num_steps ||
          first_head + step * step_stride >= p.num_heads) {
        break;
      }
      const Head head =
          FindHead(p, first_head + step * step_stride + lane_head);
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
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!normalize) continue;
        ApplyWeight<T, kAligned>(p, head.role, inv_rms, part_index(part) * kVec,
                                 &x[step][part]);
      }
      if (cos_sin != nullptr) {
        __syncwarp();  // the previous step's reads of `staged` are done
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          staged_head[part_index(part)] = x[step][part];
        }
        __syncwarp();
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (!normalize) continue;
          Rotate<T>(p, staged_head->v, part_index(part) * kVec,
                    angles.cos + part * kVec, angles.sin + part * kVec,
                    &x[step][part]);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int first = part_index(part) * kVec;
        if (normalize) {
          Store<kAligned>(x[step][part], HeadData<T>(p, head, token) + first);
        }
        if (head.active && head.role != kQ && slot >= 0) {
          WriteCache<T, kAligned>(p, head, slot, first, x[step][part]);
        }
      }
    }
  }
}

}  // namespace tenon::qk_norm

#endif  // TENON_OPS_QK_NORM_QK_NORM_KERNEL_CUDA_CUH_
