#ifndef TENON_OPS_MOE_MOE_H_
#define TENON_OPS_MOE_MOE_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/moe/moe_grouped_matmul.h"

namespace tenon {

// The expert part of a mixture-of-experts layer, from the router's choice to
// the summed output, in one call:
//   h[t, j]  = silu(x[t] * gate[e]^T) * (x[t] * up[e]^T),  e = topk_ids[t, j]
//   out[t]   = sum over j of topk_weights[t, j] * (h[t, j] * down[e]^T)
//
// Shapes: x, out [tokens, hidden] of one dtype (float32, float16 or bfloat16),
// rows may be strided; gate, up: matrices [intermediate, hidden], down:
// [hidden, intermediate], of x's dtype, the same number of experts (1 to 1024)
// in each, shared experts that the router appended included; topk_ids int32 and
// topk_weights float32, both [tokens, top_k], rows may be strided, top_k is 1
// to 32. An id below 0 or >= num_experts contributes nothing.
//
// Numerics: x * gate^T and x * up^T accumulate in float32 and go into
// silu(g) * u in float32; one rounding to the dtype gives h. The down
// projection accumulates in float32, is multiplied by the routing weight and
// rounded to the dtype; the top_k rounded rows are summed in float32 in the
// order of j, and rounded once. All sums have an order that depends on hidden
// and intermediate alone: a row depends neither on the other rows' content nor
// on their number, with batch_invariant or without. (The option promises it;
// without it a later version may choose otherwise.)
//
// Any number of tokens: more than kMoeChunkTokens are processed in chunks of
// that size (smaller ones on the CPU), so the workspace is bounded.
//
// Aliasing: out may be x (in place), and overlaps nothing else. Does not
// allocate or synchronise; can be captured in a CUDA graph. Needs `workspace`
// of MoeWorkspaceBytes(params). Zero tokens is OK.
struct MoeParams {
  TensorView x;
  TensorView topk_weights;
  TensorView topk_ids;
  ExpertMatrices gate;
  ExpertMatrices up;
  ExpertMatrices down;
  TensorView out;
  bool batch_invariant = false;
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

inline constexpr int64_t kMoeChunkTokens = 32768;

// What Moe checks of everything but where memory lies and overlaps.
Status ValidateMoeShapes(const MoeParams& params);

// An upper bound that grows with tokens; depends on shapes, dtypes and device
// alone. 0 for invalid params.
size_t MoeWorkspaceBytes(const MoeParams& params);

Status Moe(const MoeParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_H_
