#include "engine/model_config.h"

#include <algorithm>

#include "ops/core/validate.h"

namespace tenon {
namespace {

constexpr char kWhat[] = "ModelConfig";

// Far above every published model, and low enough that no product of two of
// them overflows.
constexpr int64_t kMaxSize = int64_t{1} << 20;
constexpr int64_t kMaxVocab = int64_t{1} << 20;  // of the sampler
constexpr int64_t kMaxPositions = int64_t{1} << 26;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxExperts = 1024;  // of the router
constexpr int64_t kMaxTopK = 32;       // of the router
constexpr double kMaxParameters = 1e15;

double NumParameters(const ModelConfig& c) {
  const double hidden = c.hidden_size;
  const double attention =
      2.0 * hidden * (double{1} * c.num_heads + c.num_kv_heads) * c.head_dim;
  double total = 2.0 * c.vocab_size * hidden;
  for (int32_t layer = 0; layer < c.num_layers; ++layer) {
    total += attention;
    total += c.IsMoeLayer(layer)
                 ? hidden * c.num_experts * (3.0 * c.moe_intermediate_size + 1)
                 : 3.0 * hidden * c.intermediate_size;
  }
  return total;
}

Status ValidateMoe(const ModelConfig& c) {
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_experts", c.num_experts, 1, kMaxExperts));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "num_experts_per_tok",
                                   c.num_experts_per_tok, 1,
                                   std::min<int64_t>(c.num_experts, kMaxTopK)));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "moe_intermediate_size",
                                   c.moe_intermediate_size, 1, kMaxSize));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "decoder_sparse_step",
                                   c.decoder_sparse_step, 1, kMaxLayers));
  if (c.mlp_only_layers.size() > static_cast<size_t>(c.num_layers)) {
    return InvalidArgumentError(
        kWhat, ": mlp_only_layers has ", c.mlp_only_layers.size(),
        " layers, expected at most num_hidden_layers (", c.num_layers, ")");
  }
  for (int32_t layer : c.mlp_only_layers) {
    TENON_RETURN_IF_ERROR(
        CheckRange(kWhat, "mlp_only_layers", layer, 0, c.num_layers - 1));
  }
  return Status();
}

Status ValidateTokens(const ModelConfig& c) {
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "bos_token_id", c.bos_token_id, -1, c.vocab_size - 1));
  for (int32_t token : c.eos_token_ids) {
    TENON_RETURN_IF_ERROR(
        CheckRange(kWhat, "eos_token_id", token, 0, c.vocab_size - 1));
  }
  return Status();
}

}  // namespace

const char* ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kQwen3Moe:
      return "Qwen3MoeForCausalLM";
    case Architecture::kQwen3:
      return "Qwen3ForCausalLM";
  }
  return "unknown";
}

bool ModelConfig::IsMoeLayer(int32_t layer) const {
  return num_experts > 0 && (layer + 1) % decoder_sparse_step == 0 &&
         std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) ==
             mlp_only_layers.end();
}

bool ModelConfig::HasMoeLayers() const {
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    if (IsMoeLayer(layer)) return true;
  }
  return false;
}

bool ModelConfig::HasDenseLayers() const {
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    if (!IsMoeLayer(layer)) return true;
  }
  return false;
}

Status ModelConfig::Validate() const {
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "hidden_size", hidden_size, 1, kMaxSize));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_hidden_layers", num_layers, 1, kMaxLayers));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_attention_heads", num_heads, 1, kMaxHeads));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_key_value_heads", num_kv_heads, 1, kMaxHeads));
  if (num_heads % num_kv_heads != 0) {
    return InvalidArgumentError(
        kWhat, ": num_attention_heads is ", num_heads,
        ", expected a multiple of num_key_value_heads (", num_kv_heads, ")");
  }
  if (head_dim != 64 && head_dim != 128 && head_dim != 256) {
    return InvalidArgumentError(kWhat, ": head_dim is ", head_dim,
                                ", expected 64, 128 or 256");
  }
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "vocab_size", vocab_size, 1, kMaxVocab));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "max_position_embeddings",
                                   max_position_embeddings, 1, kMaxPositions));
  if (architecture == Architecture::kQwen3Moe) {
    TENON_RETURN_IF_ERROR(ValidateMoe(*this));
  } else {
    TENON_RETURN_IF_ERROR(CheckRange(kWhat, "num_experts", num_experts, 0, 0));
  }
  if (HasDenseLayers()) {
    TENON_RETURN_IF_ERROR(
        CheckRange(kWhat, "intermediate_size", intermediate_size, 1, kMaxSize));
  }
  TENON_RETURN_IF_ERROR(
      CheckFinite(kWhat, "rms_norm_eps", rms_norm_eps, 1e-30, 1.0));
  TENON_RETURN_IF_ERROR(
      CheckFinite(kWhat, "rope_theta", rope_theta, 1.0, 1e12));
  TENON_RETURN_IF_ERROR(ValidateTokens(*this));
  const double parameters = NumParameters(*this);
  if (!(parameters <= kMaxParameters)) {
    return InvalidArgumentError(kWhat, ": the sizes make a model of ",
                                parameters, " parameters, expected at most ",
                                kMaxParameters);
  }
  return Status();
}

}  // namespace tenon
