#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "ops/qk_norm/qk_norm_backend.h"
#include "ops/qk_norm/qk_norm_element_kernel_cuda.cuh"
#include "ops/qk_norm/qk_norm_kernel_cuda.cuh"

namespace tenon {
namespace {

using namespace qk_norm;  // NOLINT: this file is the host half of the kernel

HeadArray ToHeadArray(const TensorView& heads, const TensorView& weight) {
  HeadArray array = {};
  array.data = heads.data;
  array.token_stride = heads.stride[0];
  array.head_stride = heads.stride[1];
  array.weight = weight.data;
  array.count = static_cast<int32_t>(heads.shape[1]);
  array.steps = 1;
  return array;
}

CacheArray ToCacheArray(const TensorView& cache, float scale) {
  return {cache.data,      cache.stride[0], cache.stride[1],
          cache.stride[2], scale,           1.0f / scale};
}

KernelParams MakeKernelParams(const QkNormParams& p) {
  KernelParams kernel = {};
  kernel.tokens = p.q.shape[0];
  kernel.tile_tokens = 1;
  kernel.heads[kQ] = ToHeadArray(p.q, p.q_weight);
  kernel.heads[kK] = ToHeadArray(p.k, p.k_weight);
  kernel.head_dim = static_cast<int32_t>(p.q.shape[2]);
  kernel.float_weight[kQ] = p.q_weight.dtype == DType::kFloat32;
  kernel.float_weight[kK] = p.k_weight.dtype == DType::kFloat32;
  kernel.cast_first = p.rounding == NormRounding::kCastThenMultiply;
  kernel.epsilon = p.epsilon;
  kernel.inv_head_dim = 1.0f / static_cast<float>(kernel.head_dim);
  if (p.rotary.cos_sin.present() && p.rotary.cos_sin.shape[0] > 0) {
    const int chunk = 16 / static_cast<int>(DTypeSize(p.q.dtype));
    kernel.rotary_dim = p.rotary.rotary_dim;
    kernel.rotary_lanes = kernel.rotary_dim / (2 * chunk);
    kernel.wide_positions = p.rotary.positions.dtype == DType::kInt64;
    kernel.positions = p.rotary.positions.data;
    kernel.cos_sin = p.rotary.cos_sin.As<const float>();
    kernel.cos_sin_stride = p.rotary.cos_sin.stride[0];
    const int64_t rows = p.rotary.cos_sin.shape[0];
    kernel.max_positions =
        kernel.wide_positions ? rows : std::min(rows, int64_t{1} << 31);
  }
  if (p.cache.k_cache.present()) {
    kernel.heads[kV] = ToHeadArray(p.v, p.k_weight);
    kernel.slots = p.cache.slot_mapping.As<const int64_t>();
    kernel.page_size = p.cache.k_cache.shape[1];
    kernel.num_slots = p.cache.k_cache.shape[0] * kernel.page_size;
    kernel.fp8_cache = p.cache.k_cache.dtype == DType::kFloat8E4M3;
    kernel.cache[0] = ToCacheArray(p.cache.k_cache, p.cache.k_scale);
    kernel.cache[1] = ToCacheArray(p.cache.v_cache, p.cache.v_scale);
  }
  return kernel;
}

// Whether QkNormKernel can do it: everything can be moved 16 bytes at a time
// (fp8 caches: as many elements), weights as heads are, rotation partners are
// where it has them, and scales where it can divide by them.
bool IsVectorizable(const QkNormParams& p) {
  for (const TensorView* view :
       {&p.q, &p.k, &p.v, &p.q_weight, &p.k_weight, &p.rotary.cos_sin}) {
    if (view->present() && !cuda::RowsAreAligned(*view, 16)) return false;
  }
  for (const TensorView* weight : {&p.q_weight, &p.k_weight}) {
    if (weight->dtype != p.q.dtype) return false;
  }
  const size_t chunk = 16 / DTypeSize(p.q.dtype);
  for (const TensorView* view : {&p.cache.k_cache, &p.cache.v_cache}) {
    if (view->present() &&
        !cuda::RowsAreAligned(*view, chunk * DTypeSize(view->dtype))) {
      return false;
    }
  }
  for (float scale : {p.cache.k_scale, p.cache.v_scale}) {
    if (scale < 1e-25f || scale > 1e25f) return false;
  }
  const int64_t rotary_dim = p.rotary.rotary_dim;
  const int64_t head_dim = p.q.shape[2];
  return rotary_dim / 2 % chunk == 0 &&
         (rotary_dim == head_dim || rotary_dim <= head_dim / 2);
}

// Divides the heads among warps, `step_heads` at a time. Few heads in all: a
// step to a warp and a token to a tile, for the shortest way through. Many: two
// steps, so that a warp has more bytes under way, and so many tokens that their
// K fill a step. All steps of a lane are of one token.
void AssignWarps(int step_heads, KernelParams* kernel) {
  int heads_of_token = 0;
  for (const HeadArray& heads : kernel->heads) heads_of_token += heads.count;
  const bool few = kernel->tokens * heads_of_token <= 8192;
  kernel->prefetch = few && kernel->rotary_dim > 0;
  const int k_heads = kernel->heads[kK].count;
  // HeadArray::reciprocal is exact up to here.
  constexpr int kMaxTileHeads = 64;
  if (!few && step_heads % k_heads == 0 &&
      kernel->heads[kQ].count <= kMaxTileHeads) {
    kernel->tile_tokens = step_heads / k_heads;
  }
  for (HeadArray& heads : kernel->heads) {
    heads.first_warp = kernel->num_warps;
    if (heads.count == 0) continue;
    const bool whole_warps = heads.count % (step_heads * kMaxSteps) == 0;
    if (!few && (kernel->tile_tokens == 1 || whole_warps)) {
      heads.steps = std::min(kMaxSteps, cuda::CeilDiv(heads.count, step_heads));
    }
    if (kernel->tile_tokens > 1) {
      heads.reciprocal = cuda::CeilDiv(1 << 16, heads.count);
    }
    kernel->num_warps += cuda::CeilDiv(heads.count * kernel->tile_tokens,
                                       step_heads * heads.steps);
  }
  kernel->first_k_warp = kernel->heads[kK].first_warp;
  kernel->first_v_warp = kernel->heads[kV].first_warp;
}

template <class T, bool kRotary>
auto* SelectKernel(int head_dim) {
  switch (head_dim) {
    case 64:
      return QkNormKernel<T, 64, kRotary>;
    case 128:
      return QkNormKernel<T, 128, kRotary>;
    default:
      return QkNormKernel<T, 256, kRotary>;
  }
}

template <class T>
Status LaunchElements(KernelParams kernel, Stream stream) {
  for (HeadArray& heads : kernel.heads) {
    heads.first_warp = kernel.num_warps;
    kernel.num_warps += heads.count;
  }
  kernel.first_k_warp = kernel.heads[kK].first_warp;
  kernel.first_v_warp = kernel.heads[kV].first_warp;
  const dim3 grid(static_cast<unsigned>(kernel.tokens),
                  cuda::CeilDiv(kernel.num_warps, kElementWarps));
  return cuda::LaunchDependent("QkNorm", stream, grid, dim3(32, kElementWarps),
                               0, QkNormElementKernel<T>, kernel);
}

template <class T>
Status LaunchQkNorm(const QkNormParams& p, Stream stream) {
  KernelParams kernel = MakeKernelParams(p);
  if (!IsVectorizable(p)) return LaunchElements<T>(kernel, stream);
  const int lanes = kernel.head_dim * static_cast<int>(sizeof(T)) / 32;
  AssignWarps(32 / lanes, &kernel);
  const int blocks = cuda::CeilDiv(kernel.num_warps, kMaxWarps);  // of a tile
  const int block_warps = cuda::CeilDiv(kernel.num_warps, blocks);
  constexpr int64_t kMaxGridY = 65535;
  const int64_t tiles = cuda::CeilDiv(kernel.tokens, kernel.tile_tokens);
  const int64_t grid_y = std::min(tiles, kMaxGridY);
  const dim3 grid(blocks, static_cast<unsigned>(grid_y),
                  static_cast<unsigned>(cuda::CeilDiv(tiles, grid_y)));
  return cuda::LaunchDependent("QkNorm", stream, grid, dim3(32, block_warps), 0,
                               kernel.rotary_dim > 0
                                   ? SelectKernel<T, true>(kernel.head_dim)
                                   : SelectKernel<T, false>(kernel.head_dim),
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
