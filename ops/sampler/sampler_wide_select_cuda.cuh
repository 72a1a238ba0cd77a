#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_

#include "ops/sampler/sampler_wide_passes_cuda.cuh"

// WidePasses::Select(): the token at which a running sum reaches a target.

namespace tenon::cuda {

__device__ __forceinline__ void WidePasses::AddToBin(uint32_t bin,
                                                     uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&s().bins[0][bin], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&s().bins[1][bin], high);
}

// This block's share of a histogram.
__device__ __noinline__ inline void WidePasses::FillBins(Measure measure,
                                                         uint32_t lowest,
                                                         uint32_t range,
                                                         int shift) {
  uint4* const words = reinterpret_cast<uint4*>(s().bins);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < WideScratch::kBins / 2;
       i += kDecideThreads) {
    words[i] = {0, 0, 0, 0};
  }
  __syncthreads();
  const float best = row_.best;
  const float scale = plan_.scale;
  ForEach(
      false, FloorOf(measure, lowest),
      [&](float x, int id, bool kept) {
        const uint32_t offset = KeyOf(measure, x, id) - lowest;
        const bool active = kept && offset <= range;
        const uint32_t bin = offset >> shift;
        const uint32_t low = __reduce_min_sync(~0u, active ? bin : ~0u);
        if (low == ~0u) return;
        uint64_t weight = 1;
        if (!measure.counts) weight = FixedMass(strict::Weight(x, best, scale));
        // Tokens of one bin, as one: they would take turns at it.
        if (__reduce_max_sync(~0u, active ? bin : 0) == low) {
          weight = WarpSum64(active ? weight : 0);
          if (threadIdx.x % 32 == 0) AddToBin(low, weight);
        } else if (active) {
          AddToBin(bin, weight);
        }
      },
      [](int) {});
  __syncthreads();
}

// Adds up all blocks' bins and finds the one, from the last, at which the sum
// reaches the target, and the sum before it; -1 where it does not. Of a target
// that is negative: all of the sum but so much.
__device__ __noinline__ inline int WidePasses::PickBin(uint64_t target,
                                                       uint64_t* before) {
  constexpr int kGroups = WideScratch::kGroups;
  constexpr int kBinsOfGroup = WideScratch::kBinsOfGroup;
  constexpr int kThreadsOfGroup = kDecideThreads / kGroups;
  constexpr int kThreadsOfBin = kDecideThreads / kBinsOfGroup;
  constexpr int kBinsOfThread = WideScratch::kBins / kDecideThreads;
  static_assert(kThreadsOfBin >= kTeamBlocks, "a thread for each block's bin");
  const int thread = static_cast<int>(threadIdx.x);
  WideScratch& scratch = s();
  const auto in_block = [&](int r, int bin) {
    return (uint64_t{*team_.In(r, &scratch.bins[1][bin])} << 32) +
           *team_.In(r, &scratch.bins[0][bin]);
  };
  // Of `each` neighbouring threads that have a sum together: whether it takes
  // the sum of all before it to the target.
  uint64_t before_own;
  const auto reaches = [&](uint64_t sum, int each) {
    uint64_t total;
    const uint64_t upto = team_.InclusiveSum(sum, &total);
    if (static_cast<int64_t>(target) < 0) target += total;
    const int lane = thread % 32;
    const int first = lane / each * each;
    before_own = __shfl_sync(~0u, upto - sum, first);
    const uint64_t upto_last = __shfl_sync(~0u, upto, first + each - 1);
    return before_own < target && target <= upto_last;
  };
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = 0; i < kBinsOfThread; ++i) {
    const int bin = thread * kBinsOfThread + i;
    sum += (uint64_t{scratch.bins[1][bin]} << 32) + scratch.bins[0][bin];
  }
#pragma unroll
  for (int mask = 1; mask < kThreadsOfGroup; mask *= 2) {
    sum += __shfl_xor_sync(~0u, sum, mask);
  }
  if (thread % kThreadsOfGroup == 0) {
    scratch.groups[thread / kThreadsOfGroup] = sum;
  }
  if (thread == 0) scratch.picked = -1;
  team_.Sync();
  const int group = kGroups - 1 - thread / kThreadsOfGroup;
  sum = 0;
#pragma unroll 1
  for (int r = thread % kThreadsOfGroup; r < team_.size();
       r += kThreadsOfGroup) {
    sum += *team_.In(r, &scratch.groups[group]);
  }
  if (reaches(sum, kThreadsOfGroup)) {
    scratch.picked = group;
    scratch.before_picked = before_own;
  }
  __syncthreads();
  const int picked = scratch.picked;
  if (picked < 0) return -1;
  const uint64_t before_group = scratch.before_picked;
  target -= before_group;
  const int bin =
      picked * kBinsOfGroup + kBinsOfGroup - 1 - thread / kThreadsOfBin;
  const int r = thread % kThreadsOfBin;
  if (reaches(r < team_.size() ? in_block(r, bin) : 0, kThreadsOfBin)) {
    scratch.picked = bin;
    scratch.before_picked = before_own;
  }
  __syncthreads();
  *before = before_group + scratch.before_picked;
  return scratch.picked;
}

