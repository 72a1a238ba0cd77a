#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_

#include "ops/sampler/sampler_wide_select_cuda.cuh"

// Filters where many tokens can pass them, by several blocks. What they keep is
// a KeptRange. Its ends are found by a histogram of the row's keys and, of the
// bin that has the end, the tokens themselves; where those are too many, by the
// next histogram of that bin, so that passes are bounded. The end of top-p is
// guessed first: if it is right, one pass over the row is all.

namespace tenon::cuda {

class WideFilters : private WidePasses {
 public:
  using WidePasses::WidePasses;

  // The token is known to the leading block alone.
  __device__ __noinline__ Drawn Run(const DrawInputs& inputs);

  // Keeps the `count` best.
  __device__ __noinline__ void KeepBest(int count);
  __device__ void SetRange(const KeptRange& range) { range_ = range; }
  // Leaves what is kept, at most kMaxTopLogprobs tokens, in the scratch, best
  // first; returns how many they are.
  __device__ int CollectKept();

 private:
  // Top-p's end is guessed from a few of so many sub-tiles.
  static constexpr int kLeastTilesToGuess = 16 * kDecideWarps;

  __device__ uint64_t Mass() {
    return Reduce(Reduction::kSumMass, filter_weighing()).sum;
  }
  // The largest kept logit.
  __device__ float Best() {
    if (range_.from.value == INFINITY) return row_.best;
    return FromOrderedKey(Reduce(Reduction::kKeys).max.a);
  }
  __device__ Weighing filter_weighing() const {
    return {row_.best, plan_.scale};
  }
  __device__ uint32_t KthTileKey(int count);
  __device__ __noinline__ bool KeepFromTop(uint64_t target, bool counts);
  __device__ void KeepTopP(uint64_t target);
  __device__ __noinline__ Bounds GuessTopP();
  __device__ __noinline__ bool KeepBetween(Bounds bounds, uint64_t target);
  __device__ __noinline__ bool KeepTied(float cut, uint64_t count,
                                        bool counted);
  __device__ void KeepMinP(float best) {
    const float threshold = fminf(MinPThreshold(plan_, best), best);
    if (threshold > range_.to.value) range_.to = Cutoff{threshold};
  }
  __device__ __noinline__ void KeepTypical();
  __device__ __noinline__ void DropTopChoices();
  __device__ Drawn Draw(const DrawInputs& inputs);
};

// A key that `count` sub-tiles' maxima reach, and few more unless they are
// equal; 0 where there are fewer. Each round has a warp for each of eight keys.
__device__ inline uint32_t WideFilters::KthTileKey(int count) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_tiles = row_.num_tiles;
  const uint32_t* const tile_key = AsShared(row_.tile_key);
  uint32_t low = ~0u;
  for (int i = static_cast<int>(threadIdx.x); i < num_tiles;
       i += kDecideThreads) {
    if (tile_key[i] != 0) low = min(low, tile_key[i]);
  }
  low = max(team_.block().Min(low), OrderedKey(range_.to.value));
  uint32_t range = OrderedKey(row_.best) - low;
  bool found = false;
  for (;;) {
    const uint32_t step = range / kDecideWarps + 1;
    const uint32_t key = low + min(range, step * static_cast<uint32_t>(warp));
    int own = 0;
    for (int i = lane; i < num_tiles; i += 32) {
      own += tile_key[i] >= key ? 1 : 0;
    }
    const uint64_t* const counts = team_.block().Exchange(
        static_cast<uint64_t>(__reduce_add_sync(~0u, own)));
    int at = -1;
    int reached = 0;
#pragma unroll 1
    for (int w = 0; w < kDecideWarps; ++w) {
      if (static_cast<int>(counts[w]) >= count) {
        at = w;
        reached = static_cast<int>(counts[w]);
      }
    }
    if (at < 0) return found ? low : 0;
    found = true;
    const uint32_t offset = min(range, step * static_cast<uint32_t>(at));
    low += offset;
    if (reached <= count + count / 4 || range == offset || step == 1) {
      return low;
    }
    range = min(range - offset, step - 1);
  }
}

