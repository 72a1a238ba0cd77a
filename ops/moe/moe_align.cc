#include "ops/moe/moe_align.h"

#include <algorithm>
#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_align_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "MoeAlign";
constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();

// tokens * top_k, or -1 where that is not a number of slots.
int64_t NumSlots(const TensorView& topk_ids) {
  int64_t slots;
  if (topk_ids.rank != 2 || topk_ids.shape[0] < 0 || topk_ids.shape[1] < 0 ||
      __builtin_mul_overflow(topk_ids.shape[0], topk_ids.shape[1], &slots) ||
      slots > kMaxSlots) {
    return -1;
  }
  return slots;
}

Status ValidateTiles(const MoeAlignParams& p, int64_t num_slots) {
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "tile_rows", p.tile_rows, 1, kMaxSlots));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "tiles", p.tiles, {kAnySize, 3},
                                    DTypes({DType::kInt32}),
                                    p.topk_ids.device));
  return CheckRange(kOp, "number of tiles", p.tiles.shape[0],
                    MoeMaxTiles(num_slots, p.num_experts, p.tile_rows),
                    kMaxSlots);
}

Status ValidateMemory(const MoeAlignParams& p) {
  const NamedView ids = {"topk_ids", p.topk_ids};
  const NamedView offsets = {"expert_offsets", p.expert_offsets};
  const NamedView slots = {"sorted_slots", p.sorted_slots};
  const NamedView tiles = {"tiles", p.tiles};
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, offsets, {ids}));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, slots, {ids, offsets}));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, tiles, {ids, offsets, slots}));
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        MoeAlignWorkspaceBytes(p), p.topk_ids.device,
                        {ids, offsets, slots, tiles});
}

}  // namespace

Status ValidateMoeAlignShapes(const MoeAlignParams& p) {
  const Device device = p.topk_ids.device;
  const DTypeSet int32 = DTypes({DType::kInt32});
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "topk_ids", p.topk_ids,
                                    {kAnySize, kAnySize}, int32, device));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_experts", p.num_experts, 1, kMaxExperts));
  const int64_t num_slots = NumSlots(p.topk_ids);
  if (num_slots < 0) {
    return InvalidArgumentError(kOp, ": topk_ids has ", p.topk_ids.shape[0],
                                " x ", p.topk_ids.shape[1],
                                " slots, expected less than 2^31");
  }
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "expert_offsets", p.expert_offsets,
                                    {int64_t{p.num_experts} + 1}, int32,
                                    device));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "sorted_slots", p.sorted_slots,
                                    {num_slots}, int32, device));
  return p.tiles.present() ? ValidateTiles(p, num_slots) : Status();
}

int64_t MoeMaxTiles(int64_t num_slots, int32_t num_experts, int32_t tile_rows) {
  const int64_t padding = int64_t{num_experts} * (tile_rows - 1);
  return std::min(num_slots, (num_slots + padding + tile_rows - 1) / tile_rows);
}

size_t MoeAlignWorkspaceBytes(const MoeAlignParams& params) {
  const int64_t num_slots = NumSlots(params.topk_ids);
  if (num_slots < 0 || params.num_experts < 1 ||
      params.num_experts > kMaxExperts) {
    return 0;
  }
  return MoeAlignWorkspaceBytes(num_slots, params.num_experts,
                                params.topk_ids.device.type);
}

size_t MoeAlignWorkspaceBytes(int64_t num_slots, int64_t num_experts,
                              DeviceType device) {
  if (device == DeviceType::kCuda && num_slots <= kMoeAlignOneLaunchSlots) {
    return 0;
  }
  // Per expert and chunk its slots, and per expert its first tile.
  const int64_t ints =
      MoeAlignNumChunks(num_slots) * num_experts + num_experts + 1;
  return static_cast<size_t>(ints) * sizeof(int32_t);
}

Status MoeAlign(const MoeAlignParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateMoeAlignShapes(params));
  TENON_RETURN_IF_ERROR(ValidateMemory(params));
  switch (params.topk_ids.device.type) {
    case DeviceType::kCpu:
      return MoeAlignCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return MoeAlignCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.topk_ids.device);
}

}  // namespace tenon
