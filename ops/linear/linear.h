#ifndef TENON_OPS_LINEAR_LINEAR_H_
#define TENON_OPS_LINEAR_LINEAR_H_

#include <cstddef>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

class CublasLt;

// out = x * weight^T + bias
//
// Shapes: x [tokens, in_features]; weight [out_features, in_features]; bias
// [out_features], optional; out [tokens, out_features]. x, weight and bias have
// one dtype (float32, float16 or bfloat16), out the same or float32. Rows of
// all matrices may be strided. out overlaps no input.
//
// Numerics: products and sums in float32 (float32 inputs: no TF32), bias added
// in float32, one rounding to out's dtype. The order of the sum over
// in_features is fixed for a call's shapes: the same call gives the same bits,
// and a row does not depend on the content of the other rows. With
// batch_invariant it does not depend on their number either. On the CPU that
// always holds.
//
// Speed on CUDA: rows that start at multiples of 16 bytes and in_features that
// fill whole 16 bytes. Others work, slowly.
//
// Does not allocate or synchronise; can be captured in a CUDA graph. (The first
// call of a shape through cublas_lt looks up an algorithm, on the host.) Needs
// `workspace` of LinearWorkspaceBytes(params). Zero tokens is OK.
struct LinearParams {
  TensorView x;
  TensorView weight;
  TensorView bias;  // optional
  TensorView out;
  // CUDA: the matrix library to use (see cublas_lt.h), of out's device. Null,
  // or batch_invariant: the kernels built in here.
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
