#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"
#include "ops/sampler/sampler_token_store_cuda.cuh"

// Filters where many tokens can pass them, by several blocks. What they keep is
// a KeptRange. Its ends are found by a histogram of the row's keys and, of the
// bin that has the end, the tokens themselves; where those are too many, by the
// next histogram of that bin, so that passes are bounded. Code runs a few times
// only, so that it is kept small: passes are calls, and take what differs as
// arguments.

namespace tenon::cuda {

struct WideScratch {
  static constexpr int kLog2Bins = 11;
  static constexpr int kBins = 1 << kLog2Bins;
  static constexpr int kGroups = 64;
  static constexpr int kBinsOfGroup = kBins / kGroups;
  static constexpr int kMaxMembers = kDecideThreads;

  union {
    // 64-bit bins as two words each.
    alignas(16) uint32_t bins[2][kBins];
    // Of all blocks' members, once bins are done with.
    struct {
      uint64_t all_members[kMaxMembers];
      uint64_t member_weights[kMaxMembers];
    };
  };
  uint64_t groups[kGroups];  // sums of bins
  // The bin that a sum reaches.
  int picked;
  uint64_t before_picked;
  // What the block has of the picked bin.
  int num_members;
  uint64_t members[kMaxMembers];
  float member_logits[kMaxMembers];
  uint64_t picked_member;
  // The best, in every block.
  uint64_t best[kMaxTopLogprobs];
  TokenStore store;
};

// What tokens are ordered by, the larger the better, and weighed by.
struct Measure {
  enum Key { kLogit, kDistance, kId } key = kLogit;
  bool counts = false;  // each 1, else its mass
  float at = 0.0f;      // distances from here; ids of tokens with this logit
};

class WideFilters {
 public:
  // Of all tokens with at least the logit `floor`. `tile_mass` has room for all
  // sub-tiles.
  __device__ WideFilters(Team& team, WideScratch* scratch, const DecideRow& row,
                         float floor, uint64_t* tile_mass)
      : team_(team),
        scratch_(static_cast<uint32_t>(__cvta_generic_to_shared(scratch))),
        store_(scratch->store),
        row_(row),
        plan_(*row.plan),
        tile_mass_(tile_mass),
        num_own_(store_.own_tiles()) {
    range_.to.value = fmaxf(floor, -std::numeric_limits<float>::max());
  }

  // The token is known to the leading block alone.
  __device__ __noinline__ Drawn Run(const DrawInputs& inputs);

  // Keeps the `count` best.
  __device__ __noinline__ void KeepBest(int count);
  __device__ void SetRange(const KeptRange& range) { range_ = range; }
  // Leaves what is kept, at most kMaxTopLogprobs tokens, in the scratch, best
  // first; returns how many they are.
  __device__ int CollectKept();

 private:
  // Rows that need so many times the store's room are looked at before.
  static constexpr int kStoresOfRow = 4;

  // The token at which the weights of all better ones and its own reach a
  // target.
  struct Selection {
    bool found = false;
    uint32_t key = 0;
    int id = -1;          // -1: any with this key; then
    uint64_t needed = 0;  // of their weights, at least 1
  };
  // What a pass adds up or takes the largest of.
  enum class Reduction {
    kSumMass,
    kSumSurprise,
    kSumOfTiles,
    kMaxKey,
    kMinKeyOfMass,
    kMaxIdOfKey,
    kKeysFrom
  };
  struct Reduced {
    uint64_t sum = 0;
    Block::Pair max = {0, 0};
  };

  __device__ __forceinline__ WideScratch& s() const {
    return *static_cast<WideScratch*>(__cvta_shared_to_generic(scratch_));
  }
  // Which of the block's sub-tiles can have what is kept.
  struct TileFilter {
    const uint32_t* tile_key;
    int size;
    int rank;
    uint32_t floor;
    int32_t last_id;  // of the floor

    __device__ __forceinline__ int TileOf(int own) const {
      return own * size + rank;
    }
    __device__ __forceinline__ bool Wants(int own) const {
      const int tile = TileOf(own);
      const uint32_t key = tile_key[tile];
      return key > floor || (key == floor && tile * kChunk <= last_id);
    }
  };
  // With a key from `floor` on, which is not below all that is kept.
  __device__ __forceinline__ TileFilter FilterFrom(uint32_t floor) const {
    return {AsShared(row_.tile_key), team_.size(), team_.rank(), floor,
            floor == OrderedKey(range_.to.value) ? range_.to.last_id
                                                 : Cutoff().last_id};
  }
  // Passes begin with Fill().
  __device__ void ClearStore();
  __device__ __noinline__ void Fill();
  // visit(x, id, kept) for the tokens with a key from `floor` on and some
  // more, by whole warps; end(tile) after those of a sub-tile.
  template <class Visit, class End>
  __device__ __forceinline__ void ForEach(uint32_t floor, Visit visit, End end);

