#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"
#include "ops/sampler/sampler_token_store_cuda.cuh"

// Passes over a row's tokens by several blocks. Passes are calls, and take what
// differs as arguments: their code is long, as a lane has 8 tokens at a time,
// whose steps do not wait for each other.

namespace tenon::cuda {

struct WideScratch {
  static constexpr int kLog2Bins = 11;
  static constexpr int kBins = 1 << kLog2Bins;
  static constexpr int kGroups = 64;
  static constexpr int kBinsOfGroup = kBins / kGroups;
  static constexpr int kMaxMembers = kDecideThreads;

  union {
    alignas(16) uint64_t bins[kBins];
    // Of all blocks' members, once bins are done with.
    struct {
      uint64_t all_members[kMaxMembers];
      uint64_t member_weights[kMaxMembers];
    };
  };
  uint64_t groups[kGroups];  // sums of bins
  // Whose sum reaches a target, and the sum before it.
  int reached;
  uint64_t before_reached;
  // What the block has of the picked bin.
  int num_members;
  uint64_t members[kMaxMembers];
  float member_logits[kMaxMembers];
  uint64_t picked_member;
  // What a split has left in the middle, by the chunk of their sub-tiles.
  uint32_t num_of_chunk[kChunksOfSubTile];
  // The best, in every block.
  uint64_t best[kMaxTopLogprobs];
  TokenStore store;
};

// What tokens are ordered by, the larger the better, and weighed by.
struct Measure {
  enum Key {
    kLogit,
    kDistance,  // from the logit `at`
    kSteps      // below the best, `at` a logit: 1 to kBins
  } key = kLogit;
  bool counts = false;  // each 1, else its mass
  float at = 0.0f;
};

// What a mass is relative to.
struct Weighing {
  float best;
  float scale;

  __device__ __forceinline__ uint64_t Mass(float x) const {
    return FixedMass(strict::Weight(x, best, scale));
  }
};

class WidePasses {
 public:
  // Over all tokens with at least the logit `floor`. `tile_mass` has room for
  // all sub-tiles.
  __device__ WidePasses(Team& team, WideScratch* scratch, const DecideRow& row,
                        float floor, uint64_t* tile_mass)
      : team_(team),
        row_(row),
        plan_(*row.plan),
        tile_mass_(tile_mass),
        scratch_(static_cast<uint32_t>(__cvta_generic_to_shared(scratch))),
        store_(scratch->store),
        share_({team.size(), team.rank(), store_.own_tiles()}) {
    range_.to.value = fmaxf(floor, -std::numeric_limits<float>::max());
  }

 protected:
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
    kKeys,  // the largest, and ~ the smallest
    kKeysOfMass,
    kKeysFrom,
    kMaxIdOfKey
  };
  struct Reduced {
    uint64_t sum = 0;
    Block::Pair max = {0, 0};
  };
  // How a split divides what is kept: into the top, logits from `from` on, and
  // the middle, those from `low` on below. Lanes may differ: of every sub-tile
  // a lane has half of the same chunk.
  struct Bounds {
    float low;
    float from;
  };
  struct Split {
    uint64_t top = 0;    // its mass
    Block::Pair keys{};  // of the middle: the largest, ~ the smallest
  };

  __device__ __forceinline__ WideScratch& s() const {
    return *static_cast<WideScratch*>(__cvta_shared_to_generic(scratch_));
  }
  // The sub-tiles rank, rank + size, ...
  struct Share {
    int size;
    int rank;
    int count;

    __device__ __forceinline__ int TileOf(int own) const {
      return own * size + rank;
    }
  };
  // Which sub-tiles of a share a pass reads: those that can have a token with a
  // key from `floor` on.
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
  __device__ __forceinline__ TileFilter FilterFrom(uint32_t floor) const {
    return {AsShared(row_.tile_key), share_.size, share_.rank, floor,
            floor == OrderedKey(range_.to.value) ? range_.to.last_id
                                                 : Cutoff().last_id};
  }
  // visit(tokens) for the tokens with a key from `floor` on, and some more, by
  // whole warps: from the store, if it is to be used, and from what is not
  // stored. Ends where it returns false.
  template <class Visit>
  __device__ __forceinline__ void ForEach(uint32_t floor, bool use_store,
                                          Visit visit);

