#include "service/validator.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace tenon::service {
namespace {

std::string At(const char* field, int index) {
  return std::string(field) + "[" + std::to_string(index) + "]";
}

Failure CheckCount(const std::string& field, int count, int least, int most,
                   const char* limit) {
  if (count < least) {
    return BadField(field, "has " + std::to_string(count) +
                               " entries, expected at least " +
                               std::to_string(least));
  }
  if (count > most) {
    Failure failure =
        OverLimit(limit, field + ": has " + std::to_string(count) +
                             " entries, the limit is " + std::to_string(most));
    failure.retry_ms = 0;  // it will not fit later either
    return failure;
  }
  return Failure();
}

Failure CheckToken(const std::string& field, uint32_t token,
                   int32_t vocab_size) {
  if (token < static_cast<uint32_t>(vocab_size)) return Failure();
  return BadField(field, std::to_string(token) + " is not a token: there are " +
                             std::to_string(vocab_size));
}

// The tokens of a field. There may be very many: names are made for a bad one.
Failure CheckTokens(const std::string& parent, const char* name,
                    const google::protobuf::RepeatedField<uint32_t>& tokens,
                    int32_t vocab_size) {
  const uint32_t limit = static_cast<uint32_t>(vocab_size);
  const auto bad = std::find_if(tokens.begin(), tokens.end(),
                                [=](uint32_t token) { return token >= limit; });
  if (bad == tokens.end()) return Failure();
  return CheckToken(parent + At(name, static_cast<int>(bad - tokens.begin())),
                    *bad, vocab_size);
}

template <class Message>
Failure CheckKnown(const std::string& field, const Message& message) {
  const auto& unknown = message.GetReflection()->GetUnknownFields(message);
  if (unknown.empty()) return Failure();
  return BadField(field, "has field " +
                             std::to_string(unknown.field(0).number()) +
                             ", which this server does not know");
}

Failure CheckSampling(const std::string& field, const v1::Sampling& sampling) {
  const Failure failure = CheckKnown(field, sampling);
  if (!failure.ok()) return failure;
  if (!v1::FilterOrder_IsValid(sampling.filter_order())) {
    return BadField(field + ".filter_order",
                    std::to_string(static_cast<int>(sampling.filter_order())) +
                        " is not one");
  }
  const Status status =
      ValidateSamplingParams(MergeSampling(SamplingParams(), sampling));
  if (!status.ok()) return BadField(field, status.message());
  return Failure();
}

Failure CheckWant(uint32_t want, uint32_t top_n) {
  constexpr uint32_t kKnown = v1::WANT_LOGPROB | v1::WANT_TOP_N;
  if ((want & ~kKnown) == 0) {
    const bool want_top = (want & v1::WANT_TOP_N) != 0;
    if (want_top ? top_n >= 1 && top_n <= kMaxTopLogprobs : top_n == 0) {
      return Failure();
    }
    return BadField("top_n",
                    "is " + std::to_string(top_n) + ", expected " +
                        (want_top ? "1 to " + std::to_string(kMaxTopLogprobs)
                                  : "0 without WANT_TOP_N"));
  }
  return {StatusCode::kUnimplemented,
          "want: " + std::to_string(want) + " asks for what this server cannot",
          "WANT", "want", 0};
}

}  // namespace

bool CountsTokens(const v1::Sampling& sampling) {
  return sampling.has_repetition_penalty() ||
         sampling.has_frequency_penalty() || sampling.has_presence_penalty() ||
         sampling.has_dry_multiplier() || sampling.has_rules();
}

