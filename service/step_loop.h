#ifndef TENON_SERVICE_STEP_LOOP_H_
#define TENON_SERVICE_STEP_LOOP_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/session.h"
#include "service/calls.h"
#include "service/limits.h"
#include "service/metrics.h"
#include "service/page_budget.h"
#include "service/sequence_table.h"
#include "service/session_table.h"

namespace tenon::service {

struct StepLoopOptions {
  Limits limits;
  // A call that finds the engine idle runs its step itself, which saves the
  // time that it takes to wake the loop's thread.
  bool run_inline = true;
};

// Answers calls by steps of an engine session: every step takes the rows of all
// clients that wait, the next tokens of Generate calls, and chunks of prompts.
//
// All state belongs to whoever runs the loop, one thread at a time: calls are
// put in a queue, and looked at between engine steps. Nothing else is shared.
//
// Units of work (one Step call, one sequence of a Generate call, one prompt)
// are served in the order in which they became ready, so nobody starves; those
// that decode and prompts have a queue each, and room of their own in a step.
class StepLoop {
 public:
  // The session must have room for what SetEngineLimits asks for.
  StepLoop(std::unique_ptr<Session> engine, const StepLoopOptions& options);
  // Calls that wait still are Unavailable.
  ~StepLoop();

  // What the engine's session needs for these limits.
  static void SetEngineLimits(const Limits& limits, SessionOptions* options);

  // Finishes the call at some time, maybe before it returns.
  void Submit(const AnyCall& call);

  // Whether new sequences are refused.
  void set_draining(bool draining) { draining_ = draining; }
  bool draining() const { return draining_; }
  // Refuses every call from now on; those under way are finished as usual.
  void RefuseAll() { refusing_ = true; }

  uint64_t epoch() const { return epoch_; }
  // The last time that the loop went round.
  Time heartbeat() const { return Time(Clock::duration(heartbeat_.load())); }
  bool is_broken() const { return is_broken_; }
  const Metrics& metrics() const { return metrics_; }
  Metrics* mutable_metrics() { return &metrics_; }
  void FillLoad(v1::Load* load) const;
  const Session& engine() const { return *engine_; }

 private:
  // A CreateSequences or Generate call under way.
  struct Job {
    CreateCall* create = nullptr;
    GenerateCall* generate = nullptr;
    uint64_t session_id = 0;
    bool made_session = false;
    std::vector<Sequence*> sequences;
    std::vector<StepRowResult> results;  // of first tokens
    size_t num_prefilled = 0;
    bool over = false;   // finished; its sequences may be gone
    uint64_t batch = 0;  // the last batch that one of its prompts is in

    Call* call() const {
      return create != nullptr ? static_cast<Call*>(create) : generate;
    }
  };

  struct Unit {
    StepCall* step = nullptr;
    std::shared_ptr<Job> job;
    size_t index = 0;  // of the sequence in the job
  };

  // Of the batch being made.
  struct Placed {
    Unit unit;
    size_t first_row = 0;
    size_t num_rows = 0;
    uint64_t digest = 0;
  };

  enum class Placement { kPlaced, kFinished, kLater, kFull };

  void Thread();
  void RunAndRelease();  // with the engine's token
  bool RunOnce();        // true: there is more to do
  void TakeIncoming();
  void UpdateGauges();

  // Calls that are answered between steps.
  void Take(CreateCall* call);
  void Take(GenerateCall* call);
  void Take(StepCall* call);
  void Take(ForkCall* call);
  void Take(ReleaseCall* call);
  void Take(AbortCall* call);
  Failure CheckStart(const Call& call) const;
  Failure StartJob(const std::shared_ptr<Job>& job);
  Failure FindSession(uint64_t id, ClientSession** session);
  Sequence* FindSequence(const ClientSession& session, uint64_t handle);
  Failure NoSequence(uint64_t handle) const;
  StatusOr<Sequence*> AddSequence(const v1::NewSequence& request,
                                  uint64_t session_id, Failure* failure);
  Failure AddEdits(const v1::NewSequence& request, Sequence* sequence);
  Failure ForkInto(const v1::ForkSequencesRequest& request,
                   ClientSession* session, std::vector<Sequence*>* made);
  StatusOr<Sequence*> ForkOne(Sequence* origin, Failure* failure);
  void RemoveSequence(Sequence* sequence);
  uint32_t EndSession(ClientSession* session);
  void EndJobsOf(uint64_t session_id, const Failure& failure);
  void EndJob(const std::shared_ptr<Job>& job, const Failure& failure);
  void ExpireLeases(Time now);
  void Touch(Sequence* sequence, Time now);

