#include "ops/linear/linear.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_grouped_matmul.h"
#include "ops/quantize/quantize.h"
#include "tests/abi/op_builder.h"

// Ops with fp8 weights.

namespace tenon::abi_test {

OpCasePtr MakeFp8MoeGroupedMatmul(const Target& target, int64_t tokens) {
  using Args = tenon_moe_grouped_matmul_args;
  Builder<Args, MoeGroupedMatmulParams> b(target, "tenon_moe_grouped_matmul",
                                          tenon_moe_grouped_matmul,
                                          MoeGroupedMatmul);
  MoeGroupedMatmulParams& p = b.params();
  const int64_t slots = tokens * kTopK;
  const auto [offsets, sorted] = SlotsByExpert(tokens);
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, 160}, 8, 1));
  p.weights = MakeExpertMatrices(
      b.Add("weights", &Args::weights,
            Floats(DType::kFloat8E4M3, {kExperts, 136, 160}, 16, 2)));
  p.weights.scales =
      MakeExpertScales(b.Add("weight_scales", &Args::weight_scales,
                             Floats(DType::kFloat32, {kExperts, 2, 2}, 1, 3)));
  p.expert_offsets = b.Add("expert_offsets", &Args::expert_offsets,
                           Integers(DType::kInt32, {kExperts + 1}, offsets));
  p.sorted_slots = b.Add("sorted_slots", &Args::sorted_slots,
                         Integers(DType::kInt32, {slots}, sorted));
  p.out = b.Add("out", &Args::out, {target.dtype, {slots, 136}, 8});
  p.slots_per_row = b.args().slots_per_row = kTopK;
  b.SetQuery(tenon_moe_grouped_matmul_workspace_size,
             MoeGroupedMatmulWorkspaceBytes);
  return b.Finish();
}

// With scales of rows; chooses the experts itself.
OpCasePtr MakeFp8Moe(const Target& target, int64_t tokens) {
  using Args = tenon_moe_args;
  // What the arguments and the parameters point to.
  struct Routed : MoeParams {
    tenon_moe_router_args c = {};
    MoeRouterParams cpp;
    DLTensor logits = {};
    int64_t shape[2] = {};
    int64_t strides[2] = {};
  };
  const auto run = [](const Routed& p, Stream s) -> Status {
    return Moe(p, s);
  };
  const auto bytes = [](const Routed& p) { return MoeWorkspaceBytes(p); };
  Builder<Args, Routed> b(target, "tenon_moe", tenon_moe, +run);
  Routed& p = b.params();
  const DType fp8 = DType::kFloat8E4M3;
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, kHidden}, 8, 1));
  const auto add = [&](const char* name, const DLTensor* Args::*field,
                       const char* scales, const DLTensor* Args::*scales_field,
                       int64_t rows, int64_t cols, uint64_t seed) {
    ExpertMatrices m = MakeExpertMatrices(
        b.Add(name, field, Floats(fp8, {kExperts, rows, cols}, 16, seed)));
    m.scales = MakeExpertScales(
        b.Add(scales, scales_field,
              Floats(DType::kFloat32, {kExperts, rows}, 0, seed + 1)));
    return m;
  };
  p.gate = add("gate", &Args::gate, "gate_scales", &Args::gate_scales, 24,
               kHidden, 3);
  p.up = add("up", &Args::up, "up_scales", &Args::up_scales, 24, kHidden, 5);
  p.down = add("down", &Args::down, "down_scales", &Args::down_scales, kHidden,
               24, 7);
  p.topk_weights = b.Add("topk_weights", &Args::topk_weights,
                         {DType::kFloat32, {tokens, kTopK}, 1});
  p.topk_ids =
      b.Add("topk_ids", &Args::topk_ids, {DType::kInt32, {tokens, kTopK}});
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  // Both calls read the same logits: x's first columns.
  p.cpp.logits = Columns(p.x, 0, kExperts);
  p.cpp.topk_weights = p.topk_weights;
  p.cpp.topk_ids = p.topk_ids;
  p.cpp.top_k = p.c.top_k = kTopK;
  p.cpp.renormalize = true;
  p.c.renormalize = 1;
  p.router = &p.cpp;
  p.c.struct_size = sizeof(p.c);
  p.shape[0] = tokens;
  p.shape[1] = kExperts;
  p.logits = *b.args().x;
  p.strides[0] = p.x.stride[0];
  p.strides[1] = 1;
  p.logits.shape = p.shape;
  p.logits.strides = p.strides;
  p.c.logits = &p.logits;
  p.c.topk_weights = b.args().topk_weights;
  p.c.topk_ids = b.args().topk_ids;
  b.args().router = &p.c;
  b.SetQuery(tenon_moe_workspace_size, +bytes);
  return b.Finish();
}

OpCasePtr MakeQuantizeFp8(const Target& target, int64_t tokens) {
  using Args = tenon_quantize_fp8_args;
  Builder<Args, QuantizeFp8Params> b(target, "tenon_quantize_fp8",
                                     tenon_quantize_fp8, QuantizeFp8);
  QuantizeFp8Params& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, 136}, 8, 1));
  p.out = b.Add("out", &Args::out, {DType::kFloat8E4M3, {tokens, 136}, 24});
  p.scales = b.Add("scales", &Args::scales, {DType::kFloat32, {tokens, 2}, 1});
  p.block_rows = b.args().block_rows = 1;
  p.block_cols = b.args().block_cols = 128;
  return b.Finish();
}

OpCasePtr MakeFp8Linear(const Target& target, int64_t tokens) {
  using Args = tenon_linear_args;
  Builder<Args, LinearParams> b(target, "tenon_linear", tenon_linear, Linear);
  LinearParams& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, 160}, 8, 1));
  p.weight = b.Add("weight", &Args::weight,
                   Floats(DType::kFloat8E4M3, {136, 160}, 16, 2));
  p.weight_scales = b.Add("weight_scales", &Args::weight_scales,
                          Floats(DType::kFloat32, {2, 2}, 2, 3));
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, 136}, 8});
  b.SetQuery(tenon_linear_workspace_size, LinearWorkspaceBytes);
  return b.Finish();
}

}  // namespace tenon::abi_test
