#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_router_backend.h"

// One warp per token. Lane l holds experts l, l + 32, ... in registers, and the
// warp takes the best of all top_k times. Lane j then weighs the j-th choice.

namespace tenon {
namespace {

constexpr int kWarps = 4;  // per block

// Unsigned integers in the order of the numbers; -0 equals 0.
__device__ __forceinline__ uint32_t Key(float value) {
  if (isnan(value)) return kMoeRouterNanKey;
  const uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// The inverse, with NaN as -infinity.
__device__ __forceinline__ float FromKey(uint32_t key) {
  if (key == kMoeRouterNanKey) return -INFINITY;
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// Index (register * 32 + lane) of the warp's largest key, the lowest of equal
// ones; sets that key to 0.
template <int kValues>
__device__ __forceinline__ int TakeBest(uint32_t (&keys)[kValues]) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t best = keys[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) best = max(best, keys[i]);
  best = __reduce_max_sync(~0u, best);
  uint32_t index = ~0u;
#pragma unroll
  for (int i = kValues - 1; i >= 0; --i) {
    if (keys[i] == best) index = i * 32 + lane;
  }
  index = __reduce_min_sync(~0u, index);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (index - lane == i * 32) keys[i] = 0;
  }
  return static_cast<int>(index);
}

// The score of a logit. For softmax, `max` and `sum` are of the token.
struct Scorer {
  MoeScoring scoring;
  float max = 0.0f;
  float sum = 1.0f;

  // The comparison makes infinity minus infinity 0.
  __device__ __forceinline__ float Exp(float logit) const {
    return expf(logit == max ? 0.0f : logit - max);
  }
  __device__ __forceinline__ float operator()(float logit) const {
    if (isnan(logit)) logit = -INFINITY;
    if (scoring == MoeScoring::kSigmoid) return 1.0f / (1.0f + expf(-logit));
    return Exp(logit) / sum;
  }
};

template <int kValues>
__device__ Scorer MakeScorer(MoeScoring scoring, const float (&logits)[kValues],
                             int num_experts) {
  Scorer scorer{scoring};
  if (scoring == MoeScoring::kSigmoid) return scorer;
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;  // fmaxf skips NaN
#pragma unroll
  for (int i = 0; i < kValues; ++i) max = fmaxf(max, logits[i]);
  scorer.max = cuda::WarpMax(max);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float logit = isnan(logits[i]) ? -INFINITY : logits[i];
    if (i * 32 + lane < num_experts) sum += scorer.Exp(logit);
  }
  scorer.sum = cuda::WarpSum(sum);
  return scorer;
}

// The score of experts [begin, begin + size), the same on every lane; `choice`
// holds keys.
template <int kValues>
__device__ float ScoreGroup(MoeGroupScore group_score,
                            const uint32_t (&choice)[kValues], uint32_t begin,
                            uint32_t size) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t first = kMoeRouterNanKey;  // the best two of this lane
  uint32_t second = kMoeRouterNanKey;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * 32 + lane - begin >= size) continue;  // unsigned: below begin too
    second = max(second, min(first, choice[i]));
    first = max(first, choice[i]);
  }
  const uint32_t best = __reduce_max_sync(~0u, first);
  if (group_score == MoeGroupScore::kMax) return FromKey(best);
  const uint32_t owner = __ffs(__ballot_sync(~0u, first == best)) - 1;
  const uint32_t next = __reduce_max_sync(~0u, lane == owner ? second : first);
  return FromKey(best) + FromKey(next);
}

