#ifndef TENON_OPS_RMS_NORM_RMS_NORM_H_
#define TENON_OPS_RMS_NORM_RMS_NORM_H_

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// How a norm applies its weight. Published models were trained with either, and
// the two differ in the last bit of many elements.
enum class NormRounding : int32_t {
  // y = round(x * inv_rms * weight): float32 throughout, one rounding.
  kFloat32Multiply = 0,
  // y = round(round(x * inv_rms) * weight): the normalised x is rounded to the
  // dtype of x first, as Hugging Face's Qwen3RMSNorm does.
  kCastThenMultiply = 1,
};

// Root-mean-square norm of every row, optionally after adding a row to the
// residual stream:
//   if residual is given:  residual <- residual + x,  v = residual
//   otherwise:             v = x
//   out = v / sqrt(mean(v^2) + epsilon) * weight
//
// Shapes: x, residual, out [tokens, hidden]; weight [hidden]. x, residual and
// out have one dtype (float32, float16 or bfloat16), weight the same or
// float32. Rows may be strided; a row's elements are contiguous.
//
// Aliasing: out may be x. residual overlaps neither.
//
// Numerics: the sum of residual and x is made in float32 and rounded to the
// dtype once; the norm is of the rounded sum. Squares accumulate in float32, in
// an order that depends on `hidden` alone: a row has the same bits whatever
// the other rows are and however many. See NormRounding for the rest.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero tokens is OK.
struct RmsNormParams {
  TensorView x;
  TensorView residual;  // optional, in/out
  TensorView weight;
  TensorView out;
  float epsilon = 0.0f;  // must be given: > 0, finite
  NormRounding rounding = NormRounding::kFloat32Multiply;
};

// InvalidArgument for any of the above not met, before any work;
// Unimplemented where this build has no backend for the device.
Status RmsNorm(const RmsNormParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_RMS_NORM_RMS_NORM_H_
