// The queue, the thread, and whose turn it is.

#include "service/step_loop.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "service/random.h"

namespace tenon::service {
namespace {

// How often an idle loop looks at leases and shows that it lives.
constexpr std::chrono::milliseconds kIdle{50};

}  // namespace

void StepLoop::SetEngineLimits(const Limits& limits, SessionOptions* options) {
  options->max_sequences = limits.sequences;
  options->max_tokens = limits.rows_per_step + limits.prefill_tokens_per_step;
  options->max_logit_rows = limits.rows_per_step + kPromptEndsPerStep;
  options->max_logit_edits = limits.logit_edits;
  options->max_top_logprobs = kMaxTopLogprobs;
}

StepLoop::StepLoop(std::unique_ptr<Session> engine,
                   const StepLoopOptions& options)
    : options_(options),
      epoch_(RandomBits() | 1),  // no handle is 0
      heartbeat_(Clock::now().time_since_epoch().count()),
      engine_(std::move(engine)),
      config_(engine_->model().config),
      budget_(engine_->num_free_pages()),
      sequences_(epoch_, options.limits.sequences),
      sessions_(epoch_, options.limits.sessions),
      next_expiry_(Clock::now()) {
  const size_t rows = static_cast<size_t>(options.limits.rows_per_step);
  checked_.reserve(rows);
  // A prompt's row has a token at least.
  inputs_.resize(rows +
                 static_cast<size_t>(options.limits.prefill_tokens_per_step));
  rows_.reserve(rows);
  plain_rows_.reserve(rows);
  row_sequences_.reserve(rows);
  placed_.reserve(rows);
  results_.reserve(rows);
  UpdateGauges();
  thread_ = std::thread(&StepLoop::Thread, this);
  pthread_setname_np(thread_.native_handle(), "tenon-steps");
}

StepLoop::~StepLoop() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stopping_ = true;
    wake_.notify_all();
    wake_.wait(lock, [this] { return !running_; });
    running_ = true;
  }
  thread_.join();
  const Failure failure = Unavailable("SHUTDOWN", "the server shuts down");
  TakeIncoming();
  for (const std::deque<Unit>* units : {&units_, &prompts_}) {
    for (const Unit& unit : *units) {
      if (unit.step != nullptr) {
        FinishStep(unit.step, failure);
      } else {
        EndJob(unit.job, failure);
      }
    }
  }
}

void StepLoop::Submit(const AnyCall& any) {
  Metrics& m = metrics_;
  Call* call = std::visit([](auto* c) -> Call* { return c; }, any);
  const auto* step = std::get_if<StepCall*>(&any);
  const int32_t rows = step == nullptr ? 0 : (*step)->request->seq_size();
  m.requests.fetch_add(1, std::memory_order_relaxed);
  if (refusing_) {
    return call->Finish(Unavailable("SHUTDOWN", "the server shuts down"));
  }
  // What makes room is let through always.
  const bool frees = std::holds_alternative<ReleaseCall*>(any) ||
                     std::holds_alternative<AbortCall*>(any);
  // The gate. Counting first keeps the limit with many threads at it.
  const int32_t requests = m.queued_requests.fetch_add(1) + 1;
  const int32_t queued_rows = m.queued_rows.fetch_add(rows) + rows;
  const bool too_many = requests > options_.limits.queued_requests;
  if (!frees && (too_many || queued_rows > options_.limits.queued_rows)) {
    m.queued_requests.fetch_sub(1);
    m.queued_rows.fetch_sub(rows);
    m.rejected.fetch_add(1, std::memory_order_relaxed);
    return call->Finish(
        OverLimit(too_many ? "queued_requests" : "queued_rows",
                  "the server has as many calls waiting as it allows", 20));
  }
  bool is_queued = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stopping_) {
      incoming_.push_back(any);
      is_queued = true;
      if (running_) return;
      if (!options_.run_inline) {
        more_to_do_ = true;
        wake_.notify_one();
        return;
      }
      running_ = true;
    }
  }
  if (is_queued) {  // nobody else can finish it now
    call->WillRun();
    return RunAndRelease();
  }
  m.queued_requests.fetch_sub(1);
  m.queued_rows.fetch_sub(rows);
  call->Finish(Unavailable("SHUTDOWN", "the server shuts down"));
}

void StepLoop::RunAndRelease() {
  const bool more = RunOnce();
  std::lock_guard<std::mutex> lock(mutex_);
  running_ = false;
  more_to_do_ = more || !incoming_.empty();
  if (more_to_do_ || stopping_) wake_.notify_all();
}

void StepLoop::Thread() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    // Also woken while another thread runs a step, which leaves the heartbeat
    // alone: it is that thread's.
    wake_.wait_for(lock, kIdle,
                   [this] { return stopping_ || (more_to_do_ && !running_); });
    if (stopping_ || running_) continue;
    running_ = true;
    lock.unlock();
    RunAndRelease();
    lock.lock();
  }
}

bool StepLoop::RunOnce() {
  const Time now = Clock::now();
  heartbeat_ = now.time_since_epoch().count();
  TakeIncoming();
  if (now >= next_expiry_) ExpireLeases(now);
  MakeBatch();
  if (num_rows_ != 0) RunBatch();
  UpdateGauges();
  return !units_.empty() || !prompts_.empty();
}

void StepLoop::TakeIncoming() {
  taken_.clear();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    taken_.swap(incoming_);
  }
  for (const AnyCall& call : taken_) {
    std::visit([this](auto* c) { Take(c); }, call);
  }
}

void StepLoop::UpdateGauges() {
  metrics_.active_sequences = sequences_.size();
  metrics_.sessions = sessions_.size();
  metrics_.free_pages = budget_.free();
  metrics_.engine_free_pages = engine_->num_free_pages();
}

void StepLoop::FillLoad(v1::Load* load) const {
  const auto unsigned_of = [](int32_t n) {
    return static_cast<uint32_t>(std::max(n, 0));
  };
  load->set_active_sequences(unsigned_of(metrics_.active_sequences));
  load->set_sessions(unsigned_of(metrics_.sessions));
  load->set_queued_requests(unsigned_of(metrics_.queued_requests));
  load->set_queued_rows(unsigned_of(metrics_.queued_rows));
  load->set_free_pages(static_cast<uint64_t>(metrics_.free_pages.load()));
  load->set_pages(static_cast<uint64_t>(engine_->options().num_pages));
  load->set_draining(draining_);
}

}  // namespace tenon::service
