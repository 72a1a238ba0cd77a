#ifndef TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_

#include "ops/sampler/sampler_decide_row_cuda.cuh"

// The few tokens of a row that filters choose from: found, and ranked, by one
// block.

namespace tenon::cuda {

// Rows that need more are left to the wide kernel.
inline constexpr int kMaxCandidates = 256;
static_assert(kMaxCandidates == kDecideThreads, "a thread for each");

struct CandidateScratch {
  int num_tiles;
  int count;
  int tiles[kMaxCandidates];
  uint64_t keys[kMaxCandidates];         // in no order
  uint32_t edited[kMaxCandidates / 32];  // bits of keys that edits replace
  uint64_t masses[kMaxCandidates];
  uint32_t places[kMaxCandidates];  // in draw order
  // By rank.
  uint64_t sorted[kMaxCandidates];
  uint64_t prefix[kMaxCandidates + 1];  // the masses before
  uint8_t by_place[kMaxCandidates];     // ranks in draw order

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
                        const TileArrays& arrays)
      : block_(block), s_(*scratch), tile_key_(arrays.key) {}

  // A key with at least `count` sub-tiles' maxima not below it, and few more
  // unless they are equal; 0 where there are fewer. Each round has a warp for
  // each of eight keys.
  __device__ uint32_t LowerBoundOfKth(const DecideRow& row, int count,
                                      uint32_t lowest);
  // Finds the tokens with keys of at least `floor`; -1 where they are too many.
  // kEdited: the row may have edits, the first being ReadEdits(row, 0), or a
  // mask.
  template <bool kEdited>
  __device__ int Collect(const DecideRow& row, uint32_t floor,
                         const ThreadEdits& first_edits);
  // How many ranks the scratch has; some are of what is no candidate any more.
  __device__ int places() const { return found_; }

 private:
  __device__ void ListTiles(const DecideRow& row, uint32_t floor);
  template <class T, bool kEdited>
  __device__ void CollectTiles(const DecideRow& row, uint32_t floor);
  __device__ int DropEdited();
  // Fills what the scratch has by rank.
  template <bool kEdited>
  __device__ void Rank(const DecideRow& row, int count);

  Block& block_;
  CandidateScratch& s_;
  const uint32_t* tile_key_;
  int found_ = 0;
};

__device__ __forceinline__ void AddCandidate(CandidateScratch& s, uint32_t key,
                                             int id) {
  const int at = atomicAdd(&s.count, 1);
  if (at < kMaxCandidates) s.keys[at] = CandidateKey(key, id);
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

template <class T, bool kEdited>
__device__ __forceinline__ void Candidates::CollectTiles(const DecideRow& row,
                                                         uint32_t floor) {
  constexpr int kAhead = 4;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int num_tiles = s_.num_tiles;
  const float lowest = FromOrderedKey(floor);
#pragma unroll 1
  for (int from = warp; from < num_tiles; from += kAhead * kDecideWarps) {
    int firsts[kAhead];
    LanePart parts[kAhead];
    unsigned allowed[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = from + u * kDecideWarps;
      // Past the last one: nothing is loaded, as no id is there.
      firsts[u] = i < num_tiles ? FirstIdOfLane(row, s_.tiles[i]) : row.vocab;
      parts[u] = LoadPartAt<T>(row, firsts[u]);
      allowed[u] = kEdited ? AllowedOf(row, firsts[u]) : ~0u;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      CompletePart(row, firsts[u], &parts[u]);
      const LaneLogits logits = FloatsOf<T>(parts[u]);
      unsigned found = 0;
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) {
        if (logits.x[e] >= lowest) found |= 1u << e;
      }
      // Mostly one.
      for (found &= allowed[u]; found != 0; found &= found - 1) {
        const int at = __ffs(static_cast<int>(found)) - 1;
        float x = logits.x[0];
#pragma unroll
        for (int e = 1; e < kIdsPerLane; ++e) {
          if (e == at) x = logits.x[e];
        }
        AddCandidate(s_, OrderedKey(x), firsts[u] + at);
      }
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
      if (own.id[u] >= 0 && key >= floor) AddCandidate(s, key, own.id[u]);
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
  }
  int dropped = 0;
#pragma unroll
  for (int i = 0; i < kMaxCandidates / 32; ++i) dropped += __popc(s_.edited[i]);
  return dropped;
}

template <bool kEdited>
__device__ __forceinline__ int Candidates::Collect(
    const DecideRow& row, uint32_t floor, const ThreadEdits& first_edits) {
  floor = max(floor, kLowestKey);
  ListTiles(row, floor);
  if (s_.num_tiles > kMaxCandidates) return -1;
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

// Each candidate's rank is the number of better ones: several threads, side by
// side, count for one of them.
template <bool kEdited>
__device__ __forceinline__ void Candidates::Rank(const DecideRow& row,
                                                 int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) {
    const uint64_t key = s_.keys[thread];
    const bool dropped = kEdited && key >= DroppedCandidate(0);
    s_.masses[thread] = dropped ? 0 : row.Mass(LogitOfCandidate(key));
    s_.places[thread] =
        dropped
            ? 0x80000000u + static_cast<uint32_t>(thread)
            : static_cast<uint32_t>(DrawOrder(IdOfCandidate(key), row.vocab));
  }
  __syncthreads();
  const int log2_parts = count <= 32 ? 3 : count <= 64 ? 2 : count <= 128;
  const int parts = 1 << log2_parts;
  const int i = thread >> log2_parts;
  const uint64_t key = i < count ? s_.keys[i] : 0;
  const uint32_t place = i < count ? s_.places[i] : 0;
  uint64_t before = 0;
  uint32_t ranks = 0;  // in draw order above those by key
#pragma unroll 4
  for (int j = thread & (parts - 1); j < count; j += parts) {
    const uint64_t other = s_.keys[j];
    const uint32_t other_place = s_.places[j];
    const uint64_t mass = s_.masses[j];
    bool is_before = other < key;
    bool is_placed_before = other_place < place;
    if constexpr (kEdited) {
      // Only where a row's edits are not what they should be.
      is_before |= other == key && j < i;
      is_placed_before |= other_place == place && j < i;
    }
    before += is_before ? mass : 0;
    ranks += is_before ? 1 : 0;
    ranks += is_placed_before ? 0x10000 : 0;
  }
  for (int mask = 1; mask < parts; mask *= 2) {
    before += __shfl_xor_sync(~0u, before, mask);
    ranks += __shfl_xor_sync(~0u, ranks, mask);
  }
  if (i < count && (thread & (parts - 1)) == 0) {
    const int rank = static_cast<int>(ranks & 0xffff);
    s_.sorted[rank] = key;
    s_.prefix[rank] = before;
    if (rank == count - 1) s_.prefix[count] = before + s_.masses[i];
    s_.by_place[ranks >> 16] = static_cast<uint8_t>(rank);
  }
  __syncthreads();
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_CANDIDATES_CUDA_CUH_
