#include "tests/fuzz/op_build.h"

// The ops of the MoE layer: their fields, and how to make a valid call of each.

namespace tenon::fuzz {
namespace {

void BuildMoeRouter(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_router_args>();
  const int64_t tokens = NumTokens(in);
  const int64_t experts = 2 * in.Between(2, 20);
  const int64_t top_k = in.Between(1, 2);
  const int64_t shared = in.Between(0, 2);
  args.top_k = static_cast<int32_t>(top_k);
  args.num_fused_shared_experts = static_cast<int32_t>(shared);
  args.logits = c.Add(FloatType(in), {tokens, experts});
  if (in.OneIn(2)) args.correction_bias = c.Add(kFloat32, {experts});
  args.topk_weights = c.Add(kFloat32, {tokens, top_k + shared});
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k + shared}, 0, 0);
  args.scoring = static_cast<int32_t>(in.Below(2));
  args.renormalize = static_cast<int32_t>(in.Below(2));
  args.routed_scaling_factor = in.Pick<float>({0.0f, 1.0f, 2.5f});
  if (in.OneIn(2)) {
    args.num_expert_groups = 2;
    args.num_selected_groups = static_cast<int32_t>(in.Between(1, 2));
  }
  args.group_score = static_cast<int32_t>(in.Below(2));
  c.SetArgs(args);
}

void BuildMoeAlign(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_align_args>();
  const int64_t tokens = NumTokens(in);
  const int64_t top_k = in.Between(1, 3);
  const int64_t experts = in.Between(1, 9);
  args.num_experts = static_cast<int32_t>(experts);
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k}, -1, experts);
  args.expert_offsets = c.AddInts(kInt32, {experts + 1}, 0, 0);
  args.sorted_slots = c.AddInts(kInt32, {tokens * top_k}, 0, 0);
  if (in.OneIn(2)) {
    args.tile_rows = static_cast<int32_t>(in.Between(1, 3));
    const int64_t tiles =
        tenon_moe_max_tiles(tokens * top_k, args.num_experts, args.tile_rows);
    args.tiles = c.AddInts(kInt32, {tiles + in.Between(0, 2), 3}, 0, 0);
  }
  c.SetArgs(args);
}

void BuildMoeGroupedMatmul(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_grouped_matmul_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t slots_per_row = in.Between(1, 3);
  const int64_t x_rows = NumTokens(in);
  const int64_t slots = x_rows * slots_per_row;
  const int64_t experts = in.Between(1, 4);
  const int64_t rows = in.Between(1, 20);
  const int64_t cols = in.Between(1, 20);
  args.flags = Flags(in);
  args.x = c.Add(dtype, {x_rows, cols});
  const bool fp8 = in.OneIn(3);
  args.weights = c.Add(fp8 ? kFloat8 : dtype, {experts, rows, cols});
  if (fp8) {
    args.weight_scales = in.OneIn(2) ? c.Add(kFloat32, {experts, rows})
                                     : c.Add(kFloat32, {experts, 1, 1});
  }
  args.expert_offsets = c.AddInts(kInt32, {experts + 1}, 0, 0);
  int64_t used = 0;  // slots in their order, some skipped
  for (int64_t e = 0; e < experts; ++e) {
    used += in.Between(0, slots - used);
    c.SetInt(args.expert_offsets, e + 1, used);
  }
  args.sorted_slots = c.AddInts(kInt32, {slots}, -1, -1);
  for (int64_t i = 0; i < used; ++i) c.SetInt(args.sorted_slots, i, i);
  if (in.OneIn(2)) args.bias = c.Add(dtype, {experts, rows});
  if (in.OneIn(2)) args.routing_weights = c.Add(kFloat32, {slots});
  args.out = c.Add(dtype, {slots, rows});
  args.slots_per_row = static_cast<int32_t>(slots_per_row);
  c.SetArgs(args);
}

void BuildMoeSwiGlu(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_swiglu_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t columns = in.Between(1, 20);
  args.layout = static_cast<int32_t>(in.Below(2));
  args.x = c.Add(dtype, {tokens, 2 * columns});
  args.out = c.Add(dtype, {tokens, columns});
  if (in.OneIn(2)) {
    args.limit = 7.0f;
    args.alpha = 1.702f;
  }
  c.SetArgs(args);
}

void BuildMoeSumReduce(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_sum_reduce_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 20);
  args.x = c.Add(dtype, {tokens, in.Between(1, 4), hidden});
  args.out = c.Add(dtype, {tokens, hidden});
  c.SetArgs(args);
}

