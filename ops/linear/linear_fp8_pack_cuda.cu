#include "ops/core/core_cuda.cuh"
#include "ops/linear/linear_fp8_pack_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"
#include "ops/rms_norm/rms_norm_cuda.cuh"

namespace tenon::linear_fp8 {
namespace {

constexpr int kVec = cuda::kFp8Vec;
constexpr int kGroupLanes = kFp8GroupSize / kVec;
constexpr int kPackThreads = 128;
constexpr int kNormThreads = cuda::kRmsNormThreads;

// Eight elements of `row` that begin at `column`; the 16 lanes of a group
// together. All lanes of a warp take part, also those whose column does not
// exist.
__device__ __forceinline__ void Pack(const PackedX& to, int row, int column,
                                     int cols, const float (&x)[kVec]) {
  const Fp8Scale scale =
      Fp8ScaleOf(cuda::LanesMax<kGroupLanes>(cuda::MaxMagnitude(x)));
  if (column >= cols) return;
  const int group = column / kFp8GroupSize;
  const int in_group = column % kFp8GroupSize;
  const int64_t at = int64_t{group} * to.rows + row;
  const int chunk = in_group / 16 ^ row % 8;
  *reinterpret_cast<uint2*>(to.q + at * kFp8GroupSize + chunk * 16 +
                            in_group % 16) = cuda::ToFp8x8(x, scale.inverse);
  if (in_group == 0) to.scales[at] = scale.scale;
}

// A thread for every vector of all rows, those past the last token as well:
// zeros. Eight rows of whole groups are whole blocks of threads.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    PackKernel(TensorView x, PackedX to) {
  cuda::LetNextKernelStart();
  const int cols = static_cast<int>(x.shape[1]);
  const int i = static_cast<int>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int row = i / (cols / kVec);
  const int column = i % (cols / kVec) * kVec;
  cuda::WaitBeforeReading();
  float values[kVec];
  cuda::LoadForFp8<true>(x.As<const T>() + row * x.stride[0], column,
                         row < x.shape[0] ? cols : 0, values);
  Pack(to, row, column, cols, values);
}

// A block for each row, its vectors shared among threads as in RmsNorm.
constexpr int kKept = 4;

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    NormPackKernel(TensorView x, LinearNorm norm, bool weights_are_constant,
                   PackedX to) {
  using V = cuda::Vec<T, kVec>;
  __shared__ float shared[kNormThreads / 32];
  cuda::LetNextKernelStart();
  const int row = blockIdx.x;
  const int cols = static_cast<int>(x.shape[1]);
  const int num_vecs = cols / kVec;
  const bool exists = row < x.shape[0];
  const float inverse_cols = 1.0f / static_cast<float>(cols);
  const bool cast_first = norm.rounding == NormRounding::kCastThenMultiply;
  const auto* const weights = norm.weight.As<const V>();
  V kept[kKept];
  V weight[kKept];
  const auto load_weights = [&] {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int i = threadIdx.x + k * kNormThreads;
      if (i < num_vecs) weight[k] = weights[i];
    }
  };
  if (weights_are_constant) load_weights();
  cuda::WaitBeforeReading();
  if (!weights_are_constant) load_weights();
  const auto* const from =
      reinterpret_cast<const V*>(x.As<const T>() + row * x.stride[0]);
  auto* const normed =
      reinterpret_cast<V*>(norm.out.As<T>() + row * norm.out.stride[0]);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kNormThreads;
    if (i >= num_vecs || !exists) continue;
    kept[k] = from[i];
    sum = cuda::AddSquares(kept[k], sum);
  }
  sum = cuda::BlockSum<kNormThreads>(sum, shared);
  const float inverse = cuda::InverseRms(sum, inverse_cols, norm.epsilon);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * kNormThreads;
    float values[kVec] = {};
    if (i < num_vecs && exists) {
      V v;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v.v[j] = cuda::FromFloat<T>(
            cuda::Normalized<T>(cuda::ToFloat(kept[k].v[j]), inverse,
                                cuda::ToFloat(weight[k].v[j]), cast_first));
        values[j] = cuda::ToFloat(v.v[j]);
      }
      normed[i] = v;
    }
    if (k * kNormThreads >= num_vecs) break;
    Pack(to, row, i * kVec, cols, values);
  }
}

template <class T>
Status LaunchType(const LinearParams& p, const PackedX& to, Stream stream) {
  if (p.norm.present()) {
    return cuda::LaunchDependent("Linear", stream,
                                 dim3(static_cast<unsigned>(to.rows)),
                                 dim3(kNormThreads), 0, NormPackKernel<T>, p.x,
                                 p.norm, p.weights_are_constant, to);
  }
  const int64_t blocks = to.rows * (p.x.shape[1] / kVec) / kPackThreads;
  return cuda::LaunchDependent("Linear", stream,
                               dim3(static_cast<unsigned>(blocks)),
                               dim3(kPackThreads), 0, PackKernel<T>, p.x, to);
}

}  // namespace

bool PackTakesNorm(const LinearParams& p) {
  return p.norm.weight.dtype == p.x.dtype &&
         cuda::RowsAreAligned(p.norm.weight, 16) &&
         cuda::RowsAreAligned(p.norm.out, 16) &&
         p.x.shape[1] <= int64_t{kKept} * kNormThreads * kVec;
}

Status LaunchPack(const LinearParams& p, const PackedX& to, Stream stream) {
  return p.x.dtype == DType::kFloat16
             ? LaunchType<__half>(p, to, stream)
             : LaunchType<__nv_bfloat16>(p, to, stream);
}

}  // namespace tenon::linear_fp8
