#ifndef TENON_OPS_RMS_NORM_RMS_NORM_CUDA_CUH_
#define TENON_OPS_RMS_NORM_RMS_NORM_CUDA_CUH_

#include "ops/core/core_cuda.cuh"

// The norm of a row inside a kernel, with the bits of RmsNorm: the
// kRmsNormThreads threads that work on a row take its vectors of 16 bytes in
// turn, and
//
//   sum = AddSquares(v, sum);                     // for each vector
//   sum = cuda::WarpSum(sum);                     // then over warps, in order
//   inverse = InverseRms(sum, 1.0f / hidden, epsilon);
//   f = Normalized<T>(f, inverse, weight, cast_first);

namespace tenon::cuda {

inline constexpr int kRmsNormThreads = 256;

template <class T, int kVec>
__device__ __forceinline__ float AddSquares(const Vec<T, kVec>& v, float sum) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float f = ToFloat(v.v[j]);
    sum = fmaf(f, f, sum);
  }
  return sum;
}

// Within 2 units in the last place.
__device__ __forceinline__ float InverseRms(float sum, float inverse_hidden,
                                            float epsilon) {
  return rsqrtf(fmaf(sum, inverse_hidden, epsilon));
}

// Before it is rounded to T. cast_first: NormRounding::kCastThenMultiply.
template <class T>
__device__ __forceinline__ float Normalized(float f, float inverse,
                                            float weight, bool cast_first) {
  f *= inverse;
  if (cast_first) f = ToFloat(FromFloat<T>(f));
  return f * weight;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_RMS_NORM_RMS_NORM_CUDA_CUH_
