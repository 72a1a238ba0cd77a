#include <cstring>
#include <utility>

#include "ops/attention/attention.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_grouped_matmul.h"
#include "ops/moe/moe_router.h"
#include "ops/moe/moe_sum_reduce.h"
#include "ops/moe/moe_swiglu.h"
#include "ops/qk_norm/qk_norm.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/sampler/sampler.h"
#include "tests/abi/op_builder.h"

namespace tenon::abi_test {

Operand& OpCase::operand(const std::string& name) {
  for (const auto& operand : operands) {
    if (operand->name == name) return *operand;
  }
  ADD_FAILURE() << function << " has no " << name;
  return *operands.front();
}

void AddWorkspace(tenon_context context, Device device, OpCase* op) {
  if (!op->query) return;
  uint64_t bytes = 0;
  ASSERT_EQ(op->query(context, &bytes, nullptr), TENON_OK) << op->function;
  for (int i = 0; i < 2; ++i) {
    StatusOr<Buffer> buffer = Buffer::Allocate(device, bytes + 1);
    ASSERT_TRUE(buffer.ok()) << buffer.status().message();
    op->scratch_.push_back(*std::move(buffer));
  }
  const size_t last = op->scratch_.size() - 1;
  *op->workspace = op->scratch_[last].data();
  *op->workspace_size = bytes;
  *op->cpp_workspace = op->scratch_[last - 1].data();
  *op->cpp_workspace_size = bytes;
}

OpCasePtr MakeEmbedding(const Target& target, int64_t tokens) {
  using Args = tenon_embedding_args;
  Builder<Args, EmbeddingParams> b(target, "tenon_embedding", tenon_embedding,
                                   Embedding);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(i * 5 % 11);
  b.params().ids =
      b.Add("ids", &Args::ids, Integers(DType::kInt32, {tokens}, ids));
  b.params().table =
      b.Add("table", &Args::table, Floats(target.dtype, {9, kHidden}, 8, 1));
  b.params().out =
      b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  return b.Finish();
}

OpCasePtr MakeRmsNorm(const Target& target, int64_t tokens) {
  using Args = tenon_rms_norm_args;
  Builder<Args, RmsNormParams> b(target, "tenon_rms_norm", tenon_rms_norm,
                                 RmsNorm);
  RmsNormParams& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, kHidden}, 8, 1));
  p.residual = b.AddOptional("residual", &Args::residual,
                             Floats(target.dtype, {tokens, kHidden}, 24, 2));
  p.weight =
      b.Add("weight", &Args::weight, Floats(target.dtype, {kHidden}, 0, 3));
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  p.epsilon = b.args().epsilon = 1e-5f;
  p.rounding = NormRounding::kCastThenMultiply;
  b.args().rounding = TENON_ROUNDING_CAST_THEN_MULTIPLY;
  return b.Finish();
}

OpCasePtr MakeLinear(const Target& target, int64_t tokens) {
  using Args = tenon_linear_args;
  Builder<Args, LinearParams> b(target, "tenon_linear", tenon_linear, Linear);
  LinearParams& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, kHidden}, 8, 1));
  p.weight =
      b.Add("weight", &Args::weight, Floats(target.dtype, {40, kHidden}, 8, 2));
  p.bias = b.AddOptional("bias", &Args::bias, Floats(target.dtype, {40}, 0, 3));
  p.out = b.Add("out", &Args::out, {DType::kFloat32, {tokens, 40}, 8});
  b.SetQuery(tenon_linear_workspace_size, LinearWorkspaceBytes);
  return b.Finish();
}

namespace {

// What both forms of qk_norm share: weights, rotation, cache.
void AddQkNormRest(const Target& target, int64_t tokens, int64_t kv_heads,
                   Builder<tenon_qk_norm_args, QkNormParams>* b) {
  using Args = tenon_qk_norm_args;
  QkNormParams& p = b->params();
  std::vector<int64_t> positions, slots;
  for (int64_t i = 0; i < tokens; ++i) {
    positions.push_back(i * 2);
    slots.push_back(tokens - i);
  }
  p.q_weight =
      b->Add("q_weight", &Args::q_weight, Floats(DType::kFloat32, {64}, 0, 2));
  p.k_weight =
      b->Add("k_weight", &Args::k_weight, Floats(target.dtype, {64}, 0, 3));
  p.rotary.cos_sin = b->AddOptional("cos_sin", &Args::cos_sin,
                                    Floats(DType::kFloat32, {9, 32}, 4, 4));
  p.rotary.positions =
      b->AddOptional("positions", &Args::positions,
                     Integers(DType::kInt32, {tokens}, positions));
  const Content cache = {DType::kFloat8E4M3, {3, 4, kv_heads, 64}, 16};
  p.cache.k_cache = b->AddOptional("k_cache", &Args::k_cache, cache);
  p.cache.v_cache = b->AddOptional("v_cache", &Args::v_cache, cache);
  p.cache.slot_mapping =
      b->AddOptional("slot_mapping", &Args::slot_mapping,
                     Integers(DType::kInt64, {tokens}, slots));
  p.epsilon = b->args().epsilon = 1e-6f;
  p.rotary.rotary_dim = b->args().rotary_dim = 32;
  p.cache.k_scale = b->args().k_scale = 0.5f;
  p.cache.v_scale = b->args().v_scale = 2.0f;
}

}  // namespace

