#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"
#include "ops/sampler/sampler_token_store_cuda.cuh"

// Passes over a row's tokens by several blocks. Their code runs a few times
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
        num_own_(store_.own_tiles()) {
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
  // Passes begin with Fill(), but for those that make a guess.
  __device__ void ClearStore();
  __device__ __noinline__ void Fill();
  // visit(x, id, kept) for the tokens with a key from `floor` on and some
  // more, by whole warps; end(tile) after those of a sub-tile, where `by_tile`.
  template <class Visit, class End>
  __device__ __forceinline__ void ForEach(bool by_tile, uint32_t floor,
                                          Visit visit, End end);

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

  Team& team_;
  const DecideRow& row_;
  const RowPlan& plan_;
  uint64_t* tile_mass_;
  KeptRange range_;  // what is kept; it becomes smaller
  uint32_t scratch_;
  TokenStore store_;
  int num_own_;  // sub-tiles that passes visit
  bool filled_ = false;
};

__device__ inline void WidePasses::ClearStore() {
  for (int i = static_cast<int>(threadIdx.x); i < store_.own_tiles();
       i += kDecideThreads) {
    store_.segments()[i] = TokenStore::kNotStored;
  }
  if (threadIdx.x == 0) {
    *store_.wanted() = 0;
    *store_.stored() = 0;
  }
  __syncthreads();
}

// Stores what there is room for.
__device__ __noinline__ inline void WidePasses::Fill() {
  constexpr int kAhead = 4;
  ClearStore();
  filled_ = true;
  const TokenStore store = store_;
  const DType plain_type = PlainTypeOf(row_);
  const float floor = range_.to.value;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const TileFilter filter = FilterFrom(OrderedKey(range_.to.value));
  for (int base = warp; base < store.own_tiles(); base += 32 * kDecideWarps) {
    const int own = base + lane * kDecideWarps;
    unsigned left =
        __ballot_sync(~0u, own < store.own_tiles() && filter.Wants(own));
    while (left != 0) {
      if (__any_sync(~0u, *static_cast<volatile int*>(store.wanted()) >
                              store.capacity())) {
        break;
      }
      int tiles[kAhead];
      LanePart parts[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        // Past the last one: nothing is loaded, as no id is there.
        tiles[u] = -1;
        if (left != 0) {
          tiles[u] = base + (__ffs(static_cast<int>(left)) - 1) * kDecideWarps;
        }
        left &= left - 1;
        parts[u] = LoadPart(row_, tiles[u] < 0 ? row_.num_tiles * kSubTile
                                               : filter.TileOf(tiles[u]));
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (tiles[u] < 0) break;
        PutTile(row_, plain_type, store, tiles[u], filter.TileOf(tiles[u]),
                parts[u], floor, true);
      }
    }
  }
  __syncthreads();
}

template <class Visit, class End>
__device__ __forceinline__ void WidePasses::ForEach(bool by_tile,
                                                    uint32_t floor, Visit visit,
                                                    End end) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const KeptRange range = range_;
  const TileFilter filter = FilterFrom(floor);
  const DType plain_type = PlainTypeOf(row_);
  const TokenStore store = store_;
  const int own_tiles = num_own_;
  const int ids_of_chunks = row_.num_tiles * kChunk;
  const uint32_t* const segments = store.segments();
  const TokenStore::Token* const tokens = store.tokens();
  const auto visit_some = [&](int begin, int end, int step) {
#pragma unroll 1
    for (int i = begin; i < end; i += step) {
      TokenStore::Token token = {-INFINITY, 0};
      if (i + lane < end) token = tokens[i + lane];
      const float x = token.logit;
      const int place = token.order % kSubTile;
      const int id = place / kChunk * ids_of_chunks +
                     token.order / kSubTile * kChunk + place % kChunk;
      // Without branches.
      const bool kept = (x >= range.to.value) & (x <= range.from.value) &
                        !((x == range.to.value) & (id > range.to.last_id)) &
                        !((x == range.from.value) & (id < range.from.first_id));
      visit(x, id, kept);
    }
  };
  int base = warp;
  if (!by_tile) {
    visit_some(TokenStore::kStaged + warp * 32,
               TokenStore::kStaged + *store.stored(), kDecideThreads);
    if (filled_ && *store.wanted() <= store.capacity()) base = own_tiles;
  }
