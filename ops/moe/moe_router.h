#ifndef TENON_OPS_MOE_MOE_ROUTER_H_
#define TENON_OPS_MOE_MOE_ROUTER_H_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

enum class MoeScoring : int32_t { kSoftmax = 0, kSigmoid = 1 };

// How a group of experts is scored when num_expert_groups > 1.
enum class MoeGroupScore : int32_t {
  kMax = 0,      // its best expert
  kTop2Sum = 1,  // the sum of its best two (DeepSeek-V3, GLM-4)
};

// Chooses top_k experts per token.
//   score  = softmax(logits) over all experts, or sigmoid(logits)
//   choice = score + correction_bias
//   groups: score each by MoeGroupScore over choice, keep the best
//           num_selected_groups, drop the experts of the others
//   chosen = the top_k of choice, best first, ties to the lowest expert id
//   weight = score (without the bias) of the chosen
//            / their sum (at least 1e-20), if renormalize
//            * routed_scaling_factor, if that is not 1
//   then num_fused_shared_experts ids num_experts, num_experts + 1, ... follow,
//   each with weight 1
// A token whose entry in `padding` is negative chooses none: all its ids are
// -1, all its weights 0.
//
// Shapes: logits [tokens, num_experts] float32, float16 or bfloat16, rows may
// be strided; correction_bias [num_experts] float32, optional; padding [tokens]
// int32, optional (positions serve, where padding has negative ones);
// topk_weights
// float32 and topk_ids int32, both [tokens, top_k + num_fused_shared_experts],
// rows may be strided. num_experts is 1 to 1024, top_k 1 to 32 and at most the
// number of experts in the selected groups. MoeGroupScore::kTop2Sum needs
// groups of two or more.
//
// Numerics: float32 throughout. The order of the softmax sum depends on
// num_experts alone. Sorting is exact; without a bias it is by the logits, so
// that scores which round to the same number keep their order. A NaN logit
// scores 0 and counts as lower than any number, so ids are always valid and
// distinct; weights are finite for all logits, infinite ones included.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero tokens is OK.
struct MoeRouterParams {
  TensorView logits;
  TensorView correction_bias;  // optional
  TensorView padding;          // optional
  TensorView topk_weights;     // out
  TensorView topk_ids;         // out
  int32_t top_k = 0;
  MoeScoring scoring = MoeScoring::kSoftmax;
  bool renormalize = false;
  float routed_scaling_factor = 1.0f;
  int32_t num_expert_groups = 1;  // divides num_experts
  int32_t num_selected_groups = 1;
  MoeGroupScore group_score = MoeGroupScore::kTop2Sum;
  int32_t num_fused_shared_experts = 0;
};

// All that MoeRouter checks.
Status ValidateMoeRouter(const MoeRouterParams& params);

Status MoeRouter(const MoeRouterParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_ROUTER_H_
