#ifndef TENON_ENGINE_DECODE_STEP_H_
#define TENON_ENGINE_DECODE_STEP_H_

#include <cstdint>

#include "engine/activations.h"
#include "engine/kv_cache.h"
#include "engine/model_config.h"
#include "engine/weights.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/linear/cublas_lt.h"

namespace tenon {

struct MoeKernelTable;

// What a step reads, on the model's device. `tokens` rows are new tokens of
// `rows` sequences, one sequence after the other. A token at a negative
// position is padding: it has no expert, and with a negative slot and a kv_len
// of 0 it changes and reads no cache either. Its residual is finite if its id
// is negative too.
struct StepInputs {
  TensorView token_ids;     // [tokens] int32; -2 - i: previous[i]
  TensorView previous;      // [any] int32, optional: tokens drawn before
  TensorView positions;     // [tokens] int32
  TensorView slot_mapping;  // [tokens] int64: where K and V of a token go
  TensorView block_table;   // [rows, max_pages] int32
  TensorView query_start;   // [rows + 1] int32
  TensorView kv_len;        // [rows] int32, the new tokens included
  TensorView logit_rows;  // [logit rows] int32: tokens whose logits to compute
  bool all_logits = false;  // logit_rows are all tokens, in order
  int32_t max_kv_len = 0;
  int32_t max_query_len = 0;
};

// The ops of a step by what they do, for measuring each on its own.
enum class StepOp : uint32_t {
  kEmbedding,
  kNorm,
  kQkv,
  kQkNorm,
  kAttention,
  kOutput,  // of attention
  kRouter,
  kMoe,
  kDenseMlp,
  kLmHead,
};
constexpr uint32_t Bit(StepOp op) { return 1u << static_cast<uint32_t>(op); }

// With more tokens norms are faster on their own (docs/kernels/linear.md).
inline constexpr int64_t kFusedStepTokens = 4;

// Everything a step works with; nothing here is owned.
struct StepContext {
  const ModelConfig& config;
  const Weights& weights;
  const KvCache& cache;
  const Activations& activations;
  const StepInputs& inputs;
  CublasLt* cublas_lt = nullptr;
  bool batch_invariant = false;
  Stream stream;
  const MoeKernelTable* moe_kernels = nullptr;  // optional
  uint32_t ops = ~0u;  // Bit() of those that run; the others do nothing
  // DecodeStep: up to kFusedStepTokens tokens (fp8 weights: also from 9 to
  // kLinearFewFp8Tokens), norms and sums of the residual stream are part of the
  // ops next to them. Changes no bit.
  bool fuse = true;

  bool Runs(StepOp op) const { return (ops & Bit(op)) != 0; }
  int64_t tokens() const { return inputs.token_ids.shape[0]; }
};

// residual = embedding of the tokens.
Status EmbedTokens(const StepContext& c);

// normed = norm(residual) in front of the first block; in front of a later one
// residual += block_out first.
Status FirstNorm(const StepContext& c, const TensorView& weight);
Status AddNorm(const StepContext& c, const TensorView& weight);

// block_out = attention or MLP of `normed`. With tensor parallelism it is this
// rank's part: the sum over ranks is the block's output.
Status AttentionBlock(const StepContext& c, int32_t layer);
Status MlpBlock(const StepContext& c, int32_t layer);

// logits = LM head of the last norm, for inputs.logit_rows.
Status ComputeLogits(const StepContext& c);

// The transformer: all of the above in order.
Status DecodeStep(const StepContext& c);

}  // namespace tenon

#endif  // TENON_ENGINE_DECODE_STEP_H_
