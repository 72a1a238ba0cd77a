#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/qk_norm/qk_norm_backend.h"
#include "ops/qk_norm/qk_norm_kernel_cuda.cuh"

namespace tenon {
namespace {

using namespace qk_norm;  // NOLINT: this file is the host half of the kernel

HeadArray ToHeadArray(const TensorView& heads) {
  return {heads.data, heads.stride[0], heads.stride[1],
          static_cast<int32_t>(heads.shape[1]), 0};
}

CacheArray ToCacheArray(const TensorView& cache, float scale) {
  return {cache.data, cache.stride[0], cache.stride[1], cache.stride[2], scale};
}

KernelParams MakeKernelParams(const QkNormParams& p) {
  const int64_t head_dim = p.q.shape[2];
  KernelParams kernel = {};
  kernel.tokens = p.q.shape[0];
  kernel.heads[kQ] = ToHeadArray(p.q);
  kernel.heads[kK] = ToHeadArray(p.k);
  while (kPerLane << kernel.log2_lanes < head_dim) ++kernel.log2_lanes;
  const TensorView* const weights[] = {&p.q_weight, &p.k_weight};
  for (Role role : {kQ, kK}) {
    kernel.weight[role] = weights[role]->data;
    kernel.float_weight[role] = weights[role]->dtype == DType::kFloat32;
  }
  kernel.cast_first = p.rounding == NormRounding::kCastThenMultiply;
  kernel.epsilon = p.epsilon;
  kernel.inv_head_dim = 1.0f / static_cast<float>(head_dim);
  if (p.rotary.cos_sin.present()) {
    kernel.rotary_dim = p.rotary.rotary_dim;
    kernel.wide_positions = p.rotary.positions.dtype == DType::kInt64;
    kernel.positions = p.rotary.positions.data;
    kernel.cos_sin = p.rotary.cos_sin.As<const float>();
    kernel.cos_sin_stride = p.rotary.cos_sin.stride[0];
    kernel.max_positions = p.rotary.cos_sin.shape[0];
  }
  if (p.cache.k_cache.present()) {
    kernel.heads[kV] = ToHeadArray(p.v);
    kernel.slots = p.cache.slot_mapping.As<const int64_t>();
    kernel.page_size = p.cache.k_cache.shape[1];
    kernel.num_slots = p.cache.k_cache.shape[0] * kernel.page_size;
    kernel.fp8_cache = p.cache.k_cache.dtype == DType::kFloat8E4M3;
    kernel.cache[0] = ToCacheArray(p.cache.k_cache, p.cache.k_scale);
    kernel.cache[1] = ToCacheArray(p.cache.v_cache, p.cache.v_scale);
  }
  return kernel;
}

// Whether everything can be moved 16 bytes at a time (fp8 caches: as many
// elements), and rotation partners come in whole vectors too.
bool IsVectorizable(const QkNormParams& p) {
  for (const TensorView* view :
       {&p.q, &p.k, &p.v, &p.q_weight, &p.k_weight, &p.rotary.cos_sin}) {
    if (view->present() && !cuda::RowsAreAligned(*view, 16)) return false;
  }
  const size_t vec = 16 / DTypeSize(p.q.dtype);
  for (const TensorView* view : {&p.cache.k_cache, &p.cache.v_cache}) {
    if (view->present() &&
        !cuda::RowsAreAligned(*view, vec * DTypeSize(view->dtype))) {
      return false;
    }
  }
  return !p.rotary.cos_sin.present() || p.rotary.rotary_dim / 2 % vec == 0;
}

// Gives each warp of a token heads of one role, `num_steps` steps of them.
void AssignWarps(int num_steps, KernelParams* kernel) {
  kernel->num_steps = num_steps;
  for (HeadArray& heads : kernel->heads) {
    heads.first_warp = kernel->num_warps;
    kernel->num_warps +=
        cuda::CeilDiv(heads.count, (32 >> kernel->log2_lanes) * num_steps);
  }
}

// Few heads in all: a step to a warp, for the shortest way through. Many:
// several, so that a warp has more bytes under way and reads weights and angles
// less often.
int StepsPerWarp(const KernelParams& kernel) {
  int heads = 0;
  for (const HeadArray& array : kernel.heads) heads += array.count;
  return kernel.tokens * heads <= 8192 ? 1 : kMaxSteps;
}

template <class T, bool kRotary>
auto* SelectKernel(bool vectorizable, int log2_lanes) {
  if (!vectorizable) return QkNormKernel<T, 0, true>;
  switch (log2_lanes) {
    case 3:
      return QkNormKernel<T, 3, kRotary>;
    case 4:
      return QkNormKernel<T, 4, kRotary>;
    default:
      return QkNormKernel<T, 5, kRotary>;
  }
}

template <class T>
Status LaunchQkNorm(const QkNormParams& p, Stream stream) {
  KernelParams kernel = MakeKernelParams(p);
  AssignWarps(StepsPerWarp(kernel), &kernel);
  const int blocks = cuda::CeilDiv(kernel.num_warps, kMaxWarps);  // of a token
  const int block_warps = cuda::CeilDiv(kernel.num_warps, blocks);
  const int block_tokens = kMaxWarps / block_warps;
  const dim3 grid(
      static_cast<unsigned>(cuda::CeilDiv(kernel.tokens, block_tokens)),
      blocks);
  const bool vectorizable = IsVectorizable(p);
  return cuda::LaunchDependent(
      "QkNorm", stream, grid, dim3(32, block_warps, block_tokens), 0,
      kernel.rotary_dim > 0
          ? SelectKernel<T, true>(vectorizable, kernel.log2_lanes)
          : SelectKernel<T, false>(vectorizable, kernel.log2_lanes),
      kernel);
}

}  // namespace

Status QkNormCuda(const QkNormParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.q.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.q.dtype, [&](auto zero) {
    return LaunchQkNorm<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
