#include <utility>

#include "engine/weight_plan.h"

namespace tenon {
namespace {

// A matrix of a layer and its scales; or a tensor that has none.
struct Slot {
  TensorView* tensor = nullptr;
  TensorView* scales = nullptr;
};

// What a part that is no expert's matrix stands for.
Slot SlotOf(const WeightPart& part, Weights* weights) {
  LayerWeights& layer = weights->layers[part.layer];
  switch (part.role) {
    case WeightRole::kEmbedding:
      return {&weights->embedding};
    case WeightRole::kFinalNorm:
      return {&weights->final_norm};
    case WeightRole::kLmHead:
      return {&weights->lm_head};
    case WeightRole::kInputNorm:
      return {&layer.input_norm};
    case WeightRole::kQ:
      return {&layer.q, &layer.q_scales};
    case WeightRole::kK:
      return {&layer.k, &layer.k_scales};
    case WeightRole::kV:
      return {&layer.v, &layer.v_scales};
    case WeightRole::kQNorm:
      return {&layer.q_norm};
    case WeightRole::kKNorm:
      return {&layer.k_norm};
    case WeightRole::kO:
      return {&layer.o, &layer.o_scales};
    case WeightRole::kPostAttentionNorm:
      return {&layer.post_attention_norm};
    case WeightRole::kRouter:
      return {&layer.router};
    case WeightRole::kMlpGate:
      return {&layer.mlp_gate, &layer.mlp_gate_scales};
    case WeightRole::kMlpUp:
      return {&layer.mlp_up, &layer.mlp_up_scales};
    case WeightRole::kMlpDown:
      return {&layer.mlp_down, &layer.mlp_down_scales};
    case WeightRole::kExpertGate:
    case WeightRole::kExpertUp:
    case WeightRole::kExpertDown:
      break;
  }
  return {};
}

// The matrices that an expert's part is one of.
ExpertMatrices* ExpertsOf(const WeightPart& part, Weights* weights) {
  LayerWeights& layer = weights->layers[part.layer];
  if (part.role == WeightRole::kExpertGate) return &layer.gate;
  return part.role == WeightRole::kExpertUp ? &layer.up : &layer.down;
}

// The rank's part in a mapped file.
TensorView MappedView(const WeightPart& part) {
  if (part.is_vector) return part.source;
  return Columns(Rows(part.source, part.rows.first, part.rows.size),
                 part.cols.first, part.cols.size);
}

void SetTensor(const WeightPart& part, char* base, Weights* weights) {
  const Slot slot = SlotOf(part, weights);
  const Device device = weights->device;
  char* data = base + part.offset;
  if (part.placement == Placement::kMapped) {
    *slot.tensor = MappedView(part);
  } else if (part.is_vector) {
    *slot.tensor = MakeTensor(data, part.dtype, device, {part.cols.size});
  } else {
    *slot.tensor =
        MakeTensor(data, part.dtype, device, {part.rows.size, part.cols.size});
  }
  if (part.scaling == Fp8Scaling::kNone) return;
  char* scales = base + part.scales_offset;
  *slot.scales =
      part.scaling == Fp8Scaling::kBlocks
          ? MakeMatrix(scales, DType::kFloat32, device, part.scale_rows(),
                       part.scale_cols(), part.scale_stride())
          : MakeTensor(scales, DType::kFloat32, device, {part.scale_rows()});
}

// Of all experts of a layer, from the part of the first one.
ExpertMatrices DescribeExperts(const ModelConfig& config,
                               const WeightPart& part, char* base,
                               Device device) {
  // Gate and up of an expert follow one another.
  const int64_t matrices = part.role == WeightRole::kExpertDown ? 1 : 2;
  ExpertMatrices experts;
  experts.num_experts = config.num_experts;
  experts.rows = part.rows.size;
  experts.cols = part.cols.size;
  experts.dtype = part.dtype;
  experts.device = device;
  if (part.placement == Placement::kMapped) {
    experts.row_stride = part.source.stride[0];
  } else {
    experts.data = base + part.offset;
    experts.row_stride = part.cols.size;
    experts.expert_stride = matrices * part.rows.size * part.cols.size;
  }
  if (part.scaling == Fp8Scaling::kNone) return experts;
  ExpertScales& scales = experts.scales;
  scales.data = reinterpret_cast<const float*>(base + part.scales_offset);
  scales.row_stride = part.scale_stride();
  scales.expert_stride = matrices * part.scale_rows() * part.scale_stride();
  const bool blocks = part.scaling == Fp8Scaling::kBlocks;
  scales.block_rows = blocks ? kFp8BlockSize : 1;
  scales.block_cols = blocks ? kFp8BlockSize : 0;
  return experts;
}

// Whether the rows of `next` are those behind the last one of `first`.
bool Follows(const TensorView& first, const TensorView& next) {
  return first.dtype == next.dtype && first.rank == next.rank &&
         first.stride[0] == next.stride[0] &&
         Rows(first, first.shape[0], 0).data == next.data;
}

// `next` behind `first`: one tensor with the rows of both.
void AppendRows(const TensorView& next, TensorView* first) {
  first->shape[0] += next.shape[0];
}

// q, k and v as one matrix, if they are one in memory and so are their scales:
// blocks of scales must not begin within a matrix.
void SetQkv(LayerWeights* layer) {
  if (!Follows(layer->q, layer->k) || !Follows(layer->k, layer->v)) return;
  const bool fp8 = layer->q.dtype == DType::kFloat8E4M3;
  if (fp8) {
    if (!Follows(layer->q_scales, layer->k_scales) ||
        !Follows(layer->k_scales, layer->v_scales)) {
      return;
    }
    if (layer->q_scales.rank == 2 && (layer->q.shape[0] % kFp8BlockSize != 0 ||
                                      layer->k.shape[0] % kFp8BlockSize != 0)) {
      return;
    }
    layer->qkv_scales = layer->q_scales;
    AppendRows(layer->k_scales, &layer->qkv_scales);
    AppendRows(layer->v_scales, &layer->qkv_scales);
  }
  layer->qkv = layer->q;
  AppendRows(layer->k, &layer->qkv);
  AppendRows(layer->v, &layer->qkv);
}

}  // namespace

void SetViews(const ModelConfig& config, const std::vector<WeightPart>& parts,
              void* base, Weights* weights) {
  size_t num_mapped = 0;
  for (const WeightPart& part : parts) {
    num_mapped += IsExpert(part.role) && part.placement == Placement::kMapped;
  }
  weights->expert_tables.resize(num_mapped);
  const void** unused = weights->expert_tables.data();
  for (const WeightPart& part : parts) {
    if (!IsExpert(part.role)) {
      SetTensor(part, static_cast<char*>(base), weights);
      continue;
    }
    ExpertMatrices* experts = ExpertsOf(part, weights);
    const bool mapped = part.placement == Placement::kMapped;
    if (part.expert == 0) {
      *experts = DescribeExperts(config, part, static_cast<char*>(base),
                                 weights->device);
      if (mapped) {
        experts->table = std::exchange(unused, unused + config.num_experts);
      }
    }
    if (mapped) {
      // The table is in expert_tables, which is not constant here.
      const_cast<const void**>(experts->table)[part.expert] =
          MappedView(part).data;
    }
  }
  if (config.tie_word_embeddings) weights->lm_head = weights->embedding;
  if (weights->device.type != DeviceType::kCuda) return;
  for (LayerWeights& layer : weights->layers) SetQkv(&layer);
}

}  // namespace tenon
