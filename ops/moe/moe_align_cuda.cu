#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_align_backend.h"

// A stable counting sort. A warp takes consecutive slots 32 at a time and ranks
// equal experts with match.any, so no atomics are needed and the order is that
// of the slots. Up to kMoeAlignOneLaunchSlots slots one block does all; beyond,
// three launches: count per chunk, scan over chunks, place.

namespace tenon {
namespace {

constexpr int kMaxThreads = 1024;  // a thread per expert, up to 1024 experts
constexpr int kMaxWarps = kMaxThreads / 32;

// Slots of a warp, 32 per round.
constexpr int kOneLaunchRounds = kMoeAlignOneLaunchSlots / kMaxThreads;
constexpr int kChunkRounds = kMoeAlignChunkSlots / kMaxThreads;

// Shared memory of a block; the counts of each of its warps follow, as
// [num_warps][num_experts]. All of it is dynamic, so that one limit applies.
struct Shared {
  uint64_t warp_sums[kMaxWarps];
  int position[kMaxThreads];            // of the first slot of an expert
  int expert_offsets[kMaxThreads + 1];  // for the tile schedule
  int tile_offsets[kMaxThreads + 1];

  __device__ uint16_t* counts() {
    return reinterpret_cast<uint16_t*>(this + 1);
  }
};
extern __shared__ Shared shared_memory[];

size_t SharedBytes(const MoeAlignParams& p, int threads) {
  return sizeof(Shared) + sizeof(uint16_t) * p.num_experts * (threads / 32);
}

// Sum of `value` over the threads before this one; `total` gets that over all
// threads. Contains one __syncthreads().
__device__ uint64_t ExclusiveBlockScan(uint64_t value, uint64_t* warp_sums,
                                       uint64_t* total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;
  const uint64_t inclusive = cuda::WarpInclusiveSum(value);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const uint64_t sums =
      cuda::WarpInclusiveSum(lane < num_warps ? warp_sums[lane] : 0);
  *total = __shfl_sync(~0u, sums, 31);
  const uint64_t before = __shfl_sync(~0u, sums, max(warp - 1, 0));
  return inclusive - value + (warp > 0 ? before : 0);
}

// Slots and tiles are scanned in one go: neither sum reaches 2^32.
__device__ uint64_t PackSlotsAndTiles(int slots, int tile_rows) {
  const uint64_t tiles = tile_rows > 0
                             ? (static_cast<uint32_t>(slots) + tile_rows - 1u) /
                                   static_cast<uint32_t>(tile_rows)
                             : 0u;
  return tiles << 32 | static_cast<uint32_t>(slots);
}
__device__ int UnpackSlots(uint64_t packed) { return static_cast<int>(packed); }
__device__ int UnpackTiles(uint64_t packed) {
  return static_cast<int>(packed >> 32);
}

// What one warp does with its slots first + [0, kRounds * 32), up to `end`.
template <int kRounds>
struct WarpSlots {
  int expert[kRounds];  // -1: none
  int rank[kRounds];    // among this warp's slots of the expert

  // `counts` [num_experts] of this warp, in shared memory, gets its number of
  // slots per expert.
  __device__ void Rank(const MoeAlignParams& p, uint32_t first, uint32_t end,
                       uint16_t* counts) {
    const int lane = threadIdx.x % 32;
    const uint32_t top_k = static_cast<uint32_t>(p.topk_ids.shape[1]);
    const uint32_t num_experts = static_cast<uint32_t>(p.num_experts);
    const int32_t* ids = p.topk_ids.As<const int32_t>();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const uint32_t slot = first + r * 32 + lane;
      expert[r] = -1;
      if (slot < end) {
        const uint32_t token = slot / top_k;
        const int32_t id =
            ids[token * p.topk_ids.stride[0] + (slot - token * top_k)];
        if (static_cast<uint32_t>(id) < num_experts) expert[r] = id;
      }
    }
    for (uint32_t e = lane; e < num_experts; e += 32) counts[e] = 0;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      if (first + r * 32 >= end) break;  // the same for the whole warp
      const unsigned same = __match_any_sync(~0u, expert[r]);
      const int rank_in_round = __popc(same & ((1u << lane) - 1));
      const bool valid = expert[r] >= 0;
      const int before = valid ? counts[expert[r]] : 0;
      rank[r] = before + rank_in_round;
      __syncwarp();
      if (valid && rank_in_round == 0) {
        counts[expert[r]] = static_cast<uint16_t>(before + __popc(same));
      }
      __syncwarp();
    }
  }

  // Writes the slots to their places. `position` is of the block's first slot
  // of each expert, `counts` of the slots in warps before this one.
  __device__ void Place(const MoeAlignParams& p, uint32_t first,
                        const int* position, const uint16_t* counts) const {
    const int lane = threadIdx.x % 32;
    int32_t* sorted = p.sorted_slots.As<int32_t>();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int e = expert[r];
      if (e < 0) continue;
      sorted[position[e] + counts[e] + rank[r]] =
          static_cast<int32_t>(first + r * 32 + lane);
    }
  }
};

