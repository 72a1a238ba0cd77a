#include "ops/core/hopper_cuda.cuh"
#include "ops/sampler/sampler_kernels_cuda.cuh"
#include "ops/sampler/sampler_tile_sums_cuda.cuh"

// Summaries of many rows on Hopper: blocks that stay, each with a ring of
// stages in shared memory that bulk copies fill. A stage has neighbouring
// sub-tiles, 1 KB of each of their 16 chunks. Copies keep memory busy without
// registers, and lines that sub-tiles of 16-bit logits share are read once.

namespace tenon {
namespace {

using cuda::kChunksOfGroup;
using cuda::Layout;
using cuda::Piece;
using cuda::SamplerCall;
using cuda::Values;

constexpr int kWarps = cuda::kSummarizeWarps;
constexpr int kStages = 3;
constexpr int kStripeBytes = 1024;  // of a chunk of all sub-tiles of a stage
constexpr int kStageBytes = kStripeBytes * kChunksOfSubTile;
constexpr int kBlocksPerSm = 4;
constexpr int kBarriersAt = kStages * kStageBytes;
constexpr int kSharedBytes = kBarriersAt + kStages * 8;

template <class T>
constexpr int kTilesOfStage = kStripeBytes / (kChunk * int{sizeof(T)});

#if TENON_SM90A

__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from,
                                         int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Sub-tiles of one row.
struct Item {
  int64_t row;
  int first_tile;
};

template <class T>
__device__ __forceinline__ Item ItemAt(int64_t index, int items_of_row) {
  return {index / items_of_row,
          static_cast<int>(index % items_of_row) * kTilesOfStage<T>};
}

// Fills a stage with what the vocabulary has of the item, whole pieces of 16
// bytes. The first warp calls this; a lane copies a chunk of all sub-tiles.
template <class T>
__device__ __forceinline__ void Fill(const SamplerCall& call, const Item& item,
                                     uint32_t stage, uint32_t barrier) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tiles = min(kTilesOfStage<T>, call.num_tiles - item.first_tile);
  const int first = (lane * call.num_tiles + item.first_tile) * kChunk;
  const int ids = lane < kChunksOfSubTile
                      ? max(min(tiles * kChunk, call.vocab - first), 0)
                      : 0;
  const int bytes = ids / Piece<T>::kSize * 16;
  const int total = __reduce_add_sync(~0u, bytes);
  if (lane == 0) cuda::ArriveExpectBytes(barrier, total);
  __syncwarp();
  if (bytes > 0) {
    CopyBulk(stage + lane * kStripeBytes,
             static_cast<const T*>(call.LogitsOf(item.row)) + first, bytes,
             barrier);
  }
}

// What the lane has of a stage.
template <class T, class L>
__device__ __forceinline__ void ReadStage(const SamplerCall& call,
                                          const Item& item, const L& at,
                                          const char* stage,
                                          Values<Piece<T>, L>* values) {
  const T* const row = static_cast<const T*>(call.LogitsOf(item.row));
  const char* const own =
      stage + (at.tile - item.first_tile) * kChunk * int{sizeof(T)} +
      at.piece * 16;
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
    const int g = j / kChunksOfGroup;
    const int i = j % kChunksOfGroup;
    uint4 words =
        *reinterpret_cast<const uint4*>(own + at.ChunkAt(g, i) * kStripeBytes);
    memcpy(&values->v[g][i], &words, sizeof(words));
  }
  if (at.LastIdOfWarp() < call.vocab &&
      at.first_tile + L::kTilesOfWarp <= call.num_tiles) {
    return;
  }
#pragma unroll
  for (int j = 0; j < L::kOwnGroups * kChunksOfGroup; ++j) {
    const int g = j / kChunksOfGroup;
    const int i = j % kChunksOfGroup;
    const int first = at.exists() ? at.FirstId(g, i) : call.vocab;
    if (first + L::kSize > call.vocab) {
      values->v[g][i] = cuda::LoadPieceSlowly(row, first, call.vocab);
    }
  }
}

#endif

template <class T, bool kFast>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm)
    StreamKernel(const __grid_constant__ SamplerCall call, int items_of_row) {
#if TENON_SM90A
  using L = Layout<T, 2>;
  static_assert(kWarps * L::kTilesOfWarp == kTilesOfStage<T>);
  extern __shared__ __align__(128) char shared_bytes[];
  const uint32_t shared = cuda::SharedAddress(shared_bytes);
  const uint32_t barriers = shared + kBarriersAt;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t num_items = int64_t{call.rows} * items_of_row;
  const auto fill = [&](int64_t index, int slot) {
    if (warp == 0 && index < num_items) {
      Fill<T>(call, ItemAt<T>(index, items_of_row), shared + slot * kStageBytes,
              barriers + slot * 8);
    }
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) cuda::InitBarrier(barriers + s * 8, 1);
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  cuda::WaitForPreviousKernels();
  for (int s = 0; s < kStages; ++s) {
    fill(blockIdx.x + int64_t{s} * gridDim.x, s);
  }
  int slot = 0;
  uint32_t parity = 0;
  for (int64_t index = blockIdx.x; index < num_items; index += gridDim.x) {
    const Item item = ItemAt<T>(index, items_of_row);
    const RowPlan plan = cuda::PlanOf(call, item.row);
    const L at(item.first_tile / L::kTilesOfWarp + warp, call.num_tiles);
    cuda::Wait(barriers + slot * 8, parity);
    Values<Piece<T>, L> values;
    ReadStage(call, item, at, shared_bytes + slot * kStageBytes, &values);
    __syncthreads();
    fill(index + int64_t{kStages} * gridDim.x, slot);
    if (at.first_tile < call.num_tiles) {
      cuda::Summarize<kFast>(call, item.row, plan, at, values);
    }
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
#endif
}

template <class T, bool kFast>
Status Launch(const SamplerCall& call, Stream stream) {
  constexpr int kProcessors = 132;  // any number does
  const int items_of_row = cuda::CeilDiv(call.num_tiles, kTilesOfStage<T>);
  const int64_t items = int64_t{call.rows} * items_of_row;
  const int64_t blocks = std::min<int64_t>(items, kProcessors * kBlocksPerSm);
  return cuda::LaunchDependent(
      "Sampler", stream, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps),
      kSharedBytes, StreamKernel<T, kFast>, call, items_of_row);
}

}  // namespace

Status LaunchSummarizeStream(const SamplerCall& call, Stream stream) {
  return cuda::WithFloatType(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    return call.fast ? Launch<T, true>(call, stream)
                     : Launch<T, false>(call, stream);
  });
}

}  // namespace tenon
