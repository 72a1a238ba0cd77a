#include "ops/sampler/sampler_kernels_cuda.cuh"
#include "ops/sampler/sampler_tile_sums_cuda.cuh"

// The kernel that reads all logits once. A lane loads the same 16 bytes of
// several chunks of one sub-tile, and all lanes of a warp together neighbouring
// bytes, so that there are many loads in flight and hardly any shuffles. Only
// then it takes the maximum, and only then the weights.

namespace tenon {
namespace {

using cuda::Floats;
using cuda::kChunksOfGroup;
using cuda::kGroups;
using cuda::Layout;
using cuda::Piece;
using cuda::RowEdits;
using cuda::SamplerCall;
using cuda::Values;

constexpr int kWarps = cuda::kSummarizeWarps;

// x / d is x * ceil(2^40 / d) >> 40 for x < 2^31 and d <= 2^9, the blocks of a
// row: a block begins to load that much sooner.
constexpr int kInverseBits = 40;
static_assert(kMaxVocab / kSubTile <= kWarps * 2 << 9, "sub-tiles of a block");

// The eight-byte words of SamplingParams that matter here, without edits.
constexpr uint32_t kSummaryWords = 0x827;

template <class T, class L>
__device__ __forceinline__ void Load(const SamplerCall& call, const T* row,
                                     const L& at, Values<Piece<T>, L>* values) {
  constexpr int kPieces = L::kOwnGroups * kChunksOfGroup;
  // Mostly nothing is missing.
  if (call.aligned && at.first_tile + L::kTilesOfWarp <= call.num_tiles &&
      at.LastIdOfWarp() < call.vocab) {
    const T* const from = row + at.FirstId(0, 0);
    const int stride = call.num_tiles * kChunk;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int chunk = j / kChunksOfGroup + j % kChunksOfGroup * kGroups;
      values->v[j / kChunksOfGroup][j % kChunksOfGroup] =
          cuda::StreamPiece(from + chunk * stride);
    }
    return;
  }
  const auto first_id = [&](int j) {
    return at.exists() ? at.FirstId(j / kChunksOfGroup, j % kChunksOfGroup)
                       : call.vocab;
  };
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    values->v[j / kChunksOfGroup][j % kChunksOfGroup] =
        cuda::LoadPiece<true>(row, first_id(j), call.vocab, call.aligned);
  }
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (cuda::IsSlow<T>(first_id(j), call.vocab, call.aligned)) {
      values->v[j / kChunksOfGroup][j % kChunksOfGroup] =
          cuda::LoadPieceSlowly(row, first_id(j), call.vocab);
    }
  }
}

// A warp's logits as they are, at value * 32 + lane, then those that edits
// change, which a bit of the lane tells.
template <class L>
struct WarpStage {
  static constexpr int kValues = L::kOwnGroups * kChunksOfGroup * L::kSize;
  static_assert(kValues <= 32, "a bit for each");
  float x[kValues * 32];
  uint32_t changed[32];
};

// What the row's mask has of each of the lane's pieces, as it is: loaded ahead
// with the logits.
template <class L>
struct LaneMask {
  static constexpr int kPieces = L::kOwnGroups * kChunksOfGroup;
  unsigned bytes[kPieces];

  __device__ __forceinline__ LaneMask(const SamplerCall& call, int64_t row,
                                      const L& at) {
    const uint8_t* const mask = call.bitmask + row * call.bitmask_stride;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int first = FirstId(at, j);
      bytes[j] = ~0u;
      if (call.bitmask != nullptr && first < call.vocab && at.exists()) {
        bytes[j] = mask[first / 8];
      }
    }
  }
  // A bit for each of the lane's logits.
  __device__ __forceinline__ uint32_t Bits(const L& at) const {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const uint32_t of_piece = bytes[j] >> (FirstId(at, j) % 8);
      bits |= (of_piece & ((1u << L::kSize) - 1)) << (j * L::kSize);
    }
    return bits;
  }

 private:
  static __device__ __forceinline__ int FirstId(const L& at, int j) {
    return at.FirstId(j / kChunksOfGroup, j % kChunksOfGroup);
  }
};

// 32 of the row's edits, a lane each: mostly all that a warp's sub-tiles have,
// as if edits were spread evenly.
struct EditsAhead {
  int first;
  LogitEdit own;
};
__device__ __forceinline__ LogitEdit EditAt(const RowEdits& edits, int i) {
  LogitEdit edit;
  if (i < edits.end) edit = edits.edits[i];
  return edit;
}
template <class L>
__device__ __forceinline__ EditsAhead LoadEdits(const RowEdits& edits,
                                                const L& at) {
  const float likely = static_cast<float>(edits.end) *
                       static_cast<float>(at.first_tile) /
                       static_cast<float>(at.num_tiles);
  const int first = max(min(static_cast<int>(likely) - 12, edits.end - 32), 0);
  return {first, EditAt(edits, first + static_cast<int>(threadIdx.x % 32))};
}

