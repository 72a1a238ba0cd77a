#include "ops/moe/moe_router.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_router_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "MoeRouter";

Status ValidateGroups(const MoeRouterParams& p, int64_t num_experts) {
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_expert_groups",
                                   p.num_expert_groups, 1, num_experts));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_selected_groups",
                                   p.num_selected_groups, 1,
                                   p.num_expert_groups));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "group_score", static_cast<int>(p.group_score), 0, 1));
  if (num_experts % p.num_expert_groups != 0) {
    return InvalidArgumentError(
        kOp, ": num_expert_groups is ", p.num_expert_groups,
        ", expected a divisor of the ", num_experts, " experts");
  }
  const int64_t group_size = num_experts / p.num_expert_groups;
  if (p.num_expert_groups > 1 && p.group_score == MoeGroupScore::kTop2Sum &&
      group_size < 2) {
    return InvalidArgumentError(kOp, ": num_expert_groups is ",
                                p.num_expert_groups,
                                ", expected at least 2 experts per group for "
                                "a group_score of two");
  }
  return CheckRange(kOp, "top_k (of the experts in the selected groups)",
                    p.top_k, 1, group_size * p.num_selected_groups);
}

}  // namespace

Status ValidateMoeRouter(const MoeRouterParams& p) {
  const Device device = p.logits.device;
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "logits", p.logits, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t tokens = p.logits.shape[0];
  const int64_t num_experts = p.logits.shape[1];
  const DTypeSet float32 = DTypes({DType::kFloat32});
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_experts (columns of logits)",
                                   num_experts, 1, kMoeRouterMaxExperts));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "top_k", p.top_k, 1, kMoeRouterMaxTopK));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "scoring", static_cast<int>(p.scoring), 0, 1));
  TENON_RETURN_IF_ERROR(ValidateGroups(p, num_experts));
  TENON_RETURN_IF_ERROR(CheckFinite(
      kOp, "routed_scaling_factor", p.routed_scaling_factor,
      std::numeric_limits<float>::lowest(), std::numeric_limits<float>::max()));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_fused_shared_experts",
                                   p.num_fused_shared_experts, 0,
                                   kMoeRouterMaxExperts));
  if (p.correction_bias.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "correction_bias", p.correction_bias,
                                      {num_experts}, float32, device));
  }
  if (p.padding.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "padding", p.padding, {tokens},
                                      DTypes({DType::kInt32}), device));
  }
  const int64_t columns = int64_t{p.top_k} + p.num_fused_shared_experts;
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "topk_weights", p.topk_weights,
                                    {tokens, columns}, float32, device));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "topk_ids", p.topk_ids,
                                    {tokens, columns}, DTypes({DType::kInt32}),
                                    device));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"topk_weights", p.topk_weights},
                                      {{"logits", p.logits},
                                       {"correction_bias", p.correction_bias},
                                       {"padding", p.padding}}));
  return CheckSeparate(kOp, {"topk_ids", p.topk_ids},
                       {{"logits", p.logits},
                        {"correction_bias", p.correction_bias},
                        {"padding", p.padding},
                        {"topk_weights", p.topk_weights}});
}

Status MoeRouter(const MoeRouterParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateMoeRouter(params));
  if (params.logits.shape[0] == 0) return Status();
  switch (params.logits.device.type) {
    case DeviceType::kCpu:
      return MoeRouterCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return MoeRouterCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.logits.device);
}

}  // namespace tenon
