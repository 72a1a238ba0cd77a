#ifndef TENON_OPS_QUANTIZE_QUANTIZE_H_
#define TENON_OPS_QUANTIZE_QUANTIZE_H_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// Quantises a matrix to float8_e4m3 with one float32 scale per block of
// elements, so that element * scale is about x:
//   amax  = max(largest |x| of the block, 1e-10)
//   scale = amax / 448
//   out   = e4m3(x * (448 / amax))
//
// Shapes: x, out [rows, cols]. A block has block_rows rows and block_cols
// columns (the last ones may be partial); scales is [ceil(rows / block_rows),
// ceil(cols / block_cols)], or [rows] where a block is a whole row:
//   block_rows 1,   block_cols 128   activations
//   block_rows 128, block_cols 128   weights, as published fp8 models have them
//   block_rows 1,   block_cols 0     weights with a scale per output channel
// x is float32, float16 or bfloat16. Rows of all may be strided. out and scales
// overlap neither each other nor x.
//
// Numerics: divisions and product in float32, as written above, then one
// rounding to the nearest e4m3 value, ties to even, saturating at 448. NaN
// stays NaN (0x7f) and does not count for amax. An infinite element makes its
// block's scale infinite and itself NaN: no finite result comes of it. The same
// bits on every device.
//
// Speed on CUDA: rows of x that start at multiples of 16 bytes, rows of out
// that start at multiples of 8, and cols a multiple of 8. Others work, slowly.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph.
// Zero rows is OK.
struct QuantizeFp8Params {
  TensorView x;
  TensorView out;     // float8_e4m3
  TensorView scales;  // float32
  int32_t block_rows = 1;
  int32_t block_cols = 128;  // 0: all columns
};

// InvalidArgument for any of the above not met, before any work;
// Unimplemented where this build has no backend for the device.
Status QuantizeFp8(const QuantizeFp8Params& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_QUANTIZE_QUANTIZE_H_
