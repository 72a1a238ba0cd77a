// Batches: which units the next engine step serves, and what comes of it.

#include <algorithm>
#include <string>
#include <utility>

#include "service/random.h"
#include "service/step_loop.h"
#include "service/validator.h"

namespace tenon::service {
namespace {

uint64_t Nanoseconds(Clock::duration duration) {
  return static_cast<uint64_t>(
      std::max<int64_t>(0, std::chrono::nanoseconds(duration).count()));
}

Failure CheckJob(const Call& call) {
  if (call.cancelled) {
    return {StatusCode::kCancelled, "the call was cancelled", "", "", 0};
  }
  if (Clock::now() > call.deadline) {
    return {StatusCode::kDeadlineExceeded,
            "the deadline passed before the prompt was through", "", "", 0};
  }
  return Failure();
}

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

void StepLoop::MakeBatch() {
  ++batch_;
  num_rows_ = 0;
  row_sequences_.clear();
  placed_.clear();
  num_edits_ = 0;
  decode_rows_ = 0;
  sampled_rows_ = 0;
  prefill_left_ = options_.limits.prefill_tokens_per_step;
  const bool prompts_first = std::exchange(prompts_first_, false);
  if (prompts_first) PlaceAll(&prompts_);
  PlaceAll(&units_);
  if (!prompts_first) PlaceAll(&prompts_);
  prompts_first_ = prompts_first_ && !prompts_first;  // in turn
}

void StepLoop::PlaceAll(std::deque<Unit>* units) {
  later_.clear();
  while (!units->empty()) {
    const Placement placement = Place(units->front());
    if (placement == Placement::kFull) break;
    if (placement == Placement::kLater) {
      later_.push_back(std::move(units->front()));
    }
    units->pop_front();
  }
  // Those keep their place in the queue.
  for (size_t i = later_.size(); i-- > 0;) {
    units->push_front(std::move(later_[i]));
  }
}

StepLoop::Placement StepLoop::Place(const Unit& unit) {
  return unit.step != nullptr ? PlaceStep(unit) : PlaceJob(unit);
}

// The most that a row can take which adds `num_tokens` to a sequence whose
// tokens are counted.
int64_t StepLoop::EditsNeeded(const Sequence& sequence,
                              int32_t num_tokens) const {
  return std::min(int64_t{config_.vocab_size},
                  sequence.length + num_tokens + sequence.rule_edits);
}

StepRow* StepLoop::AddRow(Sequence* sequence, const int32_t* tokens,
                          int32_t num_tokens) {
  row_sequences_.push_back(sequence);
  if (num_rows_ == plain_rows_.size()) plain_rows_.emplace_back();
  if (num_rows_ == rows_.size()) rows_.emplace_back();
  plain_rows_[num_rows_] = 0;
  StepRow& row = rows_[num_rows_++];
  row = StepRow();
  row.sequence = sequence->engine_id;
  row.tokens = tokens;
  row.num_tokens = num_tokens;
  row.sampling = sequence->sampling;
  return &row;
}

// Of a sequence whose tokens are counted, when all else of the row is set.
// There is room for them.
void StepLoop::FillEdits(Sequence* sequence, LogitEdits::Source source,
                         StepRow* row) {
  // The validator has seen the tokens, and there is room for max_length.
  (void)sequence->edits->Append(row->tokens, row->num_tokens, source);
  if (!row->sample) return;
  LogitEdit* edits = edits_.data() + num_edits_;
  row->edits = edits;
  row->num_edits =
      static_cast<int32_t>(sequence->edits->Build(row->sampling, edits));
  num_edits_ += row->num_edits;
}

StepLoop::Placement StepLoop::PlaceStep(const Unit& unit) {
  StepCall* call = unit.step;
  const int32_t count = call->request->seq_size();
  const int32_t most = options_.limits.rows_per_step;
  if (decode_rows_ + count > most ||
      sampled_rows_ + count > most + kPromptEndsPerStep) {
    return Placement::kFull;
  }
  ClientSession* session = nullptr;
  Failure failure = FindSession(call->request->session_id(), &session);
  // The step before this one is in the batch: this one needs its outcome.
  if (failure.ok() && session->batch == batch_) return Placement::kLater;
  const v1::StepResponse* reply = nullptr;
  const uint64_t digest = Digest(*call->request);
  if (failure.ok()) {
    failure = session->Look(call->request->step_id(), digest, &reply);
  }
  if (reply != nullptr) {
    metrics_.replayed.fetch_add(1, std::memory_order_relaxed);
    *call->response = *reply;
    FinishStep(call, Failure());
    return Placement::kFinished;
  }
  if (failure.ok()) failure = CheckStep(*call, *session);
  if (!failure.ok()) {
    FinishStep(call, failure);
    return Placement::kFinished;
  }
  int64_t edits = 0;
  for (const Sequence* sequence : checked_) {
    if (sequence->has_edits) edits += EditsNeeded(*sequence, 1);
  }
  const int64_t room = options_.limits.logit_edits;
  if (edits > room) {
    failure =
        OverLimit("logit_edits", "the step needs " + std::to_string(edits) +
                                     " logit_edits of " + std::to_string(room));
    failure.retry_ms = 0;
    FinishStep(call, failure);
    return Placement::kFinished;
  }
  if (num_edits_ + edits > room) return Placement::kFull;
  session->batch = batch_;
  placed_.push_back({unit, num_rows_, static_cast<size_t>(count), digest});
  decode_rows_ += count;
  sampled_rows_ += count;
  PlaceRows(*call->request);
  return Placement::kPlaced;
}

// True if the batch before had the row in the same place and it is the same
// still, which it is from step to step of a client: a row is three cache lines
// to write, and the sequence's parameters are two to read.
bool StepLoop::KeepRow(Sequence* sequence) {
  if (num_rows_ >= rows_.size() || plain_rows_[num_rows_] != sequence->handle) {
    return false;
  }
  row_sequences_.push_back(sequence);
  ++num_rows_;
  return true;
}

// Of the step that CheckStep has seen.
void StepLoop::PlaceRows(const v1::StepRequest& request) {
  const bool own_inputs = request.input_token_size() != 0;
  const bool has_overrides = request.has_overrides();
  const int32_t num_top = static_cast<int32_t>(request.top_n());
  const bool all_plain = !has_overrides && num_top == 0;
  for (size_t i = 0; i < checked_.size(); ++i) {
    Sequence* sequence = checked_[i];
    const bool is_plain = all_plain && !sequence->has_edits;
    int32_t* input = &inputs_[num_rows_];
    *input =
        own_inputs
            ? static_cast<int32_t>(request.input_token(static_cast<int>(i)))
            : sequence->next_input;
    if (is_plain && KeepRow(sequence)) continue;
    StepRow* row = AddRow(sequence, input, 1);
    if (is_plain) plain_rows_[num_rows_ - 1] = sequence->handle;
    if (has_overrides) {
      row->sampling = MergeSampling(row->sampling, request.overrides());
    }
    row->sampling.num_top_logprobs = num_top;
    if (sequence->has_edits) {
      FillEdits(sequence, LogitEdits::Source::kOutput, row);
    }
  }
}

// What of a new step depends on sequences. Changes nothing.
Failure StepLoop::CheckStep(const StepCall& call,
                            const ClientSession& session) {
  if (call.cancelled) {
    metrics_.cancelled.fetch_add(1, std::memory_order_relaxed);
    return {StatusCode::kCancelled, "the step was cancelled before its launch",
            "", "", 0};
  }
  if (Clock::now() + last_step_ / 2 > call.deadline) {
    return {StatusCode::kDeadlineExceeded,
            "too little time is left to launch the step", "", "", 0};
  }
  if (is_broken_) {
    return Unavailable("STATE_LOST", "the device failed; sequences are lost");
  }
  const v1::StepRequest& request = *call.request;
  // Others leave alone what needs counts: without them it is off.
  const bool needs_counts =
      request.has_overrides() && CountsTokens(request.overrides());
  const uint64_t check = ++num_checks_;
  checked_.clear();
  for (int i = 0; i < request.seq_size(); ++i) {
    Sequence* sequence = FindSequence(session, request.seq(i));
    if (sequence == nullptr) return NoSequence(request.seq(i));
    if (sequence->check == check) {
      return BadField("seq[" + std::to_string(i) + "]",
                      "the sequence is there twice");
    }
    sequence->check = check;
    checked_.push_back(sequence);
    if (needs_counts && sequence->edits == nullptr &&
        NeedsLogitEdits(MergeSampling(sequence->sampling, request.overrides()),
                        LogitRules())) {
      return BadField("overrides",
                      "seq[" + std::to_string(i) +
                          "] was made without penalties or rules, so that its "
                          "tokens are not counted");
    }
    if (!sequence->finished()) continue;
    const std::string name = "seq " + std::to_string(sequence->handle);
    return {StatusCode::kFailedPrecondition, name + " is finished", "FINISHED",
            name, 0};
  }
  return Failure();
}

StepLoop::Placement StepLoop::PlaceJob(const Unit& unit) {
  if (unit.job->over) return Placement::kFinished;
  // Not with another of its prompts in the batch: that needs its sequence.
  if (unit.job->batch != batch_) {
    const Failure failure = CheckJob(*unit.job->call());
    if (!failure.ok()) {
      EndJob(unit.job, failure);
      return Placement::kFinished;
    }
  }
  Sequence* sequence = unit.job->sequences[unit.index];
  const int32_t prompt = static_cast<int32_t>(sequence->prompt.size());
  const int32_t prompt_left = prompt - sequence->prefilled;
  if (prompt_left > 0 && prefill_left_ == 0) return Placement::kLater;
  const int32_t most = options_.limits.rows_per_step;
  if (prompt_left <= 0 && decode_rows_ >= most) return Placement::kFull;
  const int32_t num_tokens =
      prompt_left > 0 ? std::min(prompt_left, prefill_left_) : 1;
  const bool sample = num_tokens >= prompt_left;
  if (sample && sampled_rows_ >= most + kPromptEndsPerStep) {
    return Placement::kFull;
  }
  if (sequence->edits != nullptr && sample &&
      num_edits_ + EditsNeeded(*sequence, num_tokens) >
          options_.limits.logit_edits) {
    prompts_first_ = prompts_first_ || prompt_left > 0;
    return Placement::kFull;
  }
  const int32_t* tokens = nullptr;
  if (prompt_left > 0) {
    prefill_left_ -= num_tokens;
    tokens = &sequence->prompt[static_cast<size_t>(sequence->prefilled)];
  } else {
    inputs_[num_rows_] = sequence->next_input;
    tokens = &inputs_[num_rows_];
    ++decode_rows_;
  }
  sampled_rows_ += sample ? 1 : 0;
  unit.job->batch = batch_;
  placed_.push_back({unit, num_rows_, 1, 0});
  StepRow* row = AddRow(sequence, tokens, num_tokens);
  row->sample = sample;
  row->sampling.num_top_logprobs = static_cast<int32_t>(
      unit.job->create != nullptr ? unit.job->create->request->top_n()
                                  : unit.job->generate->request->top_n());
  if (sequence->edits != nullptr) {
    FillEdits(sequence,
              prompt_left > 0 ? LogitEdits::Source::kPrompt
                              : LogitEdits::Source::kOutput,
              row);
  }
  return Placement::kPlaced;
}

void StepLoop::RunBatch() {
  rows_.resize(num_rows_);
  launch_ = Clock::now();
  const Status status = engine_->Step(rows_, &results_, &stats_);
  last_step_ = Clock::now() - launch_;
  if (!status.ok()) {
    metrics_.failed_steps.fetch_add(1, std::memory_order_relaxed);
    is_broken_ = engine_->is_broken();
    if (!RunSeparately()) {
      for (const Placed& placed : placed_) Fail(placed, status);
    }
    return;
  }
  metrics_.steps.fetch_add(1, std::memory_order_relaxed);
  metrics_.rows.fetch_add(rows_.size(), std::memory_order_relaxed);
  metrics_.tokens.fetch_add(static_cast<uint64_t>(stats_.tokens),
                            std::memory_order_relaxed);
  metrics_.step.Add(std::chrono::nanoseconds(last_step_).count());
  for (const Placed& placed : placed_) {
    Deliver(placed, &results_[placed.first_row]);
  }
}

// Not a counter of metrics_ for every row: those wait for all loads before.
void StepLoop::CountSampled() {
  metrics_.sampled_tokens.fetch_add(sampled_, std::memory_order_relaxed);
  sampled_ = 0;
}

// After an error: one unit at a time, so that none fails for another's sake.
// False if there is nothing to separate.
bool StepLoop::RunSeparately() {
  if (is_broken_ || placed_.size() == 1) return false;
  const std::vector<StepRow> rows = rows_;
  for (const Placed& placed : placed_) {
    const auto first = rows.begin() + static_cast<int64_t>(placed.first_row);
    const std::vector<StepRow> own(
        first, first + static_cast<int64_t>(placed.num_rows));
    const Status status = engine_->Step(own, &results_, &stats_);
    is_broken_ = engine_->is_broken();
    if (status.ok()) {
      metrics_.steps.fetch_add(1, std::memory_order_relaxed);
      metrics_.rows.fetch_add(own.size(), std::memory_order_relaxed);
      Deliver(placed, results_.data());
    } else {
      Fail(placed, status);
    }
  }
  return true;
}

// The state of every sequence is as before the step.
void StepLoop::Fail(const Placed& placed, const Status& status) {
  Failure failure{status.code(), status.message(), "ENGINE", "", 0};
  if (is_broken_) {
    failure =
        Unavailable("STATE_LOST", "the device failed; sequences are lost");
  } else if (status.code() == StatusCode::kInternal) {
    failure.message = "internal error " + std::to_string(RandomBits());
  }
  if (placed.unit.step == nullptr) return EndJob(placed.unit.job, failure);
  for (size_t i = 0; i < placed.num_rows; ++i) {
    Sequence* sequence = row_sequences_[placed.first_row + i];
    if (sequence->edits != nullptr) sequence->edits->Truncate(sequence->length);
  }
  FinishStep(placed.unit.step, failure);
}

void StepLoop::Append(Sequence* sequence, int32_t num_tokens,
                      const StepRowResult& result) {
  sequence->length += num_tokens;
  if (result.status != SampleStatus::kOk) {
    sequence->next_input = 0;
    sequence->status = v1::ROW_STATUS_NO_TOKEN;
    return;
  }
  ++sampled_;
  sequence->next_input = result.token;
  ++sequence->num_generated;
  if (!sequence->ignore_eos && Contains(config_.eos_token_ids, result.token)) {
    sequence->status = v1::ROW_STATUS_FINISHED_EOS;
  } else if (sequence->has_stop_tokens &&
             Contains(sequence->stop_tokens, result.token)) {
    sequence->status = v1::ROW_STATUS_FINISHED_STOP;
  } else if (sequence->num_generated >= sequence->max_tokens) {
    sequence->status = v1::ROW_STATUS_FINISHED_LENGTH;
  }
}

void StepLoop::Deliver(const Placed& placed, const StepRowResult* results) {
  if (placed.unit.step != nullptr) {
    DeliverStep(placed, results);
  } else {
    DeliverJob(placed, results[0]);
  }
}

void StepLoop::FillTiming(const Call& call, v1::Timing* timing) const {
  timing->set_queue_ns(Nanoseconds(launch_ - call.arrival));
  timing->set_step_ns(Nanoseconds(last_step_));
  timing->set_total_ns(Nanoseconds(Clock::now() - call.arrival));
  timing->set_batch_rows(static_cast<uint32_t>(stats_.rows));
  timing->set_batch_tokens(static_cast<uint32_t>(stats_.tokens));
}

void StepLoop::DeliverStep(const Placed& placed, const StepRowResult* results) {
  StepCall* call = placed.unit.step;
  const v1::StepRequest& request = *call->request;
  v1::StepResponse* response = call->response;
  response->set_server_epoch(epoch_);
  response->set_step_id(request.step_id());
  const bool want_logprob = (request.want() & v1::WANT_LOGPROB) != 0;
  const bool want_top = (request.want() & v1::WANT_TOP_N) != 0;
  const Time now = Clock::now();
  response->mutable_token()->Resize(request.seq_size(), 0);
  response->mutable_row_status()->Resize(request.seq_size(), 0);
  uint32_t* tokens = response->mutable_token()->mutable_data();
  int* statuses = response->mutable_row_status()->mutable_data();
  Sequence* const* sequences = &row_sequences_[placed.first_row];
  for (size_t i = 0; i < placed.num_rows; ++i) {
    // The engine's step has left none of them in the caches.
    if (i + 8 < placed.num_rows) Prefetch(sequences[i + 8]);
    Sequence* sequence = sequences[i];
    Append(sequence, 1, results[i]);
    Touch(sequence, now);
    tokens[i] = static_cast<uint32_t>(sequence->next_input);
    statuses[i] = sequence->status;
    if (want_logprob) response->add_logprob(results[i].logprob);
    if (want_top) FillTop(results[i], response->add_top());
  }
  FillTiming(*call, response->mutable_timing());
  FillLoad(response->mutable_load());
  ClientSession* session = sessions_.Find(request.session_id());
  session->Remember(request.step_id(), placed.digest, *response,
                    options_.limits.replayable_steps);
  CountSampled();
  metrics_.queue.Add(static_cast<int64_t>(response->timing().queue_ns()));
  metrics_.request.Add(static_cast<int64_t>(response->timing().total_ns()));
  FinishStep(call, Failure());
}

void StepLoop::FinishStep(StepCall* call, const Failure& failure) {
  metrics_.queued_requests.fetch_sub(1);
  metrics_.queued_rows.fetch_sub(call->request->seq_size());
  call->Finish(failure);
}

void StepLoop::DeliverJob(const Placed& placed, const StepRowResult& result) {
  const std::shared_ptr<Job>& job = placed.unit.job;
  if (job->over) return;  // another of its prompts failed
  Sequence* sequence = job->sequences[placed.unit.index];
  const int32_t prompt = static_cast<int32_t>(sequence->prompt.size());
  if (sequence->prefilled < prompt) {
    const int32_t chunk = rows_[placed.first_row].num_tokens;
    sequence->prefilled += chunk;
    if (sequence->prefilled < prompt) {
      sequence->length += chunk;
      prompts_.push_back(placed.unit);
      return;
    }
    metrics_.first_token.Add(
        static_cast<int64_t>(Nanoseconds(Clock::now() - job->call()->arrival)));
    Append(sequence, chunk, result);
  } else {
    Append(sequence, 1, result);
  }
  CountSampled();
  if (job->create != nullptr) {
    job->results[placed.unit.index] = result;
    if (++job->num_prefilled == job->sequences.size()) FinishCreate(job);
    return;
  }
  job->generate->Emit(static_cast<uint32_t>(sequence->next_input), result,
                      sequence->status);
  if (sequence->finished()) {
    EndJob(job, Failure());
  } else {
    units_.push_back(placed.unit);
  }
}

void StepLoop::FinishCreate(const std::shared_ptr<Job>& job) {
  CreateCall* call = job->create;
  if (call->cancelled) {  // nobody would hear of the handles
    return EndJob(
        job, {StatusCode::kCancelled, "the call was cancelled", "", "", 0});
  }
  const Time now = Clock::now();
  v1::CreateSequencesResponse* response = call->response;
  response->set_server_epoch(epoch_);
  response->set_session_id(job->session_id);
  for (size_t i = 0; i < job->sequences.size(); ++i) {
    Sequence* sequence = job->sequences[i];
    sequence->in_call = false;
    std::vector<int32_t>().swap(sequence->prompt);
    sequence->prefilled = 0;
    Touch(sequence, now);
    response->add_seq(sequence->handle);
    response->add_token(static_cast<uint32_t>(sequence->next_input));
    if ((call->request->want() & v1::WANT_LOGPROB) != 0) {
      response->add_logprob(job->results[i].logprob);
    }
    if ((call->request->want() & v1::WANT_TOP_N) != 0) {
      FillTop(job->results[i], response->add_top());
    }
    response->add_row_status(sequence->status);
    response->set_lease_ms(static_cast<uint32_t>(sequence->lease.count()));
  }
  FillTiming(*call, response->mutable_timing());
  UpdateGauges();
  FillLoad(response->mutable_load());
  EndJob(job, Failure());
}

}  // namespace tenon::service
