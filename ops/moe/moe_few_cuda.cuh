#ifndef TENON_OPS_MOE_MOE_FEW_CUDA_CUH_
#define TENON_OPS_MOE_MOE_FEW_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_backend.h"

// The experts' layer for few tokens on Hopper in one launch, after
// MoePrepareFewCuda. Private to ops/moe.

namespace tenon {

// Whether it takes the call, where CanUseMoeHopper says yes: up to 32
// tokens, rows of all matrices whole blocks of 128 bytes, room in shared
// memory.
bool CanUseMoeFew(const MoeParams& params, int num_processors);

// out, of the choice, x (fp8: that in the scratch) and counters that are 0.
// With a ring of `stages` stages of 16 KiB for weights, as far as there is
// room.
Status LaunchMoeFew(const MoeParams& params, const MoeScratch& scratch,
                    int num_processors, int32_t stages, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_FEW_CUDA_CUH_
