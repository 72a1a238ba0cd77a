#ifndef TENON_ENGINE_ACTIVATIONS_H_
#define TENON_ENGINE_ACTIVATIONS_H_

#include <cstdint>
#include <vector>

#include "engine/model_config.h"
#include "engine/weights.h"
#include "ops/core/memory.h"
#include "ops/core/tensor_view.h"
#include "ops/linear/cublas_lt.h"

namespace tenon {

// The largest step that a session runs.
struct StepLimits {
  int32_t max_tokens = 0;                  // new tokens of all rows together
  int32_t max_rows = 0;                    // sequences in a step
  int32_t max_logit_rows = 0;              // tokens whose logits are computed
  int32_t max_context = 0;                 // tokens of one sequence
  int32_t page_size = 0;                   // of the KV cache, in tokens
  int32_t max_pages_per_row = 0;           // columns of the block table
  int32_t max_logit_edits = 0;             // of all rows together
  int32_t bitmask_words = 0;               // of a row; 0: rows have no bitmask
  int32_t max_top_logprobs = 0;            // of a row
  DType kv_cache_dtype = DType::kInvalid;  // kInvalid: that of the weights
};

// Every intermediate of a step, in one arena that is allocated when the session
// is created. The names are those of the diagram in ARCHITECTURE.md. A step of
// fewer tokens uses the first rows.
struct Activations {
  TensorView residual;   // [max_tokens, hidden]: the residual stream
  TensorView normed;     // [max_tokens, hidden]: input of a block
  TensorView block_out;  // [max_tokens, hidden]: output of a block; with tensor
                         // parallelism this rank's part of the sum
  TensorView qkv;        // [max_tokens, (heads + 2 * kv_heads) * head_dim];
                         // attention leaves its output in the Q columns
  TensorView router_logits;   // [max_tokens, num_experts] float32
  TensorView topk_weights;    // [max_tokens, top_k] float32
  TensorView topk_ids;        // [layers or 1, max_tokens, top_k] int32
  TensorView expert_rows;     // [1, top_k, hidden]: what a token's experts
                              // made, where the next layer sums it up
  TensorView mlp_gate_up;     // [max_tokens, 2 * intermediate], dense layers
  TensorView mlp_hidden;      // [max_tokens, intermediate], dense layers
  TensorView logit_hidden;    // [max_logit_rows, hidden]
  TensorView logits;          // [max_logit_rows, vocab] float32
  TensorView cos_sin;         // [max_context, head_dim] float32
  void* workspace = nullptr;  // scratch of whichever op is running
  size_t workspace_size = 0;

  // [tokens, top_k]: where a layer's choice goes in a step of so many tokens.
  // Layer lies behind layer.
  TensorView TopkIds(int32_t layer, int64_t tokens) const;

  Buffer arena;

  // keep_expert_ids: topk_ids has a slice per layer, so that a caller can read
  // what each layer chose; otherwise all layers share one. Weights and
  // cublas_lt are what steps will use: they have a say in the size of the
  // workspace.
  static StatusOr<Activations> Create(const ModelConfig& config,
                                      const Weights& weights,
                                      const StepLimits& limits,
                                      bool keep_expert_ids, CublasLt* cublas_lt,
                                      bool batch_invariant);
};

// [max_positions, rotary_dim] float32, the table that RotaryParams asks for:
// cos(position * theta^(-2i / rotary_dim)) for i < rotary_dim / 2, then the
// sines, computed in float64.
std::vector<float> RotaryTable(int64_t max_positions, int32_t rotary_dim,
                               double theta);

}  // namespace tenon

#endif  // TENON_ENGINE_ACTIVATIONS_H_
