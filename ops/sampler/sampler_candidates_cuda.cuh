#ifndef TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_

#include "ops/core/mma_cuda.cuh"
#include "ops/sampler/sampler_decide_row_cuda.cuh"

// The few tokens of a row that filters choose from: found, and ranked, by one
// block.

namespace tenon::cuda {

// Rows that need more are finished by all of their blocks.
inline constexpr int kMaxCandidates = 256;
static_assert(kMaxCandidates == kDecideThreads, "a thread for each");

// Sub-tiles that a warp has on their way to shared memory at a time, at most,
// and what they take, for all warps.
inline constexpr int kMaxTilesAhead = 8;
struct TileOnItsWay {
  LanePart lanes[32];
};
inline constexpr int kTilesAheadBytes =
    kDecideWarps * static_cast<int>(sizeof(TileOnItsWay));

struct CandidateScratch {
  // Of what is sought, the sub-tiles' maxima in parts of a range of keys, the
  // highest first.
  alignas(16) uint32_t bins[kDecideThreads];
  int num_tiles;
  int count;
  int added;  // by edits
  int tiles[kMaxCandidates];
  uint64_t keys[kMaxCandidates];         // in no order
  uint32_t edited[kMaxCandidates / 32];  // bits of keys that edits replace
  uint32_t places[kMaxCandidates];       // in draw order
  uint32_t ranks[kMaxCandidates];        // in draw order above those by key
  // By rank.
  uint64_t sorted[kMaxCandidates];
  uint64_t prefix[kMaxCandidates + 1];  // the masses before
  uint8_t by_place[kMaxCandidates];     // ranks in draw order

  // All threads call this; a barrier follows.
  __device__ __forceinline__ void Clear() {
    bins[threadIdx.x] = 0;
    ranks[threadIdx.x] = 0;
    if (threadIdx.x < kMaxCandidates / 32) edited[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      num_tiles = 0;
      count = 0;
      added = 0;
    }
  }

  __device__ float Logit(int rank) const {
    return LogitOfCandidate(sorted[rank]);
  }
  __device__ int Id(int rank) const { return IdOfCandidate(sorted[rank]); }
};

// Edits of the row, some per thread.
inline constexpr int kEditsAtOnce = 4;
struct ThreadEdits {
  int id[kEditsAtOnce];     // -1: none
  float raw[kEditsAtOnce];  // -inf where the mask stops it
  float x[kEditsAtOnce];
};

// Those from `first` on.
__device__ __forceinline__ ThreadEdits ReadEdits(const DecideRow& row,
                                                 int first) {
  ThreadEdits own;
  LogitEdit edits[kEditsAtOnce];
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    const int i = first + static_cast<int>(threadIdx.x) + u * kDecideThreads;
    if (i < row.edits.end) edits[u] = row.edits.edits[i];
    own.id[u] =
        static_cast<uint32_t>(edits[u].id) < static_cast<uint32_t>(row.vocab)
            ? edits[u].id
            : -1;
  }
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    own.raw[u] = own.id[u] >= 0 ? LogitAt(row, own.id[u]) : -INFINITY;
  }
#pragma unroll
  for (int u = 0; u < kEditsAtOnce; ++u) {
    const bool masked = own.id[u] < 0 || row.edits.Masked(own.id[u]);
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
        ahead_(static_cast<TileOnItsWay*>(room.memory)),
        tiles_ahead_(min(room.bytes / kTilesAheadBytes, kMaxTilesAhead)),
        bins_clear_(clear),
        lists_clear_(clear) {}

  // A key with at least `count` sub-tiles' maxima not below it, and few more
  // unless they are equal; 0 where there are fewer.
  __device__ uint32_t LowerBoundOfKth(int num_tiles, const TileBounds& bounds,
                                      int count);
  // Finds the tokens with keys of at least `floor`; -1 where they are too many.
  // kEdited: the row may have edits, the first being ReadEdits(row, 0), or a
  // mask. All threads call meanwhile() once, before the last barrier.
  // The first warp may read all of the scratch at once, others its prefix after
  // a barrier.
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
  __device__ void Rank(const DecideRow& row, int count);
  __device__ void SumMasses(int count);
  // Makes what one of the flags is of clear.
  __device__ void Renew(bool& clear);

  Block& block_;
  CandidateScratch& s_;
  const uint32_t* tile_key_;
  TileOnItsWay* ahead_;
  int tiles_ahead_;
  bool bins_clear_;
  bool lists_clear_;
  int found_ = 0;
};

__device__ __forceinline__ void Candidates::Renew(bool& clear) {
  if (!clear) {
    __syncthreads();
    s_.Clear();
    __syncthreads();
    bins_clear_ = true;
    lists_clear_ = true;
  }
  clear = false;
}

