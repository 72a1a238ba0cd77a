#ifndef TENON_ENGINE_WEIGHT_PLAN_H_
#define TENON_ENGINE_WEIGHT_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/tensor_parallel.h"
#include "engine/weights.h"

// The list of a model's tensors, from which everything that makes Weights
// works: what each is called, which part of it a rank holds, where that part
// goes. Private to the engine.

namespace tenon {

enum class WeightRole {
  kEmbedding,
  kInputNorm,
  kQ,
  kK,
  kV,
  kQNorm,
  kKNorm,
  kO,
  kPostAttentionNorm,
  kRouter,
  kExpertGate,
  kExpertUp,
  kExpertDown,
  kMlpGate,
  kMlpUp,
  kMlpDown,
  kFinalNorm,
  kLmHead,
};

// One published tensor, and a rank's rows and columns of it.
struct WeightPart {
  WeightRole role = WeightRole::kEmbedding;
  int32_t layer = 0;  // 0 also for what is outside the layers
  int32_t expert = 0;
  std::string name;
  bool is_vector = false;  // a norm: [full_cols]; a matrix otherwise
  int64_t full_rows = 1;
  int64_t full_cols = 0;
  int64_t first_row = 0;
  int64_t rows = 1;
  int64_t first_col = 0;
  int64_t cols = 0;

  DType dtype = DType::kInvalid;
  TensorView source;   // in a checkpoint: this rank's part
  int64_t offset = 0;  // in packed memory, in bytes

  int64_t row_bytes() const {
    return cols * static_cast<int64_t>(DTypeSize(dtype));
  }
  int64_t bytes() const { return rows * row_bytes(); }
};

// Append the parts of one layer, and of what is outside the layers (before and
// after them), in the order in which they are packed.
void PlanHead(const ModelConfig& config, std::vector<WeightPart>* parts);
void PlanLayer(const ModelConfig& config, const LocalShape& local,
               int32_t layer, std::vector<WeightPart>* parts);
void PlanTail(const ModelConfig& config, std::vector<WeightPart>* parts);

// Assigns offsets to parts whose dtypes are known: aligned, but for those that
// go right behind their predecessor (k and v, and the experts of a layer).
// Returns the bytes of all.
int64_t AssignOffsets(std::vector<WeightPart>* parts);

// Sets the views of `weights` that stand for `parts`: to their offsets from
// `base`, or to their sources in a mapped checkpoint.
void SetPackedViews(const ModelConfig& config,
                    const std::vector<WeightPart>& parts, void* base,
                    Weights* weights);
void SetMappedViews(const ModelConfig& config,
                    const std::vector<WeightPart>& parts, Weights* weights);

// Weights without values: offsets assigned, memory of their exact size
// allocated, views set.
StatusOr<Weights> AllocateWeights(const ModelConfig& config, Device device,
                                  std::vector<WeightPart>* parts);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_PLAN_H_
