#ifndef TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_
#define TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// One matrix [rows, cols] per expert, all of one dtype and row stride. Either a
// base pointer and a distance between experts, as in a tensor [num_experts,
// rows, cols], or (on the CPU only) a table with one pointer per expert, as in
// a mapped checkpoint that keeps every expert's matrix on its own.
struct ExpertMatrices {
  const void* data = nullptr;
  int64_t expert_stride = 0;           // in elements
  const void* const* table = nullptr;  // [num_experts], instead of data
  int64_t num_experts = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  // in elements, >= cols
  DType dtype = DType::kInvalid;
  Device device;
};

// All of a contiguous or strided [num_experts, rows, cols] tensor, or `count`
// rows of each expert from `first_row` on (such as the gate or the up half of a
// packed w13).
ExpertMatrices MakeExpertMatrices(const TensorView& weights);
ExpertMatrices MakeExpertMatrices(const TensorView& weights, int64_t first_row,
                                  int64_t count);

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
// float16 or bfloat16). Rows of x and out may be strided.
//
// Numerics: products and sums in float32 (no TF32), then bias, then the routing
// weight, in float32; one rounding to out's dtype. A row's sum over cols has an
// order that depends on the shapes alone, and with batch_invariant only on
// cols. Never depends on the other rows' content or experts.
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

size_t MoeGroupedMatmulWorkspaceBytes(const MoeGroupedMatmulParams& params);

Status MoeGroupedMatmul(const MoeGroupedMatmulParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_GROUPED_MATMUL_H_
