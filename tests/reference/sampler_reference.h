#ifndef TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_
#define TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace tenon::reference {

// What a sampler may do with one row, in float64.
struct Sampling {
  double temperature = 1.0;  // 0: greedy
  int64_t top_k = 0;         // 0 or -1: off
  double top_p = 1.0;
  double min_p = 0.0;
  bool joint = false;  // top_p on the whole distribution, not on top_k's
};

// The distribution that a token is drawn from.
struct Distribution {
  std::vector<double> probability;  // after the filters; 0: not kept
  std::vector<double> logprob;      // of all tokens, before the filters
  // How far the filters were from keeping another set, as a difference of
  // probabilities, and the most that one token's membership could change.
  double margin = 1.0;
  double margin_mass = 0.0;
};

// Ids by (logit descending, id ascending).
inline std::vector<int64_t> RankTokens(const std::vector<double>& logits) {
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), int64_t{0});
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  return ids;
}

// softmax(logits / temperature), of which the filters keep the best tokens,
// renormalised. Logits are finite or -inf, one at least finite.
inline Distribution KeptDistribution(const std::vector<double>& logits,
                                     const Sampling& sampling) {
  const bool greedy = sampling.temperature == 0.0;
  const double t = greedy ? 1.0 : sampling.temperature;
  const int64_t vocab = static_cast<int64_t>(logits.size());
  const double best = *std::max_element(logits.begin(), logits.end());
  // Not normalised: the weights of ties, and their sums, are exact.
  std::vector<double> weight;
  for (double x : logits) weight.push_back(std::exp((x - best) / t));
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  Distribution d;
  for (double x : logits) {
    d.logprob.push_back((x - best) / t - std::log(total));
  }
  const std::vector<int64_t> ids = RankTokens(logits);
  int64_t kept = greedy ? 1 : vocab;
  double reference = total;
  if (sampling.top_k > 0 && sampling.top_k < kept) {
    kept = sampling.top_k;
    if (!sampling.joint) {
      reference = 0.0;
      for (int64_t i = 0; i < kept; ++i) reference += weight[ids[i]];
    }
  }
  if (sampling.top_p < 1.0) {
    double sum = 0.0;
    for (int64_t i = 0; i < kept; ++i) {
      sum += weight[ids[i]];
      const double margin = std::abs(sum / reference - sampling.top_p);
      if (margin < d.margin) {
        d.margin = margin;
        d.margin_mass = weight[ids[i]] / sum;
      }
      if (sum >= sampling.top_p * reference) {
        kept = i + 1;
        break;
      }
    }
  }
  while (kept > 1 &&
         logits[ids[kept - 1]] < best + t * std::log(sampling.min_p)) {
    --kept;
  }
  double mass = 0.0;
  for (int64_t i = 0; i < kept; ++i) mass += weight[ids[i]];
  d.probability.assign(logits.size(), 0.0);
  for (int64_t i = 0; i < kept; ++i) {
    d.probability[ids[i]] = weight[ids[i]] / mass;
  }
  return d;
}

// Sums of the probabilities up to and including each id.
inline std::vector<double> CumulativeSums(
    const std::vector<double>& probability) {
  std::vector<double> sums(probability.size());
  std::partial_sum(probability.begin(), probability.end(), sums.begin());
  return sums;
}

// The first id at which the cumulative probability exceeds `uniform`.
inline int64_t InvertCdf(const std::vector<double>& cumulative,
                         double uniform) {
  return std::upper_bound(cumulative.begin(), cumulative.end(), uniform) -
         cumulative.begin();
}

// How far `uniform` is from the interval of the CDF that draws `token`; 0 where
// it is inside.
inline double DistanceToToken(const std::vector<double>& cumulative,
                              int64_t token, double uniform) {
  const double low = token == 0 ? 0.0 : cumulative[token - 1];
  return std::max({0.0, low - uniform, uniform - cumulative[token]});
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_
