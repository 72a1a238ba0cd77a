#ifndef TENON_ENGINE_QUANTIZATION_CONFIG_H_
#define TENON_ENGINE_QUANTIZATION_CONFIG_H_

#include "engine/json_fields.h"
#include "engine/model_config.h"
#include "ops/core/status.h"

// Private to the engine.

namespace tenon {

// Reads quantization_config, where a config.json has one:
//   quant_method "fp8", as DeepSeek and Qwen publish it: float8_e4m3 with
//     blocks of 128 x 128
//   quant_method "compressed-tensors": one group of float weights of 8 bits,
//     strategy "channel" or "block" of 128 x 128
// both with activations that are quantised as they come. Anything else is
// Unimplemented, naming the field and its value.
Status ReadQuantization(const JsonFields& fields, ModelConfig* config);

}  // namespace tenon

#endif  // TENON_ENGINE_QUANTIZATION_CONFIG_H_
