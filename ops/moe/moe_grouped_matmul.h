#ifndef TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_
#define TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/moe/expert_matrices.h"

namespace tenon {

// For every slot s of expert e in the CSR of MoeAlign:
//   out[s] = (x[s / slots_per_row] * weight[e]^T + bias[e]) * routing[s]
// slots_per_row is top_k for the up projection (x has a row per token) and 1
// for the down projection (x has a row per slot). Rows of out whose slot was
// skipped (id -1) are set to zero.
//
// Shapes: x [ceil(num_slots / slots_per_row), cols of weights]; expert_offsets
// and sorted_slots from MoeAlign; bias [num_experts, rows of weights] of x's
// dtype, optional; routing_weights [num_slots] float32, optional; out
// [num_slots, rows of weights]. x, weights and out have one dtype (float32,
// float16 or bfloat16). Rows of x and out may be strided. Weights may be
// float8_e4m3 with scales (ExpertScales) whatever the dtype of the others.
//
// Contents out of range: offsets are cut to the slots and made ascending;
// entries of sorted_slots that are no slot are skipped; the row of a slot that
// stands there twice, or not at all, is unspecified.
//
// Limits: num_experts 1 to 1024, rows and cols of weights 1 to 2^30, fewer than
// 2^31 slots. out overlaps no other tensor.
//
// Numerics: products and sums in float32 (no TF32), then bias, then the routing
// weight, in float32; one rounding to out's dtype. A row's sum over cols has an
// order that depends on cols alone, in every kernel choice: a row depends
// neither on the other rows' content or experts nor on their number, with
// batch_invariant or without. (The option promises it; without it a later
// version may choose otherwise.)
//
// Does not allocate or synchronise; can be captured in a CUDA graph. Needs
// `workspace` of MoeGroupedMatmulWorkspaceBytes(params). Zero slots is OK.
struct MoeGroupedMatmulParams {
  TensorView x;
  ExpertMatrices weights;
  TensorView expert_offsets;
  TensorView sorted_slots;
  TensorView bias;             // optional
  TensorView routing_weights;  // optional
  TensorView out;
  int32_t slots_per_row = 1;
  bool batch_invariant = false;
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

// What MoeGroupedMatmul checks of everything but where memory lies and
// overlaps.
Status ValidateMoeGroupedMatmulShapes(const MoeGroupedMatmulParams& params);

size_t MoeGroupedMatmulWorkspaceBytes(const MoeGroupedMatmulParams& params);

Status MoeGroupedMatmul(const MoeGroupedMatmulParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_
