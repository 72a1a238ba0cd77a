#include "ops/quantize/quantize_backend.h"
#include "ops/quantize/quantize_cuda.cuh"

namespace tenon {
namespace {

using cuda::Fp8Groups;

constexpr int kVec = cuda::kFp8Vec;  // elements that a thread takes at once
constexpr int kGroupLanes = kFp8GroupSize / kVec;

// Blocks of one row and 128 columns, one for every 16 threads: activations,
// quantised in every step. Small thread blocks, so that a single row is already
// spread over several multiprocessors.
constexpr int kGroupThreads = 128;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kGroupThreads)
    QuantizeGroupsKernel(TensorView x, Fp8Groups to, int64_t groups_per_row) {
  const int64_t index = int64_t{blockIdx.x} * (kGroupThreads / kGroupLanes) +
                        threadIdx.x / kGroupLanes;
  const int64_t row = index / groups_per_row;
  const int64_t group = index % groups_per_row;
  const int lane = threadIdx.x % kGroupLanes;
  const int64_t col = group * kFp8GroupSize + lane * kVec;
  // Lanes without a group stay for the shuffles of their warp.
  const bool exists = row < x.shape[0];
  const int64_t cols = exists ? x.shape[1] : 0;
  cuda::WaitForPreviousKernels();
  float values[kVec];
  cuda::LoadForFp8<kAligned>(x.As<const T>() + row * x.stride[0], col, cols,
                             values);
  const Fp8Scale scale =
      Fp8ScaleOf(cuda::LanesMax<kGroupLanes>(cuda::MaxMagnitude(values)));
  cuda::StoreFp8<kAligned>(cuda::ToFp8x8(values, scale.inverse),
                           to.q + row * to.row_stride, col, cols);
  if (exists && lane == 0) {
    to.scales[row * to.scale_row_stride + group * to.scale_group_stride] =
        scale.scale;
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

bool IsAligned(const TensorView& x, const void* out, int64_t out_stride) {
  return x.shape[1] % kVec == 0 && cuda::RowsAreAligned(x, 16) &&
         reinterpret_cast<uintptr_t>(out) % kVec == 0 &&
         (x.shape[0] == 1 || out_stride % kVec == 0);
}

Status LaunchBlocks(const QuantizeFp8Params& p, Stream stream) {
  const Fp8Blocks blocks = Fp8BlocksOf(p);
  const dim3 grid(static_cast<unsigned>(blocks.count_r * blocks.count_c));
  const bool aligned = IsAligned(p.x, p.out.data, p.out.stride[0]);
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::LaunchDependent("QuantizeFp8", stream, grid,
                                 dim3(kBlockThreads), 0,
                                 aligned ? QuantizeBlocksKernel<T, true>
                                         : QuantizeBlocksKernel<T, false>,
                                 p, blocks);
  });
}

}  // namespace

Status cuda::LaunchQuantizeFp8Groups(const char* op, const TensorView& x,
                                     const Fp8Groups& to, Stream stream) {
  const int64_t per_row = NumFp8Groups(x.shape[1]);
  const dim3 grid(static_cast<unsigned>(
      CeilDiv(x.shape[0] * per_row, int64_t{kGroupThreads / kGroupLanes})));
  const bool aligned = IsAligned(x, to.q, to.row_stride);
  return WithFloatType(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return LaunchDependent(op, stream, grid, dim3(kGroupThreads), 0,
                           aligned ? QuantizeGroupsKernel<T, true>
                                   : QuantizeGroupsKernel<T, false>,
                           x, to, per_row);
  });
}

Status QuantizeFp8Cuda(const QuantizeFp8Params& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  if (p.block_rows != 1 || p.block_cols != kFp8GroupSize) {
    return LaunchBlocks(p, stream);
  }
  Fp8Groups to;
  to.q = p.out.As<uint8_t>();
  to.row_stride = p.out.stride[0];
  to.scales = p.scales.As<float>();
  to.scale_row_stride = p.scales.stride[0];
  return cuda::LaunchQuantizeFp8Groups("QuantizeFp8", p.x, to, stream);
}

}  // namespace tenon
