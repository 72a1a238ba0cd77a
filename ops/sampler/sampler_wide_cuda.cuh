#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_

#include "ops/sampler/sampler_wide_select_cuda.cuh"

// Filters where many tokens can pass them, by several blocks. What they keep is
// a KeptRange. Its ends are found by a histogram of the row's keys and, of the
// bin that has the end, the tokens themselves; where those are too many, by the
// next histogram of that bin, so that passes are bounded.

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
  // A guess of where top-p ends has to look at one in so many sub-tiles, or
  // fewer.
  static constexpr int kMostGuessedFrom = 4;

  __device__ uint64_t Mass() {
    return Reduce(Reduction::kSumMass, row_.best, plan_.scale).sum;
  }
  // The largest kept logit.
  __device__ float Best() {
    if (range_.from.value == INFINITY) return row_.best;
    return FromOrderedKey(Reduce(Reduction::kMaxKey).max.a);
  }
  __device__ uint32_t KthTileKey(int count);
  __device__ __noinline__ bool KeepFromTop(uint64_t target, bool counts);
  __device__ void KeepTopP(uint64_t target);
  __device__ __noinline__ uint32_t GuessTopP();
  __device__ void KeepFirstIds(float cut, uint64_t count);
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

// Of the tokens with just this logit, the worst that are kept, keeps the first.
__device__ inline void WideFilters::KeepFirstIds(float cut, uint64_t count) {
  const Measure by_id = {Measure::kId, true, cut};
  const uint32_t last = static_cast<uint32_t>(row_.vocab - 1);
  const int32_t last_id = range_.to.last_id;
  // Where they are tied they are mostly many: the first ids are tried first,
  // and only the sub-tiles that have them.
  const uint64_t window = 2 * count + kSubTile;
  if (window < static_cast<uint64_t>(row_.num_tiles) * (kChunk / 2) &&
      window < static_cast<uint64_t>(last_id)) {
    range_.to.last_id = static_cast<int32_t>(window) - 1;
    const Selection id = Select(
        by_id, last - static_cast<uint32_t>(range_.to.last_id), last, count);
    if (id.found) {
      range_.to.last_id = static_cast<int32_t>(last - id.key);
      return;
    }
    range_.to.last_id = last_id;
    filled_ = false;
  }
  const Selection id = Select(by_id, 0, last, count);
  if (id.found) range_.to.last_id = static_cast<int32_t>(last - id.key);
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
  range_.to = Cutoff{cut, last_id};
  const uint64_t each = counts ? 1 : row_.Mass(cut);
  KeepFirstIds(cut, (end.needed + each - 1) / each);
  return true;
}

// A key that is probably not above the end of top-p, by a few sub-tiles; 0
// where they do not tell.
__device__ __noinline__ inline uint32_t WideFilters::GuessTopP() {
  ClearStore();
  num_own_ = min(num_own_, kDecideWarps);  // a sub-tile for each warp
  const double share = static_cast<double>(num_own_ * team_.size()) /
                       static_cast<double>(row_.num_tiles);
  // What top-p leaves out may be half as much as it can be.
  const int64_t rest = static_cast<int64_t>(0.5 * (1.0 - plan_.top_p) * share *
                                            static_cast<double>(row_.total));
  const uint32_t lowest = OrderedKey(range_.to.value);
  const uint32_t range = OrderedKey(row_.best) - lowest;
  const int shift = ShiftOf(range);
  FillBins({}, lowest, range, shift);
  uint64_t before;
  const int bin = PickBin(static_cast<uint64_t>(-rest - 1), &before);
  num_own_ = store_.own_tiles();
  team_.Sync();  // before the next histogram
  return bin < 0 ? 0 : lowest + (static_cast<uint32_t>(bin) << shift);
}

__device__ inline void WideFilters::KeepTopP(uint64_t target) {
  const Cutoff bound = range_.to;
  // Less is stored then. All blocks of the team have to take the same way, and
  // their numbers of sub-tiles may differ by one.
  if (!filled_ &&
      row_.num_tiles > kMostGuessedFrom * kDecideWarps * team_.size()) {
    const uint32_t guess = GuessTopP();
    if (guess > OrderedKey(bound.value)) {
      range_.to = Cutoff{FromOrderedKey(guess)};
      if (KeepFromTop(target, false)) return;
      range_.to = bound;
      filled_ = false;
    }
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
      Reduce(Reduction::kKeysFrom, 0.0f, 0.0f, nearest.key, measure).max;
  const float from = FromOrderedKey(keys.a);
  const float to = FromOrderedKey(~keys.b);
  if (from < range_.from.value) range_.from = Ceiling{from};
  if (to > range_.to.value) range_.to = Cutoff{to};
}

__device__ __noinline__ inline void WideFilters::DropTopChoices() {
  const uint32_t lowest = ~Reduce(Reduction::kMinKeyOfMass, row_.best,
                                  plan_.scale, XtcMass(plan_, Mass()))
                               .max.b;
  if (lowest == ~0u) return;
  const uint32_t last =
      Reduce(Reduction::kMaxIdOfKey, 0.0f, 0.0f, lowest).max.a;
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
  if (plan_.mirostat_tau > 0.0f) {
    const uint64_t mass =
        Reduce(Reduction::kSumMass, drawn.best, plan_.draw_scale).sum;
    const float threshold =
        MirostatThreshold(plan_, drawn.best, mass, inputs.mu);
    if (threshold > range_.to.value) range_.to = Cutoff{threshold};
  }
  team_.Sync();  // the leading block has read what is in place of tile_mass
  drawn.mass = Reduce(Reduction::kSumOfTiles, drawn.best, plan_.draw_scale).sum;
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
        return range_.Keeps(x, id)
                   ? FixedMass(strict::Weight(x, drawn.best, plan_.draw_scale))
                   : uint64_t{0};
      },
      [&](uint64_t) { return target - pick.before; });
  drawn.token = min(token.id, row_.vocab - 1);
  drawn.x = token.x;
  return drawn;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