// A round looks at a range of keys in 256 parts or fewer, then, if that is too
// coarse, at the part that has the k-th.
__device__ __forceinline__ uint32_t Candidates::LowerBoundOfKth(
    int num_tiles, const TileBounds& bounds, int count) {
  constexpr int kBins = kDecideThreads;
  constexpr int kEach = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int enough = count + count / 2 + 8;
  uint32_t low = bounds.lowest;
  uint32_t range = OrderedKey(bounds.best) - low;  // the k-th is in it
  int above = 0;                                   // maxima above the range
  for (;;) {
    Renew(bins_clear_);
    const int shift = max(24 - __clz(static_cast<int>(range)), 0);
    for (int i = static_cast<int>(threadIdx.x); i < num_tiles;
         i += kDecideThreads) {
      const uint32_t offset = tile_key_[i] - low;
      if (offset <= range) {
        atomicAdd(&s_.bins[kBins - 1 - (offset >> shift)], 1u);
      }
    }
    __syncthreads();
    // Every warp for itself, which takes no barrier.
    int own[kEach];
    int sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = static_cast<int>(s_.bins[lane * kEach + e]);
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
    const int reached = above + static_cast<int>(s_.bins[kBins - 1 - bin]);
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

// Copies the lane's logits of a sub-tile, if they can be, to shared memory.
template <class T>
__device__ __forceinline__ void CopyPart(LanePart* to, const T* from) {
#pragma unroll
  for (int i = 0; i < kIdsPerLane / Piece<T>::kSize; ++i) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(
                     SharedAddress(&to->words[i])),
                 "l"(from + i * Piece<T>::kSize)
                 : "memory");
  }
}

template <class T, bool kEdited, class Meanwhile>
__device__ __forceinline__ void Candidates::CollectTiles(
    const DecideRow& row, uint32_t floor, const Meanwhile& meanwhile) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_tiles = s_.num_tiles;
  const float lowest = FromOrderedKey(floor);
  // Shared memory is read again after every write to it.
  const T* const logits = static_cast<const T*>(row.logits);
  const int vocab = row.vocab;
  const int last = row.aligned ? vocab - kIdsPerLane : -1;
  const int first_of_tile0 = FirstIdOfLane(row, 0);
  const int at_once = tiles_ahead_ * kDecideWarps;
  // At least once, for what is done meanwhile.
  int base = 0;
#pragma unroll 1
  do {
    const int end = min(num_tiles - base, at_once);
#pragma unroll 1
    for (int i = warp; i < end; i += kDecideWarps) {
      const int first = first_of_tile0 + s_.tiles[base + i] * kChunk;
      if (first <= last) {
        CopyPart(&ahead_[i].lanes[lane], logits + first);
      } else {
        ahead_[i].lanes[lane] = LoadPartSlowly(row, first);
      }
    }
    CommitCopies();
    unsigned masks[kMaxTilesAhead];
    if constexpr (kEdited) {
#pragma unroll
      for (int u = 0; u < kMaxTilesAhead; ++u) {
        const int i = warp + u * kDecideWarps;
        masks[u] = 0;
        if (i < end) {
          masks[u] =
              AllowedOf(row, first_of_tile0 + s_.tiles[base + i] * kChunk);
        }
      }
    }
    if (base == 0) meanwhile();
    WaitForCopies<0>();
    // Bits of the lane's logits, eight for each sub-tile.
    uint64_t found = 0;
#pragma unroll
    for (int u = 0; u < kMaxTilesAhead; ++u) {
      const int i = warp + u * kDecideWarps;
      if (i < end) {
        const LaneLogits own = FloatsOf<T>(ahead_[i].lanes[lane]);
        unsigned bits = 0;
#pragma unroll
        for (int e = 0; e < kIdsPerLane; ++e) {
          if (own.x[e] >= lowest) bits |= 1u << e;
        }
        if constexpr (kEdited) bits &= masks[u];
        found |= uint64_t{bits} << (u * kIdsPerLane);
      }
    }
    const int count = __popcll(found);
    const int upto = WarpInclusiveSum(count);
    int at = 0;
    if (lane == 31 && upto > 0) at = atomicAdd(&s_.count, upto);
    at = __shfl_sync(~0u, at, 31) + upto - count;
    // Mostly one or two.
    for (; found != 0 && at < kMaxCandidates; found &= found - 1, ++at) {
      const int bit = __ffsll(static_cast<long long>(found)) - 1;
      const int i = warp + bit / kIdsPerLane * kDecideWarps;
      const int e = bit % kIdsPerLane;
      const int tile = s_.tiles[base + i];
      const Piece<T> piece = {ahead_[i].lanes[lane].words[e / Piece<T>::kSize]};
      const float x = piece.At(e % Piece<T>::kSize);
      s_.keys[at] =
          CandidateKey(OrderedKey(x), first_of_tile0 + tile * kChunk + e);
      s_.places[at] =
          static_cast<uint32_t>(tile * kSubTile + lane * kIdsPerLane + e);
    }
    base += at_once;
  } while (base < num_tiles);
}

