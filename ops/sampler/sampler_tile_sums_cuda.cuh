#ifndef TENON_OPS_SAMPLER_SAMPLER_TILE_SUMS_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TILE_SUMS_CUDA_CUH_

#include "ops/sampler/sampler_row_cuda.cuh"

// The maximum and the sums of sub-tiles whose logits a warp holds.

namespace tenon::cuda {

inline constexpr int kSummarizeWarps = 4;
// Chunks of a sub-tile in one of the groups that SubTile::sum starts from.
inline constexpr int kGroups = 4;
inline constexpr int kChunksOfGroup = kChunksOfSubTile / kGroups;

// How a warp shares out the pieces of neighbouring sub-tiles: kSplit lanes, 32
// / kSplit apart, have the groups of the same 16 bytes of a chunk.
template <class T, int kSplit_>
struct Layout {
  static constexpr int kSplit = kSplit_;
  static constexpr int kOwnGroups = kGroups / kSplit;
  static constexpr int kSize = Piece<T>::kSize;
  static constexpr int kPiecesOfChunk = kChunk / kSize;
  static constexpr int kPlaces = 32 / kSplit;
  static constexpr int kTilesOfWarp = kPlaces / kPiecesOfChunk;

  int num_tiles;
  int first_tile;  // of the warp
  int tile;
  int piece;        // of the chunk
  int first_group;  // of this lane

  __device__ __forceinline__ Layout(int warp, int num_tiles)
      : num_tiles(num_tiles) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    first_tile = warp * kTilesOfWarp;
    tile = first_tile + lane % kPlaces / kPiecesOfChunk;
    piece = lane % kPiecesOfChunk;
    first_group = lane / kPlaces * kOwnGroups;
  }
  __device__ __forceinline__ bool exists() const { return tile < num_tiles; }
  // Of the lanes that share a sub-tile, the one that writes.
  __device__ __forceinline__ bool leads() const {
    return exists() && first_group == 0 && piece == 0;
  }
  __device__ __forceinline__ int LastIdOfWarp() const {
    const int last_chunk = (kChunksOfSubTile - 1) * num_tiles + first_tile;
    return (last_chunk + kTilesOfWarp) * kChunk - 1;
  }
  // The first id of the lane's i-th chunk of its g-th group.
  __device__ __forceinline__ int FirstId(int g, int i) const {
    return (ChunkAt(g, i) * num_tiles + tile) * kChunk + piece * kSize;
  }
  __device__ __forceinline__ int ChunkAt(int g, int i) const {
    return first_group + g + i * kGroups;
  }
};

template <int kSize>
struct Floats {
  float x[kSize];
};

template <class T>
__device__ __forceinline__ float At(const Piece<T>& v, int e) {
  return v.At(e);
}
template <int kSize>
__device__ __forceinline__ float At(const Floats<kSize>& v, int e) {
  return v.x[e];
}

// The lane's logits: V is Piece<T>, or Floats once edits are applied.
template <class V, class L>
struct Values {
  V v[L::kOwnGroups][kChunksOfGroup];
};

template <class L, class V>
__device__ __forceinline__ float MaxOfLane(const Values<V, L>& values) {
  float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
  for (int g = 0; g < L::kOwnGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kChunksOfGroup; ++i) {
#pragma unroll
      for (int e = 0; e < L::kSize; ++e) {
        max[e % 4] = MaxOrNan(max[e % 4], At(values.v[g][i], e));
      }
    }
  }
  return MaxOrNan(MaxOrNan(max[0], max[1]), MaxOrNan(max[2], max[3]));
}
// Of 16-bit types two at a time.
template <class T, class L>
__device__ __forceinline__ float MaxOfPairs(const Values<Piece<T>, L>& values) {
  uint4 max = values.v[0][0].words;
#pragma unroll
  for (int j = 1; j < L::kOwnGroups * kChunksOfGroup; ++j) {
    const uint4 words = values.v[j / kChunksOfGroup][j % kChunksOfGroup].words;
    max.x = MaxOrNan2<T>(max.x, words.x);
    max.y = MaxOrNan2<T>(max.y, words.y);
    max.z = MaxOrNan2<T>(max.z, words.z);
    max.w = MaxOrNan2<T>(max.w, words.w);
  }
  const uint32_t best =
      MaxOrNan2<T>(MaxOrNan2<T>(max.x, max.y), MaxOrNan2<T>(max.z, max.w));
  T pair[2];
  memcpy(pair, &best, sizeof(pair));
  return MaxOrNan(ToFloat(pair[0]), ToFloat(pair[1]));
}