__device__ __noinline__ inline void WideFilters::KeepBest(int count) {
  if (count <= row_.num_tiles && range_.from.value == INFINITY && !filled_) {
    const uint32_t bound = KthTileKey(count);
    if (bound > OrderedKey(range_.to.value)) {
      range_.to = Cutoff{FromOrderedKey(bound)};
    }
  }
  KeepFromTop(static_cast<uint64_t>(count), true);
}

// Of the tokens with just this logit, the worst that are kept, keeps the first
// `count`; false, and all kept, where there are fewer. Two passes: how many
// each of the chunks of sub-tiles has, for ids of a chunk come before those of
// the next one; then, of the one with the last, how many each sub-tile has.
// `counted`: the first pass has been made.
__device__ __noinline__ inline bool WideFilters::KeepTied(float cut,
                                                          uint64_t count,
                                                          bool counted) {
  constexpr int kLanesOfChunk = 32 / kChunksOfSubTile;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t key = OrderedKey(cut);
  const float above = FromOrderedKey(key + 1);
  if (!counted) SplitTokens(key, {cut, above}, filter_weighing(), false);
  // A lane for each chunk.
  uint64_t ties = 0;
  if (lane < kChunksOfSubTile) {
    for (int r = 0; r < team_.size(); ++r) {
      ties += *team_.In(r, &s().num_of_chunk[lane]);
    }
  }
  const uint64_t upto = WarpInclusiveSum(ties);
  const unsigned enough = __ballot_sync(~0u, upto >= count);
  if (enough == 0) return false;
  const int chunk = __ffs(static_cast<int>(enough)) - 1;
  const uint64_t left = count - __shfl_sync(~0u, upto - ties, chunk);
  const int own_chunk = lane / kLanesOfChunk;
  SplitTokens(
      key,
      {own_chunk == chunk ? cut : INFINITY, own_chunk < chunk ? cut : above},
      filter_weighing(), false);
  const auto ties_of = [&](int tile) {
    const int size = team_.size();
    return static_cast<uint64_t>(
        *team_.In(tile % size, &store_.marks()[tile / size]));
  };
  const Block::Pick pick =
      team_.block().PickByWeight(row_.num_tiles, left - 1, ties_of);
  const int tile = max(pick.index, 0);
  const uint64_t left_in_tile = left - pick.before;
  const int ids_of_chunk = row_.num_tiles * kChunk;
  const TokenInTile token = PickInTile(
      row_, tile, LogitsOfPart(row_, tile, LoadPart(row_, tile)),
      [&](float x, int id) {
        const bool is =
            x == cut && id / ids_of_chunk == chunk && range_.Keeps(x, id);
        return is ? uint64_t{1} : uint64_t{0};
      },
      [&](uint64_t) { return left_in_tile - 1; });
  range_.to = Cutoff{cut, token.id};
  const uint64_t each = filter_weighing().Mass(cut);
  const int size = team_.size();
  const int step = size * kDecideThreads;
#pragma unroll 1
  for (int own = FirstTile(); own <= tile; own += step) {
    const uint64_t kept =
        own < tile ? store_.marks()[own / size] : left_in_tile;
    tile_mass_[own] += kept * each;
  }
  __syncthreads();
  summed_ = range_;
  return true;
}

// Keeps the best whose weights reach the target, ties by id; false, and all
// kept, where they do not.
__device__ __noinline__ inline bool WideFilters::KeepFromTop(uint64_t target,
                                                             bool counts) {
  const Selection end =
      Select({Measure::kLogit, counts}, OrderedKey(range_.to.value),
             OrderedKey(row_.best), target);
  if (!end.found) return false;
  const float cut = FromOrderedKey(end.key);
  if (end.id >= 0) {
    range_.to = Cutoff{cut, end.id};
    return true;
  }
  const int32_t last_id =
      range_.to.value == cut ? range_.to.last_id : Cutoff().last_id;
  const uint64_t each = counts ? 1 : row_.Mass(cut);
  const uint64_t count = (end.needed + each - 1) / each;
  // Where tokens are tied they are mostly many: the first ids are tried first,
  // and only the sub-tiles that have them.
  const uint64_t window = 2 * count + kSubTile;
  range_.to = Cutoff{cut, last_id};
  if (window < static_cast<uint64_t>(row_.num_tiles) * (kChunk / 2) &&
      window < static_cast<uint64_t>(last_id)) {
    range_.to.last_id = static_cast<int32_t>(window) - 1;
    if (KeepTied(cut, count, false)) return true;
    range_.to.last_id = last_id;
  }
  KeepTied(cut, count, false);
  return true;
}

