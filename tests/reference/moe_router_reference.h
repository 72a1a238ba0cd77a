#ifndef TENON_TESTS_REFERENCE_MOE_ROUTER_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_ROUTER_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace tenon::reference {

struct MoeRouterOptions {
  int64_t top_k = 1;
  bool sigmoid = false;
  bool renormalize = false;
  double scaling_factor = 1.0;
  int64_t num_groups = 1;
  int64_t num_selected_groups = 1;
  bool group_top2_sum = true;
  int64_t num_shared_experts = 0;
};

struct MoeRouting {
  std::vector<int64_t> ids;
  std::vector<double> weights;
  // The smallest distance between two choices whose order decided something,
  // unless they were exactly equal or ordered by logits.
  double margin = std::numeric_limits<double>::infinity();
};

// Indices in descending order of values, ties to the lowest; NaN comes last.
inline std::vector<int64_t> DescendingOrder(const std::vector<double>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (std::isnan(values[b])) return !std::isnan(values[a]);
    return values[a] > values[b];
  });
  return order;
}

// The smallest non-zero distance from ranks first ... last of an order to the
// respective next one.
inline double SmallestGap(const std::vector<double>& values,
                          const std::vector<int64_t>& order, int64_t first,
                          int64_t last) {
  double gap = std::numeric_limits<double>::infinity();
  for (int64_t i = first; i <= last; ++i) {
    if (i + 1 >= static_cast<int64_t>(order.size())) break;
    const double distance = values[order[i]] - values[order[i + 1]];
    if (distance > 0.0) gap = std::min(gap, distance);
  }
  return gap;
}

// softmax or sigmoid; a NaN logit scores 0, and infinity minus infinity is 0.
inline std::vector<double> MoeScores(std::vector<double> logits, bool sigmoid) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (double& v : logits) v = std::isnan(v) ? -infinity : v;
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (double& v : logits) {
    v = sigmoid ? 1.0 / (1.0 + std::exp(-v)) : std::exp(v == max ? 0 : v - max);
    sum += v;
  }
  for (double& v : logits) v /= sigmoid ? 1.0 : sum;
  return logits;
}

// Routes one token. `bias` may be empty.
inline MoeRouting MoeRoute(const std::vector<double>& logits,
                           const std::vector<double>& bias,
                           const MoeRouterOptions& o) {
  const int64_t num_experts = static_cast<int64_t>(logits.size());
  const std::vector<double> scores = MoeScores(logits, o.sigmoid);
  std::vector<double> choice = scores;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (!bias.empty()) choice[e] += bias[e];
    if (std::isnan(logits[e])) choice[e] = std::nan("");
  }
  MoeRouting out;
  std::vector<bool> keep(logits.size(), true);
  if (o.num_groups > 1) {
    const int64_t size = num_experts / o.num_groups;
    std::vector<double> group_scores;
    for (int64_t g = 0; g < o.num_groups; ++g) {
      std::vector<double> group(choice.begin() + g * size,
                                choice.begin() + (g + 1) * size);
      for (double& v : group) {
        if (std::isnan(v)) v = -std::numeric_limits<double>::infinity();
      }
      const std::vector<int64_t> order = DescendingOrder(group);
      group_scores.push_back(group[order[0]] +
                             (o.group_top2_sum ? group[order[1]] : 0.0));
    }
    const std::vector<int64_t> order = DescendingOrder(group_scores);
    out.margin = SmallestGap(group_scores, order, o.num_selected_groups - 1,
                             o.num_selected_groups - 1);
    for (int64_t i = o.num_selected_groups; i < o.num_groups; ++i) {
      for (int64_t j = 0; j < size; ++j) keep[order[i] * size + j] = false;
    }
  }
  const std::vector<double>& ranked = bias.empty() ? logits : choice;
  std::vector<int64_t> order;
  for (int64_t e : DescendingOrder(ranked)) {
    if (keep[e]) order.push_back(e);
  }
  if (!bias.empty()) {
    out.margin =
        std::min(out.margin, SmallestGap(ranked, order, 0, o.top_k - 1));
  }
  double sum = 0.0;
  for (int64_t j = 0; j < o.top_k; ++j) sum += scores[order[j]];
  for (int64_t j = 0; j < o.top_k; ++j) {
    out.ids.push_back(order[j]);
    out.weights.push_back(scores[order[j]] * o.scaling_factor /
                          (o.renormalize ? std::max(sum, 1e-20) : 1.0));
  }
  for (int64_t j = 0; j < o.num_shared_experts; ++j) {
    out.ids.push_back(num_experts + j);
    out.weights.push_back(1.0);
  }
  return out;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_ROUTER_REFERENCE_H_
