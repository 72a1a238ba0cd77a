#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_hopper_decode.h"
#include "ops/core/hopper_cuda.cuh"

namespace tenon {
namespace cuda {
namespace {

// Combines the parts of one head of one row, in order. A thread per element.
template <class T>
__global__ void __launch_bounds__(256)
    CombineKernel(const __grid_constant__ AttentionArgs args) {
  const AttentionParams& p = args.params;
  const Query query = FindQuery(args, args.first_row + blockIdx.y);
  if (query.token < 0) return;
  const int64_t head = blockIdx.x;
  const int d = threadIdx.x;
  const int parts = query.length > 0 ? args.plan.parts.Count(query.length) : 0;
  const int64_t first =
      (blockIdx.y * p.q.shape[1] + head) * args.plan.max_parts;
  const float2* softmax = args.partial_softmax + first;
  const float* out = args.partial_out + first * p.q.shape[2] + d;
  float max = -INFINITY;
  for (int i = 0; i < parts; ++i) max = fmaxf(max, softmax[i].x);
  float value = 0.0f;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) {
    const float weight = exp2f(softmax[i].x - max);
    value += out[i * p.q.shape[2]] * weight;
    sum += softmax[i].y * weight;
  }
  p.out.As<T>()[query.token * p.out.stride[0] + head * p.out.stride[1] + d] =
      FromFloat<T>(Normalize(value, sum, p.v_scale));
}

Status LaunchCombine(const AttentionArgs& args, int64_t rows, Stream stream) {
  const AttentionParams& p = args.params;
  const dim3 grid(static_cast<unsigned>(p.q.shape[1]),
                  static_cast<unsigned>(rows));
  const dim3 block(static_cast<unsigned>(p.q.shape[2]));
  return WithFloatType(p.q.dtype, [&](auto zero) {
    return Launch("Attention", stream, grid, block, 0,
                  CombineKernel<decltype(zero)>, args);
  });
}

}  // namespace
}  // namespace cuda

Status AttentionCuda(const AttentionParams& params, const AttentionPlan& plan,
                     Stream stream) {
  const cuda::DeviceGuard guard(params.q.device);
  TENON_RETURN_IF_ERROR(guard.status());
  cuda::AttentionArgs args;
  args.params = params;
  args.plan = plan;
  if (plan.kernel == AttentionKernel::kPrefill) {
    TENON_RETURN_IF_ERROR(cuda::LaunchPrefillAttention(args, stream));
  }
  if (plan.num_rows > 0 && CanUseHopperDecode(params, plan) &&
      cuda::IsHopper(params.q.device)) {
    return cuda::LaunchHopperDecodeAttention(args, stream);
  }
  for (int64_t row = 0; row < plan.num_rows; row += plan.rows_per_pass) {
    const int64_t rows = std::min(plan.rows_per_pass, plan.num_rows - row);
    args.first_row = row;
    if (plan.max_parts > 1) {
      args.partial_out = static_cast<float*>(params.workspace);
      args.partial_softmax = reinterpret_cast<float2*>(
          args.partial_out +
          rows * params.q.shape[1] * plan.max_parts * params.q.shape[2]);
    }
    TENON_RETURN_IF_ERROR(
        plan.kernel == AttentionKernel::kGeneric
            ? cuda::LaunchGenericAttention(args, rows, stream)
            : cuda::LaunchDecodeAttention(args, rows, stream));
    if (plan.max_parts > 1) {
      TENON_RETURN_IF_ERROR(cuda::LaunchCombine(args, rows, stream));
    }
  }
  return Status();
}

}  // namespace tenon
