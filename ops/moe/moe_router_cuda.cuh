#ifndef TENON_OPS_MOE_MOE_ROUTER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_ROUTER_CUDA_CUH_

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_router_backend.h"

// How a warp routes a token, for the router's own kernel and for the one that
// prepares a layer. Lane l holds experts l, l + 32, ... in registers, and the
// warp takes the best of all top_k times. Lane j then weighs the j-th choice.
// Private to ops/moe.

namespace tenon::moe_router {

// Unsigned integers in the order of the numbers; -0 equals 0.
__device__ __forceinline__ uint32_t Key(float value) {
  const int32_t bits = __float_as_int(value + 0.0f);  // makes -0 0
  const uint32_t key = static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
  return isnan(value) ? kMoeRouterNanKey : key;
}

// The inverse, with NaN as -infinity.
__device__ __forceinline__ float FromKey(uint32_t key) {
  if (key == kMoeRouterNanKey) return -INFINITY;
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// Index (register * 32 + lane) of the warp's largest key, the lowest of equal
// ones; sets that key to 0 and returns it in `key`.
template <int kValues>
__device__ __forceinline__ int TakeBest(uint32_t (&keys)[kValues],
                                        uint32_t* key) {
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
  *key = best;
  return static_cast<int>(index);
}

// A chosen expert and the key that it was chosen by.
struct Pick {
  int32_t id;
  uint32_t key;
};

// Takes the warp's top_k best keys, all of them not 0; the j-th is the result
// of lane j.
template <int kValues>
__device__ __forceinline__ Pick TakeOneByOne(uint32_t (&keys)[kValues],
                                             int top_k) {
  Pick pick = {0, kMoeRouterNanKey};
  for (int j = 0; j < top_k; ++j) {
    uint32_t key;
    const int id = TakeBest(keys, &key);
    if (threadIdx.x % 32 == j) pick = {id, key};
  }
  return pick;
}

// The same, faster. `picks` is this warp's shared memory, top_k entries.
//
// Each round takes whatever equals the best key left, which is one expert as a
// rule. Where it was not, rounds and experts taken do not match in the end, and
// all is done again one by one.
template <int kValues>
__device__ __forceinline__ Pick TakeAll(uint32_t (&keys)[kValues], int top_k,
                                        Pick* picks) {
  const int lane = threadIdx.x % 32;
  uint32_t left[kValues];
  int round[kValues] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) left[i] = keys[i];
  uint32_t best = 0;
  for (int j = 0; j < top_k; ++j) {
    best = left[0];
#pragma unroll
    for (int i = 1; i < kValues; ++i) best = max(best, left[i]);
    best = __reduce_max_sync(~0u, best);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (left[i] != best) continue;
      left[i] = 0;
      round[i] = j;
    }
  }
  int taken = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) taken += left[i] != keys[i];
  taken = __reduce_add_sync(~0u, taken);
  if (taken != top_k || best == 0) return TakeOneByOne(keys, top_k);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (left[i] != keys[i]) picks[round[i]] = {i * 32 + lane, keys[i]};
  }
  __syncwarp();
  const Pick pick = lane < top_k ? picks[lane] : Pick{0, kMoeRouterNanKey};
  __syncwarp();  // before they are written again
  return pick;
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

// `keys` are those of the logits.
template <int kValues>
__device__ Scorer MakeScorer(MoeScoring scoring, const float (&logits)[kValues],
                             const uint32_t (&keys)[kValues], int num_experts) {
  Scorer scorer{scoring};
  if (scoring == MoeScoring::kSigmoid) return scorer;
  const int lane = threadIdx.x % 32;
  uint32_t max = keys[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) max = ::max(max, keys[i]);
  scorer.max = FromKey(__reduce_max_sync(~0u, max));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float logit = isnan(logits[i]) ? -INFINITY : logits[i];
    const float exp = scorer.Exp(logit);
    sum += i * 32 + lane < num_experts ? exp : 0.0f;
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
    uint32_t key;
    const int g = TakeBest(candidates, &key);
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
__device__ __forceinline__ void LoadRow(const T* row, int num_experts,
                                        float (&to)[kValues]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int e = i * 32 + lane;
    to[i] = e < num_experts ? cuda::ToFloat(row[e]) : -INFINITY;
  }
}