  // The masses of the top are added up by sub-tile. The middle is stored, or
  // counted by sub-tile and chunk. No logit of either has a key below `floor`.
  __device__ __noinline__ Split SplitTokens(uint32_t floor, Bounds bounds,
                                            Weighing weighing, bool stores);
  static __device__ __forceinline__ uint64_t MassFrom(const LaneTokens& tokens,
                                                      float from,
                                                      Weighing weighing);
  // A bit for each token in the middle; takes note of their bounds.
  static __device__ __forceinline__ unsigned MiddleOf(const LaneTokens& tokens,
                                                      Bounds bounds,
                                                      float* highest,
                                                      float* lowest);
  // Stores what there is room for of all that is kept.
  __device__ void Fill() {
    SplitTokens(OrderedKey(range_.to.value), {range_.to.value, INFINITY}, {},
                true);
  }
  // The first of the thread's of the block's sub-tiles.
  __device__ __forceinline__ int FirstTile() const {
    return static_cast<int>(threadIdx.x) * team_.size() + team_.rank();
  }
  __device__ __forceinline__ void ClearTileMass() {
    const int step = team_.size() * kDecideThreads;
    const int num_tiles = row_.num_tiles;
    uint64_t* const tile_mass = tile_mass_;
#pragma unroll 1
    for (int tile = FirstTile(); tile < num_tiles; tile += step) {
      tile_mass[tile] = 0;
    }
  }
  // Fills tile_mass_ of the leading block; returns the sum.
  __device__ __noinline__ uint64_t SumByTile(Weighing weighing);
  // Adds those below a logit to this block's tile_mass_.
  __device__ __noinline__ void AddByTile(Weighing weighing, float below);

  // 0 for what is not kept.
  __device__ __forceinline__ void KeysOf(const Measure& measure,
                                         const float (&x)[kIdsPerLane],
                                         uint32_t (&keys)[kIdsPerLane]) const;
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
  // Adds a warp's weights to the bins they are for, kNoBin for none.
  static constexpr uint32_t kNoBin = ~0u;
  static __device__ __forceinline__ void AddToBins(
      uint64_t* bins, const uint32_t (&bin)[kIdsPerLane],
      const uint64_t (&weight)[kIdsPerLane]);
  __device__ __noinline__ void FillBins(Measure measure, uint32_t lowest,
                                        uint32_t range, int shift);
  __device__ __noinline__ int FindReached(uint64_t sum, int each,
                                          uint64_t* target);
  __device__ __noinline__ int PickBin(uint64_t* target, int num_blocks);
  __device__ __noinline__ int Gather(Measure measure, uint32_t* lowest,
                                     uint32_t* highest);
  __device__ __noinline__ Selection PickMember(Measure measure, int count,
                                               uint64_t target);
  __device__ __noinline__ Selection Select(Measure measure, uint32_t lowest,
                                           uint32_t highest, uint64_t target);
  __device__ __noinline__ Reduced Reduce(Reduction reduction,
                                         Weighing weighing = {},
                                         uint64_t least = 0,
                                         Measure measure = {});

  Team& team_;
  const DecideRow& row_;
  const RowPlan& plan_;
  uint64_t* tile_mass_;
  KeptRange range_;  // what is kept; it becomes smaller
  uint32_t scratch_;
  TokenStore store_;
  Share share_;          // what passes visit
  bool filled_ = false;  // the store has what passes choose from
  // What the block's tile_mass_ is of, by the filters' scale.
  KeptRange summed_;
};

__device__ __forceinline__ void WidePasses::KeysOf(
    const Measure& measure, const float (&x)[kIdsPerLane],
    uint32_t (&keys)[kIdsPerLane]) const {
  constexpr uint32_t kMostSteps = WideScratch::kBins - 1;
  switch (measure.key) {
    case Measure::kLogit:
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) keys[e] = OrderedKey(x[e]);
      break;
    case Measure::kDistance:
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) {
        keys[e] = OrderedKey(-TypicalDistance(x[e], measure.at));
      }
      break;
    case Measure::kSteps:
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) {
        const float steps = (row_.best - x[e]) * measure.at;
        keys[e] = WideScratch::kBins -
                  static_cast<uint32_t>(fminf(steps, kMostSteps));
      }
      break;
  }
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    keys[e] = x[e] > -INFINITY ? keys[e] : 0;
  }
}

template <class Visit>
__device__ __forceinline__ void WidePasses::ForEach(uint32_t floor,
                                                    bool use_store,
                                                    Visit visit) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const KeptRange range = range_;
  const bool by_id =
      range.to.last_id != Cutoff().last_id || range.from.value != INFINITY;
  const DType plain_type = PlainTypeOf(row_);
  const TileFilter filter = FilterFrom(floor);
  const TokenStore store = store_;
  int base = warp;
  const int count = share_.count;
  if (use_store) {
    const int stored = *store.stored();
#pragma unroll 1
    for (int i = 0; i < stored; i += kIdsPerLane * kDecideThreads) {
      LaneTokens tokens = StoredTokens(store, row_.num_tiles, i, stored);
      DropOthers(range, by_id, tokens);
      visit(tokens);
    }
    if (store.has_all()) base = count;
  }
