#ifndef TENON_OPS_SAMPLER_SPECULATIVE_H_
#define TENON_OPS_SAMPLER_SPECULATIVE_H_

#include <cstddef>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// Accepts or rejects the drafts of speculative decoding: for every sequence up
// to `drafts` tokens in a line, and what the target model makes of each of
// these places and of the one behind them. The tokens that come out have
// exactly the target's distribution, whatever was drafted.
//
// By probabilities (Leviathan et al. 2023; Chen et al. 2023): with p the
// target's and q the draft's distribution at a place, draft d is accepted where
// v * q(d) < p(d); v is the uniform of (seed, position of the place,
// RandomStream::kAccept), rounded to double, inside (0, 1), so that p = q
// always accepts and p(d) = 0 never does. At the first rejection the token is
// drawn from max(0, p - q) (float32; from p where rounding leaves nothing of
// it), with stream kResidual; where all drafts are accepted, one more token is
// drawn from the last p, with kTarget. Without draft_probabilities every draft
// is certain: q(d) = 1, accepted where v < p(d), otherwise drawn from p without
// d. Sampler makes both: SamplerParams::probabilities, with stream kDraft for
// the draft model.
//
// By tokens, for drafts that are certain (from a lookup, or a greedy draft
// model): target_tokens are what Sampler drew at every place; drafts are
// accepted while they are equal, and the first token that is not is the result.
// This has the same distribution as the above, and gives the very tokens of the
// same seed without speculation.
//
// Draws invert the cumulative sum in order of id, probabilities counted in
// units of 2^-43, as DrawTarget of row_plan.h says: integers, the same bits on
// CPU and CUDA.
//
// Shapes: draft_tokens [sequences, drafts] int32, drafts >= 1; num_drafts
// [sequences] int32, 0 to drafts (others are clamped), optional: all of them.
// Either target_tokens [sequences, drafts + 1] int32, or target_probabilities
// [sequences * (drafts + 1), vocab] float32 with rows of one sequence together,
// params (`sequences` SamplingParams in the memory of the device, of which seed
// and position, that of the first draft, count) and, optional,
// draft_probabilities [sequences * drafts, vocab] float32. Rows of matrices may
// be strided. vocab is 1 to 2^20, sequences at most 2^20, drafts at most 64.
//
// Outputs: tokens [sequences, drafts + 1] int32: the accepted drafts, then one
// more token, then -1; num_accepted [sequences] int32: accepted drafts;
// statuses [sequences] int32 (SampleStatus): kNoSupport where the token after
// the accepted drafts has no probability, or its target token is -1: it is -1
// then.
//
// Probabilities that are no number or negative count as 0, those above 1 as 1;
// a draft outside the vocabulary is rejected. Outputs overlap nothing. Does not
// allocate or synchronise; can be captured in a CUDA graph. Zero sequences is
// OK.
struct SpeculativeParams {
  TensorView draft_tokens;
  TensorView num_drafts;     // optional
  TensorView target_tokens;  // this, or the next two
  TensorView target_probabilities;
  const SamplingParams* params = nullptr;
  TensorView draft_probabilities;  // optional
  TensorView tokens;               // out, as all that follow
  TensorView num_accepted;
  TensorView statuses;
};

Status Speculative(const SpeculativeParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SPECULATIVE_H_
