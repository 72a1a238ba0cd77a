#ifndef TENON_ABI_SESSION_H_
#define TENON_ABI_SESSION_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "abi/handles.h"
#include "abi/tenon.h"
#include "engine/session.h"
#include "ops/core/status.h"

namespace tenon::abi {

// What a tenon_session names. Callers hold `mutex` for all else.
struct SessionObject {
  // A sequence as callers know it, at the slot that its tenon_sequence says.
  struct Sequence {
    tenon_sequence handle = 0;  // 0: the slot is free
    SequenceId id;
  };

  std::mutex mutex;
  std::unique_ptr<Session> session;
  std::vector<Sequence> sequences;  // one for each of max_sequences
  uint64_t num_steps = 0;
  uint64_t num_tokens = 0;  // of all steps

  // Of the steps in flight, the oldest first.
  int32_t rows_in_flight[kMaxStepsInFlight] = {};

  // Of the step under way; all have the memory for the largest one.
  std::vector<StepRow> rows;
  std::vector<StepRowResult> results;
  StepStats stats;
};

// The session of a call, kept alive and to ourselves while the call runs.
class Turn {
 public:
  // Unavailable for a session that is broken.
  Status Begin(tenon_session session);

  SessionObject* operator->() const { return pin_.get(); }
  SessionObject& operator*() const { return *pin_; }

 private:
  Pin<SessionObject> pin_;
  std::unique_lock<std::mutex> lock_;  // ends before pin_ does
};

// Null where `sequence` names none of this session, about which the error is.
// `row` stands before the name of the argument in the message.
SessionObject::Sequence* FindSequence(SessionObject* session,
                                      tenon_sequence sequence);
Status NoSequenceError(const char* row, tenon_sequence sequence);

}  // namespace tenon::abi

#endif  // TENON_ABI_SESSION_H_
