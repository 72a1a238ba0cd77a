#ifndef TENON_OPS_MOE_MOE_ALIGN_BACKEND_H_
#define TENON_OPS_MOE_MOE_ALIGN_BACKEND_H_

#include <cstdint>

#include "ops/moe/moe_align.h"

namespace tenon {

// Slots that are counted and placed together, by one thread or thread block.
// Many chunks need a table of their counts in the workspace.
inline constexpr int64_t kMoeAlignChunkSlots = 4096;

// Most slots that CUDA sorts in one launch, without workspace.
inline constexpr int64_t kMoeAlignOneLaunchSlots = 8192;

inline int64_t MoeAlignNumChunks(int64_t num_slots) {
  return (num_slots + kMoeAlignChunkSlots - 1) / kMoeAlignChunkSlots;
}

// Backends trust `params`: MoeAlign() has validated them.
Status MoeAlignCpu(const MoeAlignParams& params, Stream stream);
Status MoeAlignCuda(const MoeAlignParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_ALIGN_BACKEND_H_
