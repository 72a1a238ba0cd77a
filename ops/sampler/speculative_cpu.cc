#include "ops/core/cpu_thread_pool.h"
#include "ops/sampler/speculative_backend.h"

namespace tenon {
namespace {

// One place of one sequence.
struct Place {
  const float* p = nullptr;
  const float* q = nullptr;  // null: the draft is certain
  int32_t draft = -1;

  float DraftProbability(int64_t id) const {
    if (q != nullptr) return q[id];
    return id == draft ? 1.0f : 0.0f;
  }
};

// The id drawn from weigh(id), in order of id; -1 where nothing weighs.
template <class Weigh>
int32_t DrawFrom(int64_t vocab, uint64_t numerator, Weigh&& weigh) {
  uint64_t total = 0;
  for (int64_t id = 0; id < vocab; ++id) total += FixedMass(weigh(id));
  if (total == 0) return -1;
  const uint64_t target = DrawTarget(numerator, total);
  uint64_t sum = 0;
  int64_t id = 0;
  while ((sum += FixedMass(weigh(id))) <= target) ++id;
  return static_cast<int32_t>(id);
}

struct Outcome {
  int32_t accepted = 0;
  int32_t token = -1;  // after these
};

Outcome ByTokens(const SpeculativeParams& p, int64_t sequence,
                 const int32_t* drafts, int32_t num_drafts) {
  const int32_t* target = p.target_tokens.As<const int32_t>() +
                          sequence * p.target_tokens.stride[0];
  Outcome outcome;
  while (outcome.accepted < num_drafts && drafts[outcome.accepted] >= 0 &&
         drafts[outcome.accepted] == target[outcome.accepted]) {
    ++outcome.accepted;
  }
  outcome.token = target[outcome.accepted];
  return outcome;
}

Outcome ByProbabilities(const SpeculativeParams& p, int64_t sequence,
                        const int32_t* drafts, int32_t num_drafts) {
  const int64_t max_drafts = p.draft_tokens.shape[1];
  const int64_t vocab = p.target_probabilities.shape[1];
  const uint64_t seed = p.params[sequence].seed;
  const auto place_of = [&](int32_t i) {
    Place place;
    place.p =
        p.target_probabilities.As<const float>() +
        (sequence * (max_drafts + 1) + i) * p.target_probabilities.stride[0];
    if (i == num_drafts) return place;
    place.draft = drafts[i];
    if (p.draft_probabilities.present()) {
      place.q = p.draft_probabilities.As<const float>() +
                (sequence * max_drafts + i) * p.draft_probabilities.stride[0];
    }
    return place;
  };
  const auto bits_at = [&](int32_t i, RandomStream stream) {
    const uint64_t position = p.params[sequence].position;
    return RandomBitsAt(seed, position + static_cast<uint64_t>(i), stream);
  };

  Outcome outcome;
  for (; outcome.accepted < num_drafts; ++outcome.accepted) {
    const int32_t i = outcome.accepted;
    const Place place = place_of(i);
    const int32_t draft = place.draft;
    const double uniform = UniformFromBits(bits_at(i, RandomStream::kAccept));
    if (draft >= 0 && draft < vocab &&
        Accepts(uniform, place.p[draft], place.DraftProbability(draft))) {
      continue;
    }
    const uint64_t numerator =
        UniformNumerator(bits_at(i, RandomStream::kResidual));
    outcome.token = DrawFrom(vocab, numerator, [&](int64_t id) {
      return Residual(place.p[id], place.DraftProbability(id));
    });
    if (outcome.token >= 0) return outcome;
    outcome.token = DrawFrom(
        vocab, numerator, [&](int64_t id) { return Probability(place.p[id]); });
    return outcome;
  }
  const Place last = place_of(num_drafts);
  outcome.token = DrawFrom(
      vocab, UniformNumerator(bits_at(num_drafts, RandomStream::kTarget)),
      [&](int64_t id) { return Probability(last.p[id]); });
  return outcome;
}

}  // namespace

Status SpeculativeCpu(const SpeculativeParams& p, Stream stream) {
  const int64_t sequences = p.draft_tokens.shape[0];
  const int64_t max_drafts = p.draft_tokens.shape[1];
  ParallelFor(stream, sequences, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int32_t* drafts =
          p.draft_tokens.As<const int32_t>() + s * p.draft_tokens.stride[0];
      const int32_t num_drafts = NumDrafts(p, s);
      const Outcome outcome = p.target_tokens.present()
                                  ? ByTokens(p, s, drafts, num_drafts)
                                  : ByProbabilities(p, s, drafts, num_drafts);
      int32_t* tokens = p.tokens.As<int32_t>() + s * p.tokens.stride[0];
      for (int64_t i = 0; i <= max_drafts; ++i) {
        tokens[i] = i < outcome.accepted    ? drafts[i]
                    : i == outcome.accepted ? outcome.token
                                            : -1;
      }
      p.num_accepted.As<int32_t>()[s] = outcome.accepted;
      p.statuses.As<int32_t>()[s] = static_cast<int32_t>(
          outcome.token >= 0 ? SampleStatus::kOk : SampleStatus::kNoSupport);
    }
  });
  return Status();
}

}  // namespace tenon
