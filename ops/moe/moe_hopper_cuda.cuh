#ifndef TENON_OPS_MOE_MOE_HOPPER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_kernel_config.h"

// The expert matrix products of the fused layer on Hopper. Private to ops/moe.

namespace tenon {

// Whether the kernels can be used: a Hopper GPU, float16 or bfloat16 x, rows of
// all matrices that TMA can read.
bool CanUseMoeHopper(const MoeParams& params, int compute_capability);

// hidden = silu(x * gate^T) * (x * up^T), rows by position in sorted_slots; in
// fp8 with hidden_scales where the experts are fp8.
Status LaunchMoeHopperGateUp(const MoeParams& params, const MoeScratch& scratch,
                             const MoeWgmmaTile& tile, Stream stream);

// weighted[slot] = hidden[position of slot] * down^T * the slot's weight.
Status LaunchMoeHopperDown(const MoeParams& params, const MoeScratch& scratch,
                           const MoeWgmmaTile& tile, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_HOPPER_CUDA_CUH_
