#ifndef TENON_TESTS_TESTING_BENCH_MODEL_H_
#define TENON_TESTS_TESTING_BENCH_MODEL_H_

#include "engine/model_config.h"

namespace tenon::testing {

// About as little as a model can be: its steps leave the service's own time to
// be seen.
inline ModelConfig SmallestModel() {
  ModelConfig config;
  config.architecture = Architecture::kQwen3Moe;
  config.hidden_size = 64;
  config.num_layers = 1;
  config.num_heads = 1;
  config.num_kv_heads = 1;
  config.head_dim = 64;
  config.intermediate_size = 64;
  config.moe_intermediate_size = 32;
  config.num_experts = 4;
  config.num_experts_per_tok = 1;
  config.norm_topk_prob = true;
  config.vocab_size = 128;
  config.rope_theta = 1e6;
  config.max_position_embeddings = 40960;
  return config;
}

// Qwen3-30B-A3B with some of its 48 layers.
inline ModelConfig Qwen3Moe30B(int32_t layers) {
  ModelConfig config;
  config.architecture = Architecture::kQwen3Moe;
  config.hidden_size = 2048;
  config.num_layers = layers;
  config.num_heads = 32;
  config.num_kv_heads = 4;
  config.head_dim = 128;
  config.intermediate_size = 6144;
  config.moe_intermediate_size = 768;
  config.num_experts = 128;
  config.num_experts_per_tok = 8;
  config.norm_topk_prob = true;
  config.vocab_size = 151936;
  config.rope_theta = 1e6;
  config.max_position_embeddings = 40960;
  return config;
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_BENCH_MODEL_H_
