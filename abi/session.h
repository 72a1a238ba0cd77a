#ifndef TENON_ABI_SESSION_H_
#define TENON_ABI_SESSION_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

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

  // Of the step under way; all have the memory for the largest one.
  std::vector<StepRow> rows;
  std::vector<StepRowResult> results;
  StepStats stats;
};

}  // namespace tenon::abi

#endif  // TENON_ABI_SESSION_H_
