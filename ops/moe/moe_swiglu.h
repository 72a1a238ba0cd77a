#ifndef TENON_OPS_MOE_MOE_SWIGLU_H_
#define TENON_OPS_MOE_MOE_SWIGLU_H_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

enum class SwiGluLayout : int32_t {
  kBlocked = 0,      // gate 0 .. N-1, then up N .. 2N-1
  kInterleaved = 1,  // gate, up, gate, up, ...
};

// Without a limit:  out = round(silu(gate)) * up,  silu(g) = g / (1 + exp(-g))
// With limit > 0 (GPT-OSS style, alpha must be given too):
//   gate = min(gate, limit), up = clamp(up, -limit, limit)
//   out = (up + 1) * (gate * sigmoid(alpha * gate))
//
// Shapes: x [rows, 2N], out [rows, N], one dtype (float32, float16, bfloat16),
// rows may be strided; out does not overlap x.
//
// Numerics: silu in float32, rounded to the dtype, then multiplied by up and
// rounded again (the seed operators' order). The limit form is in float32 with
// one rounding at the end.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero rows is OK; any number of elements (64-bit offsets).
struct MoeSwiGluParams {
  TensorView x;
  TensorView out;
  SwiGluLayout layout = SwiGluLayout::kBlocked;
  float limit = 0.0f;  // 0: none
  float alpha = 0.0f;  // with limit: > 0
};

Status MoeSwiGlu(const MoeSwiGluParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_SWIGLU_H_