__device__ __forceinline__ void AddCandidate(CandidateScratch& s, int at,
                                             uint32_t key, int id, int place) {
  if (at >= kMaxCandidates) return;
  s.keys[at] = CandidateKey(key, id);
  s.places[at] = static_cast<uint32_t>(place);
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
          if (s.keys[i] == key) atomicOr(&s.edited[i / 32], 1u << (i % 32));
        }
      }
      const uint32_t key = OrderedKey(own.x[u]);
      if (own.id[u] >= 0 && key >= floor) {
        AddCandidate(s, count + atomicAdd(&s.added, 1), key, own.id[u],
                     static_cast<int>(DrawOrder(own.id[u], row.vocab)));
      }
    }
    first += kEditsAtOnce * kDecideThreads;
    if (first < row.edits.end) own = ReadEdits(row, first);
  }
}

__device__ __forceinline__ void Candidates::DropEdited() {
  const int thread = static_cast<int>(threadIdx.x);
  if ((s_.edited[thread / 32] >> (thread % 32) & 1) != 0) {
    s_.keys[thread] = DroppedCandidate(thread);
    s_.places[thread] = 0x80000000u + static_cast<uint32_t>(thread);
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
  Rank<kEdited>(row, found_);
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
      s_.keys[larger + at] = CandidateKey(tied, id);
      s_.places[larger + at] = static_cast<uint32_t>(DrawOrder(id, row.vocab));
    }
    found += static_cast<int>(total);
  }
  __syncthreads();
  found_ = larger + wanted;
  Rank<false>(row, found_);
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
      Rank<false>(row, found);
      return found;
    }
  }
  return -1;
}

// Each candidate's rank is the number of better ones: several threads count
// for one of them, all lanes of a warp looking at the same others.
template <bool kEdited>
__device__ __forceinline__ void Candidates::Rank(const DecideRow& row,
                                                 int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (count == 0) return;
  // thread / count, and the same of all threads.
  const unsigned inverse = 0x10000u / static_cast<unsigned>(count) + 1;
  const int part = static_cast<int>(threadIdx.x * inverse >> 16);
  const int parts = static_cast<int>(kDecideThreads * inverse >> 16);
  const int i = thread - part * count;
  if (part < parts) {
    const uint64_t key = s_.keys[i];
    const uint32_t place = s_.places[i];
    uint32_t better = 0;
    uint32_t placed_before = 0;
#pragma unroll 4
    for (int j = part; j < count; j += parts) {
      // Keys are the same only where a row's edits are not what they should be.
      const uint64_t other = s_.keys[j];
      const uint32_t other_place = s_.places[j];
      if (other < key || (kEdited && other == key && j < i)) ++better;
      if (other_place < place || (kEdited && other_place == place && j < i)) {
        ++placed_before;
      }
    }
    atomicAdd(&s_.ranks[i], better + (placed_before << 16));
  }
  __syncthreads();
  if (thread < count) {
    const uint32_t ranks = s_.ranks[thread];
    const int rank = static_cast<int>(ranks & 0xffff);
    const uint64_t key = s_.keys[thread];
    const bool dropped = kEdited && key >= DroppedCandidate(0);
    s_.sorted[rank] = key;
    s_.prefix[rank + 1] = dropped ? 0 : row.Mass(LogitOfCandidate(key));
    s_.by_place[ranks >> 16] = static_cast<uint8_t>(rank);
  }
  __syncthreads();
  if (thread < 32) SumMasses(count);
}

// Makes the prefix of the masses there. By one warp.
__device__ __forceinline__ void Candidates::SumMasses(int count) {
  constexpr int kMaxEach = kMaxCandidates / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int each = CeilDiv(count, 32);
  const int begin = lane * each;
  uint64_t masses[kMaxEach];
  uint64_t own = 0;
#pragma unroll
  for (int u = 0; u < kMaxEach; ++u) {
    const bool exists = u < each && begin + u < count;
    masses[u] = exists ? s_.prefix[begin + u + 1] : 0;
    own += masses[u];
  }
  uint64_t before = WarpInclusiveSum(own) - own;
  if (lane == 0) s_.prefix[0] = 0;
#pragma unroll
  for (int u = 0; u < kMaxEach; ++u) {
    before += masses[u];
    if (u < each && begin + u < count) s_.prefix[begin + u + 1] = before;
  }
  __syncwarp();
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
