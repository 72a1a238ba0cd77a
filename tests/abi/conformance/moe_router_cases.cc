#include <algorithm>
#include <cmath>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"
#include "tests/reference/moe_router_reference.h"

namespace tenon::conformance {
namespace {

struct MoeRouter {
  DType dtype = DType::kFloat32;
  int64_t num_experts = 8;
  std::vector<double> logits;
  std::vector<double> bias;  // empty: none
  bool sigmoid = false;
  bool renormalize = false;
  float scaling_factor = 0.0f;
  int32_t top_k = 2;
  int32_t num_groups = 0;
  int32_t num_selected_groups = 0;
  int32_t group_score = TENON_GROUP_SCORE_MAX;
  int32_t num_shared_experts = 0;
  Layout layout;

  std::string Text(const std::string& variant) const {
    const int64_t tokens = static_cast<int64_t>(logits.size()) / num_experts;
    const int64_t width = top_k + num_shared_experts;
    const HostTensor in(dtype, {tokens, num_experts}, logits, layout);
    std::vector<double> weights;
    std::vector<double> ids;
    for (int64_t t = 0; t < tokens; ++t) {
      const auto row = in.values().begin() + t * num_experts;
      const reference::MoeRouting routing =
          reference::MoeRoute({row, row + num_experts}, bias, Options());
      Require(routing.margin > 1e-3, "moe_router: a close choice");
      weights.insert(weights.end(), routing.weights.begin(),
                     routing.weights.end());
      ids.insert(ids.end(), routing.ids.begin(), routing.ids.end());
    }
    Case c("moe_router", variant);
    c.Arg("top_k", top_k);
    c.Arg("scoring", sigmoid ? TENON_SCORING_SIGMOID : TENON_SCORING_SOFTMAX);
    c.Arg("renormalize", renormalize ? 1 : 0);
    c.Arg("routed_scaling_factor", scaling_factor);
    c.Arg("num_expert_groups", num_groups);
    c.Arg("num_selected_groups", num_selected_groups);
    c.Arg("group_score", group_score);
    c.Arg("num_fused_shared_experts", num_shared_experts);
    c.In("logits", in);
    if (!bias.empty()) {
      c.In("correction_bias", HostTensor(DType::kFloat32, {num_experts}, bias));
    }
    c.Out("topk_weights",
          HostTensor(DType::kFloat32, {tokens, width}, {}, layout), weights,
          16);
    c.Out("topk_ids", HostTensor(DType::kInt32, {tokens, width}, {}, layout),
          ids, 0);
    return c.Text();
  }

 private:
  reference::MoeRouterOptions Options() const {
    reference::MoeRouterOptions options;
    options.top_k = top_k;
    options.sigmoid = sigmoid;
    options.renormalize = renormalize;
    options.scaling_factor = scaling_factor == 0.0f ? 1.0 : scaling_factor;
    options.num_groups = std::max(num_groups, 1);
    options.num_selected_groups = std::max(num_selected_groups, 1);
    options.group_top2_sum = group_score == TENON_GROUP_SCORE_TOP2_SUM;
    options.num_shared_experts = num_shared_experts;
    return options;
  }
};

std::string MoeRouterOfTooManyChoices() {
  Case c("moe_router", "rejects_top_k");
  c.Arg("top_k", 5);
  c.In("logits", HostTensor(DType::kFloat32, {1, 4}, Eighths(4, 1)));
  c.In("topk_weights", HostTensor(DType::kFloat32, {1, 5}));
  c.In("topk_ids", HostTensor(DType::kInt32, {1, 5}));
  c.Reject(TENON_INVALID_ARGUMENT, "top_k");
  return c.Text();
}

}  // namespace

std::string MoeRouterCases() {
  MoeRouter ties;
  ties.logits = Eighths(2 * ties.num_experts, 81);
  // Ties within the choice and at its edge, and a NaN.
  ties.logits.insert(ties.logits.end(), {0, 1, 1, 2, 1, 2, 0, 1});
  ties.logits.insert(ties.logits.end(), {0, NAN, 1, 2, 1, 0, 0, 1});
  ties.renormalize = true;
  ties.top_k = 3;
  MoeRouter grouped;
  grouped.dtype = DType::kBFloat16;
  grouped.logits = Eighths(3 * grouped.num_experts, 82);
  grouped.bias = {0.01, -0.2, 0.07, 0.31, 0.0, 0.13, -0.05, 0.22};
  for (double& b : grouped.bias) b = Round(DType::kFloat32, b);
  grouped.sigmoid = true;
  grouped.renormalize = true;
  grouped.scaling_factor = 2.5f;
  grouped.num_groups = 4;
  grouped.num_selected_groups = 2;
  grouped.group_score = TENON_GROUP_SCORE_TOP2_SUM;
  grouped.num_shared_experts = 1;
  grouped.layout = {3, 1};
  MoeRouter max_group;
  max_group.dtype = DType::kFloat16;
  max_group.num_experts = 6;
  max_group.logits = Eighths(2 * max_group.num_experts, 83);
  max_group.num_groups = 2;
  max_group.num_selected_groups = 1;
  max_group.scaling_factor = 1.5f;
  return ties.Text("float32_softmax_ties") +
         grouped.Text("bfloat16_sigmoid_bias_groups_strided") +
         max_group.Text("float16_softmax_group_max") +
         MoeRouterOfTooManyChoices();
}

}  // namespace tenon::conformance
