#ifndef TENON_OPS_MOE_MOE_SUM_REDUCE_H_
#define TENON_OPS_MOE_MOE_SUM_REDUCE_H_

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// out[t] = sum over j of x[t, j], j = 0, 1, ..., top_k - 1 in that order.
//
// Shapes: x [tokens, top_k, hidden], out [tokens, hidden], one dtype (float32,
// float16, bfloat16); the strides of all dimensions but the last are free. out
// does not overlap x.
//
// Numerics: float32 sum in that order, starting from x[t, 0]; one rounding.
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero tokens is OK.
struct MoeSumReduceParams {
  TensorView x;
  TensorView out;
};

Status MoeSumReduce(const MoeSumReduceParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_SUM_REDUCE_H_