// Puts what the row's edits make of the stage's logits into it, masked or not.
// Returns how many edits are ahead of this lane's sub-tile.
template <class L>
__device__ __forceinline__ int EditStage(const SamplerCall& call,
                                         const RowPlan& plan,
                                         const RowEdits& edits,
                                         EditsAhead ahead, const L& at,
                                         WarpStage<L>* stage) {
  constexpr int kSize = L::kSize;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int end_order = (at.first_tile + L::kTilesOfWarp) * kSubTile;
  const auto order_of = [&](int i, const LogitEdit& edit) {
    return i < edits.end ? static_cast<int>(DrawOrder(edit.id, call.vocab))
                         : end_order;
  };
  int from = ahead.first;
  LogitEdit edit = ahead.own;
  int order = order_of(from + lane, edit);
  const unsigned earlier = __ballot_sync(~0u, order < at.first_tile * kSubTile);
  if (earlier == ~0u || (earlier == 0 && from > 0)) {
    from = cuda::FirstEditFrom(edits, at.first_tile * kSubTile, call.vocab);
    edit = EditAt(edits, from + lane);
    order = order_of(from + lane, edit);
  }
  int before = from;
  for (;;) {
    const int tile = (order >= 0 ? order / kSubTile : -1) - at.first_tile;
    if (order < end_order && tile >= 0 && edit.id >= 0 &&
        edit.id < call.vocab) {
      const int place = order % kSubTile;
      const int chunk = place / kChunk;
      const int owner = chunk % kGroups / L::kOwnGroups * L::kPlaces +
                        tile * L::kPiecesOfChunk + place % kChunk / kSize;
      const int j =
          (chunk % kGroups % L::kOwnGroups * kChunksOfGroup + chunk / kGroups) *
              kSize +
          place % kSize;
      float& x = stage->x[j * 32 + owner];
      x = ApplyEdit(plan, edit, x);
      atomicOr(&stage->changed[owner], 1u << j);
    }
#pragma unroll
    for (int t = 0; t < L::kTilesOfWarp; ++t) {
      const unsigned ahead_of_tile =
          __ballot_sync(~0u, order < (at.first_tile + t) * kSubTile);
      if (at.tile - at.first_tile == t) before += __popc(ahead_of_tile);
    }
    if (__any_sync(~0u, order >= end_order)) return before;
    from += 32;
    edit = EditAt(edits, from + lane);
    order = order_of(from + lane, edit);
  }
}

// Applies the row's mask and edits.
template <class L>
__device__ __forceinline__ void ApplyEdits(
    const SamplerCall& call, int64_t row, const RowPlan& plan,
    const RowEdits& edits, const EditsAhead& ahead, const LaneMask<L>& mask,
    const L& at, WarpStage<L>* stage, Values<Floats<L::kSize>, L>* values) {
  constexpr int kSize = L::kSize;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto x = [&](int j) -> float& {
    return values->v[j / kSize / kChunksOfGroup][j / kSize % kChunksOfGroup]
        .x[j % kSize];
  };
  uint32_t changed = 0;
  if (edits.end > 0) {
#pragma unroll
    for (int j = 0; j < WarpStage<L>::kValues; ++j) {
      stage->x[j * 32 + lane] = x(j);
    }
    stage->changed[lane] = 0;
    __syncwarp();
    const int before = EditStage(call, plan, edits, ahead, at, stage);
    if (at.leads()) {
      call.scratch.first_edit[row * at.num_tiles + at.tile] = before;
    }
    __syncwarp();
    changed = stage->changed[lane];
  }
  uint32_t allowed = edits.only_allowed ? changed : ~0u;
  if (edits.mask != nullptr) allowed &= mask.Bits(at);
#pragma unroll
  for (int j = 0; j < WarpStage<L>::kValues; ++j) {
    if ((changed >> j & 1) != 0) x(j) = stage->x[j * 32 + lane];
    if ((allowed >> j & 1) == 0) x(j) = -INFINITY;
  }
}

// Blocks of a multiprocessor: a compiler that may takes registers for all of a
// lane's logits as floats, and for the rare moments.
template <class T, int kSplit, bool kRich>
inline constexpr int kLeastBlocks = kRich            ? (sizeof(T) == 4 ? 9 : 7)
                                    : sizeof(T) == 4 ? (kSplit == 4 ? 12 : 8)
                                                     : 8;