OpCasePtr MakePackedQkNorm(const Target& target, int64_t tokens) {
  using Args = tenon_qk_norm_args;
  Builder<Args, QkNormParams> b(target, "tenon_qk_norm", tenon_qk_norm, QkNorm);
  QkNormParams& p = b.params();
  p.qkv = b.Add("qkv", &Args::qkv,
                Floats(target.dtype, {tokens, 64 * 8 + 16}, 8, 1));
  p.q_offset = b.args().q_offset = 8;
  p.k_offset = b.args().k_offset = 8 + 64 * 4;
  p.v_offset = b.args().v_offset = 8 + 64 * 6;
  p.num_q_heads = b.args().num_q_heads = 4;
  p.num_kv_heads = b.args().num_kv_heads = 2;
  p.head_dim = b.args().head_dim = 64;
  AddQkNormRest(target, tokens, 2, &b);
  return b.Finish();
}

OpCasePtr MakeStridedQkNorm(const Target& target, int64_t tokens) {
  using Args = tenon_qk_norm_args;
  Builder<Args, QkNormParams> b(target, "tenon_qk_norm", tenon_qk_norm, QkNorm);
  QkNormParams& p = b.params();
  p.q = b.Add("q", &Args::q, Floats(target.dtype, {tokens, 3, 64}, 8, 1));
  p.k = b.Add("k", &Args::k, Floats(target.dtype, {tokens, 1, 64}, 0, 5));
  p.v =
      b.AddOptional("v", &Args::v, Floats(target.dtype, {tokens, 1, 64}, 8, 6));
  AddQkNormRest(target, tokens, 1, &b);
  p.rounding = NormRounding::kCastThenMultiply;
  b.args().rounding = TENON_ROUNDING_CAST_THEN_MULTIPLY;
  return b.Finish();
}

OpCasePtr MakeAttention(const Target& target, int64_t tokens) {
  using Args = tenon_attention_args;
  Builder<Args, AttentionParams> b(target, "tenon_attention", tenon_attention,
                                   Attention);
  AttentionParams& p = b.params();
  p.q = b.Add("q", &Args::q, Floats(target.dtype, {tokens, 4, 64}, 8, 1));
  p.k_cache = b.Add("k_cache", &Args::k_cache,
                    Floats(DType::kFloat8E4M3, {5, 4, 2, 64}, 16, 2));
  p.v_cache = b.Add("v_cache", &Args::v_cache,
                    Floats(DType::kFloat8E4M3, {5, 4, 2, 64}, 16, 3));
  p.block_table = b.Add("block_table", &Args::block_table,
                        Integers(DType::kInt32, {2, 2}, {3, 1, 0, 4}));
  p.query_start = b.Add("query_start", &Args::query_start,
                        Integers(DType::kInt32, {3}, {0, tokens / 2, tokens}));
  p.kv_len =
      b.Add("kv_len", &Args::kv_len, Integers(DType::kInt32, {2}, {7, 5}));
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, 4, 64}, 16});
  p.scale = b.args().scale = 0.125f;
  p.k_scale = b.args().k_scale = 0.5f;
  p.v_scale = b.args().v_scale = 2.0f;
  p.max_kv_len = b.args().max_kv_len = 7;
  p.batch_invariant = true;
  b.args().flags = TENON_FLAG_BATCH_INVARIANT;
  b.SetQuery(tenon_attention_workspace_size, AttentionWorkspaceBytes);
  return b.Finish();
}

