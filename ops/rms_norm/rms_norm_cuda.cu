#include "ops/core/core_cuda.cuh"
#include "ops/rms_norm/rms_norm_backend.h"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = 256;

// One block per row. Each thread keeps its first kKept vectors in registers, so
// that rows up to kThreads * kKept * kVec elements are read once.
constexpr int kKept = 4;

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormParams p) {
  __shared__ float shared[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int hidden = static_cast<int>(p.x.shape[1]);
  const int num_vecs = hidden / kVec;
  const auto* x = reinterpret_cast<const Vec<T, kVec>*>(p.x.As<const T>() +
                                                        row * p.x.stride[0]);
  auto* residual = reinterpret_cast<Vec<T, kVec>*>(
      p.residual.present() ? p.residual.As<T>() + row * p.residual.stride[0]
                           : nullptr);
  auto* out =
      reinterpret_cast<Vec<T, kVec>*>(p.out.As<T>() + row * p.out.stride[0]);

  // Reads (and with a residual, updates) vector i of the row to be normalised.
  const auto load = [&](int i) {
    Vec<T, kVec> v = x[i];
    if (residual != nullptr) {
      const Vec<T, kVec> r = residual[i];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v.v[j] =
            cuda::FromFloat<T>(cuda::ToFloat(r.v[j]) + cuda::ToFloat(v.v[j]));
      }
      residual[i] = v;
    }
    return v;
  };
  const auto add_squares = [](const Vec<T, kVec>& v, float sum) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float f = cuda::ToFloat(v.v[j]);
      sum += f * f;
    }
    return sum;
  };

  Vec<T, kVec> kept[kKept];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < num_vecs) {
      kept[k] = load(i);
      sum = add_squares(kept[k], sum);
    }
  }
  for (int i = threadIdx.x + kKept * kThreads; i < num_vecs; i += kThreads) {
    sum = add_squares(load(i), sum);
  }
  sum = cuda::BlockSum<kThreads>(sum, shared);
  const float inv_rms = 1.0f / sqrtf(sum / hidden + p.epsilon);

  const bool cast_first = p.rounding == NormRounding::kCastThenMultiply;
  const auto* weight =
      reinterpret_cast<const Vec<W, kVec>*>(p.weight.As<const W>());
  const auto store = [&](int i, Vec<T, kVec> v) {
    const Vec<W, kVec> w = weight[i];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      float f = cuda::ToFloat(v.v[j]) * inv_rms;
      if (cast_first) f = cuda::ToFloat(cuda::FromFloat<T>(f));
      v.v[j] = cuda::FromFloat<T>(f * cuda::ToFloat(w.v[j]));
    }
    out[i] = v;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < num_vecs) store(i, kept[k]);
  }
  for (int i = threadIdx.x + kKept * kThreads; i < num_vecs; i += kThreads) {
    // Each element is read back by the thread that wrote it.
    store(i, residual != nullptr ? residual[i] : x[i]);
  }
}

template <class T, class W>
Status LaunchRmsNorm(const RmsNormParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.x.shape[0]));
  constexpr int kWide = 4 * sizeof(float) / sizeof(W);
  const bool wide =
      p.x.shape[1] % kWide == 0 && cuda::RowsAreAligned(p.x, 16) &&
      cuda::RowsAreAligned(p.out, 16) && cuda::RowsAreAligned(p.weight, 16) &&
      (!p.residual.present() || cuda::RowsAreAligned(p.residual, 16));
  auto* const kernel =
      wide ? RmsNormKernel<T, W, kWide> : RmsNormKernel<T, W, 1>;
  return cuda::Launch("RmsNorm", stream, grid, dim3(kThreads), 0, kernel, p);
}

template <class T>
Status LaunchRmsNorm(const RmsNormParams& p, Stream stream) {
  return p.weight.dtype == DType::kFloat32 ? LaunchRmsNorm<T, float>(p, stream)
                                           : LaunchRmsNorm<T, T>(p, stream);
}

}  // namespace

Status RmsNormCuda(const RmsNormParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  switch (p.x.dtype) {
    case DType::kFloat32:
      return LaunchRmsNorm<float>(p, stream);
    case DType::kFloat16:
      return LaunchRmsNorm<__half>(p, stream);
    default:
      return LaunchRmsNorm<__nv_bfloat16>(p, stream);
  }
}

}  // namespace tenon
