#ifndef TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_

#include "ops/sampler/sampler_warp_tiles_cuda.cuh"

// The few tokens of a row that filters choose from: found, and ranked, by one
// block.

namespace tenon::cuda {

// Rows that need more are finished by all of their blocks.
inline constexpr int kMaxCandidates = 256;
static_assert(kMaxCandidates == kDecideThreads, "a thread for each");

struct CandidateScratch {
  int num_tiles;
  int count;
  int added;  // by edits
  int tiles[kMaxCandidates];
  // In no order.
  struct alignas(16) Found {
    uint64_t key;
    uint32_t place;  // in draw order
  };
  Found found[kMaxCandidates];
  uint64_t masses[kMaxCandidates];
  uint32_t edited[kMaxCandidates / 32];  // bits of those that edits replace
  // By rank.
  uint64_t sorted[kMaxCandidates];
  uint64_t prefix[kMaxCandidates + 1];  // the masses before
  uint8_t by_place[kMaxCandidates];     // ranks in draw order

  __device__ __forceinline__ void Put(int at, uint32_t key, int id, int place,
                                      uint64_t mass) {
    found[at].key = CandidateKey(key, id);
    found[at].place = static_cast<uint32_t>(place);
    masses[at] = mass;
  }
  __device__ float Logit(int rank) const {
    return LogitOfCandidate(sorted[rank]);
  }
  __device__ int Id(int rank) const { return IdOfCandidate(sorted[rank]); }
};

// What candidates need of the room while no sub-tiles are on their way.
union CandidateRoom {
  // The sub-tiles' maxima in parts of a range of keys, the highest first.
  static constexpr int kBins = 128;
  alignas(16) uint32_t bins[kBins];
  // Of some others, how many are before one, by key and in draw order, and the
  // mass of the former.
  struct alignas(16) Before {
    uint64_t mass;
    uint32_t by_key;
    uint32_t by_place;
  };
  Before before[kDecideThreads];
};
static_assert(sizeof(CandidateRoom) <= kTilesAheadBytes);

// Edits of the row, some per thread.
inline constexpr int kEditsAtOnce = 4;
struct ThreadEdits {
  int id[kEditsAtOnce];     // -1: none
  float raw[kEditsAtOnce];  // -inf where the mask stops it
  float x[kEditsAtOnce];
};

// Without branches, so that no load waits for another.
template <class T>
__device__ __forceinline__ void ReadLogits(const DecideRow& row,
                                           ThreadEdits* edits) {
  const T* const logits = static_cast<const T*>(row.logits);
  T stored[kEditsAtOnce];
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    stored[u] = logits[max(edits->id[u], 0)];
  }
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) edits->raw[u] = ToFloat(stored[u]);
}

// Those from `first` on; there are any.
__device__ __forceinline__ ThreadEdits ReadEdits(const DecideRow& row,
                                                 int first) {
  ThreadEdits own;
  LogitEdit edits[kEditsAtOnce];
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    const int i = first + static_cast<int>(threadIdx.x) + u * kDecideThreads;
    edits[u] = row.edits.edits[min(i, row.edits.end - 1)];
    const bool exists =
        i < row.edits.end &&
        static_cast<uint32_t>(edits[u].id) < static_cast<uint32_t>(row.vocab);
    own.id[u] = exists ? edits[u].id : -1;
  }
  unsigned allowed[kEditsAtOnce];
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    allowed[u] =
        row.edits.mask != nullptr ? row.edits.mask[max(own.id[u], 0) / 8] : ~0u;
  }
  switch (row.dtype) {
    case DType::kFloat32:
      ReadLogits<float>(row, &own);
      break;
    case DType::kFloat16:
      ReadLogits<__half>(row, &own);
      break;
    default:
      ReadLogits<__nv_bfloat16>(row, &own);
  }
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    const bool masked =
        own.id[u] < 0 || (allowed[u] >> (own.id[u] % 8) & 1) == 0;
    own.x[u] = masked ? -INFINITY : ApplyEdit(*row.plan, edits[u], own.raw[u]);
    if (masked || row.edits.only_allowed) own.raw[u] = -INFINITY;
  }
  return own;
}

// A candidate that is none any more: behind all others, each for itself.
__device__ __forceinline__ uint64_t DroppedCandidate(int at) {
  return 0xffffffff00000000u | static_cast<uint32_t>(at);
}

