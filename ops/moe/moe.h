#ifndef TENON_OPS_MOE_MOE_H_
#define TENON_OPS_MOE_MOE_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/moe/moe_grouped_matmul.h"
#include "ops/moe/moe_router.h"

namespace tenon {

struct MoeKernelTable;

// The expert part of a mixture-of-experts layer, from the router's choice (or,
// with `router`, from its logits) to the summed output, in one call:
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
// fp8: gate, up and down may be float8_e4m3, all three, with scales of one kind
// (ExpertScales: blocks of 128 x 128 or rows), whatever the dtype of x.
//
// Router: with `router`, MoeRouter(*router) is part of the call: topk_weights
// and topk_ids have to be its outputs, and it has to choose among as many
// experts as there are matrices, num_fused_shared_experts included.
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
// Numerics in fp8: x is quantised as QuantizeFp8 does with blocks of 1 x 128.
// Of every 128 of the depth, products and sum are in float32 (on tensor cores:
// in what their fp8 instructions accumulate in), times activation scale and
// weight scale, added in float32 in ascending order (a scale per row multiplies
// the end result instead). silu(g) * u is in float32 and quantised from there,
// again a scale per 128, without a rounding to x's dtype. The down projection
// sums alike, then goes on as above. A NaN stays in its row.
//
// Residual: with `residual` [tokens, hidden], of out's dtype, out = residual +
// what would have been in out: the sum in float32 of two rounded numbers,
// rounded, as a separate addition would.
//
// Rows: with `rows` [tokens, top_k, hidden], of x's dtype, without gaps and
// aligned to 16 bytes, the weighted rows are left there and nobody sums them
// yet: out and residual are not given. The next product does
// (LinearParams::terms). Rows of ids that contribute nothing are not written.
//
// Any number of tokens: more than kMoeChunkTokens are processed in chunks of
// that size (smaller ones on the CPU), so the workspace is bounded.
//
// Aliasing: out may be x (in place) or residual, and overlaps nothing else.
// What the router writes overlaps nothing. Does not allocate or synchronise;
// can be captured in a CUDA graph. Needs `workspace` of
// MoeWorkspaceBytes(params). Zero tokens is OK.
struct MoeParams {
  TensorView x;
  TensorView topk_weights;
  TensorView topk_ids;
  ExpertMatrices gate;
  ExpertMatrices up;
  ExpertMatrices down;
  TensorView out;
  const MoeRouterParams* router = nullptr;  // optional
  TensorView residual;                      // optional
  TensorView rows;                          // optional, in place of out
  bool batch_invariant = false;
  // CUDA, optional: measured sizes of the kernels, in place of those built in
  // (moe_kernel_choice.h). No bit of a result depends on them.
  const MoeKernelTable* kernels = nullptr;
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

inline constexpr int64_t kMoeChunkTokens = 32768;

// What Moe checks of everything but the router and where memory lies and
// overlaps.
Status ValidateMoeShapes(const MoeParams& params);

// An upper bound that grows with tokens; depends on shapes, dtypes and device
// alone. 0 for invalid params.
size_t MoeWorkspaceBytes(const MoeParams& params);

Status Moe(const MoeParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_H_
