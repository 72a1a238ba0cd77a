#include "engine/weight_plan.h"

#include <utility>

namespace tenon {
namespace {

constexpr int64_t kAlignment = 256;

int64_t NumBlocks(int64_t size) {
  return (size + kFp8BlockSize - 1) / kFp8BlockSize;
}

// All of a tensor, to begin with.
void SetShape(int64_t rows, int64_t cols, WeightPart* part) {
  part->full_rows = rows;
  part->full_cols = cols;
  part->rows = MakeShare(0, rows);
  part->cols = MakeShare(0, cols);
}

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
                int64_t cols, const Share& rows, int32_t expert = 0) {
    WeightPart& part = Add(role, name, full_rows, cols);
    part.rows = rows;
    part.expert = expert;
  }
  void ColumnSplit(WeightRole role, const std::string& name, int64_t rows,
                   int64_t full_cols, const Share& cols, int32_t expert = 0) {
    WeightPart& part = Add(role, name, rows, full_cols);
    part.cols = cols;
    part.expert = expert;
  }

 private:
  WeightPart& Add(WeightRole role, const std::string& name, int64_t rows,
                  int64_t cols) {
    WeightPart& part = parts_->emplace_back();
    part.role = role;
    part.layer = layer_;
    part.name = StrCat(prefix_, name, ".weight");
    SetShape(rows, cols, &part);
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
  const Share q = MakeShare(local.first_head * dim, local.num_heads * dim);
  const Share kv =
      MakeShare(local.first_kv_head * dim, local.num_kv_heads * dim);
  plan->RowSplit(WeightRole::kQ, "self_attn.q_proj", c.num_heads * dim, hidden,
                 q);
  plan->RowSplit(WeightRole::kK, "self_attn.k_proj", c.num_kv_heads * dim,
                 hidden, kv);
  plan->RowSplit(WeightRole::kV, "self_attn.v_proj", c.num_kv_heads * dim,
                 hidden, kv);
  plan->Norm(WeightRole::kQNorm, "self_attn.q_norm", dim);
  plan->Norm(WeightRole::kKNorm, "self_attn.k_norm", dim);
  plan->ColumnSplit(WeightRole::kO, "self_attn.o_proj", hidden,
                    c.num_heads * dim, q);
}

void PlanExperts(const ModelConfig& c, const LocalShape& local,
                 LayerPlan* plan) {
  const int64_t hidden = c.hidden_size;
  const int64_t full = c.moe_intermediate_size;
  const Share& share = local.moe_intermediate;
  plan->Matrix(WeightRole::kRouter, "mlp.gate", c.num_experts, hidden);
  for (int32_t e = 0; e < c.num_experts; ++e) {
    plan->RowSplit(WeightRole::kExpertGate,
                   StrCat("mlp.experts.", e, ".gate_proj"), full, hidden, share,
                   e);
    plan->RowSplit(WeightRole::kExpertUp, StrCat("mlp.experts.", e, ".up_proj"),
                   full, hidden, share, e);
  }
  for (int32_t e = 0; e < c.num_experts; ++e) {
    plan->ColumnSplit(WeightRole::kExpertDown,
                      StrCat("mlp.experts.", e, ".down_proj"), hidden, full,
                      share, e);
  }
}

void PlanDenseMlp(const ModelConfig& c, const LocalShape& local,
                  LayerPlan* plan) {
  const int64_t hidden = c.hidden_size;
  const int64_t full = c.intermediate_size;
  const Share& share = local.intermediate;
  plan->RowSplit(WeightRole::kMlpGate, "mlp.gate_proj", full, hidden, share);
  plan->RowSplit(WeightRole::kMlpUp, "mlp.up_proj", full, hidden, share);
  plan->ColumnSplit(WeightRole::kMlpDown, "mlp.down_proj", hidden, full, share);
}

WeightPart WholeMatrix(WeightRole role, const char* name, int64_t rows,
                       int64_t cols) {
  WeightPart part;
  part.role = role;
  part.name = name;
  SetShape(rows, cols, &part);
  return part;
}

// Whether a part's matrix is the continuation of the one before it.
bool ContinuesRole(const WeightPart& part) {
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

// Lays out one region.
class Region {
 public:
  explicit Region(int64_t begin) : end_(begin) {}

  // `continues`: right behind the last one.
  int64_t Take(int64_t bytes, bool continues) {
    if (!continues) end_ = (end_ + kAlignment - 1) / kAlignment * kAlignment;
    return std::exchange(end_, end_ + bytes);
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_;
};

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

int64_t WeightPart::scale_rows() const {
  switch (scaling) {
    case Fp8Scaling::kBlocks:
      return NumBlocks(rows.size);
    case Fp8Scaling::kChannels:
      return rows.size;
    case Fp8Scaling::kNone:
      break;
  }
  return 0;
}

int64_t WeightPart::scale_cols() const {
  return scaling == Fp8Scaling::kBlocks ? NumBlocks(cols.size) : 1;
}

int64_t WeightPart::scale_stride() const {
  return scaling == Fp8Scaling::kBlocks ? (scale_cols() + 3) / 4 * 4 : 1;
}

bool IsExpert(WeightRole role) {
  return role == WeightRole::kExpertGate || role == WeightRole::kExpertUp ||
         role == WeightRole::kExpertDown;
}

bool MayBeFp8(WeightRole role) {
  switch (role) {
    case WeightRole::kQ:
    case WeightRole::kK:
    case WeightRole::kV:
    case WeightRole::kO:
    case WeightRole::kMlpGate:
    case WeightRole::kMlpUp:
    case WeightRole::kMlpDown:
      return true;
    default:
      return IsExpert(role);
  }
}

PackedLayout AssignOffsets(std::vector<WeightPart>* parts) {
  // Visits the parts that `chosen` takes, with whether one continues the matrix
  // of its predecessor in the same region.
  const auto for_each = [&](const auto& chosen, const auto& visit) {
    const WeightPart* last = nullptr;
    for (WeightPart& part : *parts) {
      const bool taken = chosen(part);
      if (taken) {
        visit(&part, last != nullptr && ContinuesRole(part) &&
                         last->dtype == part.dtype &&
                         last->scaling == part.scaling);
      }
      last = taken ? &part : nullptr;
    }
  };
  const auto place_elements = [&](Placement placement, int64_t begin) {
    Region region(begin);
    for_each([&](const WeightPart& p) { return p.placement == placement; },
             [&](WeightPart* part, bool continues) {
               part->offset = region.Take(part->bytes(), continues);
             });
    return region.end();
  };
  const auto place_scales = [&](bool quantized, int64_t begin) {
    Region region(begin);
    for_each(
        [&](const WeightPart& p) {
          return p.scaling != Fp8Scaling::kNone &&
                 (p.placement == Placement::kQuantized) == quantized;
        },
        [&](WeightPart* part, bool continues) {
          part->scales_offset = region.Take(part->scale_bytes(), continues);
        });
    return region.end();
  };
  PackedLayout layout;
  layout.packed_end = place_elements(Placement::kPacked, 0);
  layout.scales_begin = layout.packed_end;
  layout.scales_end = place_scales(false, layout.scales_begin);
  layout.quantized_end =
      place_elements(Placement::kQuantized, layout.scales_end);
  layout.end = place_scales(true, layout.quantized_end);
  return layout;
}

StatusOr<Weights> AllocateWeights(const ModelConfig& config, Device device,
                                  std::vector<WeightPart>* parts,
                                  PackedLayout* layout) {
  *layout = AssignOffsets(parts);
  Weights weights;
  weights.device = device;
  weights.bytes = layout->end;
  for (const WeightPart& part : *parts) {
    if (part.placement == Placement::kMapped) weights.bytes += part.bytes();
  }
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  if (layout->end > 0) {
    StatusOr<Buffer> buffer =
        Buffer::Allocate(device, static_cast<size_t>(layout->end));
    if (!buffer.ok()) {
      return Status(buffer.status().code(),
                    StrCat("weights need ", layout->end, " bytes on ",
                           DeviceTypeName(device.type), ":", device.index, ": ",
                           buffer.status().message()));
    }
    weights.buffer = *std::move(buffer);
  }
  SetViews(config, *parts, weights.buffer.data(), &weights);
  return weights;
}

}  // namespace tenon