// What is to be done while sub-tiles are on their way.
struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

class Candidates {
 public:
  // `arrays` are the row's. `clear`: the scratch is, as far as anyone sees who
  // has passed a barrier.
  __device__ Candidates(Block& block, CandidateScratch* scratch,
                        const TileArrays& arrays, Room room, bool clear)
      : block_(block),
        s_(*scratch),
        tile_key_(arrays.key),
        room_(*static_cast<CandidateRoom*>(room.memory)),
        ahead_(static_cast<TileOnItsWay*>(room.memory)),
        tiles_ahead_(min(room.bytes / kTilesAheadBytes, kMaxTilesAhead)),
        bins_clear_(clear),
        lists_clear_(clear) {}

  // Before the first use of a scratch that is clear; a barrier follows.
  __device__ __forceinline__ void Clear() {
    if (threadIdx.x < CandidateRoom::kBins) room_.bins[threadIdx.x] = 0;
    if (threadIdx.x < kMaxCandidates / 32) s_.edited[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      s_.num_tiles = 0;
      s_.count = 0;
      s_.added = 0;
    }
  }
  // A key with at least `count` sub-tiles' maxima not below it, and few more
  // unless they are equal; 0 where there are fewer.
  __device__ uint32_t LowerBoundOfKth(int num_tiles, const TileBounds& bounds,
                                      int count);
  // Finds the tokens with keys of at least `floor`; -1 where they are too many.
  // kEdited: the row may have edits, the first being ReadEdits(row, 0), or a
  // mask. All threads call meanwhile() once, before the last barrier.
  template <bool kEdited, class Meanwhile>
  __device__ int Collect(const DecideRow& row, uint32_t floor,
                         const ThreadEdits& first_edits,
                         const Meanwhile& meanwhile);
  // Finds the `count` best where too many tokens have the key `tied` or a
  // larger one, for there are as many; -1 where even those with a larger one
  // are too many, or the first ids have too few of them. Of rows without edits.
  __device__ int CollectTied(const DecideRow& row, uint32_t tied, int count);
  // Finds at least the `count` best where too many tokens have the key `from`
  // or a larger one: looks for a bound in between. -1 where that takes long. Of
  // rows without edits.
  __device__ int CollectBest(const DecideRow& row, uint32_t from, int count);
  // How many ranks the scratch has; some are of what is no candidate any more.
  __device__ int places() const { return found_; }

 private:
  // Threads that count for one candidate, at most.
  static constexpr int kMaxParts = 4;

  __device__ void ListTiles(const DecideRow& row, uint32_t floor);
  template <class T, bool kEdited, class Meanwhile>
  __device__ void CollectTiles(const DecideRow& row, uint32_t floor,
                               const Meanwhile& meanwhile);
  // False where there are too many sub-tiles.
  template <bool kEdited, class Meanwhile>
  __device__ bool CollectRaw(const DecideRow& row, uint32_t floor,
                             const Meanwhile& meanwhile);
  __device__ void DropEdited();
  // Fills what the scratch has by rank.
  template <bool kEdited>
  __device__ void Rank(int count);
  // Makes what one of the flags is of clear.
  __device__ void Renew(bool& clear);

  Block& block_;
  CandidateScratch& s_;
  const uint32_t* tile_key_;
  CandidateRoom& room_;
  TileOnItsWay* ahead_;
  int tiles_ahead_;
  bool bins_clear_;
  bool lists_clear_;
  int found_ = 0;
};

__device__ __forceinline__ void Candidates::Renew(bool& clear) {
  if (!clear) {
    __syncthreads();
    Clear();
    __syncthreads();
    bins_clear_ = true;
    lists_clear_ = true;
  }
  clear = false;
}