  __device__ __forceinline__ uint32_t KeyOf(const Measure& measure, float x,
                                            int id) const {
    if (measure.key == Measure::kLogit) return OrderedKey(x);
    if (measure.key == Measure::kDistance) {
      return OrderedKey(-TypicalDistance(x, measure.at));
    }
    return x == measure.at ? static_cast<uint32_t>(row_.vocab - 1 - id) : ~0u;
  }
  // No token with a smaller logit has a key from `lowest` on.
  __device__ __forceinline__ uint32_t FloorOf(const Measure& measure,
                                              uint32_t lowest) const {
    const uint32_t floor = OrderedKey(range_.to.value);
    return measure.key == Measure::kLogit ? max(floor, lowest) : floor;
  }
  // Of offsets up to `range`, to get bins.
  static __device__ int ShiftOf(uint32_t range) {
    return max(32 - WideScratch::kLog2Bins - __clz(static_cast<int>(range)), 0);
  }
  __device__ __forceinline__ void AddToBin(uint32_t bin, uint64_t weight);
  __device__ __noinline__ void FillBins(Measure measure, uint32_t lowest,
                                        uint32_t range, int shift);
  __device__ __noinline__ int PickBin(uint64_t target, uint64_t* before);
  __device__ __noinline__ int Gather(Measure measure, uint32_t* lowest,
                                     uint32_t* highest);
  __device__ __noinline__ Selection PickMember(Measure measure, int count,
                                               uint64_t target);
  __device__ __noinline__ Selection Select(Measure measure, uint32_t lowest,
                                           uint32_t highest, uint64_t target);
  __device__ __noinline__ Reduced Reduce(Reduction reduction, float best = 0.0f,
                                         float scale = 0.0f, uint64_t least = 0,
                                         Measure measure = {});
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

  Team& team_;
  uint32_t scratch_;
  TokenStore store_;
  const DecideRow& row_;
  const RowPlan& plan_;
  uint64_t* tile_mass_;
  KeptRange range_;
  int num_own_;  // sub-tiles that passes visit
  bool filled_ = false;
};

}  // namespace tenon::cuda

#include "ops/sampler/sampler_wide_passes_cuda.cuh"

namespace tenon::cuda {

// A key that `count` sub-tiles' maxima reach, and few more unless they are
// equal; 0 where there are fewer. Each round has a warp for each of eight keys.
__device__ inline uint32_t WideFilters::KthTileKey(int count) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_tiles = row_.num_tiles;
  const uint32_t* const tile_key = AsShared(row_.tile_key);
  uint32_t low = OrderedKey(range_.to.value);
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
#pragma unroll 1
    for (int w = 0; w < kDecideWarps; ++w) {
      if (static_cast<int>(counts[w]) >= count) at = w;
    }
    if (at < 0) return found ? low : 0;
    found = true;
    const uint32_t offset = min(range, step * static_cast<uint32_t>(at));
    low += offset;
    if (range == offset || step == 1) return low;
    range = min(range - offset, step - 1);
  }
}

__device__ __noinline__ inline void WideFilters::KeepBest(int count) {
  if (count <= row_.num_tiles && range_.from.value == INFINITY) {
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
  const uint64_t mass = Mass();
  const double share = static_cast<double>(num_own_ * team_.size()) /
                       static_cast<double>(row_.num_tiles);
  // What top-p leaves out may be half as much as it can be.
  const uint64_t rest = static_cast<uint64_t>(
      0.5 * (1.0 - plan_.top_p) * share * static_cast<double>(row_.total));
  uint32_t guess = 0;
  if (mass > rest) {
    const uint32_t lowest = OrderedKey(range_.to.value);
    const uint32_t range = OrderedKey(row_.best) - lowest;
    const int shift = ShiftOf(range);
    FillBins({}, lowest, range, shift);
    uint64_t before;
    const int bin = PickBin(mass - rest, &before);
    guess = lowest + (static_cast<uint32_t>(max(bin, 0)) << shift);
  }
  num_own_ = store_.own_tiles();
  team_.Sync();  // before the next histogram
  return guess;
}

__device__ inline void WideFilters::KeepTopP(uint64_t target) {
  const Cutoff bound = range_.to;
  // Where most of a row would be read again and again.
  if (!filled_ &&
      store_.own_tiles() * kSubTile > kStoresOfRow * store_.capacity()) {
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