template <class L, class V>
__device__ __forceinline__ float MaxOfTile(const Values<V, L>& values) {
  float max;
  if constexpr (std::is_same_v<V, Piece<__half>>) {
    max = MaxOfPairs<__half>(values);
  } else if constexpr (std::is_same_v<V, Piece<__nv_bfloat16>>) {
    max = MaxOfPairs<__nv_bfloat16>(values);
  } else {
    max = MaxOfLane(values);
  }
#pragma unroll
  for (int mask = 1; mask < L::kPiecesOfChunk; mask *= 2) {
    max = MaxOrNan(max, __shfl_xor_sync(~0u, max, mask));
  }
#pragma unroll
  for (int mask = L::kPlaces; mask < 32; mask *= 2) {
    max = MaxOrNan(max, __shfl_xor_sync(~0u, max, mask));
  }
  return max;
}

// The sum over a sub-tile in the order that row_tiles.h gives at SubTile, of
// group(g, e): that of the lane's g-th group at element e of the piece.
template <class Value, class L, class Group>
__device__ __forceinline__ Value SumOfTile(Group group) {
  constexpr int kSize = L::kSize;
  Value lanes[kSize];  // B, then C, of row_tiles.h
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    Value sums[L::kOwnGroups];
#pragma unroll
    for (int g = 0; g < L::kOwnGroups; ++g) sums[g] = group(g, e);
    if constexpr (L::kOwnGroups == 2) sums[0] += sums[1];
    lanes[e] = sums[0];
#pragma unroll
    for (int mask = L::kPlaces; mask < 32; mask *= 2) {
      lanes[e] += __shfl_xor_sync(~0u, lanes[e], mask);
    }
  }
  if constexpr (kSize == 8) {
#pragma unroll
    for (int e = 0; e < 8; ++e) lanes[e] += __shfl_xor_sync(~0u, lanes[e], 1);
#pragma unroll
    for (int e = 0; e < 4; ++e) lanes[e] += lanes[e + 4];
  } else {
#pragma unroll
    for (int mask = 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        lanes[e] += __shfl_xor_sync(~0u, lanes[e], mask);
      }
    }
  }
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

template <bool kFast>
__device__ __forceinline__ float WeightOf(float x, float max, float scale) {
  if constexpr (kFast) return Exp2((x - max) * scale);
  return strict::Weight(x, max, scale);
}

// The whole warp calls this; sums of sub-tiles with a maximum that is not
// finite have no use.
template <bool kFast, class L, class V>
__device__ __forceinline__ float WeightOfTile(const Values<V, L>& values,
                                              float max, float scale) {
  const bool finite = fabsf(max) < INFINITY;
  const float origin = finite ? max : 0.0f;
  const float sum = SumOfTile<float, L>([&](int g, int e) {
    float own = WeightOf<kFast>(At(values.v[g][0], e), origin, scale);
#pragma unroll
    for (int i = 1; i < kChunksOfGroup; ++i) {
      own += WeightOf<kFast>(At(values.v[g][i], e), origin, scale);
    }
    return own;
  });
  return finite ? sum : 0.0f;
}

template <class L, class V>
__device__ Moments MomentsOfTile(const Values<V, L>& values) {
  Moments moments;
  moments.sum = SumOfTile<double, L>([&](int g, int e) {
    double own = 0.0;
#pragma unroll
    for (int i = 0; i < kChunksOfGroup; ++i) {
      const float x = At(values.v[g][i], e);
      if (x != -INFINITY) own = strict::Add(own, static_cast<double>(x));
    }
    return own;
  });
  moments.squares = SumOfTile<double, L>([&](int g, int e) {
    double own = 0.0;
#pragma unroll
    for (int i = 0; i < kChunksOfGroup; ++i) {
      const double x = static_cast<double>(At(values.v[g][i], e));
      if (x != -INFINITY) own = strict::Fma(x, x, own);
    }
    return own;
  });
  int count = 0;
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
#pragma unroll
    for (int e = 0; e < L::kSize; ++e) {
      count +=
          At(values.v[j / kChunksOfGroup][j % kChunksOfGroup], e) != -INFINITY
              ? 1
              : 0;
    }
  }
#pragma unroll
  for (int mask = 1; mask < L::kPiecesOfChunk; mask *= 2) {
    count += __shfl_xor_sync(~0u, count, mask);
  }
#pragma unroll
  for (int mask = L::kPlaces; mask < 32; mask *= 2) {
    count += __shfl_xor_sync(~0u, count, mask);
  }
  moments.count = count;
  return moments;
}

// Writes what is wanted of the lane's sub-tile.
template <bool kFast, class L, class V>
__device__ __forceinline__ void Summarize(const SamplerCall& call, int64_t row,
                                          const RowPlan& plan, const L& at,
                                          const Values<V, L>& values) {
  const int64_t index = row * call.num_tiles + at.tile;
  SubTile summary = {MaxOfTile(values), 0.0f};
  if (!plan.greedy || call.WantsSums()) {
    summary.sum = WeightOfTile<kFast>(values, summary.max, plan.scale);
  }
  if (at.leads()) call.scratch.tiles[index] = summary;
  if (plan.top_n_sigma > 0.0f) {
    const Moments moments = MomentsOfTile(values);
    if (at.leads()) call.scratch.moments[index] = moments;
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TILE_SUMS_CUDA_CUH_
