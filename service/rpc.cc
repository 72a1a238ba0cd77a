// RPCs to calls of the step loop.

#include "service/rpc.h"

#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "engine/model_config.h"
#include "service/grpc_status.h"
#include "service/proto/decode.grpc.pb.h"
#include "service/rpc_call.h"
#include "service/version.h"

namespace tenon::service {
namespace {

// Who may call a service: the bearer token is one of `allowed`; one of `other`
// alone is known but not allowed.
struct Access {
  const TokenFile* allowed;
  const TokenFile* other;
};

grpc::Status Authorize(const grpc::ServerContext& context,
                       const Access& access) {
  const TokenFile& allowed = *access.allowed;
  const TokenFile& other = *access.other;
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

Time Deadline(const grpc::ServerContext& context, Time fallback) {
  using std::chrono::system_clock;
  const system_clock::time_point deadline = context.deadline();
  if (deadline == system_clock::time_point::max()) return fallback;
  const auto left = deadline - system_clock::now();
  return left > std::chrono::hours(24 * 365)
             ? fallback
             : Clock::now() + std::chrono::duration_cast<Clock::duration>(left);
}

// A unary call that the loop answers.
template <class CallType, class Service, class Request, class Response>
class LoopCall final : public UnaryCall<Service, Request, Response>,
                       public CallType {
 public:
  using Accept = UnaryAccept<Service, Request, Response>;
  LoopCall(Poller* poller, Service* service, Accept accept,
           const RpcContext& rpc, const Access& access)
      : UnaryCall<Service, Request, Response>(poller, service, accept),
        rpc_(rpc),
        access_(access) {}

  void Finish(const Failure& failure) override {
    this->FinishWith(ToGrpcStatus(failure));
  }
  void WillRun() override { this->poller()->StandIn(); }

 private:
  void Renew() override {
    (new LoopCall(this->poller(), this->service_, this->accept_, rpc_, access_))
        ->Wait();
  }

  void Begin() override {
    CallType::request = &this->request_;
    CallType::response = &this->response_;
    CallType::arrival = Clock::now();
    CallType::deadline = Deadline(
        *this->context(), CallType::arrival + rpc_.limits->default_deadline);
    const grpc::Status authorized = Authorize(*this->context(), access_);
    if (!authorized.ok()) return this->FinishWith(authorized);
    const Failure failure = rpc_.validator->Check(this->request_);
    if (!failure.ok()) return Finish(failure);
    rpc_.loop->Submit(static_cast<CallType*>(this));
  }

  void Cancel() override { CallType::cancelled = true; }

  const RpcContext& rpc_;
  const Access access_;
};

template <class CallType, class Service, class Request, class Response>
void Submit(Poller* poller, std::common_type_t<Service>* service,
            UnaryAccept<Service, Request, Response> accept,
            const RpcContext& rpc, const Access& access) {
  (new LoopCall<CallType, Service, Request, Response>(poller, service, accept,
                                                      rpc, access))
      ->Wait();
}

using AsyncDecode = v1::Decode::AsyncService;
using AsyncControl = v1::Control::AsyncService;

// One step after the other. The next request is read while the last reply is
// written; it waits for the end of that.
class StepStreamCall final : public RpcCall, public StepCall {
 public:
  StepStreamCall(Poller* poller, AsyncDecode* service, const RpcContext& rpc,
                 const Access& access)
      : RpcCall(poller),
        service_(service),
        rpc_(rpc),
        access_(access),
        stream_(context()) {
    request = &own_request_;
    response = &own_response_;
  }
  ~StepStreamCall() override {
    if (is_open_) rpc_.streams->Remove(open_);
  }

  void Wait() override {
    service_->RequestStepStream(context(), &stream_, poller()->queue(),
                                poller()->queue(), arrival_tag());
  }

  // By the loop.
  void Finish(const Failure& failure) override {
    open_->last_use = Clock::now().time_since_epoch().count();
    if (!failure.ok()) {
      return stream_.Finish(ToGrpcStatus(failure), finish_tag());
    }
    waiting_for_ = 2;
    stream_.Write(own_response_, static_cast<Event*>(&written_));
    stream_.Read(&own_request_, static_cast<Event*>(&read_));
  }
  void WillRun() override { poller()->StandIn(); }

 private:
  void Renew() override {
    (new StepStreamCall(poller(), service_, rpc_, access_))->Wait();
  }

  void Begin() override {
    const grpc::Status authorized = Authorize(*context(), access_);
    if (!authorized.ok()) return stream_.Finish(authorized, finish_tag());
    open_ = rpc_.streams->Add(context());
    is_open_ = true;
    stream_.Read(&own_request_, static_cast<Event*>(&read_));
  }

  void OnRead(bool ok) {
    has_request_ = ok;  // or the client has no more steps, or is gone
    arrival = Clock::now();
    deadline = arrival + rpc_.limits->default_deadline;
    GoOn();
  }
  // The read fails as well where the client is gone.
  void OnWritten(bool) { GoOn(); }

  // The last of the two events runs the step.
  void GoOn() {
    if (waiting_for_.fetch_sub(1) != 1) return;
    if (!has_request_) return stream_.Finish(grpc::Status::OK, finish_tag());
    open_->last_use = Time::max().time_since_epoch().count();
    own_response_.Clear();
    const Failure failure = rpc_.validator->Check(own_request_);
    if (!failure.ok()) return Finish(failure);
    rpc_.loop->Submit(static_cast<StepCall*>(this));
  }

  void Cancel() override { cancelled = true; }

  AsyncDecode* const service_;
  const RpcContext& rpc_;
  const Access access_;
  std::list<OpenStreams::Stream>::iterator open_;
  bool is_open_ = false;
  bool has_request_ = false;
  std::atomic<int> waiting_for_{1};  // events until the next step
  v1::StepRequest own_request_;
  v1::StepResponse own_response_;
  grpc::ServerAsyncReaderWriter<v1::StepResponse, v1::StepRequest> stream_;
  EventOf<StepStreamCall, &StepStreamCall::OnRead> read_{this};
  EventOf<StepStreamCall, &StepStreamCall::OnWritten> written_{this};
};

// Tokens that are drawn while a message is written go into the next one.
class GenerateStream final : public RpcCall, public GenerateCall {
 public:
  GenerateStream(Poller* poller, AsyncDecode* service, const RpcContext& rpc,
                 const Access& access)
      : RpcCall(poller),
        service_(service),
        rpc_(rpc),
        access_(access),
        stream_(context()) {}
  // The last user has left.
  ~GenerateStream() override { std::lock_guard<std::mutex> lock(mutex_); }

  void Wait() override {
    service_->RequestGenerate(context(), &own_request_, &stream_,
                              poller()->queue(), poller()->queue(),
                              arrival_tag());
  }

  void Emit(uint32_t token, const StepRowResult& result,
            v1::RowStatus status) override {
    const uint32_t want = own_request_.want();
    std::lock_guard<std::mutex> lock(mutex_);
    pending_.set_server_epoch(rpc_.loop->epoch());
    pending_.add_token(token);
    if ((want & v1::WANT_LOGPROB) != 0) pending_.add_logprob(result.logprob);
    if ((want & v1::WANT_TOP_N) != 0) FillTop(result, pending_.add_top());
    pending_.set_row_status(status);
    if (!is_writing_) Write();
  }

  void Finish(const Failure& failure) override {
    std::lock_guard<std::mutex> lock(mutex_);
    is_over_ = true;
    status_ = ToGrpcStatus(failure);
    if (!is_writing_) stream_.Finish(status_, finish_tag());
  }
  void WillRun() override { poller()->StandIn(); }

 private:
  void Renew() override {
    (new GenerateStream(poller(), service_, rpc_, access_))->Wait();
  }

  void Begin() override {
    request = &own_request_;
    arrival = Clock::now();
    deadline = Deadline(*context(), Time::max());
    const grpc::Status authorized = Authorize(*context(), access_);
    if (!authorized.ok()) return stream_.Finish(authorized, finish_tag());
    const Failure failure = rpc_.validator->Check(own_request_);
    if (!failure.ok()) return Finish(failure);
    rpc_.loop->Submit(static_cast<GenerateCall*>(this));
  }

  void OnWritten(bool ok) {
    if (!ok) cancelled = true;
    std::lock_guard<std::mutex> lock(mutex_);
    is_writing_ = false;
    if (ok && pending_.token_size() != 0) {
      Write();
    } else if (is_over_) {
      stream_.Finish(status_, finish_tag());
    }
  }

  void Write() {
    message_.Swap(&pending_);
    pending_.Clear();
    is_writing_ = true;
    stream_.Write(message_, static_cast<Event*>(&written_));
  }

  void Cancel() override { cancelled = true; }

  AsyncDecode* const service_;
  const RpcContext& rpc_;
  const Access access_;
  v1::GenerateRequest own_request_;
  std::mutex mutex_;  // guards what follows
  v1::GenerateResponse pending_;
  v1::GenerateResponse message_;  // what is being written
  bool is_writing_ = false;
  bool is_over_ = false;
  grpc::Status status_;
  grpc::ServerAsyncWriter<v1::GenerateResponse> stream_;
  EventOf<GenerateStream, &GenerateStream::OnWritten> written_{this};
};

uint32_t Unsigned(int64_t value) { return static_cast<uint32_t>(value); }

class DecodeService final : public RpcService {
 public:
  explicit DecodeService(const RpcContext& rpc)
      : rpc_(rpc), access_{rpc.decode_tokens, rpc.control_tokens} {}

  grpc::Service* service() override { return &service_; }

  void Start(Poller* poller) override {
    Answer(poller, &service_, &AsyncDecode::RequestGetCapabilities,
           [this](const grpc::ServerContext& context,
                  const v1::GetCapabilitiesRequest&,
                  v1::GetCapabilitiesResponse* response) {
             grpc::Status authorized = Authorize(context, access_);
             if (authorized.ok()) FillCapabilities(response);
             return authorized;
           });
    Submit<CreateCall>(poller, &service_, &AsyncDecode::RequestCreateSequences,
                       rpc_, access_);
    Submit<StepCall>(poller, &service_, &AsyncDecode::RequestStep, rpc_,
                     access_);
    Submit<ForkCall>(poller, &service_, &AsyncDecode::RequestForkSequences,
                     rpc_, access_);
    Submit<ReleaseCall>(poller, &service_,
                        &AsyncDecode::RequestReleaseSequences, rpc_, access_);
    (new StepStreamCall(poller, &service_, rpc_, access_))->Wait();
    (new GenerateStream(poller, &service_, rpc_, access_))->Wait();
  }

 private:
  void FillCapabilities(v1::GetCapabilitiesResponse* response) const;

  const RpcContext rpc_;
  const Access access_;
  AsyncDecode service_;
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

class ControlService final : public RpcService {
 public:
  explicit ControlService(const RpcContext& rpc)
      : rpc_(rpc), access_{rpc.control_tokens, rpc.decode_tokens} {}

  grpc::Service* service() override { return &service_; }

  void Start(Poller* poller) override {
    using Context = grpc::ServerContext;
    Answer(poller, &service_, &AsyncControl::RequestGetLoad,
           [this](const Context& context, const v1::GetLoadRequest&,
                  v1::Load* response) {
             return IfAuthorized(context,
                                 [&] { rpc_.loop->FillLoad(response); });
           });
    Answer(poller, &service_, &AsyncControl::RequestDrain,
           [this](const Context& context, const v1::DrainRequest& request,
                  v1::DrainResponse* response) {
             return IfAuthorized(context, [&] {
               rpc_.drain->BeginDrain(
                   request.has_grace_ms()
                       ? std::chrono::milliseconds(request.grace_ms())
                       : rpc_.drain->default_grace());
               rpc_.loop->FillLoad(response->mutable_load());
             });
           });
    Answer(poller, &service_, &AsyncControl::RequestResume,
           [this](const Context& context, const v1::ResumeRequest&,
                  v1::ResumeResponse* response) {
             return IfAuthorized(context, [&] {
               rpc_.drain->EndDrain();
               rpc_.loop->FillLoad(response->mutable_load());
             });
           });
    Answer(poller, &service_, &AsyncControl::RequestGetStats,
           [this](const Context& context, const v1::GetStatsRequest&,
                  v1::GetStatsResponse* response) {
             return IfAuthorized(context, [&] { FillStats(response); });
           });
    Submit<AbortCall>(poller, &service_, &AsyncControl::RequestAbort, rpc_,
                      access_);
  }

 private:
  template <class Function>
  grpc::Status IfAuthorized(const grpc::ServerContext& context,
                            Function function) const {
    grpc::Status authorized = Authorize(context, access_);
    if (authorized.ok()) function();
    return authorized;
  }

  void FillStats(v1::GetStatsResponse* response) const;

  const RpcContext rpc_;
  const Access access_;
  AsyncControl service_;
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
    grpc::ServerContext* context) {
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

std::unique_ptr<RpcService> MakeDecodeService(const RpcContext& context) {
  return std::make_unique<DecodeService>(context);
}

std::unique_ptr<RpcService> MakeControlService(const RpcContext& context) {
  return std::make_unique<ControlService>(context);
}

}  // namespace tenon::service