// Sets the keys of experts outside the best groups to 0. `group_keys` is this
// warp's shared memory.
template <int kValues>
__device__ void DropGroups(const MoeRouterParams& p,
                           const uint32_t (&choice)[kValues],
                           uint32_t* group_keys, uint32_t (&keys)[kValues]) {
  const int lane = threadIdx.x % 32;
  const int num_groups = p.num_expert_groups;
  const int num_experts = static_cast<int>(p.logits.shape[1]);
  const int size = num_experts / num_groups;
  for (int g = 0; g < num_groups; ++g) {
    const uint32_t key = Key(ScoreGroup(p.group_score, choice, g * size, size));
    if (lane == 0) group_keys[g] = key;
  }
  __syncwarp();
  uint32_t candidates[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int g = i * 32 + lane;
    candidates[i] = g < num_groups ? group_keys[g] : 0;
  }
  __syncwarp();
  for (int j = 0; j < p.num_selected_groups; ++j) {
    const int g = TakeBest(candidates);
    if (lane == 0) group_keys[g] = 0;  // marks it selected
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int e = i * 32 + lane;
    if (e < num_experts && group_keys[e / size] != 0) keys[i] = 0;
  }
}

template <class T, int kValues>
__global__ void __launch_bounds__(kWarps * 32)
    MoeRouterKernel(MoeRouterParams p) {
  __shared__ uint32_t group_keys[kWarps][kValues * 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t token = blockIdx.x * int64_t{kWarps} + warp;
  cuda::WaitForPreviousKernels();
  if (token >= p.logits.shape[0]) return;
  const int num_experts = static_cast<int>(p.logits.shape[1]);
  const T* row = p.logits.As<const T>() + token * p.logits.stride[0];

  float logits[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int e = i * 32 + lane;
    logits[i] = e < num_experts ? cuda::ToFloat(row[e]) : -INFINITY;
  }
  const Scorer score = MakeScorer(p.scoring, logits, num_experts);

  const bool biased = p.correction_bias.present();
  const bool grouped = p.num_selected_groups < p.num_expert_groups;
  uint32_t keys[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) keys[i] = Key(logits[i]);
  if (biased || grouped) {
    uint32_t choice[kValues];
    const float* bias = p.correction_bias.As<const float>();
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int e = i * 32 + lane;
      const float b = biased && e < num_experts ? bias[e] : 0.0f;
      choice[i] =
          isnan(logits[i]) ? kMoeRouterNanKey : Key(score(logits[i]) + b);
      if (biased) keys[i] = choice[i];
    }
    if (grouped) DropGroups(p, choice, group_keys[warp], keys);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * 32 + lane >= num_experts) keys[i] = 0;
  }

  int id = 0;  // the lane-th choice
  for (int j = 0; j < p.top_k; ++j) {
    const int best = TakeBest(keys);
    if (lane == j) id = best;
  }
  const bool chosen = lane < p.top_k;
  float weight = chosen ? score(cuda::ToFloat(row[id])) : 0.0f;
  if (p.renormalize) {
    weight /= fmaxf(cuda::WarpSum(weight), kMoeRouterMinSum);
  }
  if (p.routed_scaling_factor != 1.0f) weight *= p.routed_scaling_factor;

  float* weights =
      p.topk_weights.As<float>() + token * p.topk_weights.stride[0];
  int32_t* ids = p.topk_ids.As<int32_t>() + token * p.topk_ids.stride[0];
  if (chosen) {
    weights[lane] = weight;
    ids[lane] = id;
  }
  for (int j = lane; j < p.num_fused_shared_experts; j += 32) {
    weights[p.top_k + j] = 1.0f;
    ids[p.top_k + j] = num_experts + j;
  }
}

template <class T>
Status LaunchMoeRouter(const MoeRouterParams& p, Stream stream) {
  const int64_t num_experts = p.logits.shape[1];
  auto* kernel = MoeRouterKernel<T, kMoeRouterMaxExperts / 32>;
  if (num_experts <= 256) kernel = MoeRouterKernel<T, 8>;
  if (num_experts <= 128) kernel = MoeRouterKernel<T, 4>;
  const dim3 grid(
      static_cast<unsigned>(cuda::CeilDiv(p.logits.shape[0], int64_t{kWarps})));
  return cuda::LaunchDependent("MoeRouter", stream, grid, kWarps * 32, 0,
                               kernel, p);
}

}  // namespace

Status MoeRouterCuda(const MoeRouterParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.logits.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.logits.dtype, [&](auto zero) {
    return LaunchMoeRouter<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
