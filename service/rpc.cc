// RPCs to calls of the step loop, by gRPC's callback API. A reactor is a call:
// it deletes itself when gRPC is done with it, which is after its Finish.

#include "service/rpc.h"

#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "engine/model_config.h"
#include "service/grpc_status.h"
#include "service/proto/decode.grpc.pb.h"
#include "service/version.h"

namespace tenon::service {
namespace {

using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;

// OK if the bearer token is one of `allowed`; one of `other` alone is known but
// not allowed.
grpc::Status Authorize(const CallbackServerContext& context,
                       const TokenFile& allowed, const TokenFile& other) {
  if (!allowed.enabled()) return grpc::Status::OK;
  constexpr char kScheme[] = "Bearer ";
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find("authorization");
  if (found != metadata.end() && metadata.count("authorization") == 1) {
    std::string_view value(found->second.data(), found->second.size());
    if (value.substr(0, sizeof(kScheme) - 1) == kScheme) {
      value.remove_prefix(sizeof(kScheme) - 1);
      if (allowed.Contains(value)) return grpc::Status::OK;
      if (other.enabled() && other.Contains(value)) {
        return grpc::Status(grpc::StatusCode::PERMISSION_DENIED,
                            "the token is not one for this service");
      }
    }
  }
  return grpc::Status(grpc::StatusCode::UNAUTHENTICATED,
                      "a valid bearer token is needed");
}

Time Deadline(const CallbackServerContext& context, Time fallback) {
  using std::chrono::system_clock;
  const system_clock::time_point deadline = context.deadline();
  if (deadline == system_clock::time_point::max()) return fallback;
  const auto left = deadline - system_clock::now();
  return left > std::chrono::hours(24 * 365)
             ? fallback
             : Clock::now() + std::chrono::duration_cast<Clock::duration>(left);
}

// A unary RPC that the loop answers.
template <class CallType>
class UnaryCall final : public ServerUnaryReactor, public CallType {
 public:
  void OnCancel() override { CallType::cancelled = true; }
  void OnDone() override { delete this; }
  void Finish(const Failure& failure) override {
    ServerUnaryReactor::Finish(ToGrpcStatus(failure));
  }
};

template <class CallType, class Request, class Response>
ServerUnaryReactor* StartUnary(const RpcContext& rpc,
                               CallbackServerContext* context,
                               const Request* request, Response* response,
                               const grpc::Status& authorized) {
  auto* call = new UnaryCall<CallType>;
  call->request = request;
  call->response = response;
  call->deadline =
      Deadline(*context, call->arrival + rpc.limits->default_deadline);
  if (!authorized.ok()) {
    call->ServerUnaryReactor::Finish(authorized);
    return call;
  }
  const Failure failure = rpc.validator->Check(*request);
  if (failure.ok()) {
    rpc.loop->Submit(static_cast<CallType*>(call));
  } else {
    call->Finish(failure);
  }
  return call;
}

// Answered at once.
ServerUnaryReactor* Reply(CallbackServerContext* context,
                          const grpc::Status& status) {
  ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status);
  return reactor;
}

// One step after the other. The next request is read while the last reply is
// written; it waits for the end of that.
class StepStreamCall final
    : public grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse>,
      public StepCall {
 public:
  StepStreamCall(const RpcContext& rpc, CallbackServerContext* context)
      : rpc_(rpc), stream_(rpc.streams->Add(context)) {
    request = &own_request_;
    response = &own_response_;
    StartRead(&own_request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {  // the client has no more steps, or is gone
      return ServerBidiReactor::Finish(grpc::Status::OK);
    }
    arrival = Clock::now();
    deadline = arrival + rpc_.limits->default_deadline;
    // The last of this and OnWriteDone goes on.
    if (waiting_for_.fetch_sub(1) == 1) RunStep();
  }

  void OnWriteDone(bool ok) override {
    // The read fails as well where the client is gone.
    (void)ok;
    if (waiting_for_.fetch_sub(1) == 1) RunStep();
  }

  // By the loop.
  void Finish(const Failure& failure) override {
    stream_->last_use = Clock::now().time_since_epoch().count();
    if (!failure.ok()) {
      return ServerBidiReactor::Finish(ToGrpcStatus(failure));
    }
    waiting_for_ = 2;
    StartWrite(&own_response_);
    StartRead(&own_request_);
  }

  void OnCancel() override { cancelled = true; }
  void OnDone() override {
    rpc_.streams->Remove(stream_);
    delete this;
  }

 private:
  void RunStep() {
    stream_->last_use = Time::max().time_since_epoch().count();
    own_response_.Clear();
    const Failure failure = rpc_.validator->Check(own_request_);
    if (!failure.ok()) return Finish(failure);
    rpc_.loop->Submit(static_cast<StepCall*>(this));
  }

  const RpcContext& rpc_;
  std::list<OpenStreams::Stream>::iterator stream_;
  std::atomic<int> waiting_for_{1};  // events until the next step
  v1::StepRequest own_request_;
  v1::StepResponse own_response_;
};

// Tokens that are drawn while a message is written go into the next one.
class GenerateStream final
    : public grpc::ServerWriteReactor<v1::GenerateResponse>,
      public GenerateCall {
 public:
  GenerateStream(uint64_t epoch, uint32_t want) : epoch_(epoch), want_(want) {}

  void Emit(uint32_t token, const StepRowResult& result,
            v1::RowStatus status) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      pending_.set_server_epoch(epoch_);
      pending_.add_token(token);
      if ((want_ & v1::WANT_LOGPROB) != 0) {
        pending_.add_logprob(result.logprob);
      }
      if ((want_ & v1::WANT_TOP_N) != 0) FillTop(result, pending_.add_top());
      pending_.set_row_status(status);
      if (writing_) return;
      BeginWrite();
    }
    StartWrite(&message_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) cancelled = true;
    bool finish = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      if (ok && pending_.token_size() != 0) {
        BeginWrite();
      } else {
        if (!finished_) return;
        finish = true;
      }
    }
    if (finish) {
      ServerWriteReactor::Finish(status_);
    } else {
      StartWrite(&message_);
    }
  }

  void Finish(const Failure& failure) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_ = true;
      status_ = ToGrpcStatus(failure);
      if (writing_) return;
    }
    ServerWriteReactor::Finish(status_);
  }

  void OnCancel() override { cancelled = true; }
  void OnDone() override {
    { std::lock_guard<std::mutex> lock(mutex_); }  // the last user has left
    delete this;
  }

 private:
  void BeginWrite() {
    message_.Swap(&pending_);
    pending_.Clear();
    writing_ = true;
  }

  const uint64_t epoch_;
  const uint32_t want_;
  std::mutex mutex_;
  v1::GenerateResponse pending_;  // guarded by mutex_
  bool writing_ = false;          // guarded by mutex_
  bool finished_ = false;         // guarded by mutex_
  grpc::Status status_;
  v1::GenerateResponse message_;  // what is being written
};

