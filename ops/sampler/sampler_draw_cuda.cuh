#ifndef TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_

#include "ops/sampler/sampler_followers_cuda.cuh"
#include "ops/sampler/sampler_narrow_cuda.cuh"

// How the first block of a row finds its token.

namespace tenon::cuda {

// Where top-p comes first, the tokens of so many sub-tiles are tried.
inline constexpr int kTopPTiles = 48;

struct DecideShared {
  Block::Scratch block;
  CandidateScratch candidates;
  RowPlan plan;
  RowPlan raw_plan;
  DecideRow row;  // one copy: functions that are not inlined take it by address
  DecideRow raw;
  DrawInputs inputs;
  Outcome outcome;
  double log_total;  // where logprobs are wanted
  float sigma_floor;
  int first_id;
  int first_rank;  // of what filters keep
  int end_rank;
};

// The lowest id with the largest logit.
template <bool kRich>
__device__ __forceinline__ int FirstBestToken(const DecideRow& row,
                                              const TileArrays& arrays,
                                              DecideShared& shared) {
  constexpr int kNone = std::numeric_limits<int>::max();
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncthreads();
  if (threadIdx.x == 0) shared.first_id = kNone;
  __syncthreads();
  const uint32_t best = OrderedKey(row.best);
  // 32 sub-tiles a warp and round, dealt out like cards. No id of a sub-tile is
  // below that of its first place: with many ties, few have to be read.
  for (int base = 0; base < row.num_tiles; base += kDecideThreads) {
    const int own = base + lane * kDecideWarps + warp;
    unsigned left =
        __ballot_sync(~0u, own < row.num_tiles && arrays.key[own] == best);
    for (; left != 0; left &= left - 1) {
      const int tile = __shfl_sync(~0u, own, __ffs(static_cast<int>(left)) - 1);
      const int so_far = lane == 0 ? atomicMin(&shared.first_id, kNone) : kNone;
      if (tile * kChunk > __shfl_sync(~0u, so_far, 0)) break;
      const LaneLogits logits = LogitsOfTile<kRich>(row, tile);
      int id = kNone;
#pragma unroll
      for (int e = kIdsPerLane - 1; e >= 0; --e) {
        if (OrderedKey(logits.x[e]) == best) id = FirstIdOfLane(row, tile) + e;
      }
      id = static_cast<int>(__reduce_min_sync(~0u, static_cast<unsigned>(id)));
      if (lane == 0) atomicMin(&shared.first_id, id);
    }
  }
  __syncthreads();
  // Only edits that are not what they should be leave none.
  return min(shared.first_id, row.vocab - 1);
}

// Ends with the one warp that has drawn; the others are ahead of it.
template <bool kRich>
__device__ __forceinline__ void DrawPlain(Block& block, const DecideRow& row,
                                          const TileArrays& arrays, float best,
                                          uint64_t row_total,
                                          DecideShared& shared) {
  const int bits = DrawBits(row_total);
  const int each = CeilDiv(row.num_tiles, kDecideThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * each, row.num_tiles);
  const int end = min(begin + each, row.num_tiles);
  uint64_t own = 0;
  for (int i = begin; i < end; ++i) own += arrays.Mass(i, bits);
  uint64_t total;
  const uint64_t upto = block.InclusiveSum(own, &total);
  const uint64_t target = DrawTarget(shared.inputs.numerator, total);
  uint64_t before = upto - own;
  const bool mine = before <= target && target < upto;
  const unsigned owner = __ballot_sync(~0u, mine);
  if (owner == 0) {
    // The first warp has time, or the second where the first draws.
    const bool is_first = threadIdx.x == 0;
    if (is_first || (threadIdx.x == 32 && target < before)) {
      shared.log_total = LogOfMass(row_total, kMassBits);
    }
    return;
  }
  int tile = begin;
  if (mine) {
    for (uint64_t m = arrays.Mass(tile, bits); before + m <= target;
         m = arrays.Mass(tile, bits)) {
      before += m;
      ++tile;
    }
  }
  const int lane = __ffs(static_cast<int>(owner)) - 1;
  tile = __shfl_sync(~0u, tile, lane);
  before = __shfl_sync(~0u, before, lane);
  const float max = FromOrderedKey(arrays.key[tile]);
  const TokenInTile token = PickInTile(
      row, tile, LogitsOfTile<kRich>(row, tile),
      [&](float x, int) {
        return FixedMass(strict::Weight(x, max, row.scale));
      },
      [&](uint64_t weight) {
        return TargetInTile(target - before, arrays.Mass(tile, bits), weight);
      });
  if (threadIdx.x % 32 == 0) {
    Drawn& drawn = shared.outcome.drawn;
    drawn = Drawn();
    // Only edits that are not what they should be leave no weight at all.
    drawn.token = min(token.id, row.vocab - 1);
    drawn.x = token.x;
    drawn.best = best;
    drawn.mass = row_total;
  }
}

// A bound that the `count` best tokens reach, if there are so many.
__device__ __forceinline__ uint32_t FloorOfBest(Candidates& candidates,
                                                const DecideRow& row,
                                                uint32_t lowest_tile,
                                                int count) {
  return count <= row.num_tiles
             ? candidates.LowerBoundOfKth(row, count, lowest_tile)
             : 0;
}

// At least the `count` best candidates where too many tokens have the key
// `from` or a larger one. Rare, and so not in line; of an object of its own:
// what a function takes by reference is in memory.
__device__ __noinline__ inline int CollectBest(const DecideRow& row,
                                               const TileArrays& arrays,
                                               Room room, uint32_t from,
                                               int count,
                                               DecideShared& shared) {
  Block block(&shared.block);
  Candidates candidates(block, &shared.candidates, arrays, room);
  const int found = candidates.CollectBest(row, from, count);
  return found >= 0 ? found : candidates.CollectTied(row, from, count);
}

// Leaves a row with filters to all of its blocks where it may have to choose
// from more than a few tokens. Returns the candidates' number, then, -1.
template <bool kRich>
__device__ __forceinline__ int DrawFiltered(
    Block& block, const DecideRow& row, const TileBounds& bounds,
    Candidates& candidates, const TileArrays& arrays, Room room,
    const ThreadEdits& edits, uint64_t total, bool tell, Followers& followers,
    DecideShared& shared) {
  const RowPlan& plan = shared.plan;
  const DrawInputs& inputs = shared.inputs;
  const bool typical_first =
      plan.order == FilterOrder::kLlamaCpp && plan.typical_p < 1.0f;
  const bool narrowed = plan.top_k != 0 || plan.top_n_sigma > 0.0f;
  const bool top_p_first = plan.top_p < 1.0f && !narrowed && !typical_first;
  float floor_value = -INFINITY;
  if (plan.top_n_sigma > 0.0f) floor_value = shared.sigma_floor;
  // Where no later filter needs the sum of what min-p drops.
  if (plan.min_p > 0.0f && !typical_first &&
      !(plan.top_p < 1.0f && narrowed && plan.top_p_of_kept())) {
    floor_value = fmaxf(floor_value, inputs.MinPThreshold(bounds.best));
  }
  if (plan.top_k == 0 && !top_p_first && floor_value == -INFINITY &&
      row.vocab > kMaxCandidates) {
    return -1;
  }
  uint32_t floor = kLowestKey;
  if (floor_value > -INFINITY) floor = max(floor, OrderedKey(floor_value));
  if (top_p_first) {
    floor = max(
        floor, OrderedKey(TopPLowerBound(plan, bounds.best, total, row.vocab)));
  }
  uint32_t from = floor;
  if (plan.top_k != 0 || top_p_first) {
    from = max(from, FloorOfBest(candidates, row, bounds.lowest,
                                 plan.top_k != 0 ? plan.top_k : kTopPTiles));
  }
  int count = candidates.Collect<kRich>(row, from, edits);
  int places = candidates.places();
  if (count < 0 && plan.top_k != 0 && plan.top_k <= kMaxCandidates &&
      from > floor && !row.edits.any()) {
    count = CollectBest(row, arrays, room, from, plan.top_k, shared);
    places = count;
  }
  if (count <= 0) return -1;
  if (top_p_first && from != floor) {
    __syncthreads();
    if (shared.candidates.prefix[count] < MassTarget(plan.top_p, total)) {
      return -1;
    }
  }
  if (tell) followers.Tell(0);
  if (threadIdx.x >= 32) {
    if (threadIdx.x == 32) shared.log_total = LogOfMass(total, kMassBits);
    return count;
  }
  NarrowFilters filters(shared.candidates, row, plan, 0, count);
  const Drawn drawn = filters.Run(inputs, places);
  if (threadIdx.x == 0) {
    shared.outcome.drawn = drawn;
    shared.outcome.kept = true;
    shared.first_rank = filters.low();
    shared.end_rank = filters.high();
  }
  return count;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_
