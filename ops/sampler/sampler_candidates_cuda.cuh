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
  int num_tiles;
  int count;
  int tiles[kMaxCandidates];
  uint64_t keys[kMaxCandidates];         // in no order
  uint32_t edited[kMaxCandidates / 32];  // bits of keys that edits replace
  uint32_t places[kMaxCandidates];       // in draw order
  uint32_t ranks[kMaxCandidates];        // in draw order above those by key
  // By rank.
  uint64_t sorted[kMaxCandidates];
  uint64_t prefix[kMaxCandidates + 1];  // the masses before
  uint8_t by_place[kMaxCandidates];     // ranks in draw order
  // Of the tiles on their way: whether masks let lanes' logits pass.
  uint8_t allowed[kMaxTilesAhead * kDecideWarps][32];

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

class Candidates {
 public:
  // `arrays` are the row's.
  __device__ Candidates(Block& block, CandidateScratch* scratch,
                        const TileArrays& arrays, Room room)
      : block_(block),
        s_(*scratch),
        tile_key_(arrays.key),
        ahead_(static_cast<TileOnItsWay*>(room.memory)),
        tiles_ahead_(min(room.bytes / kTilesAheadBytes, kMaxTilesAhead)) {}

  // A key with at least `count` sub-tiles' maxima not below it, and few more
  // unless they are equal; 0 where there are fewer. Each round has a warp for
  // each of eight keys.
  __device__ uint32_t LowerBoundOfKth(const DecideRow& row, int count,
                                      uint32_t lowest);
  // Finds the tokens with keys of at least `floor`; -1 where they are too many.
  // kEdited: the row may have edits, the first being ReadEdits(row, 0), or a
  // mask.
  // The first warp may read all of the scratch at once, others its prefix after
  // a barrier.
  template <bool kEdited>
  __device__ int Collect(const DecideRow& row, uint32_t floor,
                         const ThreadEdits& first_edits);
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
  template <class T, bool kEdited>
  __device__ void CollectTiles(const DecideRow& row, uint32_t floor);
  // False where there are too many sub-tiles.
  template <bool kEdited>
  __device__ bool CollectRaw(const DecideRow& row, uint32_t floor);
  __device__ int DropEdited();
  // Fills what the scratch has by rank.
  template <bool kEdited>
  __device__ void Rank(const DecideRow& row, int count);
  __device__ void SumMasses(int count);

  Block& block_;
  CandidateScratch& s_;
  const uint32_t* tile_key_;
  TileOnItsWay* ahead_;
  int tiles_ahead_;
  int found_ = 0;
};

__device__ __forceinline__ void AddCandidate(CandidateScratch& s, uint32_t key,
                                             int id, int place) {
  const int at = atomicAdd(&s.count, 1);
  if (at >= kMaxCandidates) return;
  s.keys[at] = CandidateKey(key, id);
  s.places[at] = static_cast<uint32_t>(place);
}

__device__ __forceinline__ uint32_t
Candidates::LowerBoundOfKth(const DecideRow& row, int count, uint32_t lowest) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_tiles = row.num_tiles;
  const int enough = count + count / 2 + 8;
  uint32_t low = lowest;
  uint32_t range = OrderedKey(row.best) - lowest;  // the k-th is in it
  for (;;) {
    // The first of the eight keys is the lowest.
    const uint32_t step = range / kDecideWarps + 1;
    const uint32_t key = low + min(range, step * static_cast<uint32_t>(warp));
    int own = 0;
#pragma unroll 4
    for (int i = lane; i < num_tiles; i += 32) {
      own += tile_key_[i] >= key ? 1 : 0;
    }
    const uint64_t* const counts =
        block_.Exchange(static_cast<uint64_t>(__reduce_add_sync(~0u, own)));
    int at = -1;
    int reached = 0;
#pragma unroll
    for (int w = 0; w < kDecideWarps; ++w) {
      if (static_cast<int>(counts[w]) >= count) {
        at = w;
        reached = static_cast<int>(counts[w]);
      }
    }
    if (at < 0) return 0;
    const uint32_t offset = min(range, step * static_cast<uint32_t>(at));
    low += offset;
    if (reached <= enough || range == offset || step == 1) return low;
    range = min(range - offset, step - 1);
  }
}