// Where top-p probably ends: two logits around it, by a few sub-tiles.
__device__ __noinline__ inline WidePasses::Bounds WideFilters::GuessTopP() {
  // More where a block has to find room for what is between for itself.
  const int num_tiles = kDecideWarps * (team_.size() == 1 ? 4 : 2);
  share_ = {row_.num_tiles / num_tiles, 0, num_tiles};
  const double share =
      static_cast<double>(num_tiles) / static_cast<double>(row_.num_tiles);
  const float best = row_.best;
  const float lowest = range_.to.value;
  const float steps = static_cast<float>(WideScratch::kBins) / (best - lowest);
  FillBins({Measure::kSteps, false, steps}, 1, WideScratch::kBins - 1, 0);
  share_ = {team_.size(), team_.rank(), store_.own_tiles()};
  // The logit that ends what leaves out this mass, or begins the step after.
  const auto end_of = [&](double rest, int more, float otherwise) {
    uint64_t target = ~static_cast<uint64_t>(rest);
    const int bin = PickBin(&target, 1);
    if (bin < 0) return otherwise;
    return best -
           static_cast<float>(WideScratch::kBins - 1 - bin + more) / steps;
  };
  // What top-p leaves out, and how many tokens like the best of them that is:
  // their number in a sample differs from the mean by its root.
  const double rest =
      (1.0 - plan_.top_p) * share * static_cast<double>(row_.total);
  const float end = end_of(rest, 0, best);
  const double each = static_cast<double>(row_.Mass(fminf(end, best))) + 1.0;
  const double count = rest / each;
  const double room = 0.35 * share * store_.capacity() * team_.size();
  const double error = each * fmin(6.0 * sqrt(count) + 8.0, room);
  return {fmaxf(end_of(fmax(rest - error, rest / 3), 1, lowest), lowest),
          end_of(rest + error, -1, INFINITY)};
}

// Keeps the best whose mass reaches the target if the worst of them is between
// two logits; false, and nothing changed, where it is not. The rest is added up
// by sub-tile in the same pass.
__device__ __noinline__ inline bool WideFilters::KeepBetween(Bounds bounds,
                                                             uint64_t target) {
  const Cutoff bound = range_.to;
  range_.to = Cutoff{bounds.low};
  const Split split =
      SplitTokens(OrderedKey(bounds.low), bounds, filter_weighing(), true);
  Selection end;
  if (split.top < target) {
    // With all of them above it, no keys are known.
    const bool all = bounds.from == INFINITY;
    end =
        Select({}, all ? OrderedKey(bounds.low) : ~split.keys.b,
               all ? OrderedKey(row_.best) : split.keys.a, target - split.top);
  }
  filled_ = false;  // what is above the two logits is not stored
  if (!end.found) {
    range_.to = bound;
    return false;
  }
  const float cut = FromOrderedKey(end.key);
  if (end.id >= 0) {
    range_.to = Cutoff{cut, end.id};
    AddByTile(filter_weighing(), bounds.from);
    summed_ = range_;
    return true;
  }
  range_.to = Cutoff{cut};
  const uint64_t each = row_.Mass(cut);
  // There may be fewer where the two logits left nothing to choose from.
  const bool tied = split.keys.a == ~split.keys.b;
  if (KeepTied(cut, (end.needed + each - 1) / each, tied)) return true;
  range_.to = bound;
  return false;
}

__device__ inline void WideFilters::KeepTopP(uint64_t target) {
  const bool by_logit =
      range_.to.last_id == Cutoff().last_id && range_.from.value == INFINITY;
  if (!filled_ && by_logit && row_.num_tiles >= kLeastTilesToGuess &&
      row_.best > range_.to.value && KeepBetween(GuessTopP(), target)) {
    return;
  }
  KeepFromTop(target, false);
}

