#ifndef TENON_OPS_LINEAR_LINEAR_FP8_CUDA_CUH_
#define TENON_OPS_LINEAR_LINEAR_FP8_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/core/mma_cuda.cuh"
#include "ops/linear/linear.h"
#include "ops/quantize/quantize_cuda.cuh"

// What the fp8 kernels of linear share. fp8 is converted to float16, exactly,
// and multiplied by mma.sync with weight as the left operand (16 rows) and x as
// the right one (8 tokens). All kernels add the same products in the same
// instructions and the same order, so an element has the same bits whichever
// kernel made it.

namespace tenon::linear_fp8 {

// A call with x quantised.
struct Args {
  LinearParams p;
  cuda::Fp8Groups x;
};

inline constexpr int kBlock = kFp8GroupSize;

// Adds products to a 16 x 8 tile. Of 64 bytes of depth lane l holds bytes [l %
// 4 * 16, + 16): of rows l / 4 (low) and l / 4 + 8 (high) of weight, and of
// token l / 4. Which place of an instruction's depth a product has does not
// matter as long as both operands agree, so the bytes are used as they come
// from memory, four of each lane (one word) at a time.
//
// c has rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]) of weight, tokens
// l % 4 * 2 (c[0], c[2]) and the next.

__device__ __forceinline__ uint32_t Word(const uint4& v, int j) {
  return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// A word of both rows of weight, as the left operand of an instruction.
__device__ __forceinline__ void WeightsToHalf(uint32_t low, uint32_t high,
                                              uint32_t (&a)[4]) {
  uint32_t of_low[2];
  uint32_t of_high[2];
  cuda::Fp8x4ToHalf(low, of_low);
  cuda::Fp8x4ToHalf(high, of_high);
  a[0] = of_low[0];
  a[1] = of_high[0];
  a[2] = of_low[1];
  a[3] = of_high[1];
}

// All words, in order: 64 products to each element of the tiles.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void MultiplyAdd64(float (&c)[kTilesM][kTilesN][4],
                                              const uint4 (&low)[kTilesM],
                                              const uint4 (&high)[kTilesM],
                                              const uint4 (&x)[kTilesN]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      WeightsToHalf(Word(low[i], j), Word(high[i], j), a[i]);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      uint32_t b[2];
      cuda::Fp8x4ToHalf(Word(x[n], j), b);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        cuda::Mma<__half>(c[i][n], a[i], b[0], b[1]);
      }
    }
  }
}

// The sum of one block of depth, scaled. No fused multiply-add: other kernels
// keep these before they are added.
__device__ __forceinline__ float Scaled(float sum, float x_scale,
                                        float weight_scale) {
  return __fmul_rn(sum, __fmul_rn(x_scale, weight_scale));
}

// Makes an output of a sum over all of depth: the scale of a row of weight, if
// they have one each, and the bias.
__device__ __forceinline__ float Finished(const LinearParams& p, float sum,
                                          int64_t feature) {
  if (p.weight_scales.rank == 1) {
    sum = __fmul_rn(sum, p.weight_scales.As<const float>()[feature]);
  }
  switch (p.bias.dtype) {
    case DType::kFloat32:
      return sum + p.bias.As<const float>()[feature];
    case DType::kFloat16:
      return sum + cuda::ToFloat(p.bias.As<const __half>()[feature]);
    case DType::kBFloat16:
      return sum + cuda::ToFloat(p.bias.As<const __nv_bfloat16>()[feature]);
    default:  // none
      return sum;
  }
}

// The scales of the weight's blocks in the row of blocks that `feature` is in,
// or null for a scale per row.
__device__ __forceinline__ const float* BlockScales(const LinearParams& p,
                                                    int64_t feature) {
  if (p.weight_scales.rank == 1) return nullptr;
  return p.weight_scales.As<const float>() +
         feature / kBlock * p.weight_scales.stride[0];
}

}  // namespace tenon::linear_fp8

#endif  // TENON_OPS_LINEAR_LINEAR_FP8_CUDA_CUH_
