#ifndef TENON_ENGINE_WEIGHT_QUANTIZE_H_
#define TENON_ENGINE_WEIGHT_QUANTIZE_H_

#include <cstdint>
#include <vector>

#include "engine/weight_plan.h"
#include "engine/weights.h"

// Private to the engine.

namespace tenon {

// Quantises the parts of Placement::kQuantized to their places in `base`,
// packed memory of `device`. Strips of whole blocks and about `strip_bytes` go
// through two staging buffers, so that one is read from the file while the
// other is on its way and quantised on the device. Tells `progress` how many
// bytes of weights and scales it made, of `total_bytes`.
Status QuantizeParts(const std::vector<WeightPart>& parts, void* base,
                     Device device, int64_t strip_bytes, int64_t total_bytes,
                     const LoadProgress& progress);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_QUANTIZE_H_
