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

// How a part comes to its place.
enum class Placement {
  kMapped,     // it stays in the mapped file
  kPacked,     // its elements are copied, or made, where they are packed
  kQuantized,  // they are quantised to float8_e4m3 on the way
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
  Share rows = MakeShare(0, 1);
  Share cols;

  DType dtype = DType::kInvalid;  // as it is used
  // Of float8_e4m3: how it is scaled.
  Fp8Scaling scaling = Fp8Scaling::kNone;
  TensorView source;         // in a checkpoint: the whole tensor, ...
  TensorView source_scales;  // and its published scales, as a matrix
  Placement placement = Placement::kPacked;
  int64_t offset = 0;         // in packed memory, in bytes
  int64_t scales_offset = 0;  // likewise; of float32 scales

  int64_t row_bytes() const {
    return cols.size * static_cast<int64_t>(DTypeSize(dtype));
  }
  int64_t bytes() const { return rows.size * row_bytes(); }
  // The rank's scales are a matrix; [rows, 1] for Fp8Scaling::kChannels. Rows
  // of blocks begin at multiples of 16 bytes, as cuBLASLt wants them.
  int64_t scale_rows() const;
  int64_t scale_cols() const;
  int64_t scale_stride() const;
  int64_t scale_bytes() const {
    return scale_rows() * scale_stride() * static_cast<int64_t>(sizeof(float));
  }
};

// Whether a matrix of this role may be float8_e4m3.
bool MayBeFp8(WeightRole role);
// Whether it is one of an expert's.
bool IsExpert(WeightRole role);

// Append the parts of one layer, and of what is outside the layers (before and
// after them), in the order in which they are packed.
void PlanHead(const ModelConfig& config, std::vector<WeightPart>* parts);
void PlanLayer(const ModelConfig& config, const LocalShape& local,
               int32_t layer, std::vector<WeightPart>* parts);
void PlanTail(const ModelConfig& config, std::vector<WeightPart>* parts);

// Where the regions of packed memory end: one behind the other, each in the
// order of the parts.
struct PackedLayout {
  int64_t packed_end = 0;    // elements of Placement::kPacked
  int64_t scales_begin = 0;  // of the parts that are mapped or packed
  int64_t scales_end = 0;
  int64_t quantized_end = 0;  // elements of Placement::kQuantized
  int64_t end = 0;            // and their scales
};

// Assigns offsets to parts whose dtypes, scalings and placements are known:
// aligned, but for those that go right behind their predecessor (k and v, and
// the experts of a layer).
PackedLayout AssignOffsets(std::vector<WeightPart>* parts);

// Sets the views of `weights` that stand for `parts`: to their offsets from
// `base`, or to their sources in a mapped checkpoint.
void SetViews(const ModelConfig& config, const std::vector<WeightPart>& parts,
              void* base, Weights* weights);

// Weights without values: offsets assigned, memory of their exact size
// allocated, views set.
StatusOr<Weights> AllocateWeights(const ModelConfig& config, Device device,
                                  std::vector<WeightPart>* parts,
                                  PackedLayout* layout);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_PLAN_H_
