#ifndef TENON_OPS_MOE_MOE_KERNEL_CONFIG_H_
#define TENON_OPS_MOE_MOE_KERNEL_CONFIG_H_

#include <cstdint>
#include <limits>

#include "ops/core/dtype.h"

// The sizes of the expert kernels on CUDA, and tables of them. Sizes have no
// effect on any bit of a result, so no table has. Which kernels are used, wgmma
// on Hopper or the portable mma.sync, is not in a table: their bits differ, and
// the GPU, the dtype and the alignment of the tensors decide.

namespace tenon {

// A token_tile: pairs of thread blocks have the same weights, which they load
// together, and up to this many tokens each (fp8: 128).
inline constexpr int32_t kMoePairTokenTile = 144;

// One projection by wgmma. A tile is up to token_tile tokens of one expert
// times the rows of row_warpgroups warpgroups, each with 64 rows of gate and
// the same of up, or 128 rows of down.
struct MoeWgmmaTile {
  int32_t token_tile = 128;
  int32_t row_warpgroups = 2;
  int32_t blocks_per_sm = 1;  // persistent ones, resident at the same time

  friend constexpr bool operator==(const MoeWgmmaTile& a,
                                   const MoeWgmmaTile& b) {
    return a.token_tile == b.token_tile &&
           a.row_warpgroups == b.row_warpgroups &&
           a.blocks_per_sm == b.blocks_per_sm;
  }
};

struct MoeKernelConfig {
  MoeWgmmaTile gate_up;
  MoeWgmmaTile down;
  int32_t mma_tile_rows = 64;  // portable kernels: tokens of a tile

  friend constexpr bool operator==(const MoeKernelConfig& a,
                                   const MoeKernelConfig& b) {
    return a.gate_up == b.gate_up && a.down == b.down &&
           a.mma_tile_rows == b.mma_tile_rows;
  }
};

// The sizes that kernels are compiled for.
inline constexpr MoeWgmmaTile kMoeWgmmaTiles[] = {
    {8, 1, 1}, {32, 2, 1}, {128, 2, 1}, {kMoePairTokenTile, 2, 1}};
inline constexpr int32_t kMoeMmaTileRows[] = {16, 64, 128};

// The tallest ones exist for 16-bit weights alone.
constexpr bool HasMoeMmaTile(DType weights, int32_t rows) {
  const bool is_16_bit =
      weights == DType::kFloat16 || weights == DType::kBFloat16;
  return rows == 16 || rows == 64 || (rows == 128 && is_16_bit);
}

// Bytes of shared memory that a block of any wgmma kernel of this size needs at
// least: three stages of 128 bytes of depth, and room for results.
constexpr int64_t MoeWgmmaMinSharedBytes(const MoeWgmmaTile& tile) {
  constexpr int64_t kStages = 3;
  constexpr int64_t kDepthBytes = 128;
  const int64_t weight_rows = tile.row_warpgroups * 2 * 64;
  const int64_t out_tokens = tile.token_tile < 64 ? tile.token_tile : 64;
  return kStages * (weight_rows + tile.token_tile) * kDepthBytes +
         tile.row_warpgroups * out_tokens * kDepthBytes;
}

// For calls within all three bounds.
struct MoeKernelRow {
  static constexpr int64_t kAnySize = std::numeric_limits<int64_t>::max();
  static constexpr double kAnyLoad = std::numeric_limits<double>::infinity();

  int64_t max_hidden = kAnySize;
  int64_t max_intermediate = kAnySize;     // of this rank
  double max_slots_per_expert = kAnyLoad;  // tokens * top_k / num_experts
  MoeKernelConfig config;
};

struct MoeKernelRows {
  const MoeKernelRow* rows = nullptr;
  int32_t count = 0;
};

// Rows by the weights' dtype; the first that a call is within counts. They
// ascend by (max_hidden, max_intermediate), then by max_slots_per_expert, which
// is kAnyLoad in the last of each such group.
struct MoeKernelTable {
  MoeKernelRows float32;
  MoeKernelRows float16;  // float16 and bfloat16
  MoeKernelRows float8;

  constexpr const MoeKernelRows& For(DType weights) const {
    switch (weights) {
      case DType::kFloat32:
        return float32;
      case DType::kFloat8E4M3:
        return float8;
      default:
        return float16;
    }
  }
};

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_KERNEL_CONFIG_H_
