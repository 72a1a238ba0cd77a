#ifndef TENON_OPS_LINEAR_LINEAR_FP8_PACK_CUDA_CUH_
#define TENON_OPS_LINEAR_LINEAR_FP8_PACK_CUDA_CUH_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/linear/linear.h"

namespace tenon::linear_fp8 {

// x quantised, as wgmma reads it from shared memory: for each group of 128
// columns all rows, 128 bytes each, chunk c of 16 bytes of row r at chunk c ^
// (r % 8). Any part of the depth is one piece of memory.
struct PackedX {
  uint8_t* q = nullptr;     // [groups][rows][128]
  float* scales = nullptr;  // [groups][rows]
  int rows = 0;             // tokens, rounded up to whole eights
};

// Whether LaunchPack can normalise p.x.
bool PackTakesNorm(const LinearParams& p);

// Normalises p.x (if that is asked for) and quantises it, with the bits of
// RmsNorm and QuantizeFp8. Rows are whole groups. A dependent launch that lets
// the next kernel start at once, which may read nothing but weights before its
// wait.
Status LaunchPack(const LinearParams& p, const PackedX& to, Stream stream);

}  // namespace tenon::linear_fp8

#endif  // TENON_OPS_LINEAR_LINEAR_FP8_PACK_CUDA_CUH_