OpCasePtr MakeMoeRouter(const Target& target, int64_t tokens) {
  using Args = tenon_moe_router_args;
  Builder<Args, MoeRouterParams> b(target, "tenon_moe_router", tenon_moe_router,
                                   MoeRouter);
  MoeRouterParams& p = b.params();
  p.logits =
      b.Add("logits", &Args::logits, Floats(target.dtype, {tokens, 8}, 8, 1));
  p.correction_bias = b.AddOptional("correction_bias", &Args::correction_bias,
                                    Floats(DType::kFloat32, {8}, 0, 2));
  p.topk_weights = b.Add("topk_weights", &Args::topk_weights,
                         {DType::kFloat32, {tokens, 4}, 3});
  p.topk_ids =
      b.Add("topk_ids", &Args::topk_ids, {DType::kInt32, {tokens, 4}, 1});
  p.top_k = b.args().top_k = 3;
  p.scoring = MoeScoring::kSigmoid;
  b.args().scoring = TENON_SCORING_SIGMOID;
  p.renormalize = true;
  b.args().renormalize = 1;
  p.routed_scaling_factor = b.args().routed_scaling_factor = 2.5f;
  p.num_expert_groups = b.args().num_expert_groups = 4;
  p.num_selected_groups = b.args().num_selected_groups = 2;
  p.group_score = MoeGroupScore::kTop2Sum;
  b.args().group_score = TENON_GROUP_SCORE_TOP2_SUM;
  p.num_fused_shared_experts = b.args().num_fused_shared_experts = 1;
  return b.Finish();
}

OpCasePtr MakeMoeAlign(const Target& target, int64_t tokens) {
  using Args = tenon_moe_align_args;
  Builder<Args, MoeAlignParams> b(target, "tenon_moe_align", tenon_moe_align,
                                  MoeAlign);
  MoeAlignParams& p = b.params();
  p.topk_ids =
      b.Add("topk_ids", &Args::topk_ids,
            Integers(DType::kInt32, {tokens, kTopK}, ExpertIds(tokens)));
  p.expert_offsets = b.Add("expert_offsets", &Args::expert_offsets,
                           {DType::kInt32, {kExperts + 1}});
  p.sorted_slots = b.Add("sorted_slots", &Args::sorted_slots,
                         {DType::kInt32, {tokens * kTopK}});
  p.tiles =
      b.AddOptional("tiles", &Args::tiles,
                    {DType::kInt32, {MoeMaxTiles(tokens * kTopK, 4, 3), 3}, 2});
  p.num_experts = b.args().num_experts = kExperts;
  p.tile_rows = b.args().tile_rows = 3;
  b.SetQuery(tenon_moe_align_workspace_size, MoeAlignWorkspaceBytes);
  return b.Finish();
}

OpCasePtr MakeMoeGroupedMatmul(const Target& target, int64_t tokens) {
  using Args = tenon_moe_grouped_matmul_args;
  Builder<Args, MoeGroupedMatmulParams> b(target, "tenon_moe_grouped_matmul",
                                          tenon_moe_grouped_matmul,
                                          MoeGroupedMatmul);
  MoeGroupedMatmulParams& p = b.params();
  const int64_t slots = tokens * kTopK;
  const auto [offsets, sorted] = SlotsByExpert(tokens);
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, kHidden}, 8, 1));
  p.weights = MakeExpertMatrices(
      b.Add("weights", &Args::weights,
            Floats(target.dtype, {kExperts, 24, kHidden}, 8, 2)));
  p.expert_offsets = b.Add("expert_offsets", &Args::expert_offsets,
                           Integers(DType::kInt32, {kExperts + 1}, offsets));
  p.sorted_slots = b.Add("sorted_slots", &Args::sorted_slots,
                         Integers(DType::kInt32, {slots}, sorted));
  p.bias = b.AddOptional("bias", &Args::bias,
                         Floats(target.dtype, {kExperts, 24}, 8, 3));
  p.routing_weights = b.AddOptional("routing_weights", &Args::routing_weights,
                                    Floats(DType::kFloat32, {slots}, 0, 4));
  p.out = b.Add("out", &Args::out, {target.dtype, {slots, 24}, 8});
  p.slots_per_row = b.args().slots_per_row = kTopK;
  b.SetQuery(tenon_moe_grouped_matmul_workspace_size,
             MoeGroupedMatmulWorkspaceBytes);
  return b.Finish();
}

OpCasePtr MakeMoeSwiGlu(const Target& target, int64_t tokens) {
  using Args = tenon_moe_swiglu_args;
  Builder<Args, MoeSwiGluParams> b(target, "tenon_moe_swiglu", tenon_moe_swiglu,
                                   MoeSwiGlu);
  MoeSwiGluParams& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, 2 * kHidden}, 8, 1));
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  p.layout = SwiGluLayout::kInterleaved;
  b.args().layout = TENON_SWIGLU_INTERLEAVED;
  p.limit = b.args().limit = 1.5f;
  p.alpha = b.args().alpha = 1.7f;
  return b.Finish();
}

OpCasePtr MakeMoeSumReduce(const Target& target, int64_t tokens) {
  using Args = tenon_moe_sum_reduce_args;
  Builder<Args, MoeSumReduceParams> b(target, "tenon_moe_sum_reduce",
                                      tenon_moe_sum_reduce, MoeSumReduce);
  b.params().x =
      b.Add("x", &Args::x, Floats(target.dtype, {tokens, 3, kHidden}, 8, 1));
  b.params().out =
      b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  return b.Finish();
}

