#ifndef TENON_OPS_LINEAR_LINEAR_FP8_X_CUDA_CUH_
#define TENON_OPS_LINEAR_LINEAR_FP8_X_CUDA_CUH_

#include <cstring>
#include <type_traits>

#include "ops/linear/linear_stream_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"
#include "ops/rms_norm/rms_norm_cuda.cuh"

// How the streaming kernel for fp8 weights gets its x: normalised, if that is
// asked for, with the bits of RmsNorm, and quantised with those of QuantizeFp8.
// Every block does so for all of x, in registers, while its weights are on
// their way.

namespace tenon::linear_stream {

static_assert(kMultiplyThreads == cuda::kRmsNormThreads, "for its bits");

#if TENON_SM90A

// Reduces each of kCount values over kLanes lanes in the order of
// cuda::WarpSum, all at once: every step halves the lanes that a value is
// spread over, and the values of a lane. Returns value LaneSlot of this lane.
template <int kLanes, int kCount, class F>
__device__ __forceinline__ float ReduceTogether(float (&v)[kCount],
                                                const F& f) {
  int count = kCount;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    if (count == 1) {
      v[0] = f(v[0], __shfl_xor_sync(~0u, v[0], mask));
      continue;
    }
    count /= 2;
    const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) break;
      const float other = upper ? v[i] : v[i + count];
      v[i] = f(upper ? v[i + count] : v[i], __shfl_xor_sync(~0u, other, mask));
    }
  }
  return v[0];
}
template <int kLanes, int kCount>
__device__ __forceinline__ int LaneSlot() {
  return threadIdx.x % kLanes / (kLanes / kCount);
}
// Whether it is the one that stores the value, of those that have it.
template <int kLanes, int kCount>
__device__ __forceinline__ bool StoresSlot() {
  return threadIdx.x % (kLanes / kCount) == 0;
}

// cuda::MaxMagnitude of a vector as it is, two elements at a time.
template <class T>
__device__ __forceinline__ float MaxMagnitude(uint4 v) {
  using Pair =
      std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pairs[4];
  memcpy(pairs, &v, sizeof(v));
  const Pair most = __hmax2(__hmax2(__habs2(pairs[0]), __habs2(pairs[1])),
                            __hmax2(__habs2(pairs[2]), __habs2(pairs[3])));
  return fmaxf(fmaxf(0.0f, cuda::ToFloat(most.x)), cuda::ToFloat(most.y));
}

// A vector as its elements.
template <class T>
__device__ __forceinline__ cuda::Vec<T, 8> Elements(uint4 v) {
  cuda::Vec<T, 8> elements;
  memcpy(&elements, &v, sizeof(v));
  return elements;
}

// A vector of x of a thread: number threadIdx.x + vec * kMultiplyThreads of a
// row.
struct XPlace {
  int token = 0;
  int vec = 0;

  __device__ __forceinline__ int Column() const {
    return (threadIdx.x + vec * kMultiplyThreads) * 8;
  }
};

// Works on up to kCount vectors of each thread at a time, in registers.
// kOneVec: a thread has one vector of a row at most, which takes half of the
// instructions: with several tokens they are what takes time.
template <class T, int kCount, bool kOneVec>
class XPreparer {
 public:
  // `first_weights`: of the norm, of the thread's first vector of a row.
  __device__ __forceinline__ XPreparer(const Args& a,
                                       const uint4& first_weights)
      : a_(a), first_weights_(Elements<T>(first_weights)) {}

  // The next `count` vectors. All loads are under way before any is waited for.
  __device__ __forceinline__ void Load(int count) {
    first_ = next_;
    count_ = count;
    const T* row = static_cast<const T*>(a_.x) + first_.token * a_.x_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v_[i] = make_uint4(0, 0, 0, 0);
    next_ = ForEach([&](int i, XPlace at) {
      if (i > 0 && at.vec == 0) row += a_.x_stride;
      if (at.Column() < a_.in_features) {
        v_[i] = *reinterpret_cast<const uint4*>(row + at.Column());
      }
    });
  }