// For the expert of this thread: turns the counts of the warps into sums over
// the warps before, and returns the block's count.
__device__ int ScanWarps(uint16_t* counts, int num_experts, int num_warps) {
  const int expert = threadIdx.x;
  if (expert >= num_experts) return 0;
  int sum = 0;
  for (int w = 0; w < num_warps; ++w) {
    uint16_t& entry = counts[w * num_experts + expert];
    const int count = entry;
    entry = static_cast<uint16_t>(sum);
    sum += count;
  }
  return sum;
}

// Tiles thread, thread + num_threads, ... of the schedule.
__device__ void WriteTiles(const MoeAlignParams& p, const Shared& shared,
                           int64_t thread, int64_t num_threads) {
  const int num_tiles = shared.tile_offsets[p.num_experts];
  for (int64_t i = thread; i < p.tiles.shape[0]; i += num_threads) {
    int32_t* tile = p.tiles.As<int32_t>() + i * p.tiles.stride[0];
    if (i >= num_tiles) {
      tile[0] = -1;
      tile[1] = 0;
      tile[2] = 0;
      continue;
    }
    int expert = 0;  // the last one whose first tile is not after i
    for (int end = p.num_experts; end - expert > 1;) {
      const int middle = (expert + end) / 2;
      if (shared.tile_offsets[middle] <= i) {
        expert = middle;
      } else {
        end = middle;
      }
    }
    const int index = static_cast<int>(i) - shared.tile_offsets[expert];
    tile[0] = expert;
    tile[1] = index;
    tile[2] = shared.expert_offsets[expert] + index * p.tile_rows;
  }
}

// Writes the offsets of this thread's expert, of which there are `slots` slots,
// and fills in `shared`; returns the number of slots that have an expert.
// Contains two __syncthreads().
__device__ int WriteOffsets(const MoeAlignParams& p, int slots,
                            Shared* shared) {
  const int tile_rows = p.tiles.present() ? p.tile_rows : 0;
  uint64_t total;
  const uint64_t before = ExclusiveBlockScan(
      PackSlotsAndTiles(slots, tile_rows), shared->warp_sums, &total);
  const int expert = threadIdx.x;
  int32_t* offsets = p.expert_offsets.As<int32_t>();
  if (expert < p.num_experts) {
    offsets[expert] = UnpackSlots(before);
    shared->expert_offsets[expert] = UnpackSlots(before);
    shared->tile_offsets[expert] = UnpackTiles(before);
  }
  if (threadIdx.x == 0) {
    offsets[p.num_experts] = UnpackSlots(total);
    shared->tile_offsets[p.num_experts] = UnpackTiles(total);
  }
  __syncthreads();
  return UnpackSlots(total);
}

__global__ void __launch_bounds__(kMaxThreads)
    AlignInOneLaunchKernel(MoeAlignParams p) {
  Shared& shared = shared_memory[0];
  const uint32_t num_slots = static_cast<uint32_t>(p.sorted_slots.shape[0]);
  const uint32_t num_warps = blockDim.x / 32;
  const uint32_t warp = threadIdx.x / 32;

  const uint32_t per_warp = cuda::CeilDiv(num_slots, 32 * num_warps) * 32;
  const uint32_t first = warp * per_warp;
  uint16_t* warp_counts = shared.counts() + warp * p.num_experts;
  WarpSlots<kOneLaunchRounds> slots;
  slots.Rank(p, first, min(first + per_warp, num_slots), warp_counts);
  __syncthreads();
  const int count = ScanWarps(shared.counts(), p.num_experts, num_warps);
  const uint32_t num_sorted = WriteOffsets(p, count, &shared);

  slots.Place(p, first, shared.expert_offsets, warp_counts);
  int32_t* sorted = p.sorted_slots.As<int32_t>();
  for (uint32_t i = num_sorted + threadIdx.x; i < num_slots; i += blockDim.x) {
    sorted[i] = -1;
  }
  if (p.tiles.present()) WriteTiles(p, shared, threadIdx.x, blockDim.x);
}

// The workspace of the three-launch path.
struct Table {
  int32_t* counts;        // [num_experts][num_chunks]
  int32_t* tile_offsets;  // [num_experts + 1]
  int64_t num_chunks;
};

// Ranks the slots of this block's chunk; returns the count of this thread's
// expert. Contains one __syncthreads().
__device__ int RankChunk(const MoeAlignParams& p,
                         WarpSlots<kChunkRounds>* slots, Shared* shared) {
  const uint32_t num_slots = static_cast<uint32_t>(p.sorted_slots.shape[0]);
  const uint32_t first = (blockIdx.x * kMaxWarps + threadIdx.x / 32) *
                         static_cast<uint32_t>(kChunkRounds * 32);
  slots->Rank(p, first, num_slots,
              shared->counts() + threadIdx.x / 32 * p.num_experts);
  __syncthreads();
  return ScanWarps(shared->counts(), p.num_experts, kMaxWarps);
}

