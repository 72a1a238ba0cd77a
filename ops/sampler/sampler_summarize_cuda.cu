#include "ops/sampler/sampler_kernels_cuda.cuh"

// The kernel that reads all logits once. A lane loads the same 16 bytes of
// several chunks of one sub-tile, and all lanes of a warp together neighbouring
// bytes, so that there are many loads in flight and hardly any shuffles. Only
// then it takes the maximum, and only then the weights.

namespace tenon {
namespace {

using cuda::MaxOrNan;
using cuda::Piece;
using cuda::RowEdits;
using cuda::SamplerCall;

constexpr int kWarps = 4;
// Chunks of a sub-tile in one of the groups that SubTile::sum starts from.
constexpr int kGroups = 4;
constexpr int kChunksOfGroup = kChunksOfSubTile / kGroups;

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
  // The first id of the lane's i-th chunk of its g-th group.
  __device__ __forceinline__ int FirstId(int g, int i) const {
    const int chunk = first_group + g + i * kGroups;
    return (chunk * num_tiles + tile) * kChunk + piece * kSize;
  }
};

template <int kSize>
struct Floats {
  float x[kSize];
};

template <class T>
__device__ __forceinline__ float At(const Piece<T>& v, int e) {
  return cuda::ToFloat(v.x[e]);
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
  uint32_t max[4];
  memcpy(max, &values.v[0][0], sizeof(max));
#pragma unroll
  for (int j = 1; j < L::kOwnGroups * kChunksOfGroup; ++j) {
    uint32_t words[4];
    memcpy(words, &values.v[j / kChunksOfGroup][j % kChunksOfGroup],
           sizeof(words));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      max[w] = cuda::MaxOrNan2<T>(max[w], words[w]);
    }
  }
  const uint32_t best = cuda::MaxOrNan2<T>(cuda::MaxOrNan2<T>(max[0], max[1]),
                                           cuda::MaxOrNan2<T>(max[2], max[3]));
  T pair[2];
  memcpy(pair, &best, sizeof(pair));
  return MaxOrNan(cuda::ToFloat(pair[0]), cuda::ToFloat(pair[1]));
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

// The sum over a sub-tile in the order that row_plan.h gives at SubTile, of
// group(g, e): that of the lane's g-th group at element e of the piece.
template <class Value, class L, class Group>
__device__ __forceinline__ Value SumOfTile(Group group) {
  constexpr int kSize = L::kSize;
  Value lanes[kSize];  // B, then C, of row_plan.h
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
  if constexpr (kFast) return cuda::Exp2((x - max) * scale);
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

template <class T, class L>
__device__ __forceinline__ void Load(const SamplerCall& call, const T* row,
                                     const L& at, Values<Piece<T>, L>* values) {
  constexpr int kPieces = L::kOwnGroups * kChunksOfGroup;
  const int vocab = static_cast<int>(call.p.vocab());
  const auto first_id = [&](int j) {
    return at.exists() ? at.FirstId(j / kChunksOfGroup, j % kChunksOfGroup)
                       : vocab;
  };
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    values->v[j / kChunksOfGroup][j % kChunksOfGroup] =
        cuda::LoadPiece<true>(row, first_id(j), vocab, call.aligned);
  }
  // Where anything is missing, it is of the last of the lane's chunks that the
  // vocabulary has, or all.
  bool slow = !call.aligned;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    slow = slow || cuda::IsSlow<T>(first_id(j), vocab, true);
  }
  if (!slow) return;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (cuda::IsSlow<T>(first_id(j), vocab, call.aligned)) {
      values->v[j / kChunksOfGroup][j % kChunksOfGroup] =
          cuda::LoadPieceSlowly(row, first_id(j), vocab);
    }
  }
}

// Applies the row's mask and edits. `stage` is the warp's own shared memory, of
// a float for each of its logits.
template <class T, class L>
__device__ __forceinline__ void ApplyEdits(
    const SamplerCall& call, int64_t row, const T* logits, const RowPlan& plan,
    const L& at, float* stage, Values<Floats<L::kSize>, L>* values) {
  constexpr int kSize = L::kSize;
  const int vocab = static_cast<int>(call.p.vocab());
  const int lane = static_cast<int>(threadIdx.x % 32);
  const RowEdits edits =
      cuda::EditsOf(call.p, row, plan, EditsOfRow(call.p, row));
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
    const int first = at.FirstId(j / kChunksOfGroup, j % kChunksOfGroup);
    unsigned allowed = edits.only_allowed ? 0u : ~0u;
    if (edits.mask != nullptr && first < vocab && at.exists()) {
      allowed &= static_cast<unsigned>(edits.mask[first / 8]) >> (first % 8);
    }
    float(&x)[kSize] = values->v[j / kChunksOfGroup][j % kChunksOfGroup].x;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if ((allowed >> e & 1) == 0) x[e] = -INFINITY;
    }
  }
  if (edits.end == 0) return;
  const int begin = cuda::FirstEditFrom(edits, at.first_tile * kSubTile, vocab);
  const int end_order = (at.first_tile + L::kTilesOfWarp) * kSubTile;
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup * kSize; ++j) {
    stage[j * 32 + lane] =
        values->v[j / kSize / kChunksOfGroup][j / kSize % kChunksOfGroup]
            .x[j % kSize];
  }
  __syncwarp();
  int before = begin;  // edits ahead of this lane's sub-tile
  for (int from = begin; from < edits.end; from += 32) {
    const int i = from + lane;
    LogitEdit edit;
    int order = end_order;
    if (i < edits.end) {
      edit = edits.edits[i];
      order = DrawOrder(edit.id, vocab);
    }
    const int tile = order / kSubTile - at.first_tile;
    if (order < end_order && tile >= 0 && edit.id >= 0 && edit.id < vocab) {
      const int place = order % kSubTile;
      const int chunk = place / kChunk;
      const int e = place % kSize;
      const int owner = chunk % kGroups / L::kOwnGroups * L::kPlaces +
                        tile * L::kPiecesOfChunk + place % kChunk / kSize;
      const int j =
          (chunk % kGroups % L::kOwnGroups * kChunksOfGroup + chunk / kGroups) *
              kSize +
          e;
      stage[j * 32 + owner] =
          edits.Masked(edit.id)
              ? -INFINITY
              : ApplyEdit(plan, edit, cuda::ToFloat(logits[edit.id]));
    }
#pragma unroll
    for (int t = 1; t < L::kTilesOfWarp; ++t) {
      const unsigned earlier =
          __ballot_sync(~0u, order < (at.first_tile + t) * kSubTile);
      if (at.tile - at.first_tile == t) before += __popc(earlier);
    }
    if (__any_sync(~0u, order >= end_order)) break;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup * kSize; ++j) {
    values->v[j / kSize / kChunksOfGroup][j / kSize % kChunksOfGroup]
        .x[j % kSize] = stage[j * 32 + lane];
  }
  if (at.leads()) {
    call.scratch.first_edit[row * at.num_tiles + at.tile] = before;
  }
}

