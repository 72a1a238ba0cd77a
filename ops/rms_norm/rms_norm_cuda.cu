#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/rms_norm/rms_norm_backend.h"
#include "ops/rms_norm/rms_norm_cuda.cuh"

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kThreads = cuda::kRmsNormThreads;

// One block per row, vectors of 16 bytes. Each thread keeps its first kKept
// vectors in registers, so that rows up to kThreads * kKept * kVec elements are
// read once.
constexpr int kKept = 4;
constexpr int64_t kMaxGridX = int64_t{1} << 30;

// Vector i of a row: one access where kAligned, else by elements, with zeros
// past the end of the row. Either way a thread adds up the same elements in the
// same order.
template <bool kAligned, class T, int kVec>
__device__ __forceinline__ Vec<T, kVec> Load(const T* row, int i, int hidden) {
  if constexpr (kAligned) {
    return reinterpret_cast<const Vec<T, kVec>*>(row)[i];
  } else {
    Vec<T, kVec> v;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const int64_t element = int64_t{i} * kVec + j;
      v.v[j] = element < hidden ? row[element] : cuda::FromFloat<T>(0.0f);
    }
    return v;
  }
}
template <bool kAligned, class T, int kVec>
__device__ __forceinline__ void Store(const Vec<T, kVec>& v, T* row, int i,
                                      int hidden) {
  if constexpr (kAligned) {
    reinterpret_cast<Vec<T, kVec>*>(row)[i] = v;
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const int64_t element = int64_t{i} * kVec + j;
      if (element < hidden) row[element] = v.v[j];
    }
  }
}

// The weights of vector i as floats; float32 ones take several accesses.
template <bool kAligned, int kVec, class W>
__device__ __forceinline__ void LoadWeights(const W* weight, int i, int hidden,
                                            float (&to)[kVec]) {
  constexpr int kPart = 16 / sizeof(W) < kVec ? 16 / sizeof(W) : kVec;
#pragma unroll
  for (int part = 0; part < kVec / kPart; ++part) {
    const Vec<W, kPart> w =
        Load<kAligned, W, kPart>(weight, i * (kVec / kPart) + part, hidden);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
      to[part * kPart + j] = cuda::ToFloat(w.v[j]);
  }
}

template <class T, class W, bool kAligned>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormParams p) {
  constexpr int kVec = 16 / sizeof(T);
  __shared__ float shared[kThreads / 32];
  const int hidden = static_cast<int>(p.x.shape[1]);
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  cuda::WaitForPreviousKernels();
  const int64_t row = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  if (row >= p.x.shape[0]) return;
  const int num_vecs = cuda::CeilDiv(hidden, kVec);
  const T* const x = p.x.As<const T>() + row * p.x.stride[0];
  T* const residual = p.residual.present()
                          ? p.residual.As<T>() + row * p.residual.stride[0]
                          : nullptr;
  T* const out = p.out.As<T>() + row * p.out.stride[0];

  // Reads (and with a residual, updates) vector i of the row to be normalised.
  const auto load = [&](int i) {
    Vec<T, kVec> v = Load<kAligned, T, kVec>(x, i, hidden);
    if (residual != nullptr) {
      const Vec<T, kVec> r = Load<kAligned, T, kVec>(residual, i, hidden);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v.v[j] =
            cuda::FromFloat<T>(cuda::ToFloat(r.v[j]) + cuda::ToFloat(v.v[j]));
      }
      Store<kAligned>(v, residual, i, hidden);
    }
    return v;
  };
  Vec<T, kVec> kept[kKept];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < num_vecs) {
      kept[k] = load(i);
      sum = cuda::AddSquares(kept[k], sum);
    }
  }
  for (int i = threadIdx.x + kKept * kThreads; i < num_vecs; i += kThreads) {
    sum = cuda::AddSquares(load(i), sum);
  }
  sum = cuda::BlockSum<kThreads>(sum, shared);
  const float inv_rms = cuda::InverseRms(sum, inverse_hidden, p.epsilon);

  const bool cast_first = p.rounding == NormRounding::kCastThenMultiply;
  const auto store = [&](int i, Vec<T, kVec> v) {
    float weight[kVec];
    LoadWeights<kAligned>(p.weight.As<const W>(), i, hidden, weight);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      v.v[j] = cuda::FromFloat<T>(cuda::Normalized<T>(
          cuda::ToFloat(v.v[j]), inv_rms, weight[j], cast_first));
    }
    Store<kAligned>(v, out, i, hidden);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i < num_vecs) store(i, kept[k]);
  }
  const T* const source = residual != nullptr ? residual : x;
  for (int i = threadIdx.x + kKept * kThreads; i < num_vecs; i += kThreads) {
    // Each element is read back by the thread that wrote it.
    store(i, Load<kAligned, T, kVec>(source, i, hidden));
  }
}

template <class T, class W>
Status LaunchRmsNorm(const RmsNormParams& p, Stream stream) {
  const int64_t rows = p.x.shape[0];
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridX)),
                  static_cast<unsigned>(cuda::CeilDiv(rows, kMaxGridX)));
  const bool aligned =
      cuda::RowsAreWholeChunks(p.x) && cuda::RowsAreAligned(p.out, 16) &&
      cuda::RowsAreAligned(p.weight, 16) &&
      (!p.residual.present() || cuda::RowsAreAligned(p.residual, 16));
  return cuda::LaunchDependent(
      "RmsNorm", stream, grid, dim3(kThreads), 0,
      aligned ? RmsNormKernel<T, W, true> : RmsNormKernel<T, W, false>, p);
}

template <class T>
Status LaunchRmsNorm(const RmsNormParams& p, Stream stream) {
  return p.weight.dtype == DType::kFloat32 ? LaunchRmsNorm<T, float>(p, stream)
                                           : LaunchRmsNorm<T, T>(p, stream);
}

}  // namespace

Status RmsNormCuda(const RmsNormParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return LaunchRmsNorm<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
