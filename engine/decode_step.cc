#include "engine/decode_step.h"

#include <cmath>

#include "ops/attention/attention.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_router.h"
#include "ops/moe/moe_swiglu.h"
#include "ops/qk_norm/qk_norm.h"
#include "ops/rms_norm/rms_norm.h"

namespace tenon {
namespace {

// One rounding: nearer to the exact norm than the two of the models' own
// published code, whose bits no two engines share anyway.
constexpr NormRounding kNormRounding = NormRounding::kFloat32Multiply;

// The rows of `tensor` that this step uses.
TensorView Used(const StepContext& c, const TensorView& tensor) {
  return Rows(tensor, 0, c.tokens());
}

TensorView Normed(const StepContext& c) {
  return Used(c, c.activations.normed);
}
TensorView Residual(const StepContext& c) {
  return Used(c, c.activations.residual);
}
TensorView BlockOut(const StepContext& c) {
  return Used(c, c.activations.block_out);
}

// What a block takes over from the ops in front of it and behind it.
struct Neighbours {
  // Weight of the norm of the residual that its first product begins with,
  // leaving it in `normed`. Not present: `normed` is ready.
  TensorView norm;
  // Its output is added to the residual rather than left in block_out.
  bool adds_residual = false;
  // Its first product adds what the experts of the layer before left in
  // expert_rows; the sum, in block_out, is the residual until the block ends.
  bool adds_expert_rows = false;
  // Its experts leave their rows there, unsummed.
  bool leaves_expert_rows = false;
};

// `scales` of a float8_e4m3 weight; otherwise not present.
LinearParams MakeLinear(const StepContext& c, const TensorView& x,
                        const TensorView& weight, const TensorView& scales,
                        const TensorView& out) {
  LinearParams p;
  p.x = x;
  p.weight = weight;
  p.weight_scales = scales;
  p.out = out;
  p.weights_are_constant = true;
  p.cublas_lt = c.cublas_lt;
  p.batch_invariant = c.batch_invariant;
  p.workspace = c.activations.workspace;
  p.workspace_size = c.activations.workspace_size;
  return p;
}

Status RunLinear(const StepContext& c, const TensorView& x,
                 const TensorView& weight, const TensorView& scales,
                 const TensorView& out) {
  return Linear(MakeLinear(c, x, weight, scales, out), c.stream);
}

// The first product of a block.
Status RunFirstLinear(const StepContext& c, int32_t layer, const Neighbours& n,
                      const TensorView& weight, const TensorView& scales,
                      const TensorView& out) {
  LinearParams p = MakeLinear(c, Normed(c), weight, scales, out);
  if (n.norm.present()) {
    p.x = Residual(c);
    p.norm.weight = n.norm;
    p.norm.out = Normed(c);
    p.norm.epsilon = c.config.rms_norm_eps;
    p.norm.rounding = kNormRounding;
  }
  if (n.adds_expert_rows) {
    p.terms.rows = c.activations.expert_rows;
    p.terms.ids = c.activations.TopkIds(layer - 1, c.tokens());
    p.terms.num_ids = c.config.num_experts;
    p.terms.sum = BlockOut(c);
  }
  return Linear(p, c.stream);
}

// The last product of a block.
Status RunLastLinear(const StepContext& c, const Neighbours& n,
                     const TensorView& x, const TensorView& weight,
                     const TensorView& scales) {
  LinearParams p = MakeLinear(c, x, weight, scales, BlockOut(c));
  if (n.adds_residual) {
    p.out = Residual(c);
    p.residual = n.adds_expert_rows ? BlockOut(c) : Residual(c);
  }
  return Linear(p, c.stream);
}

Status RunNorm(const StepContext& c, const TensorView& x,
               const TensorView& residual, const TensorView& weight) {
  if (!c.Runs(StepOp::kNorm)) return Status();
  RmsNormParams p;
  p.x = x;
  p.residual = residual;
  p.weight = weight;
  p.out = Normed(c);
  p.epsilon = c.config.rms_norm_eps;
  p.rounding = kNormRounding;
  return RmsNorm(p, c.stream);
}

// qkv = normed * [q; k; v]^T, in one product where the weights lie together.
Status QkvProjection(const StepContext& c, int32_t layer, const LayerWeights& w,
                     const Neighbours& n) {
  if (!c.Runs(StepOp::kQkv)) return Status();
  const TensorView qkv = Used(c, c.activations.qkv);
  if (w.qkv.present())
    return RunFirstLinear(c, layer, n, w.qkv, w.qkv_scales, qkv);
  const int64_t k = w.q.shape[0];
  const int64_t v = k + w.k.shape[0];
  TENON_RETURN_IF_ERROR(RunFirstLinear(c, layer, n, w.q, w.q_scales,
                                       Columns(qkv, 0, w.q.shape[0])));
  TENON_RETURN_IF_ERROR(
      RunLinear(c, Normed(c), w.k, w.k_scales, Columns(qkv, k, w.k.shape[0])));
  return RunLinear(c, Normed(c), w.v, w.v_scales,
                   Columns(qkv, v, w.v.shape[0]));
}

// Norm, rotary embedding and cache write of the packed rows.
Status PrepareAttention(const StepContext& c, int32_t layer,
                        const LayerWeights& w) {
  if (!c.Runs(StepOp::kQkNorm)) return Status();
  QkNormParams p;
  p.qkv = Used(c, c.activations.qkv);
  p.k_offset = w.q.shape[0];
  p.v_offset = w.q.shape[0] + w.k.shape[0];
  p.head_dim = c.config.head_dim;
  p.num_q_heads = static_cast<int32_t>(w.q.shape[0] / p.head_dim);
  p.num_kv_heads = static_cast<int32_t>(w.k.shape[0] / p.head_dim);
  p.q_weight = w.q_norm;
  p.k_weight = w.k_norm;
  p.epsilon = c.config.rms_norm_eps;
  p.rounding = kNormRounding;
  p.rotary.cos_sin = c.activations.cos_sin;
  p.rotary.positions = c.inputs.positions;
  p.rotary.rotary_dim = c.config.head_dim;
  p.cache.k_cache = c.cache.k(layer);
  p.cache.v_cache = c.cache.v(layer);
  p.cache.slot_mapping = c.inputs.slot_mapping;
  p.cache.k_scale = c.cache.options().k_scale;
  p.cache.v_scale = c.cache.options().v_scale;
  return QkNorm(p, c.stream);
}

// The Q columns of qkv hold the queries before, and the output after.
Status RunAttention(const StepContext& c, int32_t layer,
                    const LayerWeights& w) {
  if (!c.Runs(StepOp::kAttention)) return Status();
  const int64_t head_dim = c.config.head_dim;
  TensorView q = Used(c, c.activations.qkv);
  q.rank = 3;
  q.shape[1] = w.q.shape[0] / head_dim;
  q.shape[2] = head_dim;
  q.stride[1] = head_dim;
  q.stride[2] = 1;
  AttentionParams p;
  p.q = p.out = q;
  p.k_cache = c.cache.k(layer);
  p.v_cache = c.cache.v(layer);
  p.block_table = c.inputs.block_table;
  p.query_start = c.inputs.query_start;
  p.kv_len = c.inputs.kv_len;
  p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  p.k_scale = c.cache.options().k_scale;
  p.v_scale = c.cache.options().v_scale;
  p.max_kv_len = c.inputs.max_kv_len;
  p.max_query_len = c.inputs.max_query_len;
  p.batch_invariant = c.batch_invariant;
  // QkNorm is ahead, and writes this step's tokens alone; ahead of it the
  // projection, unless it is left out.
  p.early_reads = c.Runs(StepOp::kQkv);
  p.workspace = c.activations.workspace;
  p.workspace_size = c.activations.workspace_size;
  return Attention(p, c.stream);
}

Status OutputProjection(const StepContext& c, const LayerWeights& w,
                        const Neighbours& n) {
  if (!c.Runs(StepOp::kOutput)) return Status();
  return RunLastLinear(c, n,
                       Columns(Used(c, c.activations.qkv), 0, w.q.shape[0]),
                       w.o, w.o_scales);
}

// float32 logits: rounding them would reorder close experts.
Status RouterProjection(const StepContext& c, int32_t layer,
                        const LayerWeights& w, const Neighbours& n) {
  if (!c.Runs(StepOp::kRouter)) return Status();
  return RunFirstLinear(c, layer, n, w.router, TensorView(),
                        Used(c, c.activations.router_logits));
}

Status Experts(const StepContext& c, int32_t layer, const LayerWeights& w,
               const Neighbours& n) {
  if (!c.Runs(StepOp::kMoe)) return Status();
  const Activations& a = c.activations;
  MoeRouterParams r;
  r.logits = Used(c, a.router_logits);
  r.padding = c.inputs.positions;
  r.topk_weights = Used(c, a.topk_weights);
  r.topk_ids = a.TopkIds(layer, c.tokens());
  r.top_k = c.config.num_experts_per_tok;
  r.renormalize = c.config.norm_topk_prob;

  MoeParams p;
  p.x = Normed(c);
  p.topk_weights = r.topk_weights;
  p.topk_ids = r.topk_ids;
  p.router = &r;
  p.gate = w.gate;
  p.up = w.up;
  p.down = w.down;
  if (n.leaves_expert_rows) {
    p.rows = a.expert_rows;
  } else if (n.adds_residual) {
    p.residual = p.out = Residual(c);
  } else {
    p.out = BlockOut(c);
  }
  p.batch_invariant = c.batch_invariant;
  p.kernels = c.moe_kernels;
  p.workspace = a.workspace;
  p.workspace_size = a.workspace_size;
  return Moe(p, c.stream);
}

Status DenseMlp(const StepContext& c, int32_t layer, const LayerWeights& w,
                const Neighbours& n) {
  if (!c.Runs(StepOp::kDenseMlp)) return Status();
  const Activations& a = c.activations;
  const int64_t intermediate = w.mlp_gate.shape[0];
  const TensorView gate_up = Used(c, a.mlp_gate_up);
  TENON_RETURN_IF_ERROR(RunFirstLinear(c, layer, n, w.mlp_gate,
                                       w.mlp_gate_scales,
                                       Columns(gate_up, 0, intermediate)));
  TENON_RETURN_IF_ERROR(
      RunLinear(c, Normed(c), w.mlp_up, w.mlp_up_scales,
                Columns(gate_up, intermediate, intermediate)));
  MoeSwiGluParams p;
  p.x = gate_up;
  p.out = Used(c, a.mlp_hidden);
  TENON_RETURN_IF_ERROR(MoeSwiGlu(p, c.stream));
  return RunLastLinear(c, n, p.out, w.mlp_down, w.mlp_down_scales);
}

Status RunAttentionBlock(const StepContext& c, int32_t layer,
                         const Neighbours& n) {
  const LayerWeights& w = c.weights.layers[layer];
  TENON_RETURN_IF_ERROR(QkvProjection(c, layer, w, n));
  TENON_RETURN_IF_ERROR(PrepareAttention(c, layer, w));
  TENON_RETURN_IF_ERROR(RunAttention(c, layer, w));
  return OutputProjection(c, w, n);
}

Status RunMlpBlock(const StepContext& c, int32_t layer, const Neighbours& n) {
  const LayerWeights& w = c.weights.layers[layer];
  if (!c.config.IsMoeLayer(layer)) return DenseMlp(c, layer, w, n);
  TENON_RETURN_IF_ERROR(RouterProjection(c, layer, w, n));
  return Experts(c, layer, w, n);
}

// Whether norms and sums are part of the ops next to them. Of fp8 weights
// Hopper's kernels gain from it; other GPUs neither gain nor lose.
bool Fuses(const StepContext& c) {
  if (!c.fuse || c.config.num_layers == 0) return false;
  if (c.tokens() <= kFusedStepTokens) return true;
  return c.weights.layers[0].qkv.dtype == DType::kFloat8E4M3 &&
         c.cublas_lt != nullptr && !c.batch_invariant && c.tokens() > 8 &&
         c.tokens() <= kLinearFewFp8Tokens;
}

// Whether the next layer sums up what the experts of `layer` make: for one
// token that is quicker than a launch of its own, but for fp8 weights, whose
// product has its input to quantise as well.
bool LeavesExpertRows(const StepContext& c, int32_t layer) {
  return c.tokens() == 1 && layer >= 0 && layer + 1 < c.config.num_layers &&
         c.config.IsMoeLayer(layer) &&
         c.weights.layers[layer + 1].qkv.dtype != DType::kFloat8E4M3;
}

// The layers of DecodeStep for few tokens, and the norm behind them.
Status FusedLayers(const StepContext& c) {
  for (int32_t layer = 0; layer < c.config.num_layers; ++layer) {
    const LayerWeights& w = c.weights.layers[layer];
    Neighbours attention = {w.input_norm, true};
    attention.adds_expert_rows = LeavesExpertRows(c, layer - 1);
    Neighbours mlp = {w.post_attention_norm, true};
    mlp.leaves_expert_rows = LeavesExpertRows(c, layer);
    TENON_RETURN_IF_ERROR(RunAttentionBlock(c, layer, attention));
    TENON_RETURN_IF_ERROR(RunMlpBlock(c, layer, mlp));
  }
  return FirstNorm(c, c.weights.final_norm);
}

}  // namespace

Status EmbedTokens(const StepContext& c) {
  if (!c.Runs(StepOp::kEmbedding)) return Status();
  EmbeddingParams p;
  p.ids = c.inputs.token_ids;
  p.previous = c.inputs.previous;
  p.table = c.weights.embedding;
  p.out = Used(c, c.activations.residual);
  return Embedding(p, c.stream);
}

Status FirstNorm(const StepContext& c, const TensorView& weight) {
  return RunNorm(c, Residual(c), TensorView(), weight);
}

Status AddNorm(const StepContext& c, const TensorView& weight) {
  return RunNorm(c, BlockOut(c), Residual(c), weight);
}

Status AttentionBlock(const StepContext& c, int32_t layer) {
  return RunAttentionBlock(c, layer, Neighbours());
}

Status MlpBlock(const StepContext& c, int32_t layer) {
  return RunMlpBlock(c, layer, Neighbours());
}

Status ComputeLogits(const StepContext& c) {
  const int64_t rows = c.inputs.logit_rows.shape[0];
  if (rows == 0 || !c.Runs(StepOp::kLmHead)) return Status();
  TensorView hidden = Normed(c);
  if (!c.inputs.all_logits) {
    // A gather of rows is what Embedding does.
    EmbeddingParams p;
    p.ids = c.inputs.logit_rows;
    p.table = hidden;
    p.out = hidden = Rows(c.activations.logit_hidden, 0, rows);
    TENON_RETURN_IF_ERROR(Embedding(p, c.stream));
  }
  return RunLinear(c, hidden, c.weights.lm_head, TensorView(),
                   Rows(c.activations.logits, 0, rows));
}

Status DecodeStep(const StepContext& c) {
  TENON_RETURN_IF_ERROR(EmbedTokens(c));
  if (Fuses(c)) {
    TENON_RETURN_IF_ERROR(FusedLayers(c));
    return ComputeLogits(c);
  }
  for (int32_t layer = 0; layer < c.config.num_layers; ++layer) {
    const LayerWeights& w = c.weights.layers[layer];
    TENON_RETURN_IF_ERROR(layer == 0 ? FirstNorm(c, w.input_norm)
                                     : AddNorm(c, w.input_norm));
    TENON_RETURN_IF_ERROR(AttentionBlock(c, layer));
    TENON_RETURN_IF_ERROR(AddNorm(c, w.post_attention_norm));
    TENON_RETURN_IF_ERROR(MlpBlock(c, layer));
  }
  TENON_RETURN_IF_ERROR(AddNorm(c, c.weights.final_norm));
  return ComputeLogits(c);
}

}  // namespace tenon