#pragma unroll 1
  for (; base < count; base += 32 * kDecideWarps) {
    const int mine = base + lane * kDecideWarps;
    unsigned left = __ballot_sync(
        ~0u, mine < count && filter.Wants(mine) &&
                 !(use_store && store.marks()[min(mine, count - 1)] != 0));
    // Two sub-tiles are loaded ahead.
    int next[2] = {-1, -1};
    LanePart part[2];
    const auto load_next = [&] {
      next[0] = next[1];
      part[0] = part[1];
      next[1] = -1;
      if (left != 0) {
        next[1] = base + (__ffs(static_cast<int>(left)) - 1) * kDecideWarps;
      }
      left &= left - 1;
      // Past the last one: nothing is loaded, as no id is there.
      part[1] = LoadPart(row_, next[1] < 0 ? row_.num_tiles * kSubTile
                                           : filter.TileOf(next[1]));
    };
    load_next();
    load_next();
#pragma unroll 1
    while (next[0] >= 0) {
      const int own = next[0];
      const LanePart now = part[0];
      load_next();
      LaneTokens tokens =
          TokensOf(row_, plain_type, own, filter.TileOf(own), now);
      DropOthers(range, by_id, tokens);
      if (!visit(tokens)) return;
    }
  }
}

__device__ __forceinline__ uint64_t
WidePasses::MassFrom(const LaneTokens& tokens, float from, Weighing weighing) {
  constexpr int kAtOnce = 4;
  uint64_t mass = 0;
#pragma unroll
  for (int first = 0; first < kIdsPerLane; first += kAtOnce) {
    bool any = false;
#pragma unroll
    for (int e = first; e < first + kAtOnce; ++e) any |= tokens.x[e] >= from;
    if (!__any_sync(~0u, any)) continue;
#pragma unroll
    for (int e = first; e < first + kAtOnce; ++e) {
      const uint64_t own = weighing.Mass(tokens.x[e]);
      if (tokens.x[e] >= from) mass += own;
    }
  }
  return mass;
}

__device__ __forceinline__ unsigned WidePasses::MiddleOf(
    const LaneTokens& tokens, Bounds bounds, float* highest, float* lowest) {
  unsigned mask = 0;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    const float x = tokens.x[e];
    const bool is = (x >= bounds.low) & (x < bounds.from);
    mask |= is ? 1u << e : 0;
    *highest = fmaxf(*highest, is ? x : -INFINITY);
    *lowest = fminf(*lowest, is ? x : INFINITY);
  }
  return mask;
}

__device__ __noinline__ inline WidePasses::Split WidePasses::SplitTokens(
    uint32_t floor, Bounds bounds, Weighing weighing, bool stores) {
  const bool has_top = bounds.from < INFINITY;
  team_.Sync();  // before what the last one left is reset
  store_.Clear();
  ClearTileMass();
  WideScratch& scratch = s();
  if (threadIdx.x < kChunksOfSubTile) scratch.num_of_chunk[threadIdx.x] = 0;
  __syncthreads();
  filled_ = stores;
  summed_ = KeptRange();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const TokenStore store = store_;
  uint64_t top = 0;
  int in_middle = 0;
  float highest = -INFINITY;
  float lowest = INFINITY;
  ForEach(floor, false, [&](const LaneTokens& tokens) {
    const uint64_t mass = MassFrom(tokens, bounds.from, weighing);
    if (__any_sync(~0u, mass != 0)) {
      top += mass;
      const uint64_t of_tile = WarpSum64(mass);
      if (lane == 0) tile_mass_[tokens.tile[0]] = of_tile;
    }
    const unsigned mask = MiddleOf(tokens, bounds, &highest, &lowest);
    const int count = __popc(mask);
    in_middle += count;
    if (!stores) {
      const int of_tile = __reduce_add_sync(~0u, count);
      if (lane == 0) {
        store.marks()[tokens.own] = static_cast<uint8_t>(min(of_tile, 255));
      }
      return true;
    }
    const int order = tokens.tile[0] * kSubTile + lane * kIdsPerLane;
    const bool has_room =
        !__any_sync(~0u, mask != 0) || store.Put(tokens.x, mask, order);
    if (has_room && lane == 0) store.marks()[tokens.own] = 1;
    return has_top || has_room;
  });
  if (in_middle > 0) {
    atomicAdd(&scratch.num_of_chunk[lane / 2],
              static_cast<uint32_t>(in_middle));
  }
  __syncthreads();
  Split split;
  if (!stores || has_top) {
    split.top = team_.Sum(top);
    const bool any = highest >= lowest;
    split.keys = team_.Max(
        {any ? OrderedKey(highest) : 0, any ? ~OrderedKey(lowest) : 0});
  }
  return split;
}