// This lane's logits of a token.
template <int kValues>
__device__ __forceinline__ void LoadLogits(const TensorView& logits,
                                           int64_t token,
                                           float (&to)[kValues]) {
  const int64_t first = token * logits.stride[0];
  const int num_experts = static_cast<int>(logits.shape[1]);
  switch (logits.dtype) {
    case DType::kFloat32:
      return LoadRow(logits.As<const float>() + first, num_experts, to);
    case DType::kFloat16:
      return LoadRow(logits.As<const __half>() + first, num_experts, to);
    default:
      return LoadRow(logits.As<const __nv_bfloat16>() + first, num_experts, to);
  }
}

__device__ __forceinline__ float LogitAt(const TensorView& logits,
                                         int64_t token, int expert) {
  const int64_t i = token * logits.stride[0] + expert;
  switch (logits.dtype) {
    case DType::kFloat32:
      return logits.As<const float>()[i];
    case DType::kFloat16:
      return cuda::ToFloat(logits.As<const __half>()[i]);
    default:
      return cuda::ToFloat(logits.As<const __nv_bfloat16>()[i]);
  }
}

// What cuda::WarpSum gives for values of the first `count` lanes, that are not
// negative, and 0 of the others: on those first lanes.
__device__ __forceinline__ float SumOfFirst(float value, int count) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    // Further lanes have zeros, which do not change a sum.
    if (mask < count) value += __shfl_xor_sync(~0u, value, mask);
  }
  return value;
}

// The lane-th choice of a token; of lanes from top_k on, nothing. Of padding
// all lanes have id -1.
struct Choice {
  int id = 0;
  float weight = 0.0f;
};

inline __host__ __device__ bool IsGrouped(const MoeRouterParams& p) {
  return p.num_selected_groups < p.num_expert_groups;
}

// Routes one token. `picks` and, if IsGrouped, `group_keys` are this warp's
// shared memory: top_k and num_expert_groups entries.
template <int kValues>
__device__ Choice Route(const MoeRouterParams& p, int64_t token,
                        const float (&logits)[kValues], Pick* picks,
                        uint32_t* group_keys) {
  const int lane = threadIdx.x % 32;
  const int num_experts = static_cast<int>(p.logits.shape[1]);
  const bool is_padding = IsMoePadding(p, token);
  uint32_t keys[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) keys[i] = Key(logits[i]);
  const Scorer score = MakeScorer(p.scoring, logits, keys, num_experts);

  const bool biased = p.correction_bias.present();
  const bool grouped = IsGrouped(p);
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
    if (grouped) DropGroups(p, choice, group_keys, keys);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * 32 + lane >= num_experts) keys[i] = 0;
  }

  Pick pick;
  if constexpr (kValues <= 8) {
    pick = TakeAll(keys, p.top_k, picks);
  } else {  // which would need too many registers
    pick = TakeOneByOne(keys, p.top_k);
  }
  Choice result;
  if (lane < p.top_k) {
    result.id = pick.id;
    result.weight =
        score(biased ? LogitAt(p.logits, token, pick.id) : FromKey(pick.key));
  }
  if (p.renormalize) {
    const float sum = SumOfFirst(result.weight, p.top_k);
    // Not on the other lanes: division has a slow way for 0, which the whole
    // warp would go.
    if (lane < p.top_k) result.weight /= fmaxf(sum, kMoeRouterMinSum);
  }
  if (p.routed_scaling_factor != 1.0f) {
    result.weight *= p.routed_scaling_factor;
  }
  if (is_padding) result = {-1, 0.0f};
  return result;
}

__device__ __forceinline__ void StoreChoice(const MoeRouterParams& p,
                                            int64_t token, Choice choice) {
  const int lane = threadIdx.x % 32;
  float* weights =
      p.topk_weights.As<float>() + token * p.topk_weights.stride[0];
  int32_t* ids = p.topk_ids.As<int32_t>() + token * p.topk_ids.stride[0];
  if (lane < p.top_k) {
    weights[lane] = choice.weight;
    ids[lane] = choice.id;
  }
  for (int j = lane; j < p.num_fused_shared_experts; j += 32) {
    const bool is_padding = choice.id < 0;
    weights[p.top_k + j] = is_padding ? 0.0f : 1.0f;
    ids[p.top_k + j] =
        is_padding ? -1 : static_cast<int32_t>(p.logits.shape[1]) + j;
  }
}

}  // namespace tenon::moe_router

#endif  // TENON_OPS_MOE_MOE_ROUTER_CUDA_CUH_
