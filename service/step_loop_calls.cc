// Calls that are answered between engine steps, and the beginning and the end
// of sequences.

#include <algorithm>
#include <string>
#include <utility>

#include "service/random.h"
#include "service/step_loop.h"
#include "service/validator.h"

namespace tenon::service {
namespace {

Failure FromEngine(const Status& status) {
  return {status.code(), status.message(), "ENGINE", "", 0};
}

Failure EpochChanged(const std::string& what) {
  return {StatusCode::kFailedPrecondition,
          what + " is of another epoch: the server was restarted since",
          "EPOCH_CHANGED", what, 0};
}

Failure Gone(const std::string& what) {
  return {StatusCode::kNotFound, what + " does not exist (any more)",
          "NOT_FOUND", what, 0};
}

Failure NoPages(int64_t needed, int64_t free) {
  return OverLimit("pages", "needs " + std::to_string(needed) +
                                " pages of the KV cache, " +
                                std::to_string(free) + " are not set aside");
}

int64_t PagesOf(int32_t tokens, int32_t page_size) {
  return (int64_t{tokens} + page_size - 1) / page_size;
}

}  // namespace

Failure StepLoop::CheckStart(const Call& call) const {
  if (call.cancelled) {
    return {StatusCode::kCancelled, "the call was cancelled", "", "", 0};
  }
  if (Clock::now() > call.deadline) {
    return {StatusCode::kDeadlineExceeded,
            "the deadline passed before the call began", "", "", 0};
  }
  if (draining_) {
    return Unavailable("DRAINING", "the server takes no new sequences");
  }
  if (is_broken_) {
    return Unavailable("STATE_LOST", "the device failed; sequences are lost");
  }
  return Failure();
}

Failure StepLoop::FindSession(uint64_t id, ClientSession** session) {
  *session = sessions_.Find(id);
  if (*session != nullptr) return Failure();
  if (!HasEpoch(epoch_, id)) return EpochChanged("session_id");
  return Gone("session_id");
}

// Null for another session's sequence, and for one whose prompt is not through:
// nobody has been told its handle.
Sequence* StepLoop::FindSequence(const ClientSession& session,
                                 uint64_t handle) {
  Sequence* sequence = sequences_.Find(handle);
  const bool is_there = sequence != nullptr &&
                        sequence->session_id == session.id &&
                        !sequence->in_call;
  return is_there ? sequence : nullptr;
}

// Why FindSequence found none.
Failure StepLoop::NoSequence(uint64_t handle) const {
  const std::string name = "seq " + std::to_string(handle);
  return HasEpoch(epoch_, handle) ? Gone(name) : EpochChanged(name);
}

// The tokens of the sequence are counted from now on.
Failure StepLoop::AddEdits(const v1::NewSequence& request, Sequence* sequence) {
  const v1::LogitRules& from = request.sampling().rules();
  LogitRules rules;
  for (const v1::LogitBias& bias : from.bias()) {
    rules.biases.push_back({static_cast<int32_t>(bias.token()), bias.bias()});
  }
  for (const v1::BadWord& word : from.bad_word()) {
    rules.bad_words.emplace_back(word.token().begin(), word.token().end());
  }
  rules.allowed_ids.assign(from.allowed_token().begin(),
                           from.allowed_token().end());
  rules.dry_breakers.assign(from.dry_breaker().begin(),
                            from.dry_breaker().end());
  rules.min_tokens = static_cast<int32_t>(from.min_tokens());
  if (rules.min_tokens > 0) {
    rules.stop_ids = sequence->stop_tokens;
    if (!sequence->ignore_eos) {
      rules.stop_ids.insert(rules.stop_ids.end(), config_.eos_token_ids.begin(),
                            config_.eos_token_ids.end());
    }
  }
  if (!rules.allowed_ids.empty()) {
    sequence->sampling.flags |= SamplingFlags::kOnlyAllowed;
  }
  sequence->rule_edits =
      static_cast<int64_t>(rules.biases.size() + rules.bad_words.size() +
                           rules.allowed_ids.size() + rules.stop_ids.size());
  const int64_t needed = EditsNeeded(*sequence, sequence->max_length);
  if (needed > options_.limits.logit_edits) {
    Failure failure = OverLimit(
        "logit_edits", "a sequence of " + std::to_string(sequence->max_length) +
                           " tokens that are counted, with its rules, needs " +
                           std::to_string(needed) + " logit_edits of " +
                           std::to_string(options_.limits.logit_edits));
    failure.retry_ms = 0;
    return failure;
  }
  StatusOr<LogitEdits> edits =
      LogitEdits::Create(config_.vocab_size, sequence->max_length, rules);
  if (!edits.ok()) return FromEngine(edits.status());
  sequence->edits = std::make_unique<LogitEdits>(*std::move(edits));
  sequence->has_edits = true;
  // Between batches: no row points there.
  edits_.resize(static_cast<size_t>(options_.limits.logit_edits));
  return Failure();
}

StatusOr<Sequence*> StepLoop::AddSequence(const v1::NewSequence& request,
                                          uint64_t session_id,
                                          Failure* failure) {
  const int32_t context = engine_->options().max_context;
  const int32_t prompt = request.prompt_size();
  const int32_t max_tokens = request.has_max_tokens()
                                 ? static_cast<int32_t>(request.max_tokens())
                                 : context - prompt + 1;
  const int64_t pages =
      PagesOf(prompt + max_tokens - 1, engine_->options().page_size);
  std::optional<PageClaim> claim = budget_.Claim(pages);
  if (!claim.has_value()) {
    *failure = NoPages(pages, budget_.free());
    return ResourceExhaustedError("pages");
  }
  if (sequences_.room() == 0) {
    *failure = OverLimit("sequences", "all sequences are in use");
    return ResourceExhaustedError("sequences");
  }
  StatusOr<SequenceId> id = engine_->CreateSequence();
  if (!id.ok()) {
    *failure = FromEngine(id.status());
    return id.status();
  }
  Sequence* sequence = sequences_.Add();
  sequence->session_id = session_id;
  sequence->engine_id = *id;
  sequence->prompt.assign(request.prompt().begin(), request.prompt().end());
  sequence->max_length = prompt + max_tokens - 1;
  sequence->sampling = MergeSampling(SamplingParams(), request.sampling());
  if (!request.sampling().has_seed()) sequence->sampling.seed = RandomBits();
  sequence->stop_tokens.assign(request.stop_token().begin(),
                               request.stop_token().end());
  sequence->has_stop_tokens = !sequence->stop_tokens.empty();
  sequence->ignore_eos = request.ignore_eos();
  sequence->max_tokens = max_tokens;
  sequence->own_pages = *std::move(claim);
  sequence->in_call = true;
  if (CountsTokens(request.sampling())) {
    *failure = AddEdits(request, sequence);
    if (!failure->ok()) {
      (void)engine_->ReleaseSequence(*id);
      sequences_.Remove(sequence);
      return InvalidArgumentError("rules");
    }
  }
  return sequence;
}

void StepLoop::RemoveSequence(Sequence* sequence) {
  if (ClientSession* session = sessions_.Find(sequence->session_id)) {
    std::vector<Sequence*>& all = session->sequences;
    all.erase(std::find(all.begin(), all.end(), sequence));
    session->lease_end = Clock::now() + session->lease;
  }
  // Fails only where the device is lost, and the sequence with it.
  (void)engine_->ReleaseSequence(sequence->engine_id);
  sequences_.Remove(sequence);
}

void StepLoop::Take(StepCall* call) { units_.push_back({call, nullptr, 0}); }

void StepLoop::Take(CreateCall* call) {
  metrics_.queued_requests.fetch_sub(1);
  auto job = std::make_shared<Job>();
  job->create = call;
  Failure failure = StartJob(job);
  if (!failure.ok()) EndJob(job, failure);
}

void StepLoop::Take(GenerateCall* call) {
  metrics_.queued_requests.fetch_sub(1);
  auto job = std::make_shared<Job>();
  job->generate = call;
  Failure failure = StartJob(job);
  if (!failure.ok()) EndJob(job, failure);
}

Failure StepLoop::StartJob(const std::shared_ptr<Job>& job) {
  Failure failure = CheckStart(*job->call());
  if (!failure.ok()) return failure;
  ClientSession* session = nullptr;
  std::chrono::milliseconds lease = options_.limits.lease;
  if (job->create != nullptr) {
    const v1::CreateSequencesRequest& request = *job->create->request;
    if (request.has_session_id()) {
      failure = FindSession(request.session_id(), &session);
      if (!failure.ok()) return failure;
    } else {
      session = sessions_.Add();
      if (session == nullptr) {
        return OverLimit("sessions", "all sessions are in use");
      }
      job->made_session = true;
    }
    if (request.has_lease_ms()) {
      lease = std::chrono::milliseconds(request.lease_ms());
    }
    job->session_id = session->id;
    session->lease = std::max(session->lease, lease);
  }
  const int count =
      job->create == nullptr ? 1 : job->create->request->sequences_size();
  for (int i = 0; i < count; ++i) {
    StatusOr<Sequence*> sequence =
        AddSequence(job->create == nullptr ? job->generate->request->sequence()
                                           : job->create->request->sequences(i),
                    job->session_id, &failure);
    if (!sequence.ok()) return failure;
    (*sequence)->lease = lease;
    job->sequences.push_back(*sequence);
    if (session != nullptr) session->sequences.push_back(*sequence);
  }
  job->results.resize(job->sequences.size());
  for (size_t i = 0; i < job->sequences.size(); ++i) {
    prompts_.push_back({nullptr, job, i});
  }
  return Failure();
}

// Finishes a job's call. Sequences stay only if it is OK and a Create.
void StepLoop::EndJob(const std::shared_ptr<Job>& job, const Failure& failure) {
  if (job->over) return;
  job->over = true;
  if (failure.code == StatusCode::kCancelled) {
    metrics_.cancelled.fetch_add(1, std::memory_order_relaxed);
  }
  if (!failure.ok() || job->create == nullptr) {
    for (Sequence* sequence : job->sequences) RemoveSequence(sequence);
    if (job->made_session) sessions_.Remove(job->session_id);
    UpdateGauges();
  }
  job->call()->Finish(failure);
}

void StepLoop::EndJobsOf(uint64_t session_id, const Failure& failure) {
  for (const std::deque<Unit>* units : {&units_, &prompts_}) {
    for (size_t i = 0; i < units->size(); ++i) {
      const std::shared_ptr<Job> job = (*units)[i].job;
      if (job != nullptr && job->session_id == session_id) {
        EndJob(job, failure);
      }
    }
  }
}

StatusOr<Sequence*> StepLoop::ForkOne(Sequence* origin, Failure* failure) {
  const int32_t page_size = engine_->options().page_size;
  const int64_t whole = origin->length / page_size;
  const int64_t pages = PagesOf(origin->max_length, page_size) - whole;
  std::optional<PageClaim> claim = budget_.Claim(pages);
  if (!claim.has_value()) {
    *failure = NoPages(pages, budget_.free());
    return ResourceExhaustedError("pages");
  }
  if (sequences_.room() == 0) {
    *failure = OverLimit("sequences", "all sequences are in use");
    return ResourceExhaustedError("sequences");
  }
  StatusOr<SequenceId> id = engine_->ForkSequence(origin->engine_id);
  if (!id.ok()) {
    *failure = FromEngine(id.status());
    return id.status();
  }
  // Full pages are never written again: origin and fork hold them together.
  int64_t shared = 0;
  for (const auto& part : origin->shared_pages) shared += part->pages();
  if (whole > shared) {
    origin->shared_pages.push_back(
        std::make_shared<PageClaim>(origin->own_pages.Split(whole - shared)));
  }
  std::unique_ptr<LogitEdits> edits;
  if (origin->edits != nullptr) {
    StatusOr<LogitEdits> made = LogitEdits::Create(
        config_.vocab_size, origin->max_length, origin->edits->rules());
    edits = std::make_unique<LogitEdits>(*std::move(made));
    *edits = *origin->edits;  // keeps its room
  }
  Sequence* fork = sequences_.Add();
  fork->edits = std::move(edits);
  fork->has_edits = origin->has_edits;
  fork->rule_edits = origin->rule_edits;
  fork->session_id = origin->session_id;
  fork->engine_id = *id;
  fork->length = origin->length;
  fork->max_length = origin->max_length;
  fork->next_input = origin->next_input;
  fork->sampling = origin->sampling;
  fork->stop_tokens = origin->stop_tokens;
  fork->has_stop_tokens = origin->has_stop_tokens;
  fork->ignore_eos = origin->ignore_eos;
  fork->max_tokens = origin->max_tokens;
  fork->num_generated = origin->num_generated;
  fork->own_pages = *std::move(claim);
  fork->shared_pages = origin->shared_pages;
  fork->lease = origin->lease;
  return fork;
}

Failure StepLoop::ForkInto(const v1::ForkSequencesRequest& request,
                           ClientSession* session,
                           std::vector<Sequence*>* made) {
  const Time now = Clock::now();
  for (int i = 0; i < request.seq_size(); ++i) {
    Sequence* origin = FindSequence(*session, request.seq(i));
    if (origin == nullptr) return NoSequence(request.seq(i));
    if (origin->finished()) {
      return {StatusCode::kFailedPrecondition,
              "seq[" + std::to_string(i) + "] is finished", "FINISHED",
              "seq " + std::to_string(request.seq(i)), 0};
    }
    Failure failure;
    StatusOr<Sequence*> fork = ForkOne(origin, &failure);
    if (!fork.ok()) return failure;
    if (request.seed_size() != 0) (*fork)->sampling.seed = request.seed(i);
    session->sequences.push_back(*fork);
    made->push_back(*fork);
    Touch(origin, now);
    Touch(*fork, now);
  }
  return Failure();
}

void StepLoop::Take(ForkCall* call) {
  metrics_.queued_requests.fetch_sub(1);
  ClientSession* session = nullptr;
  Failure failure = CheckStart(*call);
  if (failure.ok()) {
    failure = FindSession(call->request->session_id(), &session);
  }
  std::vector<Sequence*> made;
  if (failure.ok()) failure = ForkInto(*call->request, session, &made);
  if (!failure.ok()) {
    for (Sequence* sequence : made) RemoveSequence(sequence);
    return call->Finish(failure);
  }
  call->response->set_server_epoch(epoch_);
  for (const Sequence* fork : made) call->response->add_seq(fork->handle);
  UpdateGauges();
  call->Finish(Failure());
}

void StepLoop::Take(ReleaseCall* call) {
  metrics_.queued_requests.fetch_sub(1);
  ClientSession* session = nullptr;
  const uint64_t id = call->request->session_id();
  const Failure failure = FindSession(id, &session);
  // A session that is gone has no sequences: that is what was asked for. One of
  // another epoch is a mistake worth hearing of.
  if (!failure.ok()) {
    return call->Finish(failure.code == StatusCode::kNotFound ? Failure()
                                                              : failure);
  }
  uint32_t released = 0;
  for (uint64_t handle : call->request->seq()) {
    Sequence* sequence = FindSequence(*session, handle);
    if (sequence == nullptr) continue;
    RemoveSequence(sequence);
    ++released;
  }
  if (call->request->end_session()) released += EndSession(session);
  call->response->set_released(released);
  UpdateGauges();
  call->Finish(Failure());
}

uint32_t StepLoop::EndSession(ClientSession* session) {
  const uint64_t id = session->id;
  const size_t before = session->sequences.size();
  EndJobsOf(id, {StatusCode::kCancelled, "the session was ended",
                 "SESSION_ENDED", "session_id", 0});
  session = sessions_.Find(id);  // a job may have been its only reason
  if (session == nullptr) return static_cast<uint32_t>(before);
  while (!session->sequences.empty()) {
    RemoveSequence(session->sequences.back());
  }
  sessions_.Remove(id);
  return static_cast<uint32_t>(before);
}

void StepLoop::Take(AbortCall* call) {
  metrics_.queued_requests.fetch_sub(1);
  const bool all = call->request->all_sessions();
  std::vector<uint64_t> ids(call->request->session_id().begin(),
                            call->request->session_id().end());
  if (all) ids = sessions_.Ids();
  uint32_t num_sessions = 0;
  const int32_t before = sequences_.size();
  for (uint64_t id : ids) {
    ClientSession* session = sessions_.Find(id);
    if (session == nullptr) continue;
    EndSession(session);
    ++num_sessions;
  }
  if (all) {  // Generate calls have no session
    EndJobsOf(0, {StatusCode::kCancelled, "aborted by an administrator",
                  "ABORTED_BY_CONTROL", "", 0});
  }
  call->response->set_sessions(num_sessions);
  call->response->set_sequences(
      static_cast<uint32_t>(before - sequences_.size()));
  UpdateGauges();
  call->Finish(Failure());
}

void StepLoop::Touch(Sequence* sequence, Time now) {
  sequence->lease_end = now + sequence->lease;
}

void StepLoop::ExpireLeases(Time now) {
  next_expiry_ = now + std::chrono::milliseconds(20);
  sequences_.ForEach([&](Sequence* sequence) {
    if (sequence->in_call || sequence->lease_end > now) return;
    metrics_.expired_sequences.fetch_add(1, std::memory_order_relaxed);
    RemoveSequence(sequence);
  });
  for (uint64_t id : sessions_.Ids()) {
    const ClientSession* session = sessions_.Find(id);
    if (session->sequences.empty() && session->lease_end <= now) {
      sessions_.Remove(id);
    }
  }
}

}  // namespace tenon::service
