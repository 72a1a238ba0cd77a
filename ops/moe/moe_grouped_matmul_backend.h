#ifndef TENON_OPS_MOE_MOE_GROUPED_MATMUL_BACKEND_H_
#define TENON_OPS_MOE_MOE_GROUPED_MATMUL_BACKEND_H_

#include "ops/core/workspace.h"
#include "ops/moe/moe_grouped_matmul.h"

namespace tenon {

// The pieces of a call's workspace.
struct MoeGroupedMatmulScratch {
  int32_t* tiles = nullptr;           // CUDA: [max_tiles, 3], as in MoeAlign
  int32_t* expert_offsets = nullptr;  // CPU: cut to what there is
  float* gathered = nullptr;          // CPU: rows of x, as in sorted_slots
  int32_t* active_experts = nullptr;  // CPU: [num_experts]
  // With fp8 weights; groups of 128 columns.
  void* x_fp8 = nullptr;             // CUDA: x quantised, contiguous
  float* x_scales = nullptr;         // CUDA: [rows of x, groups]
  float* gathered_scales = nullptr;  // CPU: of `gathered`
  size_t bytes = 0;
};
MoeGroupedMatmulScratch LayOutScratch(const MoeGroupedMatmulParams& params);

// Backends trust `params`: MoeGroupedMatmul() has validated them.
Status MoeGroupedMatmulCpu(const MoeGroupedMatmulParams& params,
                           const MoeGroupedMatmulScratch& scratch,
                           Stream stream);
Status MoeGroupedMatmulCuda(const MoeGroupedMatmulParams& params,
                            const MoeGroupedMatmulScratch& scratch,
                            Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_GROUPED_MATMUL_BACKEND_H_
