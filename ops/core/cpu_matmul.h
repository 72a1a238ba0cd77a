#ifndef TENON_OPS_CORE_CPU_MATMUL_H_
#define TENON_OPS_CORE_CPU_MATMUL_H_

#include <cstdint>

#include "ops/core/dtype.h"

// Matrix products of the CPU backends, for the instruction set of this host
// (AVX-512, AVX2 or generic, chosen at run time). Private to ops.

namespace tenon {

// The scales of fp8 operands; see CpuMatmul.
struct CpuMatmulScales {
  const float* x = nullptr;  // [rows, ceil(depth / 128)]
  int64_t x_stride = 0;
  // Of all of the matrix that weight is a part of: [ceil(its rows / 128),
  // ceil(depth / 128)], or, with block_rows 1, one per row.
  const float* weight = nullptr;
  int64_t weight_stride = 0;
  int32_t block_rows = 0;  // 128 or 1
  int64_t first_row = 0;   // of the matrix, that weight starts with
};

// out[m, n] = sum over k of x[m, k] * weight[n, k], on the calling thread.
//
// x and out are float32; weight is float32, float16 or bfloat16. An element's
// sum is made in an order that depends on k alone: neither the number of rows
// nor the split of n over threads changes its bits.
//
// A float8_e4m3 weight has scales, and so has x, quantised and held as float32:
//   out[m, n] = sum over blocks b of 128 of k, in ascending order, of
//               (sum over k in b of x[m, k] * weight[n, k])
//               * (scales.x[m, b] * scales.weight[block of n, b])
// With a scale per row of weight, that multiplies the end result instead.
struct CpuMatmulParams {
  const float* x = nullptr;      // [rows, depth]
  int64_t x_stride = 0;          // in elements, as all strides here
  const void* weight = nullptr;  // [cols, depth]
  DType weight_dtype = DType::kInvalid;
  int64_t weight_stride = 0;
  float* out = nullptr;  // [rows, cols]
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t depth = 0;
  CpuMatmulScales scales;  // of float8_e4m3 weights
};
void CpuMatmul(const CpuMatmulParams& params);

// Converts `count` elements between float32 and a 16-bit (or equal) dtype,
// rounding to nearest even. From float8_e4m3, but not to it.
void CpuConvertToFloat(DType dtype, const void* from, int64_t count, float* to);
void CpuConvertFromFloat(DType dtype, const float* from, int64_t count,
                         void* to);

}  // namespace tenon

#endif  // TENON_OPS_CORE_CPU_MATMUL_H_