// A round looks at a range of keys in 128 parts or fewer, then, if that is too
// coarse, at the part that has the k-th.
__device__ __forceinline__ uint32_t Candidates::LowerBoundOfKth(
    int num_tiles, const TileBounds& bounds, int count) {
  constexpr int kBins = CandidateRoom::kBins;
  constexpr int kEach = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int enough = count + count / 2 + 8;
  uint32_t low = bounds.lowest;
  uint32_t range = OrderedKey(bounds.best) - low;  // the k-th is in it
  int above = 0;                                   // maxima above the range
  for (;;) {
    Renew(bins_clear_);
    const int shift = max(25 - __clz(static_cast<int>(range)), 0);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_tiles;
         i += kDecideThreads) {
      const uint32_t offset = tile_key_[i] - low;
      if (offset <= range) {
        atomicAdd(&room_.bins[kBins - 1 - (offset >> shift)], 1u);
      }
    }
    __syncthreads();
    // Every warp for itself, which takes no barrier.
    int own[kEach];
    int sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = static_cast<int>(room_.bins[lane * kEach + e]);
      sum += own[e];
    }
    const int upto = above + WarpInclusiveSum(sum);
    const unsigned reach = __ballot_sync(~0u, upto >= count);
    if (reach == 0) return 0;
    int at = lane * kEach;
    int before = upto - sum;
#pragma unroll
    for (int e = 0; e + 1 < kEach; ++e) {
      if (at == lane * kEach + e && before + own[e] < count) {
        before += own[e];
        ++at;
      }
    }
    const int source = __ffs(static_cast<int>(reach)) - 1;
    const uint32_t bin =
        static_cast<uint32_t>(kBins - 1 - __shfl_sync(~0u, at, source));
    above = __shfl_sync(~0u, before, source);
    low += bin << shift;
    if (shift == 0) return low;
    const int reached = above + static_cast<int>(room_.bins[kBins - 1 - bin]);
    if (reached <= enough) return low;
    range = min(range - (bin << shift), (1u << shift) - 1);
  }
}

__device__ __forceinline__ void Candidates::ListTiles(const DecideRow& row,
                                                      uint32_t floor) {
  static_assert(kMaxVocab <= int64_t{32} * kDecideThreads * kSubTile,
                "a bit for each of a thread's sub-tiles");
  const int thread = static_cast<int>(threadIdx.x);
  Renew(lists_clear_);
  uint32_t own = 0;
#pragma unroll 1
  for (int i = 0; i * kDecideThreads < row.num_tiles; ++i) {
    const int tile = i * kDecideThreads + thread;
    if (tile < row.num_tiles && tile_key_[tile] >= floor) own |= 1u << i;
  }
  const int count = __popc(own);
  const int upto = WarpInclusiveSum(count);
  int at = 0;
  if (thread % 32 == 31 && upto > 0) at = atomicAdd(&s_.num_tiles, upto);
  at = __shfl_sync(~0u, at, 31) + upto - count;
  for (; own != 0 && at < kMaxCandidates; own &= own - 1, ++at) {
    const int i = __ffs(static_cast<int>(own)) - 1;
    s_.tiles[at] = i * kDecideThreads + thread;
  }
  __syncthreads();
}

template <class T, bool kEdited, class Meanwhile>
__device__ __forceinline__ void Candidates::CollectTiles(
    const DecideRow& row, uint32_t floor, const Meanwhile& meanwhile) {
  using Lane = LanePieces<T>;
  const int num_wanted = s_.num_tiles;
  const int num_tiles = row.num_tiles;
  const float lowest = FromOrderedKey(floor);
  const float best = row.best;
  const float scale = row.scale;
  const int at_once = tiles_ahead_ * kDecideWarps;
  // At least once, for what is done meanwhile.
  int base = 0;
#pragma unroll 1
  do {
    const int* const list = s_.tiles + base;
    const int count = min(num_wanted - base, at_once);
    WarpTiles<T> tiles(row, list, count, ahead_);
    if (!tiles.Copy(row)) LoadTilesSlowly<T>(row, list, count, ahead_);
    if constexpr (kEdited) tiles.LoadMasks(row);
    if (base == 0) meanwhile();
    const uint64_t allowed = kEdited ? tiles.Allowed() : ~uint64_t{0};
    WaitForCopies<0>();
    uint64_t found = tiles.Find(lowest) & allowed;
    const int own = __popcll(found);
    const int upto = WarpInclusiveSum(own);
    int at = 0;
    if (threadIdx.x % 32 == 31 && upto > 0) at = atomicAdd(&s_.count, upto);
    at = __shfl_sync(~0u, at, 31) + upto - own;
    // Mostly one or two.
#pragma unroll 1
    for (; found != 0 && at < kMaxCandidates; found &= found - 1, ++at) {
      const int bit = __ffsll(static_cast<long long>(found)) - 1;
      const int b = bit % kIdsPerLane;
      const int tile = list[WarpTiles<T>::Slot(bit / kIdsPerLane)];
      const float x = tiles.LogitOf(bit);
      s_.Put(at, OrderedKey(x), Lane::Id(b, tile, num_tiles),
             tile * kSubTile + Lane::Place(b),
             FixedMass(strict::Weight(x, best, scale)));
    }
    base += at_once;
  } while (base < num_wanted);
}

