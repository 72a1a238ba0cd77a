#ifndef TENON_SERVICE_SEQUENCE_TABLE_H_
#define TENON_SERVICE_SEQUENCE_TABLE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/kv_cache.h"
#include "ops/sampler/logit_edits.h"
#include "ops/sampler/sampler.h"
#include "service/page_budget.h"
#include "service/proto/decode.pb.h"

namespace tenon::service {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

// A sequence as the service knows it.
struct alignas(64) Sequence {
  // What every step of it looks at comes first, in one cache line: the step
  // before may have run on another core.
  uint64_t handle = 0;
  uint64_t session_id = 0;  // 0: of a Generate call
  uint64_t check = 0;       // the last Step call that was looked at with it
  Time lease_end;
  std::chrono::milliseconds lease{0};
  int32_t length = 0;      // tokens in the cache
  int32_t next_input = 0;  // the token drawn last
  int32_t num_generated = 0;
  int32_t max_tokens = 0;
  v1::RowStatus status = v1::ROW_STATUS_OK;  // otherwise it is finished
  bool in_call = false;  // a call under way owns it: the lease does not run
  bool ignore_eos = false;
  bool has_edits = false;        // `edits`
  bool has_stop_tokens = false;  // `stop_tokens`

  SequenceId engine_id;
  // With the tokens that are in the cache, where they are counted; the most
  // edits that rules make.
  std::unique_ptr<LogitEdits> edits;
  int64_t rule_edits = 0;
  std::vector<int32_t> stop_tokens;
  SamplingParams sampling;  // never changes once there was a step

  std::vector<int32_t> prompt;
  int32_t prefilled = 0;   // tokens of the prompt that are in the cache
  int32_t max_length = 0;  // tokens in the cache when it is finished

  // Pages of `max_length` tokens: those that no other sequence shares, and
  // those it does since a fork.
  PageClaim own_pages;
  std::vector<std::shared_ptr<PageClaim>> shared_pages;

  bool finished() const { return status != v1::ROW_STATUS_OK; }
};

// Of what a step looks at.
inline void Prefetch(const Sequence* sequence) {
  static_assert(offsetof(Sequence, has_stop_tokens) < 64, "one cache line");
  __builtin_prefetch(sequence, 1);
}

// Handles and what they name. A handle is the server's epoch, a slot, and a tag
// that no other use of the slot has had; the tag is a number under a secret
// permutation, so that one cannot be made from another.
class SequenceTable {
 public:
  SequenceTable(uint64_t epoch, int32_t capacity);

  // With nothing but a handle; null when there is no room.
  Sequence* Add();
  // Null for a handle that names none (any more).
  Sequence* Find(uint64_t handle) {
    const size_t index = SlotOf(handle);
    if (index >= slots_.size()) return nullptr;
    Sequence* sequence = slots_[index].sequence.get();
    return sequence != nullptr && sequence->handle == handle ? sequence
                                                             : nullptr;
  }
  void Remove(Sequence* sequence);

  int32_t size() const {
    return static_cast<int32_t>(slots_.size() - free_slots_.size());
  }
  int32_t room() const { return static_cast<int32_t>(free_slots_.size()); }

  // Calls visit(sequence), which may remove that one.
  template <class Visit>
  void ForEach(const Visit& visit) {
    for (Slot& slot : slots_) {
      if (slot.sequence != nullptr) visit(slot.sequence.get());
    }
  }

 private:
  struct Slot {
    uint32_t generation = 0;
    std::unique_ptr<Sequence> sequence;
  };

  static size_t SlotOf(uint64_t handle) { return (handle >> 32) & 0xffff; }
  uint32_t Tag(uint32_t slot, uint32_t generation) const;

  uint64_t epoch_;
  uint64_t key_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_slots_;
};

// Handles and session ids begin with 16 bits of the epoch.
inline uint64_t WithEpoch(uint64_t epoch, uint64_t low_bits) {
  return (epoch << 48) | (low_bits & ((uint64_t{1} << 48) - 1));
}
inline bool HasEpoch(uint64_t epoch, uint64_t id) {
  return (id >> 48) == (epoch & 0xffff);
}

}  // namespace tenon::service

#endif  // TENON_SERVICE_SEQUENCE_TABLE_H_
