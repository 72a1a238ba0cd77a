#ifndef TENON_OPS_MOE_MOE_ALIGN_H_
#define TENON_OPS_MOE_MOE_ALIGN_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// Groups the (token, choice) pairs by expert, as a compact CSR: slot
// s = token * top_k + choice stands at sorted_slots[expert_offsets[e] ...
// expert_offsets[e + 1] - 1] of its expert e, in ascending order of s (stable).
// Ids below 0 or >= num_experts ("expert not on this rank") are skipped, so
// expert_offsets[num_experts] may be less than tokens * top_k; the entries of
// sorted_slots from there on are -1.
//
// With `tiles`, also writes a tile schedule for a grouped GEMM whose tiles have
// tile_rows rows: entry i is (expert, index of the tile within the expert,
// first position in sorted_slots); unused entries have expert -1. Every
// position is covered exactly once. MoeMaxTiles gives the needed length.
//
// Shapes: topk_ids [tokens, top_k] int32, rows may be strided; expert_offsets
// [num_experts + 1] int32; sorted_slots [tokens * top_k] int32; tiles
// [at least MoeMaxTiles, 3] int32, optional. tokens * top_k < 2^31,
// num_experts is 1 to 1024.
//
// Deterministic. Tensors do not overlap. Does not allocate or synchronise; can
// be captured in a CUDA graph. Needs `workspace` of
// MoeAlignWorkspaceBytes(params). Zero tokens is OK (offsets are zeros then).
struct MoeAlignParams {
  TensorView topk_ids;
  int32_t num_experts = 0;
  TensorView expert_offsets;  // out
  TensorView sorted_slots;    // out
  TensorView tiles;           // out, optional
  int32_t tile_rows = 0;      // with tiles: >= 1
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

// Most tiles that num_slots slots can need:
// min(num_slots, ceil((num_slots + num_experts * (tile_rows - 1)) /
// tile_rows)).
int64_t MoeMaxTiles(int64_t num_slots, int32_t num_experts, int32_t tile_rows);

// What MoeAlign checks of everything but where memory lies and overlaps.
Status ValidateMoeAlignShapes(const MoeAlignParams& params);

size_t MoeAlignWorkspaceBytes(const MoeAlignParams& params);
// The same of num_slots = tokens * top_k, in range.
size_t MoeAlignWorkspaceBytes(int64_t num_slots, int64_t num_experts,
                              DeviceType device);

Status MoeAlign(const MoeAlignParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_ALIGN_H_
