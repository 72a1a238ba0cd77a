#ifndef TENON_OPS_SAMPLER_SAMPLER_SELECT_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_SELECT_CUDA_CUH_

#include "ops/sampler/sampler_tile_cuda.cuh"

// Block-wide building blocks of the deciding kernel: prefix sums, picking by
// weight and radix selection. All threads of the block call them together. Each
// may be followed by any other without a __syncthreads() in between.

namespace tenon::cuda {

inline constexpr int kDecideThreads = 1024;
inline constexpr int kDecideWarps = kDecideThreads / 32;

struct Pick {
  int index = 0;
  double fraction = 0.0;  // of the picked weight that lies before the target
};

struct DecideScratch {
  // 64-bit sums as two words each: shared memory adds 32-bit words natively.
  uint32_t bins_low[kRadixBins];
  uint32_t bins_high[kRadixBins];
  double warp_sums[kDecideWarps];
  uint64_t warp_masses[kDecideWarps];
  float warp_max[kDecideWarps];
  uint64_t mass_above;
  Pick pick;
  int bin;
  int first_thread;
  int last_thread;
  int token;
};

// The sum of `value` over this and all earlier threads, and over all. Fixed
// order.
template <class Value>
__device__ Value InclusiveScan(Value value, Value* warp_totals, Value* total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  value = WarpInclusiveSum(value);
  if (lane == 31) warp_totals[warp] = value;
  __syncthreads();
  if (warp == 0) warp_totals[lane] = WarpInclusiveSum(warp_totals[lane]);
  __syncthreads();
  if (warp > 0) value += warp_totals[warp - 1];
  *total = warp_totals[kDecideWarps - 1];
  __syncthreads();
  return value;
}

// Thread t's share of `count` entries in order: [begin, end).
struct ThreadRange {
  int begin;
  int end;
};
__device__ __forceinline__ ThreadRange ShareOf(int count) {
  const int each = CeilDiv(count, kDecideThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * each, count);
  return {begin, min(begin + each, count)};
}

// The sum of weights, as PickByWeight below makes it.
__device__ inline double SumWeights(DecideScratch& scratch,
                                    const double* weights, int count) {
  const ThreadRange share = ShareOf(count);
  double own = 0.0;
  for (int i = share.begin; i < share.end; ++i) own += weights[i];
  double total;
  InclusiveScan(own, scratch.warp_sums, &total);
  return total;
}

// The first entry where the running sum of weights exceeds target(sum of all);
// the last one that weighs anything where rounding leaves none. Some weight is
// positive.
template <class Target>
__device__ Pick PickByWeight(DecideScratch& scratch, const double* weights,
                             int count, Target target_of) {
  const int thread = threadIdx.x;
  const ThreadRange share = ShareOf(count);
  double own = 0.0;
  for (int i = share.begin; i < share.end; ++i) own += weights[i];
  if (thread == 0) {
    scratch.first_thread = kDecideThreads;
    scratch.last_thread = 0;
  }
  double total;
  const double upto = InclusiveScan(own, scratch.warp_sums, &total);
  const double target = target_of(total);
  // Sums of different threads are rounded differently, so that a thread without
  // weight could seem to be the one.
  if (own > 0.0) {
    if (upto > target) atomicMin(&scratch.first_thread, thread);
    atomicMax(&scratch.last_thread, thread);
  }
  __syncthreads();
  const int chosen = min(scratch.first_thread, scratch.last_thread);
  if (thread == chosen) {
    Pick pick;
    double before = upto - own;
    for (int i = share.begin; i < share.end; ++i) {
      const double weight = weights[i];
      if (!(weight > 0.0)) continue;
      pick = {i, fmin(fmax((target - before) / weight, 0.0), 1.0)};
      before += weight;
      if (before > target) break;
    }
    scratch.pick = pick;
  }
  __syncthreads();
  const Pick pick = scratch.pick;
  __syncthreads();
  return pick;
}

// The same for the tokens of one sub-tile, weighed by weigh(logit, id); returns
// the id. The target is tile.fraction of their sum.
template <class T, class Weigh>
__device__ int PickInTile(DecideScratch& scratch, const DeviceLogits<T>& logits,
                          const Pick& tile, Weigh weigh) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const int first = FirstIdOfLane(tile.index);
    const LanePart<T> part = LoadPart(logits, tile.index);
    float weights[kIdsPerLane];
    double own = 0.0;
#pragma unroll
    for (int j = 0; j < kIdsPerLane; ++j) {
      weights[j] = weigh(ToFloat(part.x[j]), first + j);
      own += weights[j];
    }
    double upto = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const double before = __shfl_up_sync(~0u, upto, offset);
      if (lane >= offset) upto += before;
    }
    const double target = tile.fraction * __shfl_sync(~0u, upto, 31);
    const unsigned beyond = __ballot_sync(~0u, own > 0.0 && upto > target);
    const unsigned weighty = __ballot_sync(~0u, own > 0.0);
    const int chosen = beyond != 0 ? __ffs(beyond) - 1 : 31 - __clz(weighty);
    if (lane == chosen) {
      int token = first;
      double before = upto - own;
      bool done = false;
#pragma unroll
      for (int j = 0; j < kIdsPerLane; ++j) {
        if (!done && weights[j] > 0.0f) {
          token = first + j;
          before += weights[j];
          done = before > target;
        }
      }
      scratch.token = token;
    }
  }
  __syncthreads();
  const int token = scratch.token;
  __syncthreads();
  return token;
}