__global__ void __launch_bounds__(kMaxThreads)
    CountChunkKernel(MoeAlignParams p, Table table) {
  WarpSlots<kChunkRounds> slots;
  const int count = RankChunk(p, &slots, &shared_memory[0]);
  if (threadIdx.x < p.num_experts) {
    table.counts[threadIdx.x * table.num_chunks + blockIdx.x] = count;
  }
}

// One block. Turns each expert's counts into sums over the chunks before, a
// warp per expert, and writes all offsets.
__global__ void __launch_bounds__(kMaxThreads)
    ScanChunksKernel(MoeAlignParams p, Table table) {
  Shared& shared = shared_memory[0];
  const int lane = threadIdx.x % 32;
  for (int e = threadIdx.x / 32; e < p.num_experts; e += kMaxWarps) {
    int32_t* counts = table.counts + e * table.num_chunks;
    int sum = 0;
    for (int64_t c = 0; c < table.num_chunks; c += 32) {
      const bool valid = c + lane < table.num_chunks;
      const int count = valid ? counts[c + lane] : 0;
      int inclusive = count;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int lower = __shfl_up_sync(~0u, inclusive, distance);
        if (lane >= distance) inclusive += lower;
      }
      if (valid) counts[c + lane] = sum + inclusive - count;
      sum += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) shared.position[e] = sum;
  }
  __syncthreads();
  WriteOffsets(p,
               threadIdx.x < p.num_experts ? shared.position[threadIdx.x] : 0,
               &shared);
  for (int e = threadIdx.x; e <= p.num_experts; e += kMaxThreads) {
    table.tile_offsets[e] = shared.tile_offsets[e];
  }
}

__global__ void __launch_bounds__(kMaxThreads)
    PlaceChunkKernel(MoeAlignParams p, Table table) {
  Shared& shared = shared_memory[0];
  const int32_t* offsets = p.expert_offsets.As<const int32_t>();
  for (int e = threadIdx.x; e <= p.num_experts; e += kMaxThreads) {
    shared.expert_offsets[e] = offsets[e];
    shared.tile_offsets[e] = table.tile_offsets[e];
    if (e == p.num_experts) break;
    shared.position[e] =
        offsets[e] + table.counts[e * table.num_chunks + blockIdx.x];
  }
  WarpSlots<kChunkRounds> slots;
  RankChunk(p, &slots, &shared);
  __syncthreads();
  const uint32_t warp = threadIdx.x / 32;
  slots.Place(p,
              (blockIdx.x * kMaxWarps + warp) *
                  static_cast<uint32_t>(kChunkRounds * 32),
              shared.position, shared.counts() + warp * p.num_experts);

  const int64_t thread = blockIdx.x * int64_t{kMaxThreads} + threadIdx.x;
  const int64_t num_threads = gridDim.x * int64_t{kMaxThreads};
  int32_t* sorted = p.sorted_slots.As<int32_t>();
  for (int64_t i = shared.expert_offsets[p.num_experts] + thread;
       i < p.sorted_slots.shape[0]; i += num_threads) {
    sorted[i] = -1;
  }
  if (p.tiles.present()) WriteTiles(p, shared, thread, num_threads);
}

Status LaunchThree(const MoeAlignParams& p, Stream stream) {
  Table table;
  table.num_chunks = MoeAlignNumChunks(p.sorted_slots.shape[0]);
  table.counts = static_cast<int32_t*>(p.workspace);
  table.tile_offsets = table.counts + table.num_chunks * p.num_experts;
  const dim3 grid(static_cast<unsigned>(table.num_chunks));
  const size_t shared = SharedBytes(p, kMaxThreads);
  TENON_RETURN_IF_ERROR(cuda::Launch("MoeAlign", stream, grid, kMaxThreads,
                                     shared, CountChunkKernel, p, table));
  TENON_RETURN_IF_ERROR(cuda::Launch("MoeAlign", stream, 1, kMaxThreads,
                                     sizeof(Shared), ScanChunksKernel, p,
                                     table));
  return cuda::Launch("MoeAlign", stream, grid, kMaxThreads, shared,
                      PlaceChunkKernel, p, table);
}

}  // namespace

Status MoeAlignCuda(const MoeAlignParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.topk_ids.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const int64_t num_slots = p.sorted_slots.shape[0];
  if (num_slots > kMoeAlignOneLaunchSlots) return LaunchThree(p, stream);
  // A thread per expert and, up to the limit, per slot: few at decode, where
  // the time of a launch grows with its warps.
  const int64_t wanted = std::max<int64_t>(p.num_experts, num_slots);
  const int threads = static_cast<int>(
      std::min<int64_t>(cuda::CeilDiv(wanted, int64_t{32}) * 32, kMaxThreads));
  return cuda::Launch("MoeAlign", stream, 1, threads, SharedBytes(p, threads),
                      AlignInOneLaunchKernel, p);
}

}  // namespace tenon