__device__ __forceinline__ void Candidates::ListTiles(const DecideRow& row,
                                                      uint32_t floor) {
  __syncthreads();
  if (threadIdx.x == 0) {
    s_.num_tiles = 0;
    s_.count = 0;
  }
  if (threadIdx.x < kMaxCandidates / 32) s_.edited[threadIdx.x] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_tiles = row.num_tiles;
#pragma unroll 1
  for (int base = 0; base < num_tiles; base += kDecideThreads) {
    const int tile = base + static_cast<int>(threadIdx.x);
    const bool wanted = tile < num_tiles && tile_key_[tile] >= floor;
    const unsigned all = __ballot_sync(~0u, wanted);
    int at = 0;
    if (lane == 0 && all != 0) at = atomicAdd(&s_.num_tiles, __popc(all));
    at = __shfl_sync(~0u, at, 0) + __popc(all & ((1u << lane) - 1));
    if (wanted && at < kMaxCandidates) s_.tiles[at] = tile;
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

template <class T, bool kEdited>
__device__ __forceinline__ void Candidates::CollectTiles(const DecideRow& row,
                                                         uint32_t floor) {
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
#pragma unroll 1
  for (int base = 0; base < num_tiles; base += at_once) {
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
    if constexpr (kEdited) {
      unsigned allowed[kMaxTilesAhead];
#pragma unroll
      for (int u = 0; u < kMaxTilesAhead; ++u) {
        const int i = warp + u * kDecideWarps;
        if (i < end) {
          allowed[u] =
              AllowedOf(row, first_of_tile0 + s_.tiles[base + i] * kChunk);
        }
      }
#pragma unroll
      for (int u = 0; u < kMaxTilesAhead; ++u) {
        const int i = warp + u * kDecideWarps;
        if (i < end) s_.allowed[i][lane] = static_cast<uint8_t>(allowed[u]);
      }
    }
    CommitCopies();
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
        if constexpr (kEdited) bits &= s_.allowed[i][lane];
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
  }
}

// Adds what edits make of their logits and marks what they replace.
__device__ __noinline__ inline void CollectEdits(
    CandidateScratch& s, const DecideRow& row, uint32_t floor,
    const ThreadEdits& first_edits) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int count = min(s.count, kMaxCandidates);
  __syncthreads();
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
        AddCandidate(s, key, own.id[u],
                     static_cast<int>(DrawOrder(own.id[u], row.vocab)));
      }
    }
    first += kEditsAtOnce * kDecideThreads;
    if (first < row.edits.end) own = ReadEdits(row, first);
  }
}

// Returns how many there were.
__device__ __forceinline__ int Candidates::DropEdited() {
  const int thread = static_cast<int>(threadIdx.x);
  if ((s_.edited[thread / 32] >> (thread % 32) & 1) != 0) {
    s_.keys[thread] = DroppedCandidate(thread);
    s_.places[thread] = 0x80000000u + static_cast<uint32_t>(thread);
  }
  int dropped = 0;
#pragma unroll
  for (int i = 0; i < kMaxCandidates / 32; ++i) dropped += __popc(s_.edited[i]);
  return dropped;
}

template <bool kEdited>
__device__ __forceinline__ bool Candidates::CollectRaw(const DecideRow& row,
                                                       uint32_t floor) {
  ListTiles(row, floor);
  if (s_.num_tiles > kMaxCandidates) return false;
  switch (row.dtype) {
    case DType::kFloat32:
      CollectTiles<float, kEdited>(row, floor);
      break;
    case DType::kFloat16:
      CollectTiles<__half, kEdited>(row, floor);
      break;
    default:
      CollectTiles<__nv_bfloat16, kEdited>(row, floor);
  }
  __syncthreads();
  return true;
}

template <bool kEdited>
__device__ __forceinline__ int Candidates::Collect(
    const DecideRow& row, uint32_t floor, const ThreadEdits& first_edits) {
  floor = max(floor, kLowestKey);
  if (!CollectRaw<kEdited>(row, floor)) return -1;
  int dropped = 0;
  if constexpr (kEdited) {
    if (row.edits.end > 0 && s_.count <= kMaxCandidates) {
      CollectEdits(s_, row, floor, first_edits);
      __syncthreads();
      dropped = DropEdited();
    }
  }
  found_ = s_.count;
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
  if (count > kMaxCandidates || !CollectRaw<false>(row, tied + 1)) return -1;
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
    const bool fits = CollectRaw<false>(row, OrderedKey(middle));
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
  s_.ranks[thread] = 0;
  __syncthreads();
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
