#ifndef TENON_ENGINE_MODEL_CONFIG_H_
#define TENON_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ops/core/status.h"

namespace tenon {

enum class Architecture : int32_t {
  kQwen3Moe = 0,  // Qwen3MoeForCausalLM
  kQwen3 = 1,     // Qwen3ForCausalLM
};

const char* ArchitectureName(Architecture architecture);

// How a checkpoint scales its float8_e4m3 matrices: an element stands for
// element * scale. Attention projections, experts and dense MLPs may be such;
// embedding, norms, router and LM head never are.
enum class Fp8Scaling : int32_t {
  kNone = 0,      // no matrix is float8_e4m3
  kBlocks = 1,    // a scale for each 128 x 128 elements; at the edges fewer
  kChannels = 2,  // a scale for each row
};
inline constexpr int32_t kFp8BlockSize = 128;

// Shapes and flags of a model, under the names of Hugging Face's config.json.
struct ModelConfig {
  Architecture architecture = Architecture::kQwen3Moe;
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t vocab_size = 0;
  int32_t max_position_embeddings = 0;
  int32_t intermediate_size = 0;  // of a dense layer

  // Mixture of experts; num_experts is 0 for a dense model.
  int32_t num_experts = 0;
  int32_t num_experts_per_tok = 0;
  int32_t moe_intermediate_size = 0;  // of one expert
  bool norm_topk_prob = false;        // chosen weights are scaled to sum to 1
  int32_t decoder_sparse_step = 1;    // every such layer has experts ...
  std::vector<int32_t> mlp_only_layers;  // ... but these, which are dense

  float rms_norm_eps = 1e-6f;
  double rope_theta = 0.0;
  bool tie_word_embeddings = false;  // lm_head is the embedding

  Fp8Scaling fp8_scaling = Fp8Scaling::kNone;
  std::string fp8_scale_suffix;  // "_scale_inv": <name>.weight_scale_inv has
                                 // the scales of <name>.weight

  int32_t bos_token_id = -1;  // -1: none
  std::vector<int32_t> eos_token_ids;

  // Of a config that is valid.
  bool IsMoeLayer(int32_t layer) const;
  bool HasMoeLayers() const;
  bool HasDenseLayers() const;

  // InvalidArgument naming a field that no model can have, or that the ops do
  // not cover. A config that passes has no product of sizes that overflows.
  Status Validate() const;
};

// Reads the text of a config.json and validates it. Accepts rope_theta at the
// top and, as transformers 5 writes it, in rope_parameters; and num_experts as
// well as num_local_experts. What would change the results and is not
// implemented (sliding windows, scaled rope, attention biases, quantisation
// other than fp8, other architectures) is Unimplemented, never ignored. Errors
// begin with source_name and name the field.
StatusOr<ModelConfig> ParseModelConfig(std::string_view json,
                                       const std::string& source_name);

// Reads config.json of a model directory, and the end-of-sequence ids of its
// generation_config.json where there is one.
StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

}  // namespace tenon

#endif  // TENON_ENGINE_MODEL_CONFIG_H_
