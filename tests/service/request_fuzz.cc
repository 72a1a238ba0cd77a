// Any bytes as any request, through the real validator. What it lets through
// must be what the step loop relies on.

#include <algorithm>
#include <string>

#include "ops/sampler/logit_edits.h"
#include "service/validator.h"
#include "tests/fuzz/check.h"

namespace tenon::service {
namespace {

constexpr int32_t kVocab = 97;
constexpr int32_t kMaxContext = 64;

Limits SmallLimits() {
  Limits limits;
  limits.rows_per_step = 8;
  limits.sequences = 8;
  limits.sessions = 4;
  limits.prompt_tokens = 48;
  limits.stop_tokens = 4;
  limits.logit_rules = 8;
  return limits;
}

const Validator& TheValidator() {
  static const Validator validator = [] {
    ModelConfig config;
    config.vocab_size = kVocab;
    return Validator(config, kMaxContext, SmallLimits());
  }();
  return validator;
}

void Expect(bool holds, const char* what) {
  if (!holds) fuzz::Fail(std::string("accepted, but not so: ") + what);
}

bool AreTokens(const google::protobuf::RepeatedField<uint32_t>& tokens) {
  return std::all_of(tokens.begin(), tokens.end(),
                     [](uint32_t token) { return token < kVocab; });
}

void ExpectSampling(const v1::Sampling& sampling) {
  Expect(ValidateSamplingParams(MergeSampling(SamplingParams(), sampling)).ok(),
         "sampling");
}

void ExpectRules(const v1::LogitRules& rules) {
  LogitRules made;
  for (const auto& bias : rules.bias()) {
    made.biases.push_back({static_cast<int32_t>(bias.token()), bias.bias()});
  }
  for (const auto& word : rules.bad_word()) {
    made.bad_words.emplace_back(word.token().begin(), word.token().end());
  }
  made.allowed_ids.assign(rules.allowed_token().begin(),
                          rules.allowed_token().end());
  made.dry_breakers.assign(rules.dry_breaker().begin(),
                           rules.dry_breaker().end());
  made.min_tokens = static_cast<int32_t>(rules.min_tokens());
  Expect(made.min_tokens >= 0 && made.allowed_ids.size() <= 8 &&
             made.biases.size() <= 8 && made.bad_words.size() <= 8,
         "rules");
  Expect(LogitEdits::Create(kVocab, kMaxContext, made).ok(), "rules");
}

void ExpectNew(const v1::NewSequence& sequence) {
  const Limits limits = SmallLimits();
  Expect(sequence.prompt_size() > 0 &&
             sequence.prompt_size() <= limits.prompt_tokens,
         "prompt");
  Expect(AreTokens(sequence.prompt()) && AreTokens(sequence.stop_token()),
         "tokens");
  Expect(sequence.stop_token_size() <= limits.stop_tokens, "stop_token");
  if (sequence.has_max_tokens()) {
    Expect(sequence.max_tokens() > 0 &&
               uint64_t{sequence.max_tokens()} +
                       static_cast<uint64_t>(sequence.prompt_size()) <=
                   kMaxContext + 1,
           "max_tokens");
  }
  ExpectRules(sequence.sampling().rules());
  ExpectSampling(sequence.sampling());
}

void ExpectRight(const v1::CreateSequencesRequest& request) {
  Expect(request.sequences_size() > 0 && request.sequences_size() <= 8,
         "sequences");
  for (const auto& sequence : request.sequences()) ExpectNew(sequence);
}
void ExpectRight(const v1::GenerateRequest& request) {
  ExpectNew(request.sequence());
}
void ExpectRight(const v1::StepRequest& request) {
  Expect(request.step_id() != 0, "step_id");
  Expect(request.seq_size() > 0 && request.seq_size() <= 8, "seq");
  Expect(request.input_token_size() == 0 ||
             request.input_token_size() == request.seq_size(),
         "input_token");
  Expect(AreTokens(request.input_token()), "tokens");
  Expect(!request.overrides().has_rules(), "overrides.rules");
  Expect((request.want() & v1::WANT_TOP_N) == 0 ||
             (request.top_n() >= 1 && request.top_n() <= 20),
         "top_n");
  ExpectSampling(request.overrides());
}
void ExpectRight(const v1::ForkSequencesRequest& request) {
  Expect(request.seq_size() > 0 && request.seq_size() <= 8, "seq");
  Expect(request.seed_size() == 0 || request.seed_size() == request.seq_size(),
         "seed");
}
void ExpectRight(const v1::ReleaseSequencesRequest& request) {
  Expect(request.seq_size() <= 8, "seq");
}
void ExpectRight(const v1::AbortRequest& request) {
  Expect(request.session_id_size() <= 4, "session_id");
}

template <class Request>
void Try(const std::string& bytes) {
  Request request;
  ++fuzz::counters().calls;
  ++fuzz::counters().mutated;
  if (!request.ParseFromString(bytes)) return;
  const Failure failure = TheValidator().Check(request);
  if (failure.ok()) {
    ExpectRight(request);
    return;
  }
  ++fuzz::counters().rejected;
  if (failure.message.empty() || failure.message.size() > 500) {
    fuzz::Fail("an error without a message, or with a long one");
  }
}

}  // namespace
}  // namespace tenon::service

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  namespace v1 = tenon::v1;
  using tenon::service::Try;
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  Try<v1::CreateSequencesRequest>(bytes);
  Try<v1::GenerateRequest>(bytes);
  Try<v1::StepRequest>(bytes);
  Try<v1::ForkSequencesRequest>(bytes);
  Try<v1::ReleaseSequencesRequest>(bytes);
  Try<v1::AbortRequest>(bytes);
  return 0;
}