  // Whole rows. Writes this block's share of them to normed.
  __device__ __forceinline__ void Normalize(
      float (&squares)[kLinearFp8StreamTokens][kWarps]) {
    const float of_lane = InverseRms(squares);
    const int share_begin = blockIdx.x * a_.normed_share * 8;
    const int share_end = share_begin + a_.normed_share * 8;
    ForEach([&](int i, XPlace at) {
      const float inverse = __shfl_sync(~0u, of_lane, i);
      const int column = at.Column();
      if (column >= a_.in_features) return;
      const cuda::Vec<T, 8> x = Elements<T>(v_[i]);
      const cuda::Vec<T, 8> weights = Weights(at);
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f[j] = cuda::Normalized<T>(cuda::ToFloat(x.v[j]), inverse,
                                   cuda::ToFloat(weights.v[j]), false);
      }
      v_[i] = {cuda::Pack<T>(f[0], f[1]), cuda::Pack<T>(f[2], f[3]),
               cuda::Pack<T>(f[4], f[5]), cuda::Pack<T>(f[6], f[7])};
      if (column < share_begin || column >= share_end) return;
      T* const to = static_cast<T*>(a_.normed) + at.token * a_.normed_stride;
      *reinterpret_cast<uint4*>(to + column) = v_[i];
    });
  }

  // To fp8 in shared memory.
  __device__ __forceinline__ void Quantize(char* xs, float* scales) const {
    constexpr int kLanes = kFp8GroupSize / 8;  // that hold a group
    float amax[kCount] = {};
    ForEach([&](int i, XPlace) { amax[i] = MaxMagnitude<T>(v_[i]); });
    const Fp8Scale of_lane = Fp8ScaleOf(ReduceTogether<kLanes>(
        amax, [](float x, float y) { return fmaxf(x, y); }));
    const int to_store =
        StoresSlot<kLanes, kCount>() ? LaneSlot<kLanes, kCount>() : -1;
    const int groups = static_cast<int>(NumFp8Groups(a_.in_features));
    ForEach([&](int i, XPlace at) {
      const float inverse =
          __shfl_sync(~0u, of_lane.inverse, i * (kLanes / kCount), kLanes);
      const int column = at.Column();
      const int group = column / kFp8GroupSize;
      if (i == to_store && group < groups) {
        scales[at.token * groups + group] = of_lane.scale;
      }
      if (column >= a_.in_features) return;
      const cuda::Vec<T, 8> x = Elements<T>(v_[i]);
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) f[j] = cuda::ToFloat(x.v[j]);
      *reinterpret_cast<uint2*>(xs + at.token * a_.x_pitch + column) =
          cuda::ToFp8x8(f, inverse);
    });
  }

 private:
  // Calls f(i, place) for the vectors, all threads for the same ones. Returns
  // the place behind them.
  template <class F>
  __device__ __forceinline__ XPlace ForEach(const F& f) const {
    XPlace at = first_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count_) break;
      f(i, at);
      if (kOneVec || ++at.vec == a_.x_vecs) at = {at.token + 1, 0};
    }
    return at;
  }

  __device__ __forceinline__ cuda::Vec<T, 8> Weights(XPlace at) const {
    if (kOneVec || at.vec == 0) return first_weights_;
    return *reinterpret_cast<const cuda::Vec<T, 8>*>(
        static_cast<const T*>(a_.norm_weight) + at.Column());
  }

  // The factor of the norm of the row of vector threadIdx.x % 32.
  __device__ __forceinline__ float InverseRms(
      float (&squares)[kLinearFp8StreamTokens][kWarps]) const {
    const int lane = threadIdx.x % 32;
    const int slot = LaneSlot<32, kCount>();
    int ended = -1;            // the token whose sum this lane gets, if any
    int token = first_.token;  // that of vector `lane`
    float sum[kCount] = {};    // of a row up to a vector
    ForEach([&](int i, XPlace at) {
      const bool goes_on = i > 0 && !kOneVec && at.vec > 0;
      sum[i] = cuda::AddSquares(Elements<T>(v_[i]),
                                goes_on ? sum[i > 0 ? i - 1 : 0] : 0.0f);
      const bool ends = kOneVec || at.vec == a_.x_vecs - 1;
      if (i == slot && ends) ended = at.token;
      if (i == lane) token = at.token;
    });
    const float total =
        ReduceTogether<32>(sum, [](float x, float y) { return x + y; });
    if (ended >= 0 && StoresSlot<32, kCount>()) {
      squares[ended][threadIdx.x / 32] = total;
    }
    SyncMultiplying();
    float of_row = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) of_row += squares[token][w];
    return cuda::InverseRms(of_row, a_.inverse_in_features, a_.epsilon);
  }

  const Args& a_;
  const cuda::Vec<T, 8> first_weights_;
  XPlace first_, next_;
  int count_ = 0;
  uint4 v_[kCount];
};

// Brings x to shared memory, normalised if that is asked for, and quantised.
template <bool kOneVec, class T, int kCount>
__device__ __forceinline__ void PrepareFp8X(
    const Args& a, float (&squares)[kLinearFp8StreamTokens][kWarps], char* xs,
    float* scales, const uint4& first_weights) {
  XPreparer<T, kCount, kOneVec> preparer(a, first_weights);
#pragma unroll 1
  for (int left = a.tokens * a.x_vecs; left > 0; left -= a.x_vecs_at_once) {
    preparer.Load(min(left, a.x_vecs_at_once));
    if (a.norm_weight != nullptr) preparer.Normalize(squares);
    preparer.Quantize(xs, scales);
  }
  SyncMultiplying();
}

#endif  // TENON_SM90A

}  // namespace tenon::linear_stream

#endif  // TENON_OPS_LINEAR_LINEAR_FP8_X_CUDA_CUH_
