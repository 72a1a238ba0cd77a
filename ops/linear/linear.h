#ifndef TENON_OPS_LINEAR_LINEAR_H_
#define TENON_OPS_LINEAR_LINEAR_H_

#include <cstddef>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/rms_norm/rms_norm.h"

namespace tenon {

class CublasLt;

// Up to this many tokens a call's time is that of reading weight, and `norm`
// and `residual` below save time. The second is for fp8 weights with cublas_lt;
// without, `norm` saves time up to 4 tokens.
inline constexpr int64_t kLinearFewTokens = 16;
inline constexpr int64_t kLinearFewFp8Tokens = 64;

// What Linear does to x first: RmsNorm(x) with these, without a residual.
struct LinearNorm {
  TensorView weight;  // [in_features], of x's dtype or float32
  TensorView out;     // [tokens, in_features], like x: the normalised rows
  float epsilon = 0.0f;
  NormRounding rounding = NormRounding::kFloat32Multiply;

  constexpr bool present() const { return weight.present(); }
};

// What Linear adds to x before that: rows of each token, as experts leave them
// (MoeParams::rows).
struct LinearTerms {
  TensorView rows;      // [tokens, terms, in_features], like x, without gaps
  TensorView ids;       // [tokens, terms] int32
  int32_t num_ids = 0;  // rows with an id outside of [0, num_ids) do not count
  TensorView sum;       // [tokens, in_features], like x: x with the rows added

  constexpr bool present() const { return rows.present(); }
};

// out = x * weight^T + bias
//
// Shapes: x [tokens, in_features]; weight [out_features, in_features]; bias
// [out_features], optional; out [tokens, out_features]. x, weight and bias have
// one dtype (float32, float16 or bfloat16), out the same or float32. Rows of
// all matrices may be strided. out overlaps no input but residual, which it may
// be.
//
// Neighbours: with `norm`, the normalised x is what is multiplied, and is left
// in norm.out, which overlaps nothing. With `residual` [tokens, out_features],
// of out's dtype, out = residual + what would have been in out: the sum in
// float32 of two rounded numbers, rounded. With `terms` as well as `norm`, x +
// the sum of its rows (in float32, in order, rounded) is x, and is left in
// terms.sum, which overlaps nothing. All give the bits of the separate
// operations; for few tokens they save their launches (terms: for one, of
// weights that are not fp8).
//
// Numerics: products and sums in float32 (float32 inputs: no TF32), bias added
// in float32, one rounding to out's dtype. The order of the sum over
// in_features is fixed for a call's shapes: the same call gives the same bits,
// and a row does not depend on the content of the other rows. With
// batch_invariant it does not depend on their number either. On the CPU that
// always holds.
//
// fp8: weight may be float8_e4m3, x as above. Then weight_scales says what its
// elements stand for, element * scale: [ceil(out_features / 128),
// ceil(in_features / 128)], one for each block of 128 x 128 (the last ones may
// be partial), or [out_features], one for each row. x is quantised first, as by
// QuantizeFp8 in groups of 128 columns. For every group products and sum are in
// float32 (or in the accumulators of tensor cores), times (scale of the group
// of x * scale of the block of weight), and the groups are added in float32 in
// ascending order (with cublas_lt and more than 8 tokens: in parts); the scale
// of a row of weight is multiplied at the end, before the bias is added.
//
// Speed on CUDA: rows that start at multiples of 16 bytes and in_features that
// fill whole 16 bytes. Others work, slowly. For cuBLASLt to take an fp8 call,
// weight_scales must be of blocks and 16-byte aligned, with rows whose distance
// is ceil(in_features / 128) rounded up to a multiple of 4.
//
// Does not allocate or synchronise; can be captured in a CUDA graph. (The first
// call of a shape through cublas_lt looks up an algorithm, on the host.) Needs
// `workspace` of LinearWorkspaceBytes(params). Zero tokens is OK.
struct LinearParams {
  TensorView x;
  TensorView weight;
  TensorView bias;  // optional
  TensorView out;
  TensorView weight_scales;  // float32, of a float8_e4m3 weight
  LinearNorm norm;           // optional
  LinearTerms terms;         // optional, with norm
  TensorView residual;       // optional
  // CUDA: says that nothing enqueued on the stream still writes weight, bias,
  // weight_scales or norm.weight, so that they can be read while the kernels
  // ahead of this call run.
  bool weights_are_constant = false;
  // CUDA: the matrix library to use (see cublas_lt.h), of out's device. Null,
  // or batch_invariant: the kernels built in here whose order of the sum does
  // not depend on the number of tokens.
  CublasLt* cublas_lt = nullptr;
  bool batch_invariant = false;
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

// What Linear checks of everything but where memory lies and overlaps.
Status ValidateLinearShapes(const LinearParams& params);

// An upper bound that grows with tokens, so that a caller may size the
// workspace once for its largest call. Depends on shapes, dtypes, device,
// whether cublas_lt is given and batch_invariant alone; 0 for invalid params.
size_t LinearWorkspaceBytes(const LinearParams& params);

Status Linear(const LinearParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_LINEAR_LINEAR_H_
