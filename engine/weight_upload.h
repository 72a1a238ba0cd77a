#ifndef TENON_ENGINE_WEIGHT_UPLOAD_H_
#define TENON_ENGINE_WEIGHT_UPLOAD_H_

#include <cstdint>
#include <vector>

#include "engine/weight_plan.h"
#include "engine/weights.h"

// Private to the engine.

namespace tenon {

// Fills `base`, memory of `device` for AssignOffsets(parts) bytes, with the
// parts' sources. Chunks of `chunk_bytes` are put together in one of two pinned
// buffers while the other one is on its way to the device. Works on the CPU as
// well, where nothing needs it but tests.
Status UploadParts(const std::vector<WeightPart>& parts, int64_t total_bytes,
                   void* base, Device device, int64_t chunk_bytes,
                   const LoadProgress& progress);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_UPLOAD_H_