SamplingParams MergeSampling(const SamplingParams& base,
                             const v1::Sampling& sampling) {
  SamplingParams merged = base;
  if (sampling.has_temperature()) merged.temperature = sampling.temperature();
  if (sampling.has_top_k()) merged.top_k = sampling.top_k();
  if (sampling.has_top_p()) merged.top_p = sampling.top_p();
  if (sampling.has_min_p()) merged.min_p = sampling.min_p();
  if (sampling.has_seed()) merged.seed = sampling.seed();
  if (sampling.filter_order() != v1::FILTER_ORDER_UNSPECIFIED) {
    // The wire's numbers are one above ours.
    static_assert(static_cast<int>(FilterOrder::kSequential) + 1 ==
                      v1::FILTER_ORDER_SEQUENTIAL &&
                  static_cast<int>(FilterOrder::kJoint) + 1 ==
                      v1::FILTER_ORDER_JOINT &&
                  static_cast<int>(FilterOrder::kLlamaCpp) + 1 ==
                      v1::FILTER_ORDER_LLAMA_CPP);
    merged.filter_order = static_cast<FilterOrder>(sampling.filter_order() - 1);
  }
  if (sampling.has_typical_p()) merged.typical_p = sampling.typical_p();
  if (sampling.has_top_n_sigma()) merged.top_n_sigma = sampling.top_n_sigma();
  if (sampling.has_xtc_probability()) {
    merged.xtc_probability = sampling.xtc_probability();
  }
  if (sampling.has_xtc_threshold()) {
    merged.xtc_threshold = sampling.xtc_threshold();
  }
  if (sampling.has_repetition_penalty()) {
    merged.repetition_penalty = sampling.repetition_penalty();
  }
  if (sampling.has_frequency_penalty()) {
    merged.frequency_penalty = sampling.frequency_penalty();
  }
  if (sampling.has_presence_penalty()) {
    merged.presence_penalty = sampling.presence_penalty();
  }
  if (sampling.has_dry_multiplier()) {
    merged.dry_multiplier = sampling.dry_multiplier();
  }
  if (sampling.has_dry_base()) merged.dry_base = sampling.dry_base();
  if (sampling.has_dry_allowed_length()) {
    merged.dry_allowed_length = sampling.dry_allowed_length();
  }
  if (sampling.has_dry_range()) merged.dry_range = sampling.dry_range();
  if (sampling.has_mirostat_tau()) {
    merged.mirostat_tau = sampling.mirostat_tau();
  }
  if (sampling.has_mirostat_eta()) {
    merged.mirostat_eta = sampling.mirostat_eta();
  }
  return merged;
}

Failure Validator::CheckRules(const std::string& field,
                              const v1::LogitRules& rules) const {
  Failure failure = CheckKnown(field, rules);
  if (!failure.ok()) return failure;
  std::vector<uint32_t> biased;
  for (int i = 0; i < rules.bias_size(); ++i) {
    const std::string name = field + "." + At("bias", i);
    failure = CheckKnown(name, rules.bias(i));
    if (!failure.ok()) return failure;
    failure = CheckToken(name, rules.bias(i).token(), vocab_size_);
    if (!failure.ok()) return failure;
    if (!std::isfinite(rules.bias(i).bias())) {
      return BadField(name, "is not finite");
    }
    biased.push_back(rules.bias(i).token());
  }
  std::sort(biased.begin(), biased.end());
  const auto twice = std::adjacent_find(biased.begin(), biased.end());
  if (twice != biased.end()) {
    return BadField(field + ".bias",
                    "has token " + std::to_string(*twice) + " twice");
  }
  int64_t tokens = rules.bias_size();
  for (int i = 0; i < rules.bad_word_size(); ++i) {
    const std::string name = field + "." + At("bad_word", i);
    const v1::BadWord& word = rules.bad_word(i);
    failure = CheckKnown(name, word);
    if (!failure.ok()) return failure;
    if (word.token_size() == 0) return BadField(name, "has no tokens");
    failure = CheckTokens(name, ".token", word.token(), vocab_size_);
    if (!failure.ok()) return failure;
    tokens += word.token_size();
  }
  failure =
      CheckTokens(field, ".allowed_token", rules.allowed_token(), vocab_size_);
  if (!failure.ok()) return failure;
  failure =
      CheckTokens(field, ".dry_breaker", rules.dry_breaker(), vocab_size_);
  if (!failure.ok()) return failure;
  tokens += rules.allowed_token_size() + rules.dry_breaker_size();
  failure = CheckCount(field, static_cast<int>(tokens), 0, limits_.logit_rules,
                       "logit_rules");
  if (!failure.ok()) return failure;
  if (rules.min_tokens() > static_cast<uint32_t>(max_context_)) {
    return BadField(field + ".min_tokens",
                    "is " + std::to_string(rules.min_tokens()) +
                        ", more than the context of " +
                        std::to_string(max_context_) + " tokens");
  }
  return Failure();
}

