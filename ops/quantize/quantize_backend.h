#ifndef TENON_OPS_QUANTIZE_QUANTIZE_BACKEND_H_
#define TENON_OPS_QUANTIZE_QUANTIZE_BACKEND_H_

#include "ops/quantize/quantize.h"

namespace tenon {

// Backends trust `params`: QuantizeFp8() has validated them.
Status QuantizeFp8Cpu(const QuantizeFp8Params& params, Stream stream);
Status QuantizeFp8Cuda(const QuantizeFp8Params& params, Stream stream);

// The blocks of a call.
struct Fp8Blocks {
  int64_t rows, cols;        // of one block
  int64_t count_r, count_c;  // how many there are
};
inline Fp8Blocks Fp8BlocksOf(const QuantizeFp8Params& p) {
  Fp8Blocks b;
  b.rows = p.block_rows;
  b.cols = p.block_cols == 0 ? p.x.shape[1] : p.block_cols;
  b.count_r = (p.x.shape[0] + b.rows - 1) / b.rows;
  b.count_c = (p.x.shape[1] + b.cols - 1) / b.cols;
  return b;
}

}  // namespace tenon

#endif  // TENON_OPS_QUANTIZE_QUANTIZE_BACKEND_H_
