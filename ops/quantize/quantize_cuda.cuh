#ifndef TENON_OPS_QUANTIZE_QUANTIZE_CUDA_CUH_
#define TENON_OPS_QUANTIZE_QUANTIZE_CUDA_CUH_

#include <cstdint>

#include "ops/core/core_cuda.cuh"
#include "ops/quantize/fp8_scale.h"

// Quantisation to fp8 inside a kernel, with the bits of QuantizeFp8: the lanes
// that hold a group find its largest magnitude, make the scale, and round.
//
//   float x[8];                            // of 16 lanes: a group of 128
//   const Fp8Scale s = Fp8ScaleOf(cuda::LanesMax<16>(cuda::MaxMagnitude(x)));
//   const uint2 q = cuda::ToFp8x8(x, s.inverse);
//   // one lane stores s.scale

namespace tenon::cuda {

// The largest magnitude, not counting NaN.
template <int kCount>
__device__ __forceinline__ float MaxMagnitude(const float (&x)[kCount]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

// The maximum over each kLanes consecutive lanes, a power of two, the same on
// all of them. All lanes of the warp take part.
template <int kLanes>
__device__ __forceinline__ float LanesMax(float value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, mask));
  }
  return value;
}

// Rounds two floats to e4m3, the first in the lower byte: to nearest even,
// saturating; NaN becomes 0x7f.
__device__ __forceinline__ uint16_t ToFp8x2(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

// Rounds four floats to e4m3, the first in the lowest byte: to nearest even,
// saturating; NaN becomes 0x7f.
__device__ __forceinline__ uint32_t ToFp8x4(float a, float b, float c,
                                            float d) {
  const uint32_t low =
      __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high =
      __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// The same of eight elements times `inverse`.
__device__ __forceinline__ uint2 ToFp8x8(const float (&x)[8], float inverse) {
  return {
      ToFp8x4(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse),
      ToFp8x4(x[4] * inverse, x[5] * inverse, x[6] * inverse, x[7] * inverse)};
}

inline constexpr int kFp8Vec = 8;  // elements that a thread takes at once

// Elements [col, col + kFp8Vec) of a row as floats, zeros past its end.
// kAligned: rows are whole chunks of kFp8Vec elements and start at multiples of
// 16 bytes.
template <bool kAligned, class T>
__device__ __forceinline__ void LoadForFp8(const T* row, int64_t col,
                                           int64_t cols, float (&to)[kFp8Vec]) {
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int begin = 0; begin < kFp8Vec; begin += kPart) {
    Vec<T, kPart> part;
    if (kAligned && col < cols) {  // rows are whole vectors
      part = *reinterpret_cast<const Vec<T, kPart>*>(row + col + begin);
    } else {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        part.v[i] =
            col + begin + i < cols ? row[col + begin + i] : FromFloat<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) to[begin + i] = ToFloat(part.v[i]);
  }
}

// Stores what ToFp8x8 made of them. kAligned: rows start at multiples of 8
// bytes.
template <bool kAligned>
__device__ __forceinline__ void StoreFp8(uint2 q, uint8_t* row, int64_t col,
                                         int64_t cols) {
  if constexpr (kAligned) {
    if (col < cols) *reinterpret_cast<uint2*>(row + col) = q;
  } else {
    const uint64_t bytes = uint64_t{q.y} << 32 | q.x;
#pragma unroll
    for (int i = 0; i < kFp8Vec; ++i) {
      if (col + i < cols) row[col + i] = static_cast<uint8_t>(bytes >> 8 * i);
    }
  }
}

// Where a matrix quantised in groups of 128 columns goes.
struct Fp8Groups {
  uint8_t* q = nullptr;
  int64_t row_stride = 0;
  float* scales = nullptr;
  int64_t scale_row_stride = 0;  // in floats
  int64_t scale_group_stride = 1;
};

// Quantises x [rows, cols], not empty, like QuantizeFp8 with blocks of one row
// and 128 columns, on the current device. A dependent launch (see
// LaunchDependent).
Status LaunchQuantizeFp8Groups(const char* op, const TensorView& x,
                               const Fp8Groups& to, Stream stream);

}  // namespace tenon::cuda

#endif  // TENON_OPS_QUANTIZE_QUANTIZE_CUDA_CUH_
