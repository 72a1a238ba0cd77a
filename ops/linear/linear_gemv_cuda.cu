#include <cstring>

#include "ops/core/core_cuda.cuh"
#include "ops/core/mma_cuda.cuh"
#include "ops/linear/linear_backend.h"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Warps that keep the memory of a large GPU busy. Small matrices get there by
// several warps sharing the same rows.
constexpr int64_t kTargetWarps = 132 * 16;

// A warp works on kRows rows of the weight at once, of which each lane has
// kVecs vectors of 16 bytes under way: enough for the latency of memory, with
// the 16 warps of a multiprocessor that the registers allow.
constexpr int kRows = 2;
constexpr int kVecs = 4;

// Used once, so that it needs no place in L1.
template <class V>
__device__ __forceinline__ V LoadOnce(const V* from) {
  static_assert(sizeof(V) == 16, "one vector");
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from));
  V v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// Adds the products of this lane's share of in_features: of every kVecs vectors
// that the warp's lanes hold, in turn with the other warps of its group.
template <class T, int kTokens>
__device__ __forceinline__ void AddProducts(const LinearParams& p,
                                            int64_t first_row, int part,
                                            int split,
                                            float (&sum)[kTokens][kRows]) {
  constexpr int kVec = 16 / sizeof(T);
  using V = Vec<T, kVec>;
  // Rows past the end repeat the last one, and are not stored.
  const V* x[kTokens];
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    const int64_t row = min(static_cast<int64_t>(m), p.x.shape[0] - 1);
    x[m] = reinterpret_cast<const V*>(p.x.As<const T>() + row * p.x.stride[0]);
  }
  const V* w[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = min(first_row + r, p.weight.shape[0] - 1);
    w[r] = reinterpret_cast<const V*>(p.weight.As<const T>() +
                                      row * p.weight.stride[0]);
  }
  const int num_vecs = static_cast<int>(p.x.shape[1] / kVec);
  const int step = 32 * kVecs;
  for (int begin = part * step; begin < num_vecs; begin += split * step) {
    V ws[kVecs][kRows];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int at = begin + i * 32 + static_cast<int>(threadIdx.x % 32);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (at < num_vecs) ws[i][r] = LoadOnce(w[r] + at);
      }
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int at = begin + i * 32 + static_cast<int>(threadIdx.x % 32);
      if (at >= num_vecs) break;
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        const V xs = x[m][at];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            sum[m][r] = fmaf(cuda::ToFloat(xs.v[j]),
                             cuda::ToFloat(ws[i][r].v[j]), sum[m][r]);
          }
        }
      }
    }
  }
}

// p.x has at most kTokens rows. `split` warps share kRows rows of the weight.
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    GemvKernel(LinearParams p, int split) {
  constexpr int kOuts = kTokens * kRows;
  static_assert(kOuts <= 32, "a lane keeps one sum of its warp");
  __shared__ float sums[kWarps][kOuts];
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int groups = kWarps / split;
  const int64_t out_features = p.weight.shape[0];
  const int64_t first_row =
      (int64_t{blockIdx.x} * groups + warp / split) * kRows;

  // The block's weights, while the kernel before this one ends. Where blocks
  // follow one another on a multiprocessor that only gets in the way.
  constexpr unsigned kMaxPrefetchBlocks = 512;
  const int64_t asked_row = int64_t{blockIdx.x} * groups * kRows + threadIdx.x;
  if (gridDim.x <= kMaxPrefetchBlocks && threadIdx.x < groups * kRows &&
      asked_row < out_features) {
    cuda::PrefetchToL2(p.weight.As<const T>() + asked_row * p.weight.stride[0],
                       static_cast<uint32_t>(p.weight.shape[1] * sizeof(T)));
  }
  cuda::WaitForPreviousKernels();

  float sum[kTokens][kRows] = {};
  if (first_row < out_features) {
    AddProducts<T, kTokens>(p, first_row, warp % split, split, sum);
  }
  float mine = 0.0f;  // lane m * kRows + r keeps sum[m][r]
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = cuda::WarpSum(sum[m][r]);
      if (lane == m * kRows + r) mine = total;
    }
  }
  if (lane < kOuts) sums[warp][lane] = mine;
  __syncthreads();

  // The first warp of each group finishes its group's elements.
  if (warp % split != 0 || lane >= kOuts) return;
  float value = 0.0f;
  for (int s = 0; s < split; ++s) value += sums[warp + s][lane];
  const int64_t row = lane / kRows;
  const int64_t col = first_row + lane % kRows;
  if (row >= p.x.shape[0] || col >= out_features) return;
  if (p.bias.present()) value += cuda::ToFloat(p.bias.As<const T>()[col]);
  const int64_t at = row * p.out.stride[0] + col;
  if (p.out.dtype == DType::kFloat32) {
    p.out.As<float>()[at] = value;
  } else {
    p.out.As<T>()[at] = cuda::FromFloat<T>(value);
  }
}

template <class T, int kTokens>
Status LaunchGemv(const LinearParams& p, Stream stream) {
  const int64_t groups = cuda::CeilDiv(p.weight.shape[0], int64_t{kRows});
  // A warp must still have a full round of vectors.
  const int64_t max_split =
      p.x.shape[1] * static_cast<int64_t>(sizeof(T)) / (kVecs * 512);
  int split = 1;
  while (split < kWarps && split * 2 <= max_split &&
         groups * split < kTargetWarps) {
    split *= 2;
  }
  const dim3 grid(
      static_cast<unsigned>(cuda::CeilDiv(groups, int64_t{kWarps / split})));
  return cuda::LaunchDependent("Linear", stream, grid, dim3(kThreads), 0,
                               GemvKernel<T, kTokens>, p, split);
}

template <class T>
Status LaunchGemv(const LinearParams& p, Stream stream) {
  static_assert(kLinearGemvTokens == 4, "the largest kernel below");
  const int64_t tokens = p.x.shape[0];
  if (tokens == 1) return LaunchGemv<T, 1>(p, stream);
  if (tokens == 2) return LaunchGemv<T, 2>(p, stream);
  return LaunchGemv<T, 4>(p, stream);
}

}  // namespace

Status LinearGemv(const LinearParams& p, Stream stream) {
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return LaunchGemv<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
