#ifndef TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_

#include "ops/sampler/sampler_row_cuda.cuh"

// Block-wide building blocks of the deciding kernel. All threads of the block
// call them together; each may be followed by any other without a
// __syncthreads() in between.

namespace tenon::cuda {

inline constexpr int kDecideThreads = 256;
inline constexpr int kDecideWarps = kDecideThreads / 32;
// Tokens that filters can sort.
inline constexpr int kMaxCandidates = 2048;
inline constexpr int kBins = 2048;

// Shared memory of known size.
struct BlockScratch {
  // Of reductions, two sets taking turns: a thread may be one barrier ahead.
  uint64_t sums[2][kDecideWarps];
  // What Sort() sorts: candidates are ~OrderedKey(logit) above the id.
  // Histograms are made when there are none.
  union {
    uint64_t keys[kMaxCandidates];
    uint32_t bins[2][kBins];  // 64-bit bins as two words each
  };
  uint64_t sorted[kMaxCandidates];
  uint64_t prefix[kMaxCandidates + 1];
  int count;
  int picked;
  uint64_t before_picked;
};

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
  __device__ explicit Block(BlockScratch* scratch) : s(*scratch) {}

  // Over the block, the same on every thread.
  __device__ uint64_t Sum(uint64_t value) {
    uint64_t* const sums = Exchange(WarpSum64(value));
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) sum += sums[i];
    return sum;
  }
  __device__ uint32_t Max(uint32_t value) {
    uint64_t* const sums = Exchange(__reduce_max_sync(~0u, value));
    uint32_t max = 0;
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) {
      max = ::max(max, static_cast<uint32_t>(sums[i]));
    }
    return max;
  }
  __device__ uint32_t Min(uint32_t value) { return ~Max(~value); }

  // The sum over this and all earlier threads, and over all.
  __device__ uint64_t InclusiveSum(uint64_t value, uint64_t* total) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    value = WarpInclusiveSum(value);
    uint64_t* const sums = Exchange(__shfl_sync(~0u, value, 31));
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kDecideWarps; ++i) {
      if (i < warp) value += sums[i];
      sum += sums[i];
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
    if (threadIdx.x == 0) s.picked = -1;
    uint64_t total;
    const uint64_t upto = InclusiveSum(own, &total);
    uint64_t before = upto - own;
    if (before <= target && target < upto) {
      int i = begin;
      for (uint64_t w = weight(i); before + w <= target; w = weight(i)) {
        before += w;
        ++i;
      }
      s.picked = i;
      s.before_picked = before;
    }
    __syncthreads();
    const Pick pick = {s.picked, s.before_picked};
    __syncthreads();
    return pick;
  }

  // s.sorted = the first `count` of s.keys, ascending. Keys differ.
  __device__ void Sort(int count) {
    if (count <= kDecideThreads) {
      SortByRank(count);
    } else {
      SortByExchange(count);
    }
  }

  // A key with at least `count` of key(i), 0 <= i < n, not below it, and few
  // more unless they are equal; 0 where there are fewer. Keys are from `lowest`
  // to `highest`, or 0, which does not count. Two rounds at most, three where
  // keys are far apart.
  template <class Key>
  __device__ uint32_t LowerBoundOfKth(int n, uint32_t count, uint32_t lowest,
                                      uint32_t highest, Key key) {
    const uint32_t slack = count / 2 + 8;
    uint32_t needed = count;
    uint32_t range = highest - lowest;
    for (;;) {
      const int shift = range < kBins ? 0 : 21 - __clz(static_cast<int>(range));
      for (int i = static_cast<int>(threadIdx.x); i < kBins;
           i += kDecideThreads) {
        s.bins[0][i] = 0;
      }
      if (threadIdx.x == 0) s.picked = -1;
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < n; i += kDecideThreads) {
        const uint32_t k = key(i);
        if (k >= lowest && k - lowest <= range && k != 0) {
          atomicAdd(&s.bins[0][(k - lowest) >> shift], 1u);
        }
      }
      __syncthreads();
      constexpr int kEach = kBins / kDecideThreads;
      const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
      uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) own += s.bins[0][top - i];
      const uint32_t upto = InclusiveSum32(own);
      uint32_t above = upto - own;
      if (above < needed && needed <= upto) {
        int bin = top;
        while (above + s.bins[0][bin] < needed) above += s.bins[0][bin--];
        s.picked = bin;
        s.before_picked = (uint64_t{above} << 32) | (above + s.bins[0][bin]);
      }
      __syncthreads();
      const int bin = s.picked;
      const uint32_t above_bin = static_cast<uint32_t>(s.before_picked >> 32);
      const uint32_t with_bin = static_cast<uint32_t>(s.before_picked);
      __syncthreads();
      if (bin < 0) return 0;
      lowest += static_cast<uint32_t>(bin) << shift;
      if (shift == 0 || count - needed + with_bin <= count + slack) {
        return lowest;
      }
      needed -= above_bin;
      range = (1u << shift) - 1;
    }
  }

  BlockScratch& s;

 private:
  // Every warp's value, after a barrier.
  __device__ uint64_t* Exchange(uint64_t value) {
    uint64_t* const sums = s.sums[turn_];
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    return sums;
  }

  __device__ uint32_t InclusiveSum32(uint32_t value) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    value = WarpInclusiveSum(value);
    uint64_t* const sums = Exchange(__shfl_sync(~0u, value, 31));
#pragma unroll
    for (int i = 0; i < kDecideWarps - 1; ++i) {
      if (i < warp) value += static_cast<uint32_t>(sums[i]);
    }
    return value;
  }

  // Each key's rank is the number of smaller ones: several threads, side by
  // side, count for one key.
  __device__ void SortByRank(int count) {
    const int parts = count <= 32 ? 8 : count <= 64 ? 4 : count <= 128 ? 2 : 1;
    const int thread = static_cast<int>(threadIdx.x);
    const int i = thread / parts;
    const uint64_t key = i < count ? s.keys[i] : 0;
    int rank = 0;
#pragma unroll 4
    for (int j = thread % parts; j < count; j += parts) {
      rank += s.keys[j] < key ? 1 : 0;
    }
    for (int mask = 1; mask < parts; mask *= 2) {
      rank += __shfl_xor_sync(~0u, rank, mask);
    }
    if (i < count && thread % parts == 0) s.sorted[rank] = key;
    __syncthreads();
  }

  // Bitonic.
  __device__ void SortByExchange(int count) {
    const int thread = static_cast<int>(threadIdx.x);
    int size = 2 * kDecideThreads;
    while (size < count) size *= 2;
    for (int i = thread; i < size; i += kDecideThreads) {
      s.sorted[i] = i < count ? s.keys[i] : ~uint64_t{0};
    }
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        for (int pair = thread; pair < size / 2; pair += kDecideThreads) {
          const int low = pair / distance * 2 * distance + pair % distance;
          const uint64_t a = s.sorted[low];
          const uint64_t b = s.sorted[low + distance];
          if ((a > b) == ((low & run) == 0)) {
            s.sorted[low] = b;
            s.sorted[low + distance] = a;
          }
        }
        __syncthreads();
      }
    }
  }

  int turn_ = 0;
};

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_BLOCK_CUDA_CUH_
