#include <algorithm>
#include <cmath>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/moe/moe_router_backend.h"

namespace tenon {
namespace {

constexpr int kMaxExperts = kMoeRouterMaxExperts;

// Independent sums, so that the loop can be vectorised in a fixed order.
constexpr int kLanes = 16;

// Unsigned integers in the order of the numbers; -0 equals 0.
uint32_t Key(float value) {
  if (std::isnan(value)) return kMoeRouterNanKey;
  if (value == 0.0f) value = 0.0f;
  const uint32_t bits = FloatBits(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// The `count` largest of keys[0, n), best first, ties to the lowest index, as
// indices. Skips keys of 0, of which at least n - count are not.
void SelectBest(const uint32_t* keys, int n, int count, int32_t* indices) {
  uint64_t best[kMaxExperts];
  std::fill_n(best, count, 0);
  for (int i = 0; i < n; ++i) {
    const uint64_t entry = uint64_t{keys[i]} << 32 | ~static_cast<uint32_t>(i);
    if (keys[i] == 0 || entry <= best[count - 1]) continue;
    int j = count - 1;
    for (; j > 0 && best[j - 1] < entry; --j) best[j] = best[j - 1];
    best[j] = entry;
  }
  for (int j = 0; j < count; ++j) {
    indices[j] = static_cast<int32_t>(~static_cast<uint32_t>(best[j]));
  }
}

// scores[0, n) <- softmax or sigmoid of logits, for which NaN is -infinity.
// Where all are -infinity, softmax is uniform.
void Score(MoeScoring scoring, const float* logits, int n, float* scores) {
  float max = -INFINITY;
  for (int i = 0; i < n; ++i) {
    scores[i] = std::isnan(logits[i]) ? -INFINITY : logits[i];
    max = std::max(max, scores[i]);
  }
  if (scoring == MoeScoring::kSigmoid) {
    for (int i = 0; i < n; ++i)
      scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    return;
  }
  float sums[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    // The comparison makes infinity minus infinity 0.
    scores[i] = std::exp(scores[i] == max ? 0.0f : scores[i] - max);
    sums[i % kLanes] += scores[i];
  }
  float sum = 0.0f;
  for (float s : sums) sum += s;
  for (int i = 0; i < n; ++i) scores[i] /= sum;
}

float ScoreGroup(MoeGroupScore group_score, const float* choice, int size) {
  float first = -INFINITY;
  float second = -INFINITY;
  for (int i = 0; i < size; ++i) {  // comparisons skip NaN
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return group_score == MoeGroupScore::kMax ? first : first + second;
}

// Sets the keys of experts outside the best groups to 0.
void DropGroups(const MoeRouterParams& p, const float* choice, int num_experts,
                uint32_t* keys) {
  const int size = num_experts / p.num_expert_groups;
  uint32_t group_keys[kMaxExperts];
  for (int g = 0; g < p.num_expert_groups; ++g) {
    group_keys[g] = Key(ScoreGroup(p.group_score, choice + g * size, size));
  }
  int32_t selected[kMaxExperts];
  SelectBest(group_keys, p.num_expert_groups, p.num_selected_groups, selected);
  bool keep[kMaxExperts] = {};
  for (int i = 0; i < p.num_selected_groups; ++i) keep[selected[i]] = true;
  for (int e = 0; e < num_experts; ++e) {
    if (!keep[e / size]) keys[e] = 0;
  }
}

void RouteToken(const MoeRouterParams& p, int64_t token) {
  const int num_experts = static_cast<int>(p.logits.shape[1]);
  int32_t* ids = p.topk_ids.As<int32_t>() + token * p.topk_ids.stride[0];
  float* weights =
      p.topk_weights.As<float>() + token * p.topk_weights.stride[0];
  if (IsMoePadding(p, token)) {
    std::fill_n(ids, p.topk_ids.shape[1], -1);
    std::fill_n(weights, p.topk_weights.shape[1], 0.0f);
    return;
  }
  float logits[kMaxExperts];
  const char* row =
      p.logits.As<char>() + token * p.logits.stride[0] *
                                static_cast<int64_t>(DTypeSize(p.logits.dtype));
  CpuConvertToFloat(p.logits.dtype, row, num_experts, logits);

  float scores[kMaxExperts];
  Score(p.scoring, logits, num_experts, scores);
  const bool biased = p.correction_bias.present();
  const float* bias = p.correction_bias.As<float>();
  float choice[kMaxExperts];
  uint32_t keys[kMaxExperts];
  for (int e = 0; e < num_experts; ++e) {
    choice[e] = scores[e] + (biased ? bias[e] : 0.0f);
    if (std::isnan(logits[e])) choice[e] = NAN;
    keys[e] = Key(biased ? choice[e] : logits[e]);
  }
  if (p.num_expert_groups > 1) DropGroups(p, choice, num_experts, keys);

  SelectBest(keys, num_experts, p.top_k, ids);
  float sum = 0.0f;
  for (int j = 0; j < p.top_k; ++j) {
    weights[j] = scores[ids[j]];
    sum += weights[j];
  }
  for (int j = 0; j < p.top_k; ++j) {
    if (p.renormalize) weights[j] /= std::max(sum, kMoeRouterMinSum);
    if (p.routed_scaling_factor != 1.0f) weights[j] *= p.routed_scaling_factor;
  }
  for (int j = 0; j < p.num_fused_shared_experts; ++j) {
    weights[p.top_k + j] = 1.0f;
    ids[p.top_k + j] = num_experts + j;
  }
}

}  // namespace

Status MoeRouterCpu(const MoeRouterParams& p, Stream stream) {
  // About ten microseconds of work a piece.
  const int64_t grain = 2048 / p.logits.shape[1] + 1;
  ParallelFor(stream, p.logits.shape[0], grain,
              [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; ++t) RouteToken(p, t);
              });
  return Status();
}

}  // namespace tenon