// kRich: for calls that may have edits or masks, or that ask for logprobs of
// the logits as they are.
template <class T, int kSplit, bool kRich, bool kFast>
__global__ void __launch_bounds__(32 * kWarps)
    SummarizeKernel(const __grid_constant__ SamplerCall call,
                    int blocks_per_row) {
  using L = Layout<T, kSplit>;
  cuda::WaitForPreviousKernels();
  const int64_t row = blockIdx.x / blocks_per_row;
  const int warp_of_block = static_cast<int>(threadIdx.x / 32);
  const int warp =
      static_cast<int>(blockIdx.x % blocks_per_row) * kWarps + warp_of_block;
  const L at(warp, call.num_tiles);
  if (at.first_tile >= call.num_tiles) return;
  const T* logits = call.p.logits.As<const T>() + row * call.p.logits.stride[0];
  Values<Piece<T>, L> values;
  Load(call, logits, at, &values);
  const RowPlan plan = MakeRowPlan(call.p.params[row], call.p.vocab());
  const bool with_sum = !plan.greedy || call.p.logprobs.present() ||
                        (call.p.top_logprobs.present() &&
                         call.p.top_logprobs_kind == LogprobKind::kUnfiltered);
  const int64_t index = row * call.num_tiles + at.tile;
  const auto finish = [&](const auto& x) {
    SubTile summary = {MaxOfTile(x), 0.0f};
    if (with_sum) {
      summary.sum = WeightOfTile<kFast>(x, summary.max, plan.scale);
    }
    if (at.leads()) call.scratch.tiles[index] = summary;
    if (plan.top_n_sigma > 0.0f) {
      const Moments moments = MomentsOfTile(x);
      if (at.leads()) call.scratch.moments[index] = moments;
    }
  };
  if constexpr (kRich) {
    __shared__ float stage[kWarps]
                          [32 * L::kOwnGroups * kChunksOfGroup * L::kSize];
    if (call.scratch.raw_tiles != nullptr) {
      SubTile raw = {MaxOfTile(values), 0.0f};
      raw.sum = WeightOfTile<kFast>(values, raw.max, kRawScale);
      if (at.leads()) call.scratch.raw_tiles[index] = raw;
    }
    Values<Floats<L::kSize>, L> x;
#pragma unroll
    for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
#pragma unroll
      for (int e = 0; e < L::kSize; ++e) {
        x.v[j / kChunksOfGroup][j % kChunksOfGroup].x[e] =
            At(values.v[j / kChunksOfGroup][j % kChunksOfGroup], e);
      }
    }
    ApplyEdits(call, row, logits, plan, at, stage[warp_of_block], &x);
    finish(x);
  } else {
    finish(values);
  }
}

template <class T, int kSplit, bool kRich, bool kFast>
Status Launch(const SamplerCall& call, Stream stream) {
  const int warps =
      cuda::CeilDiv(call.num_tiles, Layout<T, kSplit>::kTilesOfWarp);
  const int blocks_per_row = cuda::CeilDiv(warps, kWarps);
  const int64_t rows = call.p.logits.shape[0];
  return cuda::LaunchDependent(
      "Sampler", stream, dim3(static_cast<unsigned>(rows * blocks_per_row)),
      dim3(32 * kWarps), 0, SummarizeKernel<T, kSplit, kRich, kFast>, call,
      blocks_per_row);
}

template <class T, bool kFast>
Status LaunchSplit(const SamplerCall& call, Stream stream) {
  if (call.p.edits != nullptr || call.p.bitmask.present() ||
      call.scratch.raw_tiles != nullptr) {
    return Launch<T, 4, true, kFast>(call, stream);
  }
  // Few rows are over sooner on more threads, many on fewer instructions.
  constexpr int64_t kMany = 4 << 20;
  return call.p.logits.shape[0] * call.p.vocab() < kMany
             ? Launch<T, 4, false, kFast>(call, stream)
             : Launch<T, 2, false, kFast>(call, stream);
}

}  // namespace

Status LaunchSummarize(const SamplerCall& call, Stream stream) {
  return cuda::WithFloatType(call.p.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    return call.p.fast ? LaunchSplit<T, true>(call, stream)
                       : LaunchSplit<T, false>(call, stream);
  });
}

}  // namespace tenon