  // Batches.
  void MakeBatch();
  void PlaceAll(std::deque<Unit>* units);
  Placement Place(const Unit& unit);
  Placement PlaceStep(const Unit& unit);
  Placement PlaceJob(const Unit& unit);
  Failure CheckStep(const StepCall& call, const ClientSession& session);
  void PlaceRows(const v1::StepRequest& request);
  bool KeepRow(Sequence* sequence);
  int64_t EditsNeeded(const Sequence& sequence, int32_t num_tokens) const;
  StepRow* AddRow(Sequence* sequence, const int32_t* tokens,
                  int32_t num_tokens);
  void FillEdits(Sequence* sequence, LogitEdits::Source source, StepRow* row);
  void RunBatch();
  bool RunSeparately();
  void Deliver(const Placed& placed, const StepRowResult* results);
  void DeliverStep(const Placed& placed, const StepRowResult* results);
  void DeliverJob(const Placed& placed, const StepRowResult& result);
  void FinishCreate(const std::shared_ptr<Job>& job);
  void Fail(const Placed& placed, const Status& status);
  void Append(Sequence* sequence, int32_t num_tokens,
              const StepRowResult& result);
  void CountSampled();
  void FillTiming(const Call& call, v1::Timing* timing) const;
  void FinishStep(StepCall* call, const Failure& failure);

  const StepLoopOptions options_;
  const uint64_t epoch_;
  Metrics metrics_;

  // Shared between threads.
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<AnyCall> incoming_;  // guarded by mutex_
  bool running_ = false;           // guarded: somebody has the engine's token
  bool more_to_do_ = false;        // guarded
  bool stopping_ = false;          // guarded
  std::atomic<bool> draining_{false};
  std::atomic<bool> refusing_{false};
  std::atomic<bool> is_broken_{false};
  std::atomic<Clock::rep> heartbeat_;

  // Belongs to who has the engine's token.
  std::unique_ptr<Session> engine_;
  const ModelConfig& config_;
  PageBudget budget_;
  SequenceTable sequences_;
  SessionTable sessions_;
  std::deque<Unit> units_;  // that decode
  std::deque<Unit> prompts_;
  bool prompts_first_ = false;  // there was no room for a prompt's edits
  std::vector<AnyCall> taken_;
  Time next_expiry_;
  uint64_t batch_ = 0;
  uint64_t num_checks_ = 0;
  std::vector<Sequence*> checked_;  // by CheckStep: those of the step
  std::vector<Unit> later_;
  std::vector<Placed> placed_;
  std::vector<StepRow> rows_;  // those from num_rows_ on: of the batch before
  size_t num_rows_ = 0;
  // For each row the handle where sequence and place alone make it, or 0.
  std::vector<uint64_t> plain_rows_;
  std::vector<Sequence*> row_sequences_;
  std::vector<int32_t> inputs_;   // of decode rows, in their rows' places
  std::vector<LogitEdit> edits_;  // of all rows; empty until one has some
  int64_t num_edits_ = 0;
  int32_t decode_rows_ = 0;
  int32_t sampled_rows_ = 0;
  int32_t prefill_left_ = 0;
  Time launch_;
  uint64_t sampled_ = 0;  // tokens that are not in the metrics yet
  Clock::duration last_step_{0};
  std::vector<StepRowResult> results_;
  StepStats stats_;

  std::thread thread_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_STEP_LOOP_H_
