#include "ops/moe/moe_grouped_matmul.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_grouped_matmul_backend.h"
#include "ops/moe/moe_tile_rows.h"
#include "ops/quantize/fp8_scale.h"

namespace tenon {
namespace {

constexpr char kOp[] = "MoeGroupedMatmul";
constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxDim = int64_t{1} << 30;
constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();

}  // namespace

Status ValidateMoeGroupedMatmulShapes(const MoeGroupedMatmulParams& p) {
  const Device device = p.x.device;
  const DTypeSet int32 = DTypes({DType::kInt32});
  const ExpertMatrices& w = p.weights;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "cols of weights", w.cols, 1, kMaxDim));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "rows of weights", w.rows, 1, kMaxDim));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_experts of weights", w.num_experts, 1, kMaxExperts));
  TENON_RETURN_IF_ERROR(CheckExpertMatrices(kOp, "weights", w, w.num_experts,
                                            w.rows, w.cols, ExpertDType(w, p.x),
                                            device));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "expert_offsets", p.expert_offsets,
                                    {w.num_experts + 1}, int32, device));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "sorted_slots", p.sorted_slots,
                                    {kAnySize}, int32, device));
  const int64_t num_slots = p.sorted_slots.shape[0];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "slots (of sorted_slots)", num_slots, 0, kMaxSlots));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "slots_per_row", p.slots_per_row, 1, kMaxSlots));
  const int64_t x_rows = (num_slots + p.slots_per_row - 1) / p.slots_per_row;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {x_rows, w.cols}, kFloatDTypes, device));
  const DTypeSet same = DTypes({p.x.dtype});
  if (p.bias.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "bias", p.bias,
                                      {w.num_experts, w.rows}, same, device));
  }
  if (p.routing_weights.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "routing_weights", p.routing_weights,
                                      {num_slots}, DTypes({DType::kFloat32}),
                                      device));
  }
  return CheckOutput(kOp, "out", p.out, {num_slots, w.rows}, same, device);
}

namespace {

Status Validate(const MoeGroupedMatmulParams& p) {
  TENON_RETURN_IF_ERROR(ValidateMoeGroupedMatmulShapes(p));
  const TensorView weights = ViewOf(p.weights);
  const TensorView scales = ScalesViewOf(p.weights);
  TENON_RETURN_IF_ERROR(
      CheckSeparate(kOp, {"out", p.out},
                    {{"x", p.x},
                     {"weights", weights},
                     {"weights.scales", scales},
                     {"expert_offsets", p.expert_offsets},
                     {"sorted_slots", p.sorted_slots},
                     {"bias", p.bias},
                     {"routing_weights", p.routing_weights}}));
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        LayOutScratch(p).bytes, p.x.device,
                        {{"x", p.x},
                         {"weights", weights},
                         {"weights.scales", scales},
                         {"expert_offsets", p.expert_offsets},
                         {"sorted_slots", p.sorted_slots},
                         {"bias", p.bias},
                         {"routing_weights", p.routing_weights},
                         {"out", p.out}});
}

}  // namespace

MoeGroupedMatmulScratch LayOutScratch(const MoeGroupedMatmulParams& p) {
  const int64_t num_slots = p.sorted_slots.shape[0];
  const int64_t num_experts = p.weights.num_experts;
  WorkspaceCutter cutter(p.workspace);
  MoeGroupedMatmulScratch scratch;
  if (p.x.device.type == DeviceType::kCuda) {
    scratch.tiles = cutter.Take<int32_t>(
        3 * MoeMaxTiles(num_slots, static_cast<int32_t>(num_experts),
                        kMoeMinTileRows));
  } else {
    scratch.active_experts = cutter.Take<int32_t>(num_experts);
    scratch.expert_offsets = cutter.Take<int32_t>(num_experts + 1);
    scratch.gathered = cutter.Take<float>(num_slots * p.weights.cols);
  }
  if (IsFp8(p.weights)) {
    const int64_t x_rows = p.x.shape[0];
    const int64_t groups = NumFp8Groups(p.weights.cols);
    if (p.x.device.type == DeviceType::kCuda) {
      scratch.x_fp8 = cutter.TakeBytes(x_rows * p.weights.cols);
      scratch.x_scales = cutter.Take<float>(x_rows * groups);
    } else {
      scratch.gathered_scales = cutter.Take<float>(num_slots * groups);
    }
  }
  scratch.bytes = cutter.size();
  return scratch;
}

size_t MoeGroupedMatmulWorkspaceBytes(const MoeGroupedMatmulParams& params) {
  return ValidateMoeGroupedMatmulShapes(params).ok()
             ? LayOutScratch(params).bytes
             : 0;
}

Status MoeGroupedMatmul(const MoeGroupedMatmulParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.sorted_slots.shape[0] == 0) return Status();
  const MoeGroupedMatmulScratch scratch = LayOutScratch(params);
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return MoeGroupedMatmulCpu(params, scratch, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        return MoeGroupedMatmulCuda(params, scratch, stream);
      }
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