class FailedStream final
    : public grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse> {
 public:
  explicit FailedStream(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

uint32_t Unsigned(int64_t value) { return static_cast<uint32_t>(value); }

class DecodeService final : public v1::Decode::CallbackService {
 public:
  explicit DecodeService(const RpcContext& rpc) : rpc_(rpc) {}

  ServerUnaryReactor* GetCapabilities(
      CallbackServerContext* context, const v1::GetCapabilitiesRequest*,
      v1::GetCapabilitiesResponse* response) override {
    const grpc::Status authorized = Check(*context);
    if (authorized.ok()) FillCapabilities(response);
    return Reply(context, authorized);
  }

  ServerUnaryReactor* CreateSequences(
      CallbackServerContext* context, const v1::CreateSequencesRequest* request,
      v1::CreateSequencesResponse* response) override {
    return Start<CreateCall>(context, request, response);
  }

  ServerUnaryReactor* Step(CallbackServerContext* context,
                           const v1::StepRequest* request,
                           v1::StepResponse* response) override {
    return Start<StepCall>(context, request, response);
  }

  grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse>* StepStream(
      CallbackServerContext* context) override {
    const grpc::Status authorized = Check(*context);
    if (!authorized.ok()) return new FailedStream(authorized);
    return new StepStreamCall(rpc_, context);
  }

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      CallbackServerContext* context,
      const v1::GenerateRequest* request) override {
    auto* call = new GenerateStream(rpc_.loop->epoch(), request->want());
    call->request = request;
    call->deadline = Deadline(*context, Time::max());
    const grpc::Status authorized = Check(*context);
    if (!authorized.ok()) {
      call->grpc::ServerWriteReactor<v1::GenerateResponse>::Finish(authorized);
      return call;
    }
    const Failure failure = rpc_.validator->Check(*request);
    if (failure.ok()) {
      rpc_.loop->Submit(static_cast<GenerateCall*>(call));
    } else {
      call->Finish(failure);
    }
    return call;
  }

  ServerUnaryReactor* ForkSequences(
      CallbackServerContext* context, const v1::ForkSequencesRequest* request,
      v1::ForkSequencesResponse* response) override {
    return Start<ForkCall>(context, request, response);
  }

  ServerUnaryReactor* ReleaseSequences(
      CallbackServerContext* context,
      const v1::ReleaseSequencesRequest* request,
      v1::ReleaseSequencesResponse* response) override {
    return Start<ReleaseCall>(context, request, response);
  }

 private:
  grpc::Status Check(const CallbackServerContext& context) const {
    return Authorize(context, *rpc_.decode_tokens, *rpc_.control_tokens);
  }

  template <class CallType, class Request, class Response>
  ServerUnaryReactor* Start(CallbackServerContext* context,
                            const Request* request, Response* response) {
    return StartUnary<CallType>(rpc_, context, request, response,
                                Check(*context));
  }

  void FillCapabilities(v1::GetCapabilitiesResponse* response) const;

  const RpcContext rpc_;
};

void DecodeService::FillCapabilities(
    v1::GetCapabilitiesResponse* response) const {
  const Session& engine = rpc_.loop->engine();
  const ModelConfig& config = engine.model().config;
  response->set_server_epoch(rpc_.loop->epoch());
  response->set_protocol_minor(kProtocolMinor);
  response->set_server_version(kServerVersion);
  response->set_batch_invariant(engine.options().batch_invariant ||
                                engine.model().device.type == DeviceType::kCpu);
  response->add_wants(v1::WANT_LOGPROB);
  response->add_wants(v1::WANT_TOP_N);

  v1::Model* model = response->mutable_model();
  model->set_architecture(ArchitectureName(config.architecture));
  model->set_dtype(DTypeName(engine.model().weights.dtype));
  model->set_device(engine.model().device.type == DeviceType::kCpu ? "cpu"
                                                                   : "cuda");
  model->set_vocab_size(Unsigned(config.vocab_size));
  model->set_num_layers(Unsigned(config.num_layers));
  model->set_hidden_size(Unsigned(config.hidden_size));
  model->set_num_experts(Unsigned(config.num_experts));
  for (int32_t id : config.eos_token_ids) model->add_eos_token(Unsigned(id));

  const Limits& limits = *rpc_.limits;
  v1::Limits* out = response->mutable_limits();
  out->set_rows_per_step(Unsigned(limits.rows_per_step));
  out->set_sequences(Unsigned(limits.sequences));
  out->set_sessions(Unsigned(limits.sessions));
  out->set_prompt_tokens(Unsigned(limits.prompt_tokens));
  out->set_context_tokens(Unsigned(engine.options().max_context));
  out->set_request_bytes(Unsigned(limits.request_bytes));
  out->set_stop_tokens(Unsigned(limits.stop_tokens));
  out->set_logit_edits(Unsigned(limits.logit_edits));
  out->set_logit_rules(Unsigned(limits.logit_rules));
  out->set_top_logprobs(Unsigned(engine.options().max_top_logprobs));
  out->set_metadata_bytes(Unsigned(limits.metadata_bytes));
  out->set_streams_per_connection(Unsigned(limits.streams_per_connection));
  out->set_lease_ms(Unsigned(limits.lease.count()));
  out->set_max_lease_ms(Unsigned(limits.max_lease.count()));
  out->set_stream_idle_ms(Unsigned(limits.stream_idle.count()));
  out->set_default_deadline_ms(Unsigned(limits.default_deadline.count()));
  out->set_queued_requests(Unsigned(limits.queued_requests));
  out->set_queued_rows(Unsigned(limits.queued_rows));
  out->set_page_tokens(Unsigned(engine.options().page_size));
  out->set_pages(static_cast<uint64_t>(engine.options().num_pages));
  out->set_replayable_steps(Unsigned(limits.replayable_steps));
  out->set_connections(Unsigned(limits.connections));
}

class ControlService final : public v1::Control::CallbackService {
 public:
  explicit ControlService(const RpcContext& rpc) : rpc_(rpc) {}

  ServerUnaryReactor* GetLoad(CallbackServerContext* context,
                              const v1::GetLoadRequest*,
                              v1::Load* response) override {
    const grpc::Status authorized = Check(*context);
    if (authorized.ok()) rpc_.loop->FillLoad(response);
    return Reply(context, authorized);
  }

  ServerUnaryReactor* Drain(CallbackServerContext* context,
                            const v1::DrainRequest* request,
                            v1::DrainResponse* response) override {
    const grpc::Status authorized = Check(*context);
    if (authorized.ok()) {
      rpc_.drain->BeginDrain(
          request->has_grace_ms()
              ? std::chrono::milliseconds(request->grace_ms())
              : rpc_.drain->default_grace());
      rpc_.loop->FillLoad(response->mutable_load());
    }
    return Reply(context, authorized);
  }

  ServerUnaryReactor* Resume(CallbackServerContext* context,
                             const v1::ResumeRequest*,
                             v1::ResumeResponse* response) override {
    const grpc::Status authorized = Check(*context);
    if (authorized.ok()) {
      rpc_.drain->EndDrain();
      rpc_.loop->FillLoad(response->mutable_load());
    }
    return Reply(context, authorized);
  }

  ServerUnaryReactor* Abort(CallbackServerContext* context,
                            const v1::AbortRequest* request,
                            v1::AbortResponse* response) override {
    return StartUnary<AbortCall>(rpc_, context, request, response,
                                 Check(*context));
  }

  ServerUnaryReactor* GetStats(CallbackServerContext* context,
                               const v1::GetStatsRequest*,
                               v1::GetStatsResponse* response) override {
    const grpc::Status authorized = Check(*context);
    if (authorized.ok()) FillStats(response);
    return Reply(context, authorized);
  }

 private:
  grpc::Status Check(const CallbackServerContext& context) const {
    return Authorize(context, *rpc_.control_tokens, *rpc_.decode_tokens);
  }

  void FillStats(v1::GetStatsResponse* response) const;

  const RpcContext rpc_;
};

void ControlService::FillStats(v1::GetStatsResponse* response) const {
  using std::chrono::milliseconds;
  const auto ms_since = [](Time time) {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<milliseconds>(Clock::now() - time).count());
  };
  const Metrics& m = rpc_.loop->metrics();
  response->set_server_epoch(rpc_.loop->epoch());
  response->set_uptime_ms(ms_since(rpc_.start));
  response->set_steps(m.steps);
  response->set_rows(m.rows);
  response->set_tokens(m.tokens);
  response->set_sampled_tokens(m.sampled_tokens);
  response->set_requests(m.requests);
  response->set_rejected(m.rejected);
  response->set_cancelled(m.cancelled);
  response->set_replayed(m.replayed);
  response->set_expired_sequences(m.expired_sequences);
  response->set_engine_free_pages(
      static_cast<uint64_t>(m.engine_free_pages.load()));
  response->set_heartbeat_age_ms(ms_since(rpc_.loop->heartbeat()));
  rpc_.loop->FillLoad(response->mutable_load());
}

}  // namespace

std::list<OpenStreams::Stream>::iterator OpenStreams::Add(
    CallbackServerContext* context) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++*count_;
  streams_.emplace_back();
  streams_.back().context = context;
  streams_.back().last_use = Clock::now().time_since_epoch().count();
  return std::prev(streams_.end());
}

void OpenStreams::Remove(std::list<Stream>::iterator stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  --*count_;
  streams_.erase(stream);
}

void OpenStreams::CancelIdle(std::chrono::milliseconds idle) {
  const Clock::rep oldest = (Clock::now() - idle).time_since_epoch().count();
  std::lock_guard<std::mutex> lock(mutex_);
  for (Stream& stream : streams_) {
    if (stream.last_use < oldest) stream.context->TryCancel();
  }
}

std::unique_ptr<grpc::Service> MakeDecodeService(const RpcContext& context) {
  return std::make_unique<DecodeService>(context);
}

std::unique_ptr<grpc::Service> MakeControlService(const RpcContext& context) {
  return std::make_unique<ControlService>(context);
}

}  // namespace tenon::service