OpCasePtr MakeMoe(const Target& target, int64_t tokens) {
  using Args = tenon_moe_args;
  Builder<Args, MoeParams> b(target, "tenon_moe", tenon_moe, Moe);
  MoeParams& p = b.params();
  p.x = b.Add("x", &Args::x, Floats(target.dtype, {tokens, kHidden}, 8, 1));
  p.topk_weights = b.Add("topk_weights", &Args::topk_weights,
                         Floats(DType::kFloat32, {tokens, kTopK}, 1, 2));
  p.topk_ids =
      b.Add("topk_ids", &Args::topk_ids,
            Integers(DType::kInt32, {tokens, kTopK}, ExpertIds(tokens)));
  p.gate = MakeExpertMatrices(
      b.Add("gate", &Args::gate,
            Floats(target.dtype, {kExperts, 24, kHidden}, 8, 3)));
  p.up = MakeExpertMatrices(b.Add(
      "up", &Args::up, Floats(target.dtype, {kExperts, 24, kHidden}, 0, 4)));
  p.down = MakeExpertMatrices(
      b.Add("down", &Args::down,
            Floats(target.dtype, {kExperts, kHidden, 24}, 8, 5)));
  p.out = b.Add("out", &Args::out, {target.dtype, {tokens, kHidden}, 16});
  b.SetQuery(tenon_moe_workspace_size, MoeWorkspaceBytes);
  return b.Finish();
}

OpCasePtr MakeSampler(const Target& target, int64_t tokens) {
  using Args = tenon_sampler_args;
  Builder<Args, SamplerParams> b(target, "tenon_sampler", tenon_sampler,
                                 Sampler);
  std::vector<int64_t> bytes;
  for (int64_t row = 0; row < tokens; ++row) {
    tenon_sampling_params params;
    EXPECT_EQ(tenon_sampling_params_init(&params, sizeof(params), nullptr),
              TENON_OK);
    params.temperature = row == 0 ? 0.0f : 0.7f;
    params.top_k = static_cast<int32_t>(3 * row);
    params.min_p = 0.01f;
    params.filter_order = row % 2;
    params.seed = static_cast<uint64_t>(row) << 40 | 17;
    params.position = static_cast<uint64_t>(row);
    params.typical_p = row % 3 == 2 ? 0.8f : 0.0f;
    params.num_top_logprobs = 2;
    unsigned char raw[sizeof(params)];
    std::memcpy(raw, &params, sizeof(params));
    bytes.insert(bytes.end(), raw, raw + sizeof(raw));
  }
  SamplerParams& p = b.params();
  p.logits =
      b.Add("logits", &Args::logits, Floats(target.dtype, {tokens, 997}, 8, 1));
  p.params = b.Add("params", &Args::params,
                   Integers(DType::kUInt8, {tokens, 128}, bytes))
                 .As<SamplingParams>();
  p.tokens = b.Add("tokens", &Args::tokens, {DType::kInt32, {tokens}});
  p.logprobs =
      b.AddOptional("logprobs", &Args::logprobs, {DType::kFloat32, {tokens}});
  p.statuses = b.Add("statuses", &Args::statuses, {DType::kInt32, {tokens}});
  p.raw_logprobs = b.AddOptional("raw_logprobs", &Args::raw_logprobs,
                                 {DType::kFloat32, {tokens}});
  p.processed_logprobs =
      b.AddOptional("processed_logprobs", &Args::processed_logprobs,
                    {DType::kFloat32, {tokens}});
  p.top_tokens = b.AddOptional("top_tokens", &Args::top_tokens,
                               {DType::kInt32, {tokens, 3}});
  p.top_logprobs = b.AddOptional("top_logprobs", &Args::top_logprobs,
                                 {DType::kFloat32, {tokens, 3}});
  b.SetQuery(tenon_sampler_workspace_size, SamplerWorkspaceBytes);
  return b.Finish();
}

std::vector<OpMaker> OpMakers() {
  return {MakeEmbedding,
          MakeRmsNorm,
          MakeLinear,
          MakePackedQkNorm,
          MakeStridedQkNorm,
          MakeAttention,
          MakeMoeRouter,
          MakeMoeAlign,
          MakeMoeGroupedMatmul,
          MakeMoeSwiGlu,
          MakeMoeSumReduce,
          MakeMoe,
          MakeSampler,
          MakeQuantizeFp8,
          MakeFp8Linear,
          MakeFp8MoeGroupedMatmul,
          MakeFp8Moe};
}

std::vector<OpCasePtr> MakeAllOps(const Target& target, int64_t tokens) {
  std::vector<OpCasePtr> ops;
  for (OpMaker make : OpMakers()) ops.push_back(make(target, tokens));
  return ops;
}

}  // namespace tenon::abi_test
