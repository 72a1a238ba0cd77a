#ifndef TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_

#include "ops/sampler/sampler_block_cuda.cuh"

// One row between its summaries and its token, on one block.

namespace tenon::cuda {

// Of a sub-tile a lane has 8 consecutive places.
inline constexpr int kIdsPerLane = kSubTile / 32;

// No smaller key belongs to a token that can be drawn.
inline constexpr uint32_t kLowestKey =
    OrderedKey(-std::numeric_limits<float>::max());

// The type of logits is not a template parameter: it matters where they are
// loaded only, and one kernel compiles in a third of the time.
struct DecideRow {
  const void* logits;
  DType dtype;
  int vocab;
  int num_tiles;
  bool aligned;
  RowEdits edits;
  const int32_t* first_edit;
  const RowPlan* plan;       // in shared memory, as the next
  const uint32_t* tile_key;  // OrderedKey of the maximum, 0 for -inf
  float best;                // the largest logit, finite
  uint64_t total;            // of the sub-tiles' TileMass(kMassBits)

  __device__ __forceinline__ uint64_t Mass(float x) const {
    return FixedMass(strict::Weight(x, best, plan->scale));
  }
};

// The id of the lane's first place.
__device__ __forceinline__ int FirstIdOfLane(const DecideRow& row, int tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return (lane / 2 * row.num_tiles + tile) * kChunk + lane % 2 * kIdsPerLane;
}

__device__ __forceinline__ float LogitAt(const DecideRow& row, int id) {
  switch (row.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(row.logits)[id];
    case DType::kFloat16:
      return ToFloat(static_cast<const __half*>(row.logits)[id]);
    default:
      return ToFloat(static_cast<const __nv_bfloat16*>(row.logits)[id]);
  }
}

// A lane's logits of a sub-tile as stored; 16-bit ones have the first words.
struct LanePart {
  uint4 words[2];
};

template <class T>
__device__ __forceinline__ LanePart LoadPartSlowly(const DecideRow& row,
                                                   int first) {
  LanePart part;
#pragma unroll
  for (int i = 0; i < kIdsPerLane / Piece<T>::kSize; ++i) {
    const Piece<T> piece =
        LoadPieceSlowly(static_cast<const T*>(row.logits),
                        first + i * Piece<T>::kSize, row.vocab);
    memcpy(&part.words[i], &piece, sizeof(piece));
  }
  return part;
}
__device__ __noinline__ inline LanePart LoadPartSlowly(const DecideRow& row,
                                                       int first) {
  switch (row.dtype) {
    case DType::kFloat32:
      return LoadPartSlowly<float>(row, first);
    case DType::kFloat16:
      return LoadPartSlowly<__half>(row, first);
    default:
      return LoadPartSlowly<__nv_bfloat16>(row, first);
  }
}

__device__ __forceinline__ LanePart LoadPart(const DecideRow& row, int tile) {
  const int first = FirstIdOfLane(row, tile);
  const bool is_wide = row.dtype == DType::kFloat32;
  const bool exists = row.aligned && first + kIdsPerLane <= row.vocab;
  const char* const from = static_cast<const char*>(row.logits) +
                           static_cast<int64_t>(first) * (is_wide ? 4 : 2);
  const uint32_t fill = LowestWord(row.dtype);
  return {{Load16If<false>(exists, from, fill),
           Load16If<false>(exists && is_wide, from + 16, fill)}};
}

// What LoadPart leaves out, apart so that loads need not wait for each other.
__device__ __forceinline__ void CompletePart(const DecideRow& row, int tile,
                                             LanePart* part) {
  const int first = FirstIdOfLane(row, tile);
  if (first < row.vocab && (!row.aligned || first + kIdsPerLane > row.vocab)) {
    *part = LoadPartSlowly(row, first);
  }
}

struct LaneLogits {
  float x[kIdsPerLane];
};

// Masks and edits one sub-tile. The whole warp calls this.
__device__ __noinline__ inline LaneLogits ApplyEdits(const DecideRow& row,
                                                     int tile,
                                                     LaneLogits logits) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = FirstIdOfLane(row, tile);
  unsigned allowed = row.edits.only_allowed ? 0u : ~0u;
  if (row.edits.mask != nullptr && first < row.vocab) {
    allowed &= row.edits.mask[first / 8];
  }
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if ((allowed >> e & 1) == 0) logits.x[e] = -INFINITY;
  }
  if (row.edits.end == 0) return logits;
  const int end_order = (tile + 1) * kSubTile;
  for (int from = row.first_edit[tile]; from < row.edits.end; from += 32) {
    int order = end_order;
    float value = 0.0f;
    bool applies = false;
    if (from + lane < row.edits.end) {
      const LogitEdit edit = row.edits.edits[from + lane];
      order = DrawOrder(edit.id, row.vocab);
      applies = order / kSubTile == tile && order >= 0 && edit.id >= 0 &&
                edit.id < row.vocab;
      if (applies) {
        value = row.edits.Masked(edit.id)
                    ? -INFINITY
                    : ApplyEdit(*row.plan, edit, LogitAt(row, edit.id));
      }
    }
    for (unsigned left = __ballot_sync(~0u, applies); left != 0;
         left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const int place = __shfl_sync(~0u, order, source) % kSubTile;
      const float edited = __shfl_sync(~0u, value, source);
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) {
        if (place == lane * kIdsPerLane + e) logits.x[e] = edited;
      }
    }
    if (__any_sync(~0u, order >= end_order)) break;
  }
  return logits;
}

