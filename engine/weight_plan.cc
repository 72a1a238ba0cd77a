#include "engine/weight_plan.h"

#include <utility>

namespace tenon {
namespace {

constexpr int64_t kAlignment = 256;

// Adds the parts of one layer.
class LayerPlan {
 public:
  LayerPlan(int32_t layer, std::vector<WeightPart>* parts)
      : layer_(layer),
        prefix_(StrCat("model.layers.", layer, ".")),
        parts_(parts) {}

  void Norm(WeightRole role, const char* name, int64_t size) {
    Add(role, name, 1, size).is_vector = true;
  }
  void Matrix(WeightRole role, const std::string& name, int64_t rows,
              int64_t cols) {
    Add(role, name, rows, cols);
  }
  // A rank's part of a matrix that is split by output, and by input.
  void RowSplit(WeightRole role, const std::string& name, int64_t full_rows,
                int64_t cols, int64_t first, int64_t count,
                int32_t expert = 0) {
    WeightPart& part = Add(role, name, full_rows, cols);
    part.first_row = first;
    part.rows = count;
    part.expert = expert;
  }
  void ColumnSplit(WeightRole role, const std::string& name, int64_t rows,
                   int64_t full_cols, int64_t first, int64_t count,
                   int32_t expert = 0) {
    WeightPart& part = Add(role, name, rows, full_cols);
    part.first_col = first;
    part.cols = count;
    part.expert = expert;
  }

 private:
  WeightPart& Add(WeightRole role, const std::string& name, int64_t rows,
                  int64_t cols) {
    WeightPart& part = parts_->emplace_back();
    part.role = role;
    part.layer = layer_;
    part.name = StrCat(prefix_, name, ".weight");
    part.full_rows = part.rows = rows;
    part.full_cols = part.cols = cols;
    return part;
  }

