#ifndef TENON_ENGINE_WEIGHT_UPLOAD_H_
#define TENON_ENGINE_WEIGHT_UPLOAD_H_

#include <cstdint>
#include <vector>

#include "engine/weight_plan.h"
#include "engine/weights.h"

// Private to the engine.

namespace tenon {

// A pinned buffer and the stream that carries it to the device.
struct Staging {
  Buffer buffer;
  OwnedStream stream;

  Status Create(Device device, int64_t bytes);
};

// The threads that read a checkpoint.
StatusOr<OwnedStream> LoaderThreads();

// Bytes [begin, end) of the rank's part of a tensor, in the source's dtype,
// rows following one another, to `to`.
void CopyPart(const WeightPart& part, int64_t begin, int64_t end, char* to,
              Stream cpu);

// Asks for the pages of the file from which CopyPart would read.
void PrefetchPart(const WeightPart& part, int64_t begin, int64_t end);

// Fills `base`, memory of `device` for total_bytes bytes, with the parts'
// sources at their offsets, which ascend; all are Placement::kPacked. Chunks of
// `chunk_bytes` are put together in one of two pinned buffers while the other
// one is on its way to the device.
Status UploadParts(const std::vector<WeightPart>& parts, int64_t total_bytes,
                   void* base, Device device, int64_t chunk_bytes,
                   const LoadProgress& progress);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHT_UPLOAD_H_