template <class T>
__device__ __forceinline__ LaneLogits FloatsOf(const LanePart& part) {
  T stored[kIdsPerLane];
  memcpy(stored, &part, sizeof(stored));
  LaneLogits logits;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) logits.x[e] = ToFloat(stored[e]);
  return logits;
}

__device__ __forceinline__ LaneLogits LogitsOf(const DecideRow& row, int tile,
                                               LanePart part) {
  CompletePart(row, tile, &part);
  LaneLogits logits;
  switch (row.dtype) {
    case DType::kFloat32:
      logits = FloatsOf<float>(part);
      break;
    case DType::kFloat16:
      logits = FloatsOf<__half>(part);
      break;
    default:
      logits = FloatsOf<__nv_bfloat16>(part);
      break;
  }
  if (row.edits.any()) return ApplyEdits(row, tile, logits);
  return logits;
}
__device__ __forceinline__ LaneLogits LogitsOfTile(const DecideRow& row,
                                                   int tile) {
  return LogitsOf(row, tile, LoadPart(row, tile));
}

// Has whole warps call visit(tile, logits) for the sub-tiles that wanted(tile)
// tells, with kAhead of them loaded at a time, until stop().
template <int kAhead, class Wanted, class Stop, class Visit>
__device__ __forceinline__ void ForEachTile(const DecideRow& row, Wanted wanted,
                                            Stop stop, Visit visit) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  // 32 sub-tiles a warp and round, dealt out like cards.
  for (int base = 0; base < row.num_tiles; base += 32 * kDecideWarps) {
    const int own = base + lane * kDecideWarps + warp;
    unsigned left = __ballot_sync(~0u, own < row.num_tiles && wanted(own));
    while (left != 0) {
      int tiles[kAhead];
      LanePart parts[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        // Past the last one: nothing is loaded, as no id is there.
        tiles[i] = row.num_tiles * kSubTile;
        if (left != 0) {
          tiles[i] =
              base + (__ffs(static_cast<int>(left)) - 1) * kDecideWarps + warp;
        }
        left &= left - 1;
        parts[i] = LoadPart(row, tiles[i]);
      }
      if (stop()) return;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (tiles[i] < row.num_tiles) {
          visit(tiles[i], LogitsOf(row, tiles[i], parts[i]));
        }
      }
    }
  }
}
template <int kAhead, class Visit>
__device__ __forceinline__ void ForEachTile(const DecideRow& row,
                                            uint32_t floor, Visit visit) {
  ForEachTile<kAhead>(
      row, [&](int tile) { return row.tile_key[tile] >= floor; },
      [] { return false; }, visit);
}

// The first token of a sub-tile at which the running sum of weigh(x, id)
// exceeds the target; it does. Every warp that calls this gets it.
struct TokenInTile {
  int id;
  float x;
};
template <class Weigh>
__device__ TokenInTile PickInTile(const DecideRow& row, int tile,
                                  const LaneLogits& logits, uint64_t target,
                                  Weigh weigh) {
  const int first = FirstIdOfLane(row, tile);
  uint64_t weights[kIdsPerLane];
  uint64_t own = 0;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    weights[e] = weigh(logits.x[e], first + e);
    own += weights[e];
  }
  const uint64_t upto = WarpInclusiveSum(own);
  TokenInTile token = {first, logits.x[0]};
  uint64_t before = upto - own;
  const bool mine = before <= target && target < upto;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if (before <= target) token = {first + e, logits.x[e]};
    before += weights[e];
  }
  const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, mine))) - 1;
  token.id = __shfl_sync(~0u, token.id, max(lane, 0));
  token.x = __shfl_sync(~0u, token.x, max(lane, 0));
  return token;
}

// Candidates, see BlockScratch::keys.
__device__ __forceinline__ uint64_t CandidateKey(uint32_t key, int id) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float LogitOfCandidate(uint64_t candidate) {
  return FromOrderedKey(~static_cast<uint32_t>(candidate >> 32));
}
__device__ __forceinline__ int IdOfCandidate(uint64_t candidate) {
  return static_cast<int>(static_cast<uint32_t>(candidate));
}

// Makes candidates of the tokens with larger keys than `floor`, and of those
// with this key the ones with ids below `id_end`. Returns how many there are:
// with more than kMaxCandidates some are missing.
__device__ __noinline__ inline int Collect(Block& block, const DecideRow& row,
                                           uint32_t floor, int id_end) {
  BlockScratch& s = block.s;
  floor = max(floor, kLowestKey);
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  const auto wanted = [&](int tile) {
    const uint32_t key = row.tile_key[tile];
    return key > floor || (key == floor && tile * kChunk < id_end);
  };
  const auto too_many = [&] {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int count = lane == 0 ? atomicAdd(&s.count, 0) : 0;
    return __shfl_sync(~0u, count, 0) > kMaxCandidates;
  };
  ForEachTile<4>(
      row, wanted, too_many, [&](int tile, const LaneLogits& logits) {
        const int first = FirstIdOfLane(row, tile);
        unsigned hits = 0;
#pragma unroll
        for (int e = 0; e < kIdsPerLane; ++e) {
          const uint32_t key = OrderedKey(logits.x[e]);
          if (key > floor || (key == floor && first + e < id_end))
            hits |= 1u << e;
        }
        if (hits == 0) return;
        int at = atomicAdd(&s.count, __popc(hits));
#pragma unroll
        for (int e = 0; e < kIdsPerLane; ++e) {
          if ((hits >> e & 1) != 0) {
            if (at < kMaxCandidates) {
              s.keys[at] = CandidateKey(OrderedKey(logits.x[e]), first + e);
            }
            ++at;
          }
        }
      });
  __syncthreads();
  const int count = s.count;
  __syncthreads();
  return count;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_
