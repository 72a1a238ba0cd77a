#ifndef TENON_OPS_SAMPLER_SPECULATIVE_BACKEND_H_
#define TENON_OPS_SAMPLER_SPECULATIVE_BACKEND_H_

#include "ops/sampler/row_plan.h"
#include "ops/sampler/speculative.h"

namespace tenon {

// Backends trust `params`: Speculative() has validated them, but for what lies
// in the memory of the device.
Status SpeculativeCpu(const SpeculativeParams& params, Stream stream);
Status SpeculativeCuda(const SpeculativeParams& params, Stream stream);

// What both backends compute.

// A probability as it counts: 0 where it is no number.
TENON_HOST_DEVICE inline float Probability(float p) {
  return p > 0.0f ? (p < 1.0f ? p : 1.0f) : 0.0f;
}

// What the token after a rejection is drawn from; q is 0 where there is none.
TENON_HOST_DEVICE inline float Residual(float p, float q) {
  return Probability(strict::Sub(Probability(p), Probability(q)));
}

// Whether a draft with these probabilities is accepted.
TENON_HOST_DEVICE inline bool Accepts(double uniform, float p, float q) {
  return strict::Mul(uniform, static_cast<double>(Probability(q))) <
         static_cast<double>(Probability(p));
}

constexpr int32_t NumDrafts(const SpeculativeParams& p, int64_t sequence) {
  const int32_t max = static_cast<int32_t>(p.draft_tokens.shape[1]);
  if (!p.num_drafts.present()) return max;
  const int32_t given = p.num_drafts.As<const int32_t>()[sequence];
  return given < 0 ? 0 : given > max ? max : given;
}

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SPECULATIVE_BACKEND_H_
