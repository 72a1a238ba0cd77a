#include "engine/activations.h"

#include <algorithm>
#include <cmath>

#include "ops/attention/attention.h"
#include "ops/core/workspace.h"
#include "ops/linear/linear.h"
#include "ops/moe/moe.h"
#include "ops/sampler/sampler.h"

namespace tenon {
namespace {

// A row-major tensor cut from the arena.
TensorView Cut(WorkspaceCutter* cutter, DType dtype, Device device,
               std::initializer_list<int64_t> shape) {
  TensorView view = MakeTensor(nullptr, dtype, device, shape);
  view.data = cutter->TakeBytes(static_cast<size_t>(NumElements(view)) *
                                DTypeSize(dtype));
  return view;
}

constexpr int64_t kAlignment = 256;

// A tensor that stands for one of this shape in a workspace query. Queries read
// shapes alone, but reject null data.
TensorView Shaped(DType dtype, Device device,
                  std::initializer_list<int64_t> shape) {
  return MakeTensor(reinterpret_cast<void*>(kAlignment), dtype, device, shape);
}

struct Shapes {
  const ModelConfig& config;
  const Weights& weights;
  const StepLimits& limits;
  CublasLt* cublas_lt;
  bool batch_invariant;

  DType dtype() const { return weights.dtype; }
  Device device() const { return weights.device; }
  // The same in every layer.
  int64_t q_width() const { return weights.layers[0].q.shape[0]; }
  int64_t kv_width() const { return weights.layers[0].k.shape[0]; }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  // Of dense layers; 0 where there are none.
  int64_t intermediate() const {
    for (const LayerWeights& layer : weights.layers) {
      if (layer.mlp_gate.present()) return layer.mlp_gate.shape[0];
    }
    return 0;
  }
};

size_t LinearBytes(const Shapes& s, int64_t tokens, const TensorView& weight,
                   const TensorView& scales, DType out_dtype) {
  LinearParams p;
  p.x = Shaped(s.dtype(), s.device(), {tokens, weight.shape[1]});
  p.weight = weight;
  p.weight_scales = scales;
  p.out = Shaped(out_dtype, s.device(), {tokens, weight.shape[0]});
  p.cublas_lt = s.cublas_lt;
  p.batch_invariant = s.batch_invariant;
  const size_t bytes = LinearWorkspaceBytes(p);
  // For few tokens DecodeStep lets a product add the residual.
  p.x.shape[0] = p.out.shape[0] = std::min(tokens, kLinearFewFp8Tokens);
  p.residual = p.out;
  return std::max(bytes, LinearWorkspaceBytes(p));
}

size_t AttentionBytes(const Shapes& s) {
  const int64_t tokens = s.limits.max_tokens;
  const int64_t rows = s.limits.max_rows;
  const int64_t pages = s.limits.max_pages_per_row;
  const int64_t dim = s.config.head_dim;
  AttentionParams p;
  p.q = p.out = Shaped(s.dtype(), s.device(), {tokens, s.q_width() / dim, dim});
  const DType cache_dtype = s.limits.kv_cache_dtype == DType::kInvalid
                                ? s.dtype()
                                : s.limits.kv_cache_dtype;
  p.k_cache = p.v_cache =
      Shaped(cache_dtype, s.device(),
             {rows * pages, s.limits.page_size, s.kv_width() / dim, dim});
  p.block_table = Shaped(DType::kInt32, s.device(), {rows, pages});
  p.query_start = Shaped(DType::kInt32, s.device(), {rows + 1});
  p.kv_len = Shaped(DType::kInt32, s.device(), {rows});
  p.scale = 1.0f;
  p.batch_invariant = s.batch_invariant;
  return AttentionWorkspaceBytes(p);
}

size_t MoeBytes(const Shapes& s, const LayerWeights& layer) {
  const int64_t tokens = s.limits.max_tokens;
  const int64_t top_k = s.config.num_experts_per_tok;
  MoeParams p;
  p.x = p.out = Shaped(s.dtype(), s.device(), {tokens, s.config.hidden_size});
  p.topk_weights = Shaped(DType::kFloat32, s.device(), {tokens, top_k});
  p.topk_ids = Shaped(DType::kInt32, s.device(), {tokens, top_k});
  p.gate = layer.gate;
  p.up = layer.up;
  p.down = layer.down;
  p.batch_invariant = s.batch_invariant;
  return MoeWorkspaceBytes(p);
}

size_t SamplerBytes(const Shapes& s) {
  SamplerParams p;
  p.logits = Shaped(DType::kFloat32, s.device(),
                    {s.limits.max_logit_rows, s.config.vocab_size});
  const LogitEdit edit;
  if (s.limits.max_logit_edits > 0) p.edits = &edit;  // that there are some
  return SamplerWorkspaceBytes(p);
}

// The most that any op of a layer asks for.
size_t LayerBytes(const Shapes& s, const LayerWeights& w) {
  const int64_t tokens = s.limits.max_tokens;
  const auto linear = [&](const TensorView& weight, const TensorView& scales,
                          DType out_dtype) {
    if (!weight.present()) return size_t{0};
    return LinearBytes(s, tokens, weight, scales, out_dtype);
  };
  return std::max(
      {linear(w.qkv, w.qkv_scales, s.dtype()),
       linear(w.q, w.q_scales, s.dtype()), linear(w.k, w.k_scales, s.dtype()),
       linear(w.v, w.v_scales, s.dtype()), linear(w.o, w.o_scales, s.dtype()),
       linear(w.mlp_gate, w.mlp_gate_scales, s.dtype()),
       linear(w.mlp_up, w.mlp_up_scales, s.dtype()),
       linear(w.mlp_down, w.mlp_down_scales, s.dtype()),
       linear(w.router, TensorView(), DType::kFloat32),
       w.router.present() ? MoeBytes(s, w) : size_t{0}});
}

// The most that any op of a step asks for.
size_t WorkspaceBytes(const Shapes& s) {
  size_t bytes =
      std::max({LinearBytes(s, s.limits.max_logit_rows, s.weights.lm_head,
                            TensorView(), DType::kFloat32),
                AttentionBytes(s), SamplerBytes(s)});
  for (const LayerWeights& layer : s.weights.layers) {
    bytes = std::max(bytes, LayerBytes(s, layer));
  }
  return bytes;
}

// Fills `a` from `cutter`; called once to measure and once to carve.
void Carve(const Shapes& s, int64_t id_layers, size_t workspace_size,
           WorkspaceCutter* cutter, Activations* a) {
  const int64_t tokens = s.limits.max_tokens;
  const int64_t hidden = s.config.hidden_size;
  a->residual = Cut(cutter, s.dtype(), s.device(), {tokens, hidden});
  a->normed = Cut(cutter, s.dtype(), s.device(), {tokens, hidden});
  a->block_out = Cut(cutter, s.dtype(), s.device(), {tokens, hidden});
  a->qkv = Cut(cutter, s.dtype(), s.device(), {tokens, s.qkv_width()});
  if (s.config.HasMoeLayers()) {
    const int64_t top_k = s.config.num_experts_per_tok;
    a->router_logits = Cut(cutter, DType::kFloat32, s.device(),
                           {tokens, s.config.num_experts});
    a->topk_weights = Cut(cutter, DType::kFloat32, s.device(), {tokens, top_k});
    a->topk_ids =
        Cut(cutter, DType::kInt32, s.device(), {id_layers, tokens, top_k});
    a->expert_rows = Cut(cutter, s.dtype(), s.device(), {1, top_k, hidden});
  }
  if (s.config.HasDenseLayers()) {
    const int64_t intermediate = s.intermediate();
    a->mlp_gate_up =
        Cut(cutter, s.dtype(), s.device(), {tokens, 2 * intermediate});
    a->mlp_hidden = Cut(cutter, s.dtype(), s.device(), {tokens, intermediate});
  }
  a->logit_hidden =
      Cut(cutter, s.dtype(), s.device(), {s.limits.max_logit_rows, hidden});
  a->logits = Cut(cutter, DType::kFloat32, s.device(),
                  {s.limits.max_logit_rows, s.config.vocab_size});
  a->cos_sin = Cut(cutter, DType::kFloat32, s.device(),
                   {s.limits.max_context, s.config.head_dim});
  a->workspace = cutter->TakeBytes(workspace_size);
  a->workspace_size = workspace_size;
}

}  // namespace

StatusOr<Activations> Activations::Create(
    const ModelConfig& config, const Weights& weights, const StepLimits& limits,
    bool keep_expert_ids, CublasLt* cublas_lt, bool batch_invariant) {
  const Device device = weights.device;
  const Shapes shapes{config, weights, limits, cublas_lt, batch_invariant};
  const size_t workspace_size = WorkspaceBytes(shapes);
  const int64_t id_layers = keep_expert_ids ? config.num_layers : 1;

  Activations a;
  WorkspaceCutter measure(nullptr);
  Carve(shapes, id_layers, workspace_size, &measure, &a);
  StatusOr<Buffer> arena = Buffer::Allocate(device, measure.size());
  TENON_RETURN_IF_ERROR(arena.status());
  a.arena = *std::move(arena);
  WorkspaceCutter cutter(a.arena.data());
  Carve(shapes, id_layers, workspace_size, &cutter, &a);

  const std::vector<float> table =
      RotaryTable(limits.max_context, config.head_dim, config.rope_theta);
  TENON_RETURN_IF_ERROR(CopyMemory(a.cos_sin.data, device, table.data(),
                                   Device(), table.size() * sizeof(float),
                                   Stream()));
  TENON_RETURN_IF_ERROR(Synchronize(device, Stream()));
  return a;
}

TensorView Activations::TopkIds(int32_t layer, int64_t tokens) const {
  const int64_t slice = std::min<int64_t>(layer, topk_ids.shape[0] - 1);
  const int64_t top_k = topk_ids.shape[2];
  return MakeTensor(topk_ids.As<int32_t>() + slice * tokens * top_k,
                    topk_ids.dtype, topk_ids.device, {tokens, top_k});
}

std::vector<float> RotaryTable(int64_t max_positions, int32_t rotary_dim,
                               double theta) {
  const int32_t half = rotary_dim / 2;
  std::vector<float> table(static_cast<size_t>(max_positions * rotary_dim));
  for (int32_t i = 0; i < half; ++i) {
    const double frequency = std::pow(theta, -2.0 * i / rotary_dim);
    for (int64_t position = 0; position < max_positions; ++position) {
      const double angle = static_cast<double>(position) * frequency;
      float* row = &table[static_cast<size_t>(position * rotary_dim)];
      row[i] = static_cast<float>(std::cos(angle));
      row[half + i] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

}  // namespace tenon
