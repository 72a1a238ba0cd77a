#include <cmath>

#include "ops/core/cpu_thread_pool.h"
#include "ops/rms_norm/rms_norm_backend.h"

namespace tenon {
namespace {

// Independent sums: vector registers of any width can hold them without
// changing the order, and short sums lose fewer bits.
constexpr int kLanes = 32;

template <class T, class W>
void NormalizeRow(const RmsNormParams& p, int64_t row) {
  const int64_t hidden = p.x.shape[1];
  const T* x = p.x.As<T>() + row * p.x.stride[0];
  T* out = p.out.As<T>() + row * p.out.stride[0];
  const W* weight = p.weight.As<W>();
  const T* source = x;
  if (p.residual.present()) {
    T* residual = p.residual.As<T>() + row * p.residual.stride[0];
    for (int64_t i = 0; i < hidden; ++i) {
      residual[i] = FromFloat<T>(ToFloat(residual[i]) + ToFloat(x[i]));
    }
    source = residual;
  }
  float sums[kLanes] = {};
  for (int64_t i = 0; i < hidden; i += kLanes) {
    for (int lane = 0; lane < kLanes && i + lane < hidden; ++lane) {
      const float v = ToFloat(source[i + lane]);
      sums[lane] += v * v;
    }
  }
  float sum = 0.0f;
  for (float s : sums) sum += s;
  const float inv_rms =
      1.0f / std::sqrt(sum / static_cast<float>(hidden) + p.epsilon);
  const bool cast_first = p.rounding == NormRounding::kCastThenMultiply;
  for (int64_t i = 0; i < hidden; ++i) {
    float v = ToFloat(source[i]) * inv_rms;
    if (cast_first) v = ToFloat(FromFloat<T>(v));
    out[i] = FromFloat<T>(v * ToFloat(weight[i]));
  }
}

template <class T>
void NormalizeRows(const RmsNormParams& p, Stream stream) {
  // Rows of about 16k elements a piece, so that threads are worth waking.
  const int64_t grain = 16384 / p.x.shape[1] + 1;
  const bool float_weight = p.weight.dtype == DType::kFloat32;
  ParallelFor(stream, p.x.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (float_weight) {
        NormalizeRow<T, float>(p, row);
      } else {
        NormalizeRow<T, T>(p, row);
      }
    }
  });
}

}  // namespace

Status RmsNormCpu(const RmsNormParams& p, Stream stream) {
  switch (p.x.dtype) {
    case DType::kFloat32:
      NormalizeRows<float>(p, stream);
      break;
    case DType::kFloat16:
      NormalizeRows<Float16>(p, stream);
      break;
    default:
      NormalizeRows<BFloat16>(p, stream);
      break;
  }
  return Status();
}

}  // namespace tenon
