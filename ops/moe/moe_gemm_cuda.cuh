#ifndef TENON_OPS_MOE_MOE_GEMM_CUDA_CUH_
#define TENON_OPS_MOE_MOE_GEMM_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/expert_matrices.h"

// What the CUDA kernels of grouped matmul and of the fused layer share: how a
// thread block finds its expert and rows. Private to ops/moe.

namespace tenon {

// Where tiles of rows come from: a schedule in device memory, as MoeAlign
// writes it, or, for up to kMoeMaxDirectSlots slots, the ids themselves, which
// saves the launch that makes a schedule. Either way a tile has the slots of
// one expert in ascending order.
struct MoeTileSource {
  const int32_t* tiles = nullptr;  // [num_tiles, 3]; null: from the ids
  const int32_t* expert_offsets = nullptr;
  const int32_t* sorted_slots = nullptr;  // [num_slots]
  int32_t num_slots = 0;

  const int32_t* ids = nullptr;  // [num_slots / top_k, top_k]
  int64_t ids_stride = 0;
  int32_t top_k = 0;
  int32_t num_experts = 0;

  int64_t num_tiles = 0;  // that blocks are launched for
};

inline constexpr int kMoeMaxDirectSlots = 128;

// One tile, in shared memory.
template <int kRows>
struct MoeTile {
  int expert;        // -1: nothing to do
  int slots[kRows];  // -1: no row
};

// Warp 0 finds tile i among the ids: the slots of i's expert from slot i on,
// provided that a multiple of kRows of them come before i. Otherwise they are
// part of another tile.
template <int kRows>
__device__ inline void FindDirectTile(const MoeTileSource& source, int i,
                                      MoeTile<kRows>* tile) {
  constexpr int kRounds = kMoeMaxDirectSlots / 32;
  const int lane = threadIdx.x;
  int ids[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int slot = r * 32 + lane;
    ids[r] = -1;
    if (slot < source.num_slots) {
      const int token = slot / source.top_k;
      ids[r] =
          source.ids[token * source.ids_stride + (slot - token * source.top_k)];
    }
  }
  int expert = -1;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int id = __shfl_sync(~0u, ids[r], i % 32);
    if (i / 32 == r) expert = id;
  }
  // Ids of no expert, such as those past num_slots, start no tile.
  if (static_cast<unsigned>(expert) >=
      static_cast<unsigned>(source.num_experts)) {
    expert = -1;
  }
  for (int r = lane; r < kRows; r += 32) tile->slots[r] = -1;
  __syncwarp();
  unsigned same[kRounds];
  int before = 0;  // slots of the expert before i
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    same[r] = __ballot_sync(~0u, ids[r] == expert);
    const int earlier = i - r * 32;
    const unsigned mask = earlier >= 32  ? ~0u
                          : earlier <= 0 ? 0u
                                         : (1u << earlier) - 1;
    before += __popc(same[r] & mask);
  }
  if (before % kRows != 0) expert = -1;
  int position = -before;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = position + __popc(same[r] & ((1u << lane) - 1));
    if (expert >= 0 && (same[r] >> lane & 1u) != 0 && row >= 0 && row < kRows) {
      tile->slots[row] = r * 32 + lane;
    }
    position += __popc(same[r]);
  }
  if (lane == 0) tile->expert = expert;
}

// Fills in `tile` for all threads of the block.
template <int kRows>
__device__ inline void FindTile(const MoeTileSource& source, int64_t i,
                                MoeTile<kRows>* tile) {
  if (source.tiles == nullptr) {
    if (threadIdx.x < 32) FindDirectTile(source, static_cast<int>(i), tile);
  } else {
    const int expert = source.tiles[3 * i];
    if (expert >= 0) {
      // A caller's offsets and slots may be anything.
      const int64_t first = source.tiles[3 * i + 2];
      const int end = min(source.expert_offsets[expert + 1], source.num_slots);
      for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
        const bool is_row = first >= 0 && first + r < end;
        const int slot = is_row ? source.sorted_slots[first + r] : -1;
        tile->slots[r] = slot < source.num_slots ? slot : -1;
      }
    }
    if (threadIdx.x == 0) tile->expert = expert;
  }
  __syncthreads();
}

// Weight of a slot in [num_slots / per_row, per_row]; 1 where there are none.
struct MoeRoutingWeights {
  const float* data = nullptr;
  int64_t stride = 0;
  int32_t per_row = 1;

  __device__ float operator[](int slot) const {
    const int row = slot / per_row;
    return data[row * stride + (slot - row * per_row)];
  }
};

// out[slot] = (x[slot / slots_per_row] * weights[expert]^T + bias[expert])
//             * routing[slot], for the slots of all tiles.
struct MoeGroupedGemm {
  MoeTileSource source;
  TensorView x;
  const float* x_scales = nullptr;  // of fp8: [rows, groups of 128 columns]
  int32_t slots_per_row = 1;
  ExpertMatrices weights;
  TensorView bias;  // optional
  MoeRoutingWeights routing;
  TensorView out;
  // The kernel before this one in the stream writes x and nothing else that is
  // read here, and lets this one start early; see LaunchDependent.
  bool dependent = false;
};

// hidden[slot] = silu(x[slot / top_k] * gate^T) * (x[slot / top_k] * up^T) for
// the slots of all tiles, all of it fp8. Rows of x and hidden are contiguous,
// with a scale for every 128 columns. A dependent launch.
struct MoeFp8GateUp {
  MoeTileSource source;
  const void* x = nullptr;
  const float* x_scales = nullptr;
  int32_t top_k = 1;
  ExpertMatrices gate;
  ExpertMatrices up;
  void* hidden = nullptr;
  float* hidden_scales = nullptr;
};

// Of fp8 matrices; tile_rows 16 or 64.
Status LaunchMoeFp8GateUp(const char* op, const MoeFp8GateUp& gate_up,
                          int32_t tile_rows, bool aligned, Stream stream);
Status LaunchMoeFp8GroupedGemm(const char* op, const MoeGroupedGemm& gemm,
                               int32_t tile_rows, bool aligned, Stream stream);

// Of all matrices. tile_rows and aligned: see MoeTileRows.
Status LaunchMoeGroupedGemm(const char* op, const MoeGroupedGemm& gemm,
                            int32_t tile_rows, bool aligned, Stream stream);

// Whether all rows of the matrices, and all experts, are aligned to 16 bytes.
bool MoeMatricesAreAligned(const ExpertMatrices& matrices);

// Number of blocks for `num_tiles` tiles by the column tiles of `cols`.
// InvalidArgument where that is more than a launch can have.
Status MoeGrid(const char* op, int64_t num_tiles, int64_t cols, int tile_cols,
               dim3* grid);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_GEMM_CUDA_CUH_