__device__ __noinline__ inline void WidePasses::AddByTile(Weighing weighing,
                                                          float below) {
  ForEach(OrderedKey(range_.to.value), true, [&](const LaneTokens& tokens) {
    uint32_t tile[kIdsPerLane];
    uint64_t mass[kIdsPerLane];
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      const bool is = tokens.x[e] > -INFINITY && tokens.x[e] < below;
      tile[e] = is ? static_cast<uint32_t>(tokens.tile[e]) : kNoBin;
      mass[e] = weighing.Mass(tokens.x[e]);
    }
    AddToBins(tile_mass_, tile, mass);
    return true;
  });
  __syncthreads();
}

__device__ __noinline__ inline uint64_t WidePasses::SumByTile(
    Weighing weighing) {
  const bool is_summed = summed_.to.value == range_.to.value &&
                         summed_.to.last_id == range_.to.last_id &&
                         summed_.from.value == range_.from.value &&
                         summed_.from.first_id == range_.from.first_id &&
                         weighing.best == row_.best &&
                         weighing.scale == plan_.scale;
  const bool by_logit =
      range_.to.last_id == Cutoff().last_id && range_.from.value == INFINITY;
  if (!is_summed && !filled_ && by_logit) {
    SplitTokens(OrderedKey(range_.to.value), {INFINITY, range_.to.value},
                weighing, false);
  } else if (!is_summed) {
    if (!filled_) Fill();
    ClearTileMass();
    __syncthreads();
    AddByTile(weighing, INFINITY);
  }
  uint64_t own = 0;
  const int size = team_.size();
  uint64_t* const tile_mass = tile_mass_;
#pragma unroll 1
  for (int tile = FirstTile(); tile < row_.num_tiles;
       tile += size * kDecideThreads) {
    own += tile_mass[tile];
    if (!team_.leads()) *team_.In(0, &tile_mass[tile]) = tile_mass[tile];
  }
  return team_.Sum(own);
}

__device__ __noinline__ inline WidePasses::Reduced WidePasses::Reduce(
    Reduction reduction, Weighing weighing, uint64_t least, Measure measure) {
  if (!filled_) Fill();
  Reduced own;
  ForEach(OrderedKey(range_.to.value), true, [&](const LaneTokens& tokens) {
    uint64_t mass[kIdsPerLane];
    uint32_t keys[kIdsPerLane];
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) mass[e] = weighing.Mass(tokens.x[e]);
    KeysOf({}, tokens.x, keys);
    const auto for_each = [](auto visit) {
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) visit(e);
    };
    const auto take_key = [&](int e, bool takes) {
      own.max.a = max(own.max.a, takes ? keys[e] : 0);
      own.max.b = max(own.max.b, takes ? ~keys[e] : 0);
    };
    switch (reduction) {
      case Reduction::kSumMass:
        for_each([&](int e) { own.sum += keys[e] != 0 ? mass[e] : 0; });
        break;
      case Reduction::kSumSurprise:
        for_each([&](int e) {
          own.sum += FixedSurprise(tokens.x[e], row_.best, plan_.scale);
        });
        break;
      case Reduction::kKeys:
        for_each([&](int e) { take_key(e, keys[e] != 0); });
        break;
      case Reduction::kKeysOfMass:
        for_each([&](int e) { take_key(e, keys[e] != 0 && mass[e] >= least); });
        break;
      case Reduction::kMaxIdOfKey:
        for_each([&](int e) {
          const uint32_t id = static_cast<uint32_t>(tokens.id[e]);
          own.max.a = max(own.max.a, keys[e] == least ? id : 0);
        });
        break;
      case Reduction::kKeysFrom:
        uint32_t measured[kIdsPerLane];
        KeysOf(measure, tokens.x, measured);
        for_each(
            [&](int e) { take_key(e, keys[e] != 0 && measured[e] >= least); });
        break;
    }
    return true;
  });
  if (reduction <= Reduction::kSumSurprise) {
    own.sum = team_.Sum(own.sum);
  } else {
    own.max = team_.Max(own.max);
  }
  return own;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_
