#ifndef TENON_TESTS_BENCH_ROUTER_LOGITS_H_
#define TENON_TESTS_BENCH_ROUTER_LOGITS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
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

// A number from 0 to 1, exclusive, for each seed and index: the same everywhere
// and in peers/inputs.py (splitmix64).
inline double RouterUniform(uint64_t seed, uint64_t index) {
  const auto mix = [](uint64_t v) {
    v += 0x9e3779b97f4a7c15u;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
    return v ^ (v >> 31);
  };
  return (static_cast<double>(mix(mix(seed) + index) >> 40) + 0.5) / (1 << 24);
}

// [tokens, num_experts] logits that route so; which experts are popular depends
// on the seed. The best of log(popularity) + Gumbel noise are drawn without
// replacement in proportion to popularity.
inline std::vector<float> RouterLogits(int64_t tokens, int32_t num_experts,
                                       Routing routing, int seed) {
  constexpr uint64_t kNoise = (1 << 14) - 3;  // odd: rows do not repeat soon
  const auto experts = static_cast<size_t>(num_experts);
  std::vector<size_t> by_rank(experts);
  std::iota(by_rank.begin(), by_rank.end(), size_t{0});
  std::sort(by_rank.begin(), by_rank.end(), [&](size_t a, size_t b) {
    return RouterUniform(seed, kNoise + a) < RouterUniform(seed, kNoise + b);
  });
  std::vector<float> base(experts);
  for (size_t rank = 0; rank < experts; ++rank) {
    double logit = 0.0;
    if (routing == Routing::kSkewed) logit = -std::log(rank + 1.0);
    if (routing == Routing::kAllToOne) logit = -0.05 * rank;
    base[by_rank[rank]] = static_cast<float>(logit);
  }
  std::vector<float> noise(kNoise);
  if (routing != Routing::kAllToOne) {
    for (size_t i = 0; i < noise.size(); ++i) {
      noise[i] =
          static_cast<float>(-std::log(-std::log(RouterUniform(seed, i))));
    }
  }
  std::vector<float> logits(static_cast<size_t>(tokens) * experts);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = base[i % experts] + noise[i % kNoise];
  }
  return logits;
}

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_ROUTER_LOGITS_H_
