#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_

#include "ops/sampler/sampler_wide_passes_cuda.cuh"

// WidePasses::Select(): the token at which a running sum reaches a target.

namespace tenon::cuda {

// A 64-bit sum in shared memory as two words, the second of which changes less
// often.
__device__ __forceinline__ void AddToSum(uint64_t* sum, uint64_t weight) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(AsShared(sum));
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&words[0], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&words[1], high);
}

__device__ __forceinline__ void WidePasses::AddToBins(
    uint64_t* bins, const uint32_t (&bin)[kIdsPerLane],
    const uint64_t (&weight)[kIdsPerLane]) {
  uint32_t lowest = kNoBin;
  uint32_t highest = 0;
  uint64_t sum = 0;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    lowest = min(lowest, bin[e]);
    highest = max(highest, bin[e] == kNoBin ? 0 : bin[e]);
    sum += bin[e] == kNoBin ? 0 : weight[e];
  }
  lowest = __reduce_min_sync(~0u, lowest);
  if (lowest == kNoBin) return;
  // Those of one bin as one: they would take turns at it.
  if (__reduce_max_sync(~0u, highest) == lowest) {
    sum = WarpSum64(sum);
    if (threadIdx.x % 32 == 0) AddToSum(&bins[lowest], sum);
    return;
  }
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if (bin[e] != kNoBin) AddToSum(&bins[bin[e]], weight[e]);
  }
}

// This block's share of a histogram.
__device__ __noinline__ inline void WidePasses::FillBins(Measure measure,
                                                         uint32_t lowest,
                                                         uint32_t range,
                                                         int shift) {
  WideScratch& scratch = s();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < WideScratch::kBins;
       i += kDecideThreads) {
    scratch.bins[i] = 0;
  }
  __syncthreads();
  const Weighing weighing = {row_.best, plan_.scale};
  ForEach(FloorOf(measure, lowest), filled_, [&](const LaneTokens& tokens) {
    uint32_t bin[kIdsPerLane];
    uint64_t weight[kIdsPerLane];
    KeysOf(measure, tokens.x, bin);
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      const uint32_t offset = bin[e] - lowest;
      bin[e] = offset <= range ? offset >> shift : kNoBin;
      const uint64_t mass = weighing.Mass(tokens.x[e]);
      weight[e] = measure.counts ? 1 : mass;
    }
    AddToBins(scratch.bins, bin, weight);
    return true;
  });
  __syncthreads();
}

// Each `each` neighbouring threads have a sum together. Finds the first of
// these groups whose sum, added to those before it, reaches the target, and
// leaves what it takes of that one; -1 where none does. Of a target that is
// negative: all of the sum but so much. The same on all threads.
__device__ __noinline__ inline int WidePasses::FindReached(uint64_t sum,
                                                           int each,
                                                           uint64_t* target) {
  WideScratch& scratch = s();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) scratch.reached = -1;
  uint64_t total;
  const uint64_t upto = team_.InclusiveSum(sum, &total);
  if (static_cast<int64_t>(*target) < 0) *target += total;
  const uint64_t upto_last =
      __shfl_sync(~0u, upto, thread % 32 / each * each + each - 1);
  const uint64_t before = upto - sum;
  if (thread % each == 0 && before < *target && *target <= upto_last) {
    scratch.reached = thread / each;
    scratch.before_reached = before;
  }
  __syncthreads();
  const int reached = scratch.reached;
  if (reached >= 0) *target -= scratch.before_reached;
  __syncthreads();  // before it is used again
  return reached;
}

// Adds up the bins of `num_blocks` blocks, all or the own one, and finds the
// one, from the last, at which the sum reaches the target, as FindReached().
__device__ __noinline__ inline int WidePasses::PickBin(uint64_t* target,
                                                       int num_blocks) {
  constexpr int kGroups = WideScratch::kGroups;
  constexpr int kBinsOfGroup = WideScratch::kBinsOfGroup;
  constexpr int kThreadsOfGroup = kDecideThreads / kGroups;
  constexpr int kThreadsOfBin = kDecideThreads / kBinsOfGroup;
  constexpr int kBinsOfThread = WideScratch::kBins / kDecideThreads;
  static_assert(kThreadsOfBin >= kTeamBlocks, "a thread for each block's bin");
  const int thread = static_cast<int>(threadIdx.x);
  WideScratch& scratch = s();
  const int first = num_blocks > 1 ? 0 : team_.rank();
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    sum += scratch.bins[thread * kBinsOfThread + i];
  }
#pragma unroll
  for (int mask = 1; mask < kThreadsOfGroup; mask *= 2) {
    sum += __shfl_xor_sync(~0u, sum, mask);
  }
  if (thread % kThreadsOfGroup == 0) {
    scratch.groups[thread / kThreadsOfGroup] = sum;
  }
  if (num_blocks > 1) {
    team_.Sync();
  } else {
    __syncthreads();
  }
  const int group = kGroups - 1 - thread / kThreadsOfGroup;
  sum = 0;
  for (int r = thread % kThreadsOfGroup; r < num_blocks; r += kThreadsOfGroup) {
    sum += *team_.In(first + r, &scratch.groups[group]);
  }
  const int group_reached = FindReached(sum, kThreadsOfGroup, target);
  if (group_reached < 0) return -1;
  const int last = (kGroups - group_reached) * kBinsOfGroup - 1;
  const int r = thread % kThreadsOfBin;
  sum = r < num_blocks
            ? *team_.In(first + r, &scratch.bins[last - thread / kThreadsOfBin])
            : 0;
  return last - FindReached(sum, kThreadsOfBin, target);
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
  const uint32_t low = *lowest;
  const uint32_t range = *highest - low;
  Block::Pair keys = {0, 0};  // of the first of them, the largest and smallest
  ForEach(FloorOf(measure, low), filled_, [&](const LaneTokens& tokens) {
    unsigned mask = 0;
    uint32_t key[kIdsPerLane];
    KeysOf(measure, tokens.x, key);
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      const bool is = key[e] - low <= range;
      mask |= is ? 1u << e : 0;
      keys.a = max(keys.a, is ? key[e] : 0);
      keys.b = max(keys.b, is ? ~key[e] : 0);
    }
    if (!__any_sync(~0u, mask != 0)) return true;
    const int count = __popc(mask);
    const int upto = WarpInclusiveSum(count);
    int at = 0;
    if (threadIdx.x % 32 == 31) at = atomicAdd(&scratch.num_members, upto);
    at = __shfl_sync(~0u, at, 31) + upto - count;
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      if ((mask >> e & 1) == 0) continue;
      if (at < WideScratch::kMaxMembers) {
        scratch.members[at] = CandidateKey(key[e], tokens.id[e]);
        scratch.member_logits[at] = tokens.x[e];
      }
      ++at;
    }
    return true;
  });
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
    // Which of them, counts by chunk tell sooner.
    if (lowest == highest) return {true, lowest, -1, target};
    if (!filled_) Fill();
    const int shift = ShiftOf(highest - lowest);
    FillBins(measure, lowest, highest - lowest, shift);
    const int bin = PickBin(&target, team_.size());
    if (bin < 0) {
      team_.Sync();  // before the next histogram
      return {};
    }
    lowest += static_cast<uint32_t>(bin) << shift;
    highest = min(lowest + ((1u << shift) - 1), highest);
    const int count = Gather(measure, &lowest, &highest);
    if (count <= WideScratch::kMaxMembers) {
      return PickMember(measure, count, target);
    }
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_SELECT_CUDA_CUH_