#pragma unroll 1
  for (; base < own_tiles; base += 32 * kDecideWarps) {
    const int mine = base + lane * kDecideWarps;
    unsigned left = __ballot_sync(
        ~0u, mine < own_tiles && filter.Wants(mine) &&
                 (by_tile || segments[mine] == TokenStore::kNotStored));
    // The next sub-tile, loaded ahead where it is not stored.
    int next = -1;
    uint32_t next_segment = 0;
    LanePart next_part = {};
    const auto load_next = [&] {
      next = -1;
      next_segment = 0;
      if (left != 0) {
        next = base + (__ffs(static_cast<int>(left)) - 1) * kDecideWarps;
        next_segment = segments[next];
      }
      left &= left - 1;
      if (next_segment == TokenStore::kNotStored) {
        next_part = LoadPart(row_, filter.TileOf(next));
      }
    };
    load_next();
#pragma unroll 1
    while (next >= 0) {
      const int own = next;
      uint32_t segment = next_segment;
      const LanePart part = next_part;
      load_next();
      if (segment == TokenStore::kNotStored) {
        segment = PutTile(row_, plain_type, store, own, filter.TileOf(own),
                          part, range.to.value, false);
      }
      const int begin = static_cast<int>(segment >> 9);
      visit_some(begin, begin + static_cast<int>(segment & 511), 32);
      end(filter.TileOf(own));
    }
  }
}

__device__ __noinline__ inline WidePasses::Reduced WidePasses::Reduce(
    Reduction reduction, float best, float scale, uint64_t least,
    Measure measure) {
  if (!filled_ && num_own_ == store_.own_tiles()) Fill();  // not of a guess
  const bool of_tiles = reduction == Reduction::kSumOfTiles;
  if (of_tiles) {
    const TileFilter filter = FilterFrom(OrderedKey(range_.to.value));
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < store_.own_tiles();
         i += kDecideThreads) {
      if (!filter.Wants(i)) *team_.In(0, &tile_mass_[filter.TileOf(i)]) = 0;
    }
  }
  Reduced own;
  uint64_t before = 0;
  ForEach(
      of_tiles, OrderedKey(range_.to.value),
      [&](float x, int id, bool kept) {
        if (!kept) return;
        const uint32_t key = OrderedKey(x);
        uint64_t mass = 0;
        if (scale != 0.0f) mass = FixedMass(strict::Weight(x, best, scale));
        switch (reduction) {
          case Reduction::kSumMass:
          case Reduction::kSumOfTiles:
            own.sum += mass;
            break;
          case Reduction::kSumSurprise:
            own.sum += FixedSurprise(x, row_.best, plan_.scale);
            break;
          case Reduction::kMaxKey:
            own.max.a = max(own.max.a, key);
            break;
          case Reduction::kMinKeyOfMass:
            if (mass >= least) own.max.b = max(own.max.b, ~key);
            break;
          case Reduction::kMaxIdOfKey:
            if (key == least) {
              own.max.a = max(own.max.a, static_cast<uint32_t>(id));
            }
            break;
          case Reduction::kKeysFrom:
            if (KeyOf(measure, x, id) >= least) {
              own.max.a = max(own.max.a, key);
              own.max.b = max(own.max.b, ~key);
            }
            break;
        }
      },
      [&](int tile) {
        if (!of_tiles) return;
        const uint64_t mass = WarpSum64(own.sum - before);
        before = own.sum;
        if (threadIdx.x % 32 == 0) *team_.In(0, &tile_mass_[tile]) = mass;
      });
  if (reduction <= Reduction::kSumOfTiles) {
    own.sum = team_.Sum(own.sum);
  } else {
    own.max = team_.Max(own.max);
  }
  return own;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_PASSES_CUDA_CUH_
