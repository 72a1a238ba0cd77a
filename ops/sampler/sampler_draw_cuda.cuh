#ifndef TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_

#include "ops/sampler/sampler_followers_cuda.cuh"
#include "ops/sampler/sampler_narrow_cuda.cuh"

// How the first block of a row finds its token.

namespace tenon::cuda {

// Where top-p comes first, the tokens of so many sub-tiles are tried.
inline constexpr int kTopPTiles = 48;

// What kind of row one is, as bits: asked of its plan before the summaries are
// there, for each question takes a while.
enum RowKind : uint32_t {
  kIsGreedy = 1u << 0,
  kIsFiltered = 1u << 1,
  kIsNarrow = 1u << 2,     // filters may choose from few tokens
  kTopPIsFirst = 1u << 3,  // it needs the total, and many sub-tiles
  kMinPIsFirst = 1u << 4,
  kSigmaIsFirst = 1u << 5,  // the k best are found without top-n-sigma
  kSigmaIsLater = 1u << 6,
};
__device__ __forceinline__ uint32_t KindOf(const RowPlan& plan, int vocab) {
  const bool top_p_is_first =
      plan.top_p < 1.0f && !plan.narrowed() && !plan.typical_first();
  const bool has_sigma = plan.top_n_sigma > 0.0f;
  uint32_t kind = 0;
  if (plan.greedy) kind |= kIsGreedy;
  if (!plan.greedy && plan.filtered()) kind |= kIsFiltered;
  if (plan.narrowed() || top_p_is_first || plan.min_p_first() ||
      vocab <= kMaxCandidates) {
    kind |= kIsNarrow;
  }
  if (top_p_is_first) kind |= kTopPIsFirst;
  if (plan.min_p_first()) kind |= kMinPIsFirst;
  if (has_sigma) kind |= plan.top_k == 0 ? kSigmaIsFirst : kSigmaIsLater;
  return kind;
}

struct DecideShared {
  Block::Scratch block;
  CandidateScratch candidates;
  RowPlan plan;
  RowPlan raw_plan;
  uint32_t kind;  // RowKind
  DecideRow row;  // one copy: functions that are not inlined take it by address
  DecideRow raw;
  DrawInputs inputs;
  Outcome outcome;
  double log_total;      // where logprobs are wanted
  double log_raw_total;  // where they are of the logits as they are
  float sigma_floor;
  int first_id;
  int first_rank;  // of what filters keep
  int end_rank;
};

// The lowest id with the largest logit; shared.first_id is kNoId before.
inline constexpr int kNoId = std::numeric_limits<int>::max();
template <bool kRich>
__device__ __forceinline__ int FirstBestToken(const DecideRow& row,
                                              float best_logit,
                                              const TileArrays& arrays,
                                              DecideShared& shared) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t best = OrderedKey(best_logit);
  // 32 sub-tiles a warp and round, dealt out like cards. No id of a sub-tile is
  // below that of its first place: with many ties, few have to be read.
  for (int base = 0; base < row.num_tiles; base += kDecideThreads) {
    const int own = base + lane * kDecideWarps + warp;
    unsigned left =
        __ballot_sync(~0u, own < row.num_tiles && arrays.key[own] == best);
    for (; left != 0; left &= left - 1) {
      const int tile = __shfl_sync(~0u, own, __ffs(static_cast<int>(left)) - 1);
      const int so_far = lane == 0 ? atomicMin(&shared.first_id, kNoId) : kNoId;
      if (tile * kChunk > __shfl_sync(~0u, so_far, 0)) break;
      const LaneLogits logits = LogitsOfTile<kRich>(row, tile);
      int id = kNoId;
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

// The masses of sub-tiles [begin, end) together.
__device__ __forceinline__ uint64_t MassOfTiles(const TileArrays& arrays,
                                                int begin, int end, int bits) {
  constexpr int kAtOnce = 4;
  uint64_t sum = 0;
  for (int base = begin; base < end; base += kAtOnce) {
    // Without branches, so that none of them waits for another.
    uint64_t masses[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      masses[u] = arrays.Mass(min(base + u, end - 1), bits);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) sum += base + u < end ? masses[u] : 0;
  }
  return sum;
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
  const uint64_t own = MassOfTiles(arrays, begin, end, bits);
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
  const LanePart part = LoadPart(row, tile);
  const float max = FromOrderedKey(arrays.key[tile]);
  const double fraction =
      FractionInTile(target - before, arrays.Mass(tile, bits));
  const TokenInTile token = PickInTile(
      row, tile, LogitsOf<kRich>(row, tile, part),
      [&](float x, int) {
        return FixedMass(strict::Weight(x, max, row.scale));
      },
      [&](uint64_t weight) { return TargetInTile(fraction, weight); });
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
                                                int num_tiles,
                                                const TileBounds& bounds,
                                                int count) {
  return count <= num_tiles
             ? candidates.LowerBoundOfKth(num_tiles, bounds, count)
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
  Candidates candidates(block, &shared.candidates, arrays, room, false);
  const int found = candidates.CollectBest(row, from, count);
  return found >= 0 ? found : candidates.CollectTied(row, from, count);
}

// What a row's first block has to know of it. Sums of masses are made while
// candidates are on their way, if nothing needs them before.
template <bool kRich>
struct RowSums {
  const SubTile* raw_tiles;  // null: none
  const Moments* moments;
  TileBounds bounds;
  bool has_total = false;  // of a row with a best
  uint64_t total = 0;
  uint64_t raw_total = 0;

  // With a barrier in between.
  __device__ __forceinline__ void Post(Block& block, const DecideRow& row,
                                       const RowPlan& plan,
                                       const TileArrays& arrays) const {
    uint64_t own = 0;
    if (has_total) own = OwnTotal(plan, bounds.best, row.num_tiles, arrays);
    block.Post(WarpSum64(own));
    if constexpr (kRich) {
      own = OwnRawTotal(raw_tiles, bounds.raw_best, row.num_tiles);
      block.Post(WarpSum64(own), Block::kSecond);
    }
  }
  __device__ __forceinline__ void Take(Block& block, DecideShared& shared) {
    const uint64_t* const posted = block.Posted();
    total = Block::SumOf(posted);
    if constexpr (kRich) raw_total = Block::SumOf(posted + Block::kSecond);
    if (threadIdx.x == 0) {
      shared.row.total = total;
      if constexpr (kRich) shared.raw.total = raw_total;
    }
  }
};

// By one warp; others see it after a barrier.
__device__ __forceinline__ void FindSigmaFloor(const Moments* moments,
                                               const TileBounds& bounds,
                                               DecideShared& shared) {
  const float floor =
      SigmaFloor(moments, shared.row.num_tiles, shared.plan, bounds.best);
  if (threadIdx.x % 32 == 0) shared.sigma_floor = floor;
}

// Finds the tokens that filters choose from; a count of -1 where they may be
// many. The sums are there if top-p is first, otherwise afterwards.
struct Found {
  int count;
  int places;  // that the scratch has; some are of what is no candidate any
               // more
};
template <bool kRich>
__device__ __forceinline__ Found FindCandidates(
    Block& block, Candidates& candidates, const TileArrays& arrays, Room room,
    const ThreadEdits& edits, RowSums<kRich>& sums, DecideShared& shared) {
  const RowPlan& plan = shared.plan;
  const DecideRow& row = shared.row;
  const TileBounds& bounds = sums.bounds;
  const uint32_t kind = shared.kind;
  const bool top_p_first = (kind & kTopPIsFirst) != 0;
  float floor_value = -INFINITY;
  if ((kind & kSigmaIsFirst) != 0) floor_value = shared.sigma_floor;
  if ((kind & kMinPIsFirst) != 0) {
    floor_value = fmaxf(floor_value, shared.inputs.MinPThreshold(bounds.best));
  }
  uint32_t floor = kLowestKey;
  if (floor_value > -INFINITY) floor = max(floor, OrderedKey(floor_value));
  if (top_p_first) {
    floor = max(floor, OrderedKey(TopPLowerBound(plan, bounds.best, sums.total,
                                                 row.vocab)));
  }
  uint32_t from = floor;
  if (plan.top_k != 0 || top_p_first) {
    from = max(from, FloorOfBest(candidates, row.num_tiles, bounds,
                                 plan.top_k != 0 ? plan.top_k : kTopPTiles));
  }
  const bool sigma_waits = (kind & kSigmaIsLater) != 0;
  if (sigma_waits) WaitForCopies<0>();  // and the barriers of Collect()
  Found found;
  found.count = candidates.Collect<kRich>(row, from, edits, [&] {
    if (sigma_waits && threadIdx.x >= kDecideThreads - 32) {
      FindSigmaFloor(sums.moments, bounds, shared);
    }
    if (!top_p_first) sums.Post(block, row, plan, arrays);
  });
  found.places = candidates.places();
  if (!top_p_first) sums.Take(block, shared);
  if (found.count < 0 && plan.top_k != 0 && plan.top_k <= kMaxCandidates &&
      from > floor && !row.edits.any()) {
    found.count = CollectBest(row, arrays, room, from, plan.top_k, shared);
    found.places = found.count;
  }
  if (top_p_first && from != floor && found.count > 0) {
    if (shared.candidates.prefix[found.count] <
        MassTarget(plan.top_p, sums.total)) {
      return {-1, 0};
    }
  }
  return found;
}

// Leaves a row with filters to all of its blocks where it may have to choose
// from more than a few tokens. Returns the candidates' number, then, -1.
template <bool kRich>
__device__ __forceinline__ int DrawFiltered(
    Block& block, Candidates& candidates, const TileArrays& arrays, Room room,
    const ThreadEdits& edits, bool tell, Followers& followers,
    RowSums<kRich>& sums, DecideShared& shared) {
  const Found found =
      FindCandidates(block, candidates, arrays, room, edits, sums, shared);
  if (found.count <= 0) return -1;
  if (tell) followers.Tell(0);
  if (threadIdx.x >= 32) {
    if (threadIdx.x == 32) shared.log_total = LogOfMass(sums.total, kMassBits);
    return found.count;
  }
  __syncwarp();
  NarrowFilters filters(shared.candidates, shared.row, shared.plan, 0,
                        found.count);
  const Drawn drawn =
      filters.Run(shared.inputs, shared.sigma_floor, found.places);
  if (threadIdx.x == 0) {
    shared.outcome.drawn = drawn;
    shared.outcome.kept = true;
    shared.first_rank = filters.low();
    shared.end_rank = filters.high();
  }
  return found.count;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_DRAW_CUDA_CUH_
