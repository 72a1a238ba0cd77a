#ifndef TENON_ENGINE_WEIGHT_SCALES_H_
#define TENON_ENGINE_WEIGHT_SCALES_H_

#include <cstdint>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/model_config.h"
#include "engine/weight_plan.h"

// Published scales of float8_e4m3 matrices. Private to the engine.

namespace tenon {

// Looks up the scales of a float8_e4m3 part and checks them; sets scaling and
// source_scales.
Status FindScales(const Checkpoint& checkpoint, const ModelConfig& config,
                  WeightPart* part);

// Fills `base`, host memory that stands for the bytes from layout.scales_begin
// to scales_end of packed memory, with the rank's scales, as float32.
// InvalidArgument naming the tensor where one is not finite.
Status PackScales(const Checkpoint& checkpoint, const ModelConfig& config,
                  const std::vector<WeightPart>& parts,
                  const PackedLayout& layout, void* base);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_SCALES_H_
