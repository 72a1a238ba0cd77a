#ifndef TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_

#include "ops/sampler/sampler_row_cuda.cuh"

// Block-wide building blocks of the deciding kernel. All threads of the block
// call them together; each may be followed by any other without a
// __syncthreads() in between.

namespace tenon::cuda {

inline constexpr int kDecideThreads = 256;
inline constexpr int kDecideWarps = kDecideThreads / 32;

// Sum over a warp, the same on every lane. Words of 26 bits, as the hardware
// adds 32-bit ones across a warp.
__device__ __forceinline__ uint64_t WarpSum64(uint64_t value) {
  constexpr uint32_t kMask = (1u << 26) - 1;
  const uint32_t low =
      __reduce_add_sync(~0u, static_cast<uint32_t>(value) & kMask);
  const uint32_t middle =
      __reduce_add_sync(~0u, static_cast<uint32_t>(value >> 26) & kMask);
  const uint32_t high =
      __reduce_add_sync(~0u, static_cast<uint32_t>(value >> 52));
  return low + (uint64_t{middle} << 26) + (uint64_t{high} << 52);
}

class Block {
 public:
  // What threads tell each other: two sets taking turns, as a thread may be one
  // barrier ahead.
  struct Scratch {
    uint64_t values[2][2 * kDecideWarps];
    int picked;
    uint64_t before_picked;
  };

  __device__ explicit Block(Scratch* scratch) : s_(*scratch) {}

  // Over the block, the same on every thread.
  __device__ uint64_t Sum(uint64_t value) {
    return SumOf(Exchange(WarpSum64(value)));
  }
  static __device__ uint64_t SumOf(const uint64_t* values) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) sum += values[i];
    return sum;
  }
  // The largest of both halves, each for itself.
  struct Pair {
    uint32_t a;
    uint32_t b;
  };
  __device__ Pair Max(Pair pair) { return MaxOf(Exchange(WarpMax(pair))); }
  static __device__ uint64_t WarpMax(Pair pair) {
    return (uint64_t{__reduce_max_sync(~0u, pair.a)} << 32) |
           __reduce_max_sync(~0u, pair.b);
  }
  static __device__ Pair MaxOf(const uint64_t* values) {
    Pair pair = {0, 0};
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) {
      pair.a = max(pair.a, static_cast<uint32_t>(values[i] >> 32));
      pair.b = max(pair.b, static_cast<uint32_t>(values[i]));
    }
    return pair;
  }
  __device__ uint32_t Min(uint32_t value) { return ~Max({~value, 0}).a; }

  // The sum over this and all earlier threads, and over all.
  __device__ uint64_t InclusiveSum(uint64_t value, uint64_t* total) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    value = WarpInclusiveSum(value);
    const uint64_t* const values = Exchange(__shfl_sync(~0u, value, 31));
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) {
      if (i < warp) value += values[i];
      sum += values[i];
    }
    *total = sum;
    return value;
  }

  // The first entry at which the running sum of weight(i), 0 <= i < count,
  // exceeds `target`, and the sum before it; -1 where none does.
  struct Pick {
    int index;
    uint64_t before;
  };
  template <class Weight>
  __device__ Pick PickByWeight(int count, uint64_t target, Weight weight) {
    const int each = CeilDiv(count, kDecideThreads);
    const int begin = min(static_cast<int>(threadIdx.x) * each, count);
    const int end = min(begin + each, count);
    uint64_t own = 0;
    for (int i = begin; i < end; ++i) own += weight(i);
    if (threadIdx.x == 0) s_.picked = -1;
    uint64_t total;
    const uint64_t upto = InclusiveSum(own, &total);
    uint64_t before = upto - own;
    if (before <= target && target < upto) {
      int i = begin;
      for (uint64_t w = weight(i); before + w <= target; w = weight(i)) {
        before += w;
        ++i;
      }
      s_.picked = i;
      s_.before_picked = before;
    }
    __syncthreads();
    const Pick pick = {s_.picked, s_.before_picked};
    __syncthreads();
    return pick;
  }

  // Every warp's value, after a barrier.
  __device__ const uint64_t* Exchange(uint64_t value) {
    Post(value);
    __syncthreads();
    return Posted();
  }
  // The same in two steps, for a barrier that is there for more. A second value
  // is at kSecond from the first.
  static constexpr int kSecond = kDecideWarps;
  __device__ void Post(uint64_t value, int at = 0) {
    if (threadIdx.x % 32 == 0) s_.values[turn_][at + threadIdx.x / 32] = value;
  }
  __device__ const uint64_t* Posted() {
    turn_ ^= 1;
    return s_.values[turn_ ^ 1];
  }

 private:
  Scratch& s_;
  int turn_ = 0;
};

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_