// kRich: for calls that may have edits or masks, or that ask for logprobs of
// the logits as they are.
template <class T, int kSplit, bool kRich, bool kFast>
__global__ void __launch_bounds__(32 * kWarps, kLeastBlocks<T, kSplit, kRich>)
    SummarizeKernel(const __grid_constant__ SamplerCall call,
                    int blocks_per_row, uint64_t inverse) {
  using L = Layout<T, kSplit>;
  cuda::WaitForPreviousKernels();
  const int64_t row =
      static_cast<int64_t>(blockIdx.x * inverse >> kInverseBits);
  const int warp_of_block = static_cast<int>(threadIdx.x / 32);
  const int block_of_row =
      static_cast<int>(blockIdx.x) - static_cast<int>(row) * blocks_per_row;
  const int warp = block_of_row * kWarps + warp_of_block;
  const L at(warp, call.num_tiles);
  if (at.first_tile >= call.num_tiles) return;
  const T* logits = static_cast<const T*>(call.LogitsOf(row));
  Values<Piece<T>, L> values;
  Load(call, logits, at, &values);
  if constexpr (kRich) {
    __shared__ WarpStage<L> stage[kWarps];
    // While the logits are on their way.
    const LaneMask<L> mask(call, row, at);
    const SamplingParams params =
        cuda::ParamsOf<kSummaryWords | 0x300>(call, row);
    const RowEdits edits = cuda::EditsOf(call, row, params);
    const EditsAhead ahead = LoadEdits(edits, at);
    const RowPlan plan = cuda::PlanOf(call, params);
    if (call.scratch.raw_tiles != nullptr) {
      SubTile raw = {cuda::MaxOfTile(values), 0.0f};
      raw.sum = cuda::WeightOfTile<kFast>(values, raw.max, kRawScale);
      if (at.leads()) {
        call.scratch.raw_tiles[row * call.num_tiles + at.tile] = raw;
      }
    }
    Values<Floats<L::kSize>, L> x;
#pragma unroll
    for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
#pragma unroll
      for (int e = 0; e < L::kSize; ++e) {
        x.v[j / kChunksOfGroup][j % kChunksOfGroup].x[e] =
            cuda::At(values.v[j / kChunksOfGroup][j % kChunksOfGroup], e);
      }
    }
    ApplyEdits(call, row, plan, edits, ahead, mask, at, &stage[warp_of_block],
               &x);
    cuda::Summarize<kFast>(call, row, plan, at, x);
  } else {
    const RowPlan plan =
        cuda::PlanOf(call, cuda::ParamsOf<kSummaryWords>(call, row));
    if (plan.only_allowed) {  // and no edit allows any
      if (at.leads()) {
        call.scratch.tiles[row * call.num_tiles + at.tile] = {-INFINITY, 0.0f};
      }
      return;
    }
    cuda::Summarize<kFast>(call, row, plan, at, values);
  }
}

template <class T, int kSplit, bool kRich, bool kFast>
Status Launch(const SamplerCall& call, Stream stream) {
  const int warps =
      cuda::CeilDiv(call.num_tiles, Layout<T, kSplit>::kTilesOfWarp);
  const int blocks_per_row = cuda::CeilDiv(warps, kWarps);
  return cuda::LaunchDependent(
      "Sampler", stream,
      dim3(static_cast<unsigned>(int64_t{call.rows} * blocks_per_row)),
      dim3(32 * kWarps), 0, SummarizeKernel<T, kSplit, kRich, kFast>, call,
      blocks_per_row,
      cuda::CeilDiv(uint64_t{1} << kInverseBits,
                    static_cast<uint64_t>(blocks_per_row)));
}

template <class T, bool kFast>
Status LaunchSplit(const SamplerCall& call, Stream stream) {
  if (call.edits != nullptr || call.bitmask != nullptr ||
      call.scratch.raw_tiles != nullptr) {
    return Launch<T, 4, true, kFast>(call, stream);
  }
  // Few rows are over sooner on more threads, many on fewer instructions.
  constexpr int64_t kMany = 4 << 20;
  return int64_t{call.rows} * call.vocab < kMany
             ? Launch<T, 4, false, kFast>(call, stream)
             : Launch<T, 2, false, kFast>(call, stream);
}

}  // namespace

Status LaunchSummarize(const SamplerCall& call, Stream stream) {
  return cuda::WithFloatType(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    return call.fast ? LaunchSplit<T, true>(call, stream)
                     : LaunchSplit<T, false>(call, stream);
  });
}

}  // namespace tenon
