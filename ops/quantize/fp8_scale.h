#ifndef TENON_OPS_QUANTIZE_FP8_SCALE_H_
#define TENON_OPS_QUANTIZE_FP8_SCALE_H_

#include <cstdint>

#include "ops/core/dtype.h"

// The arithmetic of fp8 quantisation, for every place that quantises: the same
// formula on the CPU and in kernels (constexpr, so that device code may call
// it).

namespace tenon {

// Activations have one scale per row and this many columns.
inline constexpr int kFp8GroupSize = 128;

inline constexpr int64_t NumFp8Groups(int64_t cols) {
  return (cols + kFp8GroupSize - 1) / kFp8GroupSize;
}

struct Fp8Scale {
  float scale;    // what a quantised element is multiplied by to get it back
  float inverse;  // what an element is multiplied by before it is rounded
};

// The scale of elements of which `amax` is the largest magnitude. Maps it to
// 448, the largest e4m3 value; the floor keeps groups of zeros finite.
inline constexpr Fp8Scale Fp8ScaleOf(float amax) {
  const float floored = amax > 1e-10f ? amax : 1e-10f;
  return {floored / 448.0f, 448.0f / floored};
}

// Quantises `count` host elements with one scale, which it returns. NaN does
// not count for the scale and becomes NaN (0x7f).
float QuantizeFp8Group(const float* x, int64_t count, Float8E4M3* out);

}  // namespace tenon

#endif  // TENON_OPS_QUANTIZE_FP8_SCALE_H_