__device__ __noinline__ inline void WideFilters::KeepTypical() {
  const uint64_t mass = Mass();
  const uint64_t surprise = Reduce(Reduction::kSumSurprise).sum;
  const Measure measure = {Measure::kDistance, false,
                           TypicalCentre(plan_, row_.best, surprise, mass)};
  const Selection nearest =
      Select(measure, OrderedKey(-INFINITY), OrderedKey(0.0f),
             MassTarget(plan_.typical_p, mass));
  if (!nearest.found) return;
  const Block::Pair keys =
      Reduce(Reduction::kKeysFrom, {}, nearest.key, measure).max;
  const float from = FromOrderedKey(keys.a);
  const float to = FromOrderedKey(~keys.b);
  if (from < range_.from.value) range_.from = Ceiling{from};
  if (to > range_.to.value) range_.to = Cutoff{to};
}

__device__ __noinline__ inline void WideFilters::DropTopChoices() {
  const uint64_t least = XtcMass(plan_, Mass());
  const uint32_t lowest =
      ~Reduce(Reduction::kKeysOfMass, filter_weighing(), least).max.b;
  if (lowest == ~0u) return;
  const uint32_t last = Reduce(Reduction::kMaxIdOfKey, {}, lowest).max.a;
  range_.from = Ceiling{FromOrderedKey(lowest), static_cast<int32_t>(last)};
}

__device__ __noinline__ inline Drawn WideFilters::Run(
    const DrawInputs& inputs) {
  const bool llama = plan_.order == FilterOrder::kLlamaCpp;
  const bool typical = plan_.typical_p < 1.0f;
  const bool typical_first = llama && typical;
  if (plan_.top_k != 0) KeepBest(plan_.top_k);
  if (typical_first) KeepTypical();
  if (plan_.top_p < 1.0f) {
    const bool narrowed =
        plan_.top_k != 0 || plan_.top_n_sigma > 0.0f || typical_first;
    const uint64_t mass =
        plan_.top_p_of_kept() && narrowed ? Mass() : row_.total;
    if (!narrowed) {
      const float bound =
          TopPLowerBound(plan_, row_.best, row_.total, row_.vocab);
      if (bound > range_.to.value) range_.to = Cutoff{bound};
    }
    KeepTopP(MassTarget(plan_.top_p, mass));
  }
  if (plan_.min_p > 0.0f) KeepMinP(typical_first ? Best() : row_.best);
  if (!llama && typical) KeepTypical();
  if (inputs.xtc_acts) DropTopChoices();
  return Draw(inputs);
}

__device__ inline int WideFilters::CollectKept() {
  team_.Sync();  // before what Gather() leaves is reset
  uint32_t lowest = OrderedKey(range_.to.value);
  uint32_t highest = OrderedKey(row_.best);
  const int count = min(Gather({}, &lowest, &highest), kMaxTopLogprobs);
  PickMember({Measure::kLogit, true}, count, ~uint64_t{0});
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) {
    const uint64_t key = s().all_members[thread];
    int rank = 0;
    for (int i = 0; i < count; ++i) rank += s().all_members[i] < key ? 1 : 0;
    s().best[rank] = key;
  }
  __syncthreads();
  return count;
}

__device__ inline Drawn WideFilters::Draw(const DrawInputs& inputs) {
  Drawn drawn;
  drawn.best = Best();
  const Weighing weighing = {drawn.best, plan_.draw_scale};
  if (plan_.mirostat_tau > 0.0f) {
    const uint64_t mass = Reduce(Reduction::kSumMass, weighing).sum;
    const float threshold =
        MirostatThreshold(plan_, drawn.best, mass, inputs.mu);
    if (threshold > range_.to.value) range_.to = Cutoff{threshold};
  }
  drawn.mass = SumByTile(weighing);
  drawn.kept = range_;
  if (!team_.leads()) {
    drawn.token = 0;  // there is one
    return drawn;
  }
  const uint64_t target = DrawTarget(inputs.numerator, drawn.mass);
  const Block::Pick pick = team_.block().PickByWeight(
      row_.num_tiles, target, [&](int i) { return tile_mass_[i]; });
  // Only edits that are not what they should be leave none.
  const int tile = max(pick.index, 0);
  const TokenInTile token = PickInTile(
      row_, tile, LogitsOfPart(row_, tile, LoadPart(row_, tile)),
      [&](float x, int id) {
        return range_.Keeps(x, id) ? weighing.Mass(x) : uint64_t{0};
      },
      [&](uint64_t) { return target - pick.before; });
  drawn.token = min(token.id, row_.vocab - 1);
  drawn.x = token.x;
  return drawn;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
