#ifndef TENON_TESTS_BENCH_ROUTER_LOGITS_H_
#define TENON_TESTS_BENCH_ROUTER_LOGITS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace tenon::bench {

// How tokens spread over the experts.
enum class Routing {
  kUniform,
  kSkewed,    // the n-th expert is 1/n as popular as the first
  kAllToOne,  // every token to the same top_k experts
};

inline const char* RoutingName(Routing routing) {
  switch (routing) {
    case Routing::kUniform:
      return "uniform";
    case Routing::kSkewed:
      return "skewed";
    case Routing::kAllToOne:
      break;
  }
  return "all-to-one";
}

// [tokens, num_experts] logits that route so; which experts are popular depends
// on the seed. The best of log(popularity) + Gumbel noise are drawn without
// replacement in proportion to popularity.
inline std::vector<float> RouterLogits(int64_t tokens, int32_t num_experts,
                                       Routing routing, int seed) {
  std::mt19937 rng(seed);
  std::vector<float> base(static_cast<size_t>(num_experts));
  for (size_t rank = 0; rank < base.size(); ++rank) {
    if (routing == Routing::kSkewed) base[rank] = -std::log(rank + 1.0f);
    if (routing == Routing::kAllToOne) base[rank] = -0.05f * rank;
  }
  std::shuffle(base.begin(), base.end(), rng);
  std::vector<float> noise((1 << 14) - 3);
  if (routing != Routing::kAllToOne) {
    std::uniform_real_distribution<float> uniform(0.001f, 0.999f);
    for (float& v : noise) v = -std::log(-std::log(uniform(rng)));
  }
  std::vector<float> logits(static_cast<size_t>(tokens) * base.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = base[i % base.size()] + noise[i % noise.size()];
  }
  return logits;
}

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_ROUTER_LOGITS_H_