// Adds what edits make of their logits to the `count` candidates there are, and
// marks what they replace.
__device__ __noinline__ inline void CollectEdits(
    CandidateScratch& s, const DecideRow& row, uint32_t floor, int count,
    const ThreadEdits& first_edits) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ThreadEdits own = first_edits;
  for (int first = 0; first < row.edits.end;) {
#pragma unroll
    for (int u = 0; u < kEditsAtOnce; ++u) {
      const uint32_t raw = OrderedKey(own.raw[u]);
      for (unsigned left = __ballot_sync(~0u, own.id[u] >= 0 && raw >= floor);
           left != 0; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        const uint64_t key = CandidateKey(__shfl_sync(~0u, raw, source),
                                          __shfl_sync(~0u, own.id[u], source));
        for (int i = lane; i < count; i += 32) {
          if (s.found[i].key == key) {
            atomicOr(&s.edited[i / 32], 1u << (i % 32));
          }
        }
      }
      const uint32_t key = OrderedKey(own.x[u]);
      if (own.id[u] >= 0 && key >= floor) {
        const int at = count + atomicAdd(&s.added, 1);
        if (at < kMaxCandidates) {
          s.Put(at, key, own.id[u],
                static_cast<int>(DrawOrder(own.id[u], row.vocab)),
                row.Mass(own.x[u]));
        }
      }
    }
    first += kEditsAtOnce * kDecideThreads;
    if (first < row.edits.end) own = ReadEdits(row, first);
  }
}

__device__ __forceinline__ void Candidates::DropEdited() {
  const int thread = static_cast<int>(threadIdx.x);
  if ((s_.edited[thread / 32] >> (thread % 32) & 1) != 0) {
    s_.found[thread].key = DroppedCandidate(thread);
    s_.found[thread].place = 0x80000000u + static_cast<uint32_t>(thread);
    s_.masses[thread] = 0;
  }
  __syncthreads();
}

template <bool kEdited, class Meanwhile>
__device__ __forceinline__ bool Candidates::CollectRaw(
    const DecideRow& row, uint32_t floor, const Meanwhile& meanwhile) {
  ListTiles(row, floor);
  if (s_.num_tiles > kMaxCandidates) return false;
  switch (row.dtype) {
    case DType::kFloat32:
      CollectTiles<float, kEdited>(row, floor, meanwhile);
      break;
    case DType::kFloat16:
      CollectTiles<__half, kEdited>(row, floor, meanwhile);
      break;
    default:
      CollectTiles<__nv_bfloat16, kEdited>(row, floor, meanwhile);
  }
  __syncthreads();
  return true;
}

template <bool kEdited, class Meanwhile>
__device__ __forceinline__ int Candidates::Collect(
    const DecideRow& row, uint32_t floor, const ThreadEdits& first_edits,
    const Meanwhile& meanwhile) {
  floor = max(floor, kLowestKey);
  if (!CollectRaw<kEdited>(row, floor, meanwhile)) {
    meanwhile();
    __syncthreads();
    return -1;
  }
  found_ = s_.count;
  int dropped = 0;
  if constexpr (kEdited) {
    if (row.edits.end > 0 && found_ <= kMaxCandidates) {
      CollectEdits(s_, row, floor, found_, first_edits);
      __syncthreads();
      found_ += s_.added;
#pragma unroll
      for (int i = 0; i < kMaxCandidates / 32; ++i) {
        dropped += __popc(s_.edited[i]);
      }
      if (dropped > 0) DropEdited();
    }
  }
  if (found_ > kMaxCandidates) return -1;
  Rank<kEdited>(found_);
  return found_ - dropped;
}