// Lists the kept tokens with keys from `lowest` to `highest`, and makes these
// the smallest and the largest key of them if they are too many for the lists.
// Returns how many they are. All blocks have read what lists had before.
__device__ __noinline__ inline int WidePasses::Gather(Measure measure,
                                                      uint32_t* lowest,
                                                      uint32_t* highest) {
  WideScratch& scratch = s();
  if (threadIdx.x == 0) scratch.num_members = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t low = *lowest;
  const uint32_t range = *highest - low;
  Block::Pair keys = {0, 0};  // of the first of them, the largest and smallest
  ForEach(
      false, FloorOf(measure, low),
      [&](float x, int id, bool kept) {
        const uint32_t key = KeyOf(measure, x, id);
        const bool active = kept && key - low <= range;
        const unsigned lanes = __ballot_sync(~0u, active);
        if (lanes == 0) return;
        int at = 0;
        if (lane == 0) at = atomicAdd(&scratch.num_members, __popc(lanes));
        at = __shfl_sync(~0u, at, 0) + __popc(lanes & ((1u << lane) - 1));
        if (!active) return;
        keys.a = max(keys.a, key);
        keys.b = max(keys.b, ~key);
        if (at < WideScratch::kMaxMembers) {
          scratch.members[at] = CandidateKey(key, id);
          scratch.member_logits[at] = x;
        }
      },
      [](int) {});
  team_.Sync();
  int count = 0;
#pragma unroll 1
  for (int r = 0; r < team_.size(); ++r) {
    count += *team_.In(r, &scratch.num_members);
  }
  if (count > WideScratch::kMaxMembers) {
    keys = team_.Max(keys);
    *lowest = ~keys.b;
    *highest = keys.a;
  }
  return count;
}

// Of all blocks' lists, `count` tokens.
__device__ __noinline__ inline WidePasses::Selection WidePasses::PickMember(
    Measure measure, int count, uint64_t target) {
  WideScratch& scratch = s();
  const int thread = static_cast<int>(threadIdx.x);
  constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t key = kNone;
  uint64_t weight = 0;
  if (thread == 0) scratch.picked_member = kNone;
  if (thread < count) {
    int r = 0;
    int i = thread;
    for (int there = *team_.In(0, &scratch.num_members); i >= there;
         there = *team_.In(r, &scratch.num_members)) {
      i -= there;
      ++r;
    }
    key = *team_.In(r, &scratch.members[i]);
    weight =
        measure.counts ? 1 : row_.Mass(*team_.In(r, &scratch.member_logits[i]));
    scratch.all_members[thread] = key;
    scratch.member_weights[thread] = weight;
  }
  __syncthreads();
  uint64_t before = 0;
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    if (scratch.all_members[i] < key) before += scratch.member_weights[i];
  }
  if (before < target && target <= before + weight) {
    scratch.picked_member = key;
  }
  __syncthreads();
  const uint64_t picked = scratch.picked_member;
  Selection selection;
  if (picked != kNone) {
    selection.found = true;
    selection.key = ~static_cast<uint32_t>(picked >> 32);
    selection.id = IdOfCandidate(picked);
  }
  return selection;
}

// Of keys from `lowest` to `highest`.
__device__ __noinline__ inline WidePasses::Selection WidePasses::Select(
    Measure measure, uint32_t lowest, uint32_t highest, uint64_t target) {
  for (;;) {
    // Which of them, ids tell sooner.
    if (lowest == highest && measure.key != Measure::kId) {
      return {true, lowest, -1, target};
    }
    if (!filled_) Fill();
    const uint32_t range = highest - lowest;
    if (range != 0) {
      const int shift = ShiftOf(range);
      FillBins(measure, lowest, range, shift);
      uint64_t before;
      const int bin = PickBin(target, &before);
      if (bin < 0) {
        team_.Sync();  // before the next histogram
        return {};
      }
      target -= before;
      lowest += static_cast<uint32_t>(bin) << shift;
      highest = min(lowest + ((1u << shift) - 1), highest);
    } else {
      team_.Sync();  // before what Gather() leaves is reset
    }
    const int count = Gather(measure, &lowest, &highest);
    if (count <= WideScratch::kMaxMembers) {
      return PickMember(measure, count, target);
    }
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_
