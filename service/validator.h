#ifndef TENON_SERVICE_VALIDATOR_H_
#define TENON_SERVICE_VALIDATOR_H_

#include "engine/model_config.h"
#include "ops/sampler/sampler.h"
#include "service/failure.h"
#include "service/limits.h"
#include "service/proto/decode.pb.h"

namespace tenon::service {

// Everything about a request that can be checked without looking at sessions
// and sequences: any bytes that parse may come here.
class Validator {
 public:
  // max_context: tokens of one sequence in the engine's session.
  Validator(const ModelConfig& config, int32_t max_context,
            const Limits& limits)
      : vocab_size_(config.vocab_size),
        max_context_(max_context),
        limits_(limits) {}

  Failure Check(const v1::CreateSequencesRequest& request) const;
  Failure Check(const v1::StepRequest& request) const;
  Failure Check(const v1::GenerateRequest& request) const;
  Failure Check(const v1::ForkSequencesRequest& request) const;
  Failure Check(const v1::ReleaseSequencesRequest& request) const;
  Failure Check(const v1::AbortRequest& request) const;

 private:
  Failure CheckRules(const std::string& field,
                     const v1::LogitRules& rules) const;
  Failure CheckNew(const std::string& field,
                   const v1::NewSequence& sequence) const;

  int32_t vocab_size_;
  int32_t max_context_;
  Limits limits_;
};

// Whether a sequence that is made with it has its tokens counted.
bool CountsTokens(const v1::Sampling& sampling);

// `base` with what is set in `sampling`, but its rules.
SamplingParams MergeSampling(const SamplingParams& base,
                             const v1::Sampling& sampling);

}  // namespace tenon::service

#endif  // TENON_SERVICE_VALIDATOR_H_
