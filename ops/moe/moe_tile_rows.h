#ifndef TENON_OPS_MOE_MOE_TILE_ROWS_H_
#define TENON_OPS_MOE_MOE_TILE_ROWS_H_

#include <cstdint>

#include "ops/core/dtype.h"

namespace tenon {

// Of matrices that cannot be read 16 bytes at a time.
inline constexpr int32_t kMoeUnalignedTileRows = 64;

// Rows of a tile of the grouped matrix products on CUDA, chosen from the mean
// number of slots per expert. Tall tiles multiply faster, but compute rows that
// do not exist where an expert has few. Has no effect on any bit of a result.
//
// dtype: of the matrices. aligned: they can be read 16 bytes at a time.
constexpr int32_t MoeTileRows(DType dtype, bool aligned, int64_t num_slots,
                              int64_t num_experts) {
  if (!aligned) return kMoeUnalignedTileRows;
  if (num_slots <= 12 * num_experts) return 16;
  if (num_slots < 192 * num_experts || dtype == DType::kFloat32 ||
      dtype == DType::kFloat8E4M3) {
    return 64;
  }
  return 128;
}

// The fewest that MoeTileRows returns, so the most tiles.
inline constexpr int32_t kMoeMinTileRows = 16;

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_TILE_ROWS_H_