void BuildMoe(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 20);
  const int64_t inner = in.Between(1, 12);
  const int64_t experts = in.Between(1, 4);
  const int64_t top_k = in.Between(1, 3);
  args.flags = Flags(in);
  args.x = c.Add(dtype, {tokens, hidden});
  args.topk_weights = c.Add(kFloat32, {tokens, top_k});
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k}, -1, experts);
  const bool fp8 = in.OneIn(3);
  const DLDataType weights = fp8 ? kFloat8 : dtype;
  args.gate = c.Add(weights, {experts, inner, hidden});
  args.up = c.Add(weights, {experts, inner, hidden});
  args.down = c.Add(weights, {experts, hidden, inner});
  if (fp8) {
    const bool rows = in.OneIn(2);
    const auto scales = [&](int64_t count) {
      return rows ? c.Add(kFloat32, {experts, count})
                  : c.Add(kFloat32, {experts, 1, 1});
    };
    args.gate_scales = scales(inner);
    args.up_scales = scales(inner);
    args.down_scales = scales(hidden);
  }
  args.out = in.OneIn(3) ? args.x : c.Add(dtype, {tokens, hidden});
  c.SetArgs(args);
}

}  // namespace

Op MoeRouter() {
  using Args = tenon_moe_router_args;
  return {"tenon_moe_router",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, top_k), FIELD(kIn, logits),
           FIELD(kOptionalIn, correction_bias), FIELD(kOut, topk_weights),
           FIELD(kOut, topk_ids), FIELD(kInt32, scoring),
           FIELD(kInt32, renormalize), FIELD(kFloat, routed_scaling_factor),
           FIELD(kInt32, num_expert_groups), FIELD(kInt32, num_selected_groups),
           FIELD(kInt32, group_score), FIELD(kInt32, num_fused_shared_experts),
           FIELD(kReserved, reserved)},
          nullptr,
          nullptr,
          BuildMoeRouter,
          Run<Args, tenon_moe_router>,
          nullptr};
}

Op MoeAlign() {
  using Args = tenon_moe_align_args;
  return {"tenon_moe_align",
          "tenon_moe_align_workspace_size",
          sizeof(Args),
          {FIELD(kInt32, num_experts), FIELD(kIn, topk_ids),
           FIELD(kOut, expert_offsets), FIELD(kOut, sorted_slots),
           FIELD(kOptionalOut, tiles), FIELD(kInt32, tile_rows),
           FIELD(kReserved, reserved), FIELD(kWorkspace, workspace),
           FIELD(kWorkspaceSize, workspace_size)},
          nullptr,
          nullptr,
          BuildMoeAlign,
          Run<Args, tenon_moe_align>,
          Query<Args, tenon_moe_align_workspace_size>};
}

Op MoeGroupedMatmul() {
  using Args = tenon_moe_grouped_matmul_args;
  return {"tenon_moe_grouped_matmul",
          "tenon_moe_grouped_matmul_workspace_size",
          sizeof(Args),
          {FIELD(kFlags, flags), FIELD(kIn, x), FIELD(kIn, weights),
           FIELD(kIn, expert_offsets), FIELD(kIn, sorted_slots),
           FIELD(kOptionalIn, bias), FIELD(kOptionalIn, routing_weights),
           FIELD(kOut, out), FIELD(kInt32, slots_per_row),
           FIELD(kReserved, reserved), FIELD(kWorkspace, workspace),
           FIELD(kWorkspaceSize, workspace_size),
           FIELD(kOptionalIn, weight_scales)},
          nullptr,
          nullptr,
          BuildMoeGroupedMatmul,
          Run<Args, tenon_moe_grouped_matmul>,
          Query<Args, tenon_moe_grouped_matmul_workspace_size>};
}

Op MoeSwiGlu() {
  using Args = tenon_moe_swiglu_args;
  return {"tenon_moe_swiglu",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, layout), FIELD(kIn, x), FIELD(kOut, out),
           FIELD(kFloat, limit), FIELD(kFloat, alpha)},
          nullptr,
          nullptr,
          BuildMoeSwiGlu,
          Run<Args, tenon_moe_swiglu>,
          nullptr};
}

Op MoeSumReduce() {
  using Args = tenon_moe_sum_reduce_args;
  return {"tenon_moe_sum_reduce",
          nullptr,
          sizeof(Args),
          {FIELD(kReserved, reserved), FIELD(kIn, x), FIELD(kOut, out)},
          nullptr,
          nullptr,
          BuildMoeSumReduce,
          Run<Args, tenon_moe_sum_reduce>,
          nullptr};
}

Op Moe() {
  using Args = tenon_moe_args;
  return {
      "tenon_moe",
      "tenon_moe_workspace_size",
      sizeof(Args),
      {FIELD(kFlags, flags), FIELD(kIn, x), FIELD(kIn, topk_weights),
       FIELD(kIn, topk_ids), FIELD(kIn, gate), FIELD(kIn, up), FIELD(kIn, down),
       FIELD(kOut, out), FIELD(kWorkspace, workspace),
       FIELD(kWorkspaceSize, workspace_size), FIELD(kOptionalIn, gate_scales),
       FIELD(kOptionalIn, up_scales), FIELD(kOptionalIn, down_scales)},
      "out",
      "x",
      BuildMoe,
      Run<Args, tenon_moe>,
      Query<Args, tenon_moe_workspace_size>};
}

}  // namespace tenon::fuzz
