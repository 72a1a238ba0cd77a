#include "ops/quantize/quantize_backend.h"
#include "ops/quantize/quantize_cuda.cuh"

namespace tenon {
namespace {

constexpr int kVec = cuda::kFp8Vec;  // elements that a thread takes at once
constexpr int kGroupLanes = kFp8GroupSize / kVec;

// Blocks of one row and 128 columns, one for every 16 threads: activations,
// quantised in every step. Small thread blocks, so that a single row is already
// spread over several multiprocessors.
constexpr int kGroupThreads = 128;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kGroupThreads)
    QuantizeGroupsKernel(QuantizeFp8Params p, int64_t groups_per_row) {
  const int64_t group = int64_t{blockIdx.x} * (kGroupThreads / kGroupLanes) +
                        threadIdx.x / kGroupLanes;
  const int64_t row = group / groups_per_row;
  const int64_t of_row = group % groups_per_row;
  const int lane = threadIdx.x % kGroupLanes;
  const int64_t col = of_row * kFp8GroupSize + lane * kVec;
  // Lanes without a group stay for the shuffles of their warp.
  const bool exists = row < p.x.shape[0];
  const int64_t cols = exists ? p.x.shape[1] : 0;
  cuda::WaitForPreviousKernels();
  float x[kVec];
  cuda::LoadForFp8<kAligned>(p.x.As<const T>() + row * p.x.stride[0], col, cols,
                             x);
  const Fp8Scale scale =
      Fp8ScaleOf(cuda::LanesMax<kGroupLanes>(cuda::MaxMagnitude(x)));
  cuda::StoreFp8<kAligned>(cuda::ToFp8x8(x, scale.inverse),
                           p.out.As<uint8_t>() + row * p.out.stride[0], col,
                           cols);
  if (exists && lane == 0) {
    p.scales.As<float>()[row * p.scales.stride[0] + of_row] = scale.scale;
  }
}

// Any blocks: a thread block each, which reads its elements twice, the second
// time mostly out of cache. For weights, once in a model's life.
constexpr int kBlockThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads)
    QuantizeBlocksKernel(QuantizeFp8Params p, Fp8Blocks blocks) {
  __shared__ float shared[kBlockThreads / 32];
  const int64_t r = blockIdx.x / blocks.count_c;
  const int64_t c = blockIdx.x % blocks.count_c;
  const int64_t first_row = r * blocks.rows;
  const int64_t first_col = c * blocks.cols;
  const int64_t rows = min(p.x.shape[0] - first_row, blocks.rows);
  const int64_t cols = min(p.x.shape[1], first_col + blocks.cols);
  const int64_t row_vecs = cuda::CeilDiv(cols - first_col, int64_t{kVec});
  cuda::WaitForPreviousKernels();
  const auto for_each_vec = [&](const auto& f) {
    for (int64_t i = threadIdx.x; i < rows * row_vecs; i += kBlockThreads) {
      const int64_t row = first_row + i / row_vecs;
      const int64_t col = first_col + i % row_vecs * kVec;
      float x[kVec];
      cuda::LoadForFp8<kAligned>(p.x.As<const T>() + row * p.x.stride[0], col,
                                 cols, x);
      f(row, col, x);
    }
  };
  float amax = 0.0f;
  for_each_vec([&](int64_t, int64_t, const float(&x)[kVec]) {
    amax = fmaxf(amax, cuda::MaxMagnitude(x));
  });
  amax = cuda::WarpMax(amax);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = amax;
  __syncthreads();
  amax = cuda::MaxMagnitude(shared);
  const Fp8Scale scale = Fp8ScaleOf(amax);
  for_each_vec([&](int64_t row, int64_t col, const float(&x)[kVec]) {
    cuda::StoreFp8<kAligned>(cuda::ToFp8x8(x, scale.inverse),
                             p.out.As<uint8_t>() + row * p.out.stride[0], col,
                             cols);
  });
  if (threadIdx.x == 0) {
    p.scales.As<float>()[r * p.scales.stride[0] + c] = scale.scale;
  }
}

template <class T, bool kAligned>
Status Launch(const QuantizeFp8Params& p, Stream stream) {
  constexpr char kOp[] = "QuantizeFp8";
  const Fp8Blocks blocks = Fp8BlocksOf(p);
  const int64_t count = blocks.count_r * blocks.count_c;
  if (p.block_rows == 1 && p.block_cols == kFp8GroupSize) {
    const int64_t grid =
        cuda::CeilDiv(count, int64_t{kGroupThreads / kGroupLanes});
    return cuda::LaunchDependent(
        kOp, stream, dim3(static_cast<unsigned>(grid)), dim3(kGroupThreads), 0,
        QuantizeGroupsKernel<T, kAligned>, p, blocks.count_c);
  }
  return cuda::LaunchDependent(kOp, stream, dim3(static_cast<unsigned>(count)),
                               dim3(kBlockThreads), 0,
                               QuantizeBlocksKernel<T, kAligned>, p, blocks);
}

}  // namespace

Status QuantizeFp8Cuda(const QuantizeFp8Params& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const bool aligned = p.x.shape[1] % kVec == 0 &&
                       cuda::RowsAreAligned(p.x, 16) &&
                       cuda::RowsAreAligned(p.out, kVec);
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return aligned ? Launch<T, true>(p, stream) : Launch<T, false>(p, stream);
  });
}

}  // namespace tenon