__device__ __forceinline__ int Candidates::CollectTied(const DecideRow& row,
                                                       uint32_t tied,
                                                       int count) {
  constexpr int kEach = 8;
  constexpr int kIdsAtOnce = kEach * kDecideThreads;
  constexpr int kMaxIds = 8 * kIdsAtOnce;
  if (count > kMaxCandidates || !CollectRaw<false>(row, tied + 1, Nothing()))
    return -1;
  const int larger = s_.count;
  if (larger > kMaxCandidates) return -1;
  const int wanted = max(count - larger, 0);
  // Of the tied ones the lowest ids.
  int found = 0;
  for (int base = 0; found < wanted; base += kIdsAtOnce) {
    if (base >= min(row.vocab, kMaxIds)) return -1;
    const int first = base + static_cast<int>(threadIdx.x) * kEach;
    unsigned ties = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (first + e < row.vocab &&
          OrderedKey(LogitAt(row, first + e)) == tied) {
        ties |= 1u << e;
      }
    }
    const uint64_t own = static_cast<uint64_t>(__popc(ties));
    uint64_t total;
    int at = found + static_cast<int>(block_.InclusiveSum(own, &total) - own);
    for (; ties != 0 && at < wanted; ties &= ties - 1, ++at) {
      const int id = first + __ffs(static_cast<int>(ties)) - 1;
      s_.Put(larger + at, tied, id, static_cast<int>(DrawOrder(id, row.vocab)),
             row.Mass(FromOrderedKey(tied)));
    }
    found += static_cast<int>(total);
  }
  __syncthreads();
  found_ = larger + wanted;
  Rank<false>(found_);
  return found_;
}

__device__ __forceinline__ int Candidates::CollectBest(const DecideRow& row,
                                                       uint32_t from,
                                                       int count) {
  constexpr int kMaxTries = 8;
  float low = FromOrderedKey(from);
  float high = row.best;
  for (int i = 0; i < kMaxTries; ++i) {
    const float middle = 0.5f * low + 0.5f * high;
    if (!(low < middle && middle < high)) return -1;
    const bool fits = CollectRaw<false>(row, OrderedKey(middle), Nothing());
    const int found = fits ? s_.count : kMaxCandidates + 1;
    if (found > kMaxCandidates) {
      low = middle;
    } else if (found < count) {
      high = middle;
    } else {
      found_ = found;
      Rank<false>(found);
      return found;
    }
  }
  return -1;
}

// Each candidate's rank is the number of better ones: several threads count
// for one of them, all lanes of a warp looking at the same others.
template <bool kEdited>
__device__ __forceinline__ void Candidates::Rank(int count) {
  if (count == 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  // thread / count, and the same of all threads.
  const unsigned inverse = 0x10000u / static_cast<unsigned>(count) + 1;
  const int part = static_cast<int>(threadIdx.x * inverse >> 16);
  const int parts =
      min(static_cast<int>(kDecideThreads * inverse >> 16), kMaxParts);
  const int i = thread - part * count;
  if (part < parts) {
    const CandidateScratch::Found own = s_.found[i];
    CandidateRoom::Before before = {0, 0, 0};
#pragma unroll 2
    for (int j = part; j < count; j += parts) {
      // Keys are the same only where a row's edits are not what they should be.
      const CandidateScratch::Found other = s_.found[j];
      const uint64_t mass = s_.masses[j];
      const bool earlier = kEdited && j < i;
      const bool is_better =
          other.key < own.key || (earlier && other.key == own.key);
      const bool is_placed_before =
          other.place < own.place || (earlier && other.place == own.place);
      before.by_key += is_better ? 1 : 0;
      before.mass += is_better ? mass : 0;
      before.by_place += is_placed_before ? 1 : 0;
    }
    room_.before[thread] = before;
  }
  __syncthreads();
  if (thread < count) {
    CandidateRoom::Before before = {0, 0, 0};
#pragma unroll 1
    for (int p = thread; p < parts * count; p += count) {
      const CandidateRoom::Before some = room_.before[p];
      before.mass += some.mass;
      before.by_key += some.by_key;
      before.by_place += some.by_place;
    }
    s_.sorted[before.by_key] = s_.found[thread].key;
    s_.prefix[before.by_key + 1] = before.mass + s_.masses[thread];
    s_.by_place[before.by_place] = static_cast<uint8_t>(before.by_key);
    if (thread == 0) s_.prefix[0] = 0;
  }
  __syncthreads();
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