// Adds where `active` to a 64-bit bin. A whole warp calls this together.
__device__ __forceinline__ void AddToBin(DecideScratch& scratch, int bin,
                                         uint64_t weight, bool active) {
  const unsigned adding = __ballot_sync(~0u, active);
  if (adding == 0) return;
  const int leader = __ffs(adding) - 1;
  const int leaders_bin = __shfl_sync(~0u, bin, leader);
  // Rows of equal logits would otherwise take turns 32 times each.
  if (__popc(adding) > 4 && __all_sync(~0u, !active || bin == leaders_bin)) {
    weight = active ? weight : 0;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      weight += __shfl_xor_sync(~0u, weight, mask);
    }
    active = static_cast<int>(threadIdx.x % 32) == leader;
  }
  if (!active) return;
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&scratch.bins_low[bin], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&scratch.bins_high[bin], high);
}

// The value at which the weights of all larger or equal values reach a target.
struct Selection {
  bool found = false;  // false where all weights together do not reach it
  float value = 0.0f;
  uint64_t needed = 0;  // of the weight of `value`, at least 1
};

// for_each(lowest, highest, add) has whole warps call add(value, weight,
// active) at least for the candidates in [lowest, highest], in any order:
// integer sums do not depend on it.
template <class ForEach>
__device__ Selection SelectFromTop(DecideScratch& scratch, uint64_t target,
                                   ForEach for_each) {
  uint32_t prefix = 0;
  for (int i = 0; i < kRadixPasses; ++i) {
    const RadixPass pass = GetRadixPass(i);
    for (int b = threadIdx.x; b < kRadixBins; b += kDecideThreads) {
      scratch.bins_low[b] = 0;
      scratch.bins_high[b] = 0;
    }
    if (threadIdx.x == 0) scratch.bin = -1;
    __syncthreads();
    for_each(pass.Lowest(prefix), pass.Highest(prefix),
             [&](float value, uint64_t weight, bool active) {
               const uint32_t key = OrderedKey(value);
               AddToBin(scratch, pass.Bin(key), weight,
                        active && pass.Matches(key, prefix));
             });
    __syncthreads();
    // Two bins of each thread, from the top.
    static_assert(kRadixBins == 2 * kDecideThreads, "two bins a thread");
    const int bin = kRadixBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const auto mass_of = [&](int b) {
      return (uint64_t{scratch.bins_high[b]} << 32) | scratch.bins_low[b];
    };
    const uint64_t upper = mass_of(bin);
    const uint64_t both = upper + mass_of(bin - 1);
    uint64_t total;
    const uint64_t upto = InclusiveScan(both, scratch.warp_masses, &total);
    const uint64_t before = upto - both;
    if (before < target && target <= upto) {
      const bool in_upper = target <= before + upper;
      scratch.bin = in_upper ? bin : bin - 1;
      scratch.mass_above = in_upper ? before : before + upper;
    }
    __syncthreads();
    const int chosen = scratch.bin;
    const uint64_t above = scratch.mass_above;
    __syncthreads();
    if (chosen < 0) return {};
    prefix |= static_cast<uint32_t>(chosen) << pass.shift;
    target -= above;
  }
  return {true, FromOrderedKey(prefix), target};
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_SELECT_CUDA_CUH_
