#ifndef TENON_SERVICE_CALLS_H_
#define TENON_SERVICE_CALLS_H_

#include <atomic>
#include <variant>

#include "engine/session.h"
#include "service/failure.h"
#include "service/proto/decode.pb.h"
#include "service/sequence_table.h"

namespace tenon::service {

// A call that the step loop answers. Its request must have passed the Validator
// and, like the call, stay as it is until Finish, which is called exactly once,
// by any thread, and ends the loop's interest in both.
class Call {
 public:
  virtual ~Call() = default;
  virtual void Finish(const Failure& failure) = 0;
  // The thread of Submit is about to run a step itself.
  virtual void WillRun() {}

  // Set when nobody waits for the answer any more. Before its launch a call
  // then has no effect; a step that was launched goes on and can be replayed.
  std::atomic<bool> cancelled{false};
  Time arrival = Clock::now();
  Time deadline = Time::max();
};

template <class Request, class Response>
class CallWith : public Call {
 public:
  const Request* request = nullptr;
  Response* response = nullptr;
};

using CreateCall =
    CallWith<v1::CreateSequencesRequest, v1::CreateSequencesResponse>;
using StepCall = CallWith<v1::StepRequest, v1::StepResponse>;
using ForkCall = CallWith<v1::ForkSequencesRequest, v1::ForkSequencesResponse>;
using ReleaseCall =
    CallWith<v1::ReleaseSequencesRequest, v1::ReleaseSequencesResponse>;
using AbortCall = CallWith<v1::AbortRequest, v1::AbortResponse>;

class GenerateCall : public Call {
 public:
  const v1::GenerateRequest* request = nullptr;
  // Before Finish, from one thread at a time.
  virtual void Emit(uint32_t token, const StepRowResult& result,
                    v1::RowStatus status) = 0;
};

inline void FillTop(const StepRowResult& result, v1::TopTokens* top) {
  for (int32_t i = 0; i < result.num_top; ++i) {
    top->add_token(static_cast<uint32_t>(result.top_tokens[i]));
    top->add_logprob(result.top_logprobs[i]);
  }
}

using AnyCall = std::variant<CreateCall*, StepCall*, GenerateCall*, ForkCall*,
                             ReleaseCall*, AbortCall*>;

}  // namespace tenon::service

#endif  // TENON_SERVICE_CALLS_H_