Failure Validator::CheckNew(const std::string& field,
                            const v1::NewSequence& sequence) const {
  Failure failure = CheckCount(field + ".prompt", sequence.prompt_size(), 1,
                               limits_.prompt_tokens, "prompt_tokens");
  if (!failure.ok()) return failure;
  failure = CheckCount(field + ".stop_token", sequence.stop_token_size(), 0,
                       limits_.stop_tokens, "stop_tokens");
  if (!failure.ok()) return failure;
  if (sequence.has_max_tokens() && sequence.max_tokens() == 0) {
    return BadField(field + ".max_tokens", "is 0, expected at least 1");
  }
  // The token drawn last is never run, so it needs no place.
  const int64_t tokens =
      sequence.prompt_size() +
      (sequence.has_max_tokens() ? int64_t{sequence.max_tokens()} - 1 : 0);
  if (tokens > max_context_) {
    return {StatusCode::kOutOfRange,
            field + ": prompt and max_tokens need a context of " +
                std::to_string(tokens) + " tokens, there are " +
                std::to_string(max_context_),
            "CONTEXT_LENGTH", field, 0};
  }
  failure = CheckTokens(field, ".prompt", sequence.prompt(), vocab_size_);
  if (!failure.ok()) return failure;
  failure =
      CheckTokens(field, ".stop_token", sequence.stop_token(), vocab_size_);
  if (!failure.ok()) return failure;
  failure = CheckRules(field + ".sampling.rules", sequence.sampling().rules());
  if (!failure.ok()) return failure;
  return CheckSampling(field + ".sampling", sequence.sampling());
}

Failure Validator::Check(const v1::CreateSequencesRequest& request) const {
  Failure failure = CheckWant(request.want(), request.top_n());
  if (!failure.ok()) return failure;
  failure = CheckCount("sequences", request.sequences_size(), 1,
                       limits_.rows_per_step, "rows_per_step");
  if (!failure.ok()) return failure;
  if (request.has_lease_ms() &&
      (request.lease_ms() == 0 ||
       request.lease_ms() > limits_.max_lease.count())) {
    return BadField("lease_ms", std::to_string(request.lease_ms()) +
                                    " is not from 1 to " +
                                    std::to_string(limits_.max_lease.count()));
  }
  for (int i = 0; i < request.sequences_size(); ++i) {
    failure = CheckNew(At("sequences", i), request.sequences(i));
    if (!failure.ok()) return failure;
  }
  return Failure();
}

Failure Validator::Check(const v1::GenerateRequest& request) const {
  const Failure failure = CheckWant(request.want(), request.top_n());
  if (!failure.ok()) return failure;
  return CheckNew("sequence", request.sequence());
}

Failure Validator::Check(const v1::StepRequest& request) const {
  Failure failure = CheckWant(request.want(), request.top_n());
  if (!failure.ok()) return failure;
  failure = CheckCount("seq", request.seq_size(), 1, limits_.rows_per_step,
                       "rows_per_step");
  if (!failure.ok()) return failure;
  if (request.step_id() == 0)
    return BadField("step_id", "is 0; they begin at 1");
  if (request.input_token_size() != 0 &&
      request.input_token_size() != request.seq_size()) {
    return BadField("input_token",
                    "has " + std::to_string(request.input_token_size()) +
                        " entries, expected none or one for each of " +
                        std::to_string(request.seq_size()) + " rows");
  }
  failure = CheckTokens("", "input_token", request.input_token(), vocab_size_);
  if (!failure.ok()) return failure;
  if (request.overrides().has_rules()) {
    return BadField("overrides.rules", "are for sequences, not for a step");
  }
  return CheckSampling("overrides", request.overrides());
}

Failure Validator::Check(const v1::ForkSequencesRequest& request) const {
  const Failure failure = CheckCount("seq", request.seq_size(), 1,
                                     limits_.rows_per_step, "rows_per_step");
  if (!failure.ok()) return failure;
  if (request.seed_size() != 0 && request.seed_size() != request.seq_size()) {
    return BadField("seed", "has " + std::to_string(request.seed_size()) +
                                " entries, expected none or one for each of " +
                                std::to_string(request.seq_size()) + " forks");
  }
  return Failure();
}

Failure Validator::Check(const v1::ReleaseSequencesRequest& request) const {
  return CheckCount("seq", request.seq_size(), 0, limits_.sequences,
                    "sequences");
}

Failure Validator::Check(const v1::AbortRequest& request) const {
  return CheckCount("session_id", request.session_id_size(),
                    request.all_sessions() ? 0 : 1, limits_.sessions,
                    "sessions");
}

}  // namespace tenon::service