  int32_t layer_;
  std::string prefix_;
  std::vector<WeightPart>* parts_;
};

void PlanAttention(const ModelConfig& c, const LocalShape& local,
                   LayerPlan* plan) {
  const int64_t hidden = c.hidden_size;
  const int64_t dim = c.head_dim;
  plan->RowSplit(WeightRole::kQ, "self_attn.q_proj", c.num_heads * dim, hidden,
                 local.first_head * dim, local.num_heads * dim);
  plan->RowSplit(WeightRole::kK, "self_attn.k_proj", c.num_kv_heads * dim,
                 hidden, local.first_kv_head * dim, local.num_kv_heads * dim);
  plan->RowSplit(WeightRole::kV, "self_attn.v_proj", c.num_kv_heads * dim,
                 hidden, local.first_kv_head * dim, local.num_kv_heads * dim);
  plan->Norm(WeightRole::kQNorm, "self_attn.q_norm", dim);
  plan->Norm(WeightRole::kKNorm, "self_attn.k_norm", dim);
  plan->ColumnSplit(WeightRole::kO, "self_attn.o_proj", hidden,
                    c.num_heads * dim, local.first_head * dim,
                    local.num_heads * dim);
}

void PlanExperts(const ModelConfig& c, const LocalShape& local,
                 LayerPlan* plan) {
  const int64_t hidden = c.hidden_size;
  const int64_t full = c.moe_intermediate_size;
  const int64_t first = local.first_moe_intermediate;
  const int64_t count = local.moe_intermediate_size;
  plan->Matrix(WeightRole::kRouter, "mlp.gate", c.num_experts, hidden);
  for (int32_t e = 0; e < c.num_experts; ++e) {
    plan->RowSplit(WeightRole::kExpertGate,
                   StrCat("mlp.experts.", e, ".gate_proj"), full, hidden, first,
                   count, e);
    plan->RowSplit(WeightRole::kExpertUp, StrCat("mlp.experts.", e, ".up_proj"),
                   full, hidden, first, count, e);
  }
  for (int32_t e = 0; e < c.num_experts; ++e) {
    plan->ColumnSplit(WeightRole::kExpertDown,
                      StrCat("mlp.experts.", e, ".down_proj"), hidden, full,
                      first, count, e);
  }
}

void PlanDenseMlp(const ModelConfig& c, const LocalShape& local,
                  LayerPlan* plan) {
  const int64_t hidden = c.hidden_size;
  const int64_t full = c.intermediate_size;
  const int64_t first = local.first_intermediate;
  const int64_t count = local.intermediate_size;
  plan->RowSplit(WeightRole::kMlpGate, "mlp.gate_proj", full, hidden, first,
                 count);
  plan->RowSplit(WeightRole::kMlpUp, "mlp.up_proj", full, hidden, first, count);
  plan->ColumnSplit(WeightRole::kMlpDown, "mlp.down_proj", hidden, full, first,
                    count);
}

WeightPart WholeMatrix(WeightRole role, const char* name, int64_t rows,
                       int64_t cols) {
  WeightPart part;
  part.role = role;
  part.name = name;
  part.full_rows = part.rows = rows;
  part.full_cols = part.cols = cols;
  return part;
}

// Whether a part is the continuation of the matrix that its predecessor began.
bool ContinuesPredecessor(const WeightPart& part) {
  switch (part.role) {
    case WeightRole::kK:
    case WeightRole::kV:
    case WeightRole::kExpertUp:
      return true;
    case WeightRole::kExpertGate:
    case WeightRole::kExpertDown:
      return part.expert > 0;
    default:
      return false;
  }
}

// The view that a part which is no expert's matrix stands for.
TensorView* ViewOf(const WeightPart& part, Weights* weights) {
  LayerWeights& layer = weights->layers[part.layer];
  switch (part.role) {
    case WeightRole::kEmbedding:
      return &weights->embedding;
    case WeightRole::kFinalNorm:
      return &weights->final_norm;
    case WeightRole::kLmHead:
      return &weights->lm_head;
    case WeightRole::kInputNorm:
      return &layer.input_norm;
    case WeightRole::kQ:
      return &layer.q;
    case WeightRole::kK:
      return &layer.k;
    case WeightRole::kV:
      return &layer.v;
    case WeightRole::kQNorm:
      return &layer.q_norm;
    case WeightRole::kKNorm:
      return &layer.k_norm;
    case WeightRole::kO:
      return &layer.o;
    case WeightRole::kPostAttentionNorm:
      return &layer.post_attention_norm;
    case WeightRole::kRouter:
      return &layer.router;
    case WeightRole::kMlpGate:
      return &layer.mlp_gate;
    case WeightRole::kMlpUp:
      return &layer.mlp_up;
    case WeightRole::kMlpDown:
      return &layer.mlp_down;
    case WeightRole::kExpertGate:
    case WeightRole::kExpertUp:
    case WeightRole::kExpertDown:
      break;
  }
  return nullptr;
}

// The matrices that an expert's part is one of; null for every other part.
ExpertMatrices* ExpertsOf(const WeightPart& part, Weights* weights) {
  switch (part.role) {
    case WeightRole::kExpertGate:
      return &weights->layers[part.layer].gate;
    case WeightRole::kExpertUp:
      return &weights->layers[part.layer].up;
    case WeightRole::kExpertDown:
      return &weights->layers[part.layer].down;
    default:
      return nullptr;
  }
}

ExpertMatrices DescribeExperts(const ModelConfig& config,
                               const WeightPart& part, int64_t row_stride,
                               Device device) {
  ExpertMatrices experts;
  experts.num_experts = config.num_experts;
  experts.rows = part.rows;
  experts.cols = part.cols;
  experts.row_stride = row_stride;
  experts.dtype = part.dtype;
  experts.device = device;
  return experts;
}

}  // namespace

void PlanHead(const ModelConfig& config, std::vector<WeightPart>* parts) {
  parts->push_back(WholeMatrix(WeightRole::kEmbedding,
                               "model.embed_tokens.weight", config.vocab_size,
                               config.hidden_size));
}

void PlanLayer(const ModelConfig& config, const LocalShape& local,
               int32_t layer, std::vector<WeightPart>* parts) {
  LayerPlan plan(layer, parts);
  plan.Norm(WeightRole::kInputNorm, "input_layernorm", config.hidden_size);
  PlanAttention(config, local, &plan);
  plan.Norm(WeightRole::kPostAttentionNorm, "post_attention_layernorm",
            config.hidden_size);
  if (config.IsMoeLayer(layer)) {
    PlanExperts(config, local, &plan);
  } else {
    PlanDenseMlp(config, local, &plan);
  }
}

void PlanTail(const ModelConfig& config, std::vector<WeightPart>* parts) {
  parts->push_back(WholeMatrix(WeightRole::kFinalNorm, "model.norm.weight", 1,
                               config.hidden_size));
  parts->back().is_vector = true;
  if (config.tie_word_embeddings) return;
  parts->push_back(WholeMatrix(WeightRole::kLmHead, "lm_head.weight",
                               config.vocab_size, config.hidden_size));
}

int64_t AssignOffsets(std::vector<WeightPart>* parts) {
  int64_t end = 0;
  for (WeightPart& part : *parts) {
    if (!ContinuesPredecessor(part)) {
      end = (end + kAlignment - 1) / kAlignment * kAlignment;
    }
    part.offset = end;
    end += part.bytes();
  }
  return end;
}

void SetPackedViews(const ModelConfig& config,
                    const std::vector<WeightPart>& parts, void* base,
                    Weights* weights) {
  for (const WeightPart& part : parts) {
    void* data = static_cast<char*>(base) + part.offset;
    ExpertMatrices* experts = ExpertsOf(part, weights);
    if (experts == nullptr) {
      *ViewOf(part, weights) =
          part.is_vector
              ? MakeTensor(data, part.dtype, weights->device, {part.cols})
              : MakeTensor(data, part.dtype, weights->device,
                           {part.rows, part.cols});
    } else if (part.expert == 0) {
      *experts = DescribeExperts(config, part, part.cols, weights->device);
      experts->data = data;
      const bool in_w13 = part.role != WeightRole::kExpertDown;
      experts->expert_stride = (in_w13 ? 2 : 1) * part.rows * part.cols;
    }
  }
  if (config.tie_word_embeddings) weights->lm_head = weights->embedding;
  if (weights->device.type != DeviceType::kCuda) return;
  for (LayerWeights& layer : weights->layers) {
    layer.qkv = layer.q;
    layer.qkv.shape[0] += layer.k.shape[0] + layer.v.shape[0];
  }
}

void SetMappedViews(const ModelConfig& config,
                    const std::vector<WeightPart>& parts, Weights* weights) {
  size_t num_matrices = 0;
  for (const WeightPart& part : parts) {
    num_matrices += ExpertsOf(part, weights) != nullptr;
  }
  weights->expert_tables.resize(num_matrices);
  const void** unused = weights->expert_tables.data();
  for (const WeightPart& part : parts) {
    ExpertMatrices* experts = ExpertsOf(part, weights);
    if (experts == nullptr) {
      *ViewOf(part, weights) = part.source;
      continue;
    }
    if (part.expert == 0) {
      *experts =
          DescribeExperts(config, part, part.source.stride[0], weights->device);
      experts->table = std::exchange(unused, unused + config.num_experts);
    }
    // The table is in expert_tables, which is not constant here.
    const_cast<const void**>(experts->table)[part.expert] = part.source.data;
  }
  if (config.tie_word_embeddings) weights->lm_head = weights->embedding;
}

StatusOr<Weights> AllocateWeights(const ModelConfig& config, Device device,
                                  std::vector<WeightPart>* parts) {
  Weights weights;
  weights.device = device;
  weights.bytes = AssignOffsets(parts);
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  StatusOr<Buffer> buffer =
      Buffer::Allocate(device, static_cast<size_t>(weights.bytes));
  if (!buffer.ok()) {
    return Status(buffer.status().code(),
                  StrCat("weights need ", weights.bytes, " bytes on ",
                         DeviceTypeName(device.type), ":", device.index, ": ",
                         buffer.status().message()));
  }
  weights.buffer = *std::move(buffer);
  SetPackedViews(config, *parts, weights.buffer.data(), &weights);
  return weights;
}

}  // namespace tenon
