#ifndef TENON_TESTS_ABI_CONFORMANCE_SAMPLING_H_
#define TENON_TESTS_ABI_CONFORMANCE_SAMPLING_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "abi/tenon.h"
#include "tests/reference/philox_reference.h"
#include "tests/reference/sampler_reference.h"

namespace tenon::conformance {

struct ReferenceDraw {
  int64_t token = 0;
  double logprob = 0.0;
  // How much a probability must change before the token does.
  double margin = 1.0;
};

// What float64 draws from one row of logits.
inline ReferenceDraw DrawToken(const std::vector<double>& logits,
                               const tenon_sampling_params& params) {
  const reference::Distribution kept = reference::KeptDistribution(
      logits, {params.temperature, params.top_k, params.top_p, params.min_p,
               params.filter_order == TENON_FILTER_JOINT
                   ? reference::Order::kJoint
                   : reference::Order::kSequential});
  ReferenceDraw draw;
  if (params.temperature == 0.0f) {
    const auto best =
        std::max_element(kept.probability.begin(), kept.probability.end());
    draw.token = best - kept.probability.begin();
    // Exactly equal logits are no close call: the lower id wins.
    for (size_t i = 0; i < logits.size(); ++i) {
      const double lead =
          std::exp(kept.logprob[draw.token]) - std::exp(kept.logprob[i]);
      if (lead > 0.0) draw.margin = std::min(draw.margin, lead);
    }
  } else {
    const reference::Cdf cdf(kept.probability);
    const double uniform =
        reference::PhiloxUniform(params.seed, params.position);
    draw.token = cdf.Invert(uniform);
    const double low = cdf.low(draw.token);
    const double high = low + kept.probability[draw.token];
    draw.margin = std::min({kept.margin, uniform - low, high - uniform});
  }
  draw.logprob = kept.logprob[draw.token];
  return draw;
}

}  // namespace tenon::conformance

#endif  // TENON_TESTS_ABI_CONFORMANCE_SAMPLING_H_
