#ifndef TENON_SERVICE_RPC_CALL_H_
#define TENON_SERVICE_RPC_CALL_H_

// Calls by gRPC's asynchronous API. A call is made before there is a client for
// it, as what gRPC's next call of its method goes to; it makes the one after it
// when it begins, and deletes itself at its end.

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <type_traits>
#include <utility>

#include "service/poller.h"

namespace tenon::service {

// What all calls have. Each asks for OnArrival once; of those that began, both
// the status's Finish and gRPC's "done" come back, in any order, and perhaps to
// another thread before Begin has returned, or is called.
class RpcCall {
 public:
  explicit RpcCall(Poller* poller) : poller_(poller) {
    poller_->AddCall();
    context_.AsyncNotifyWhenDone(static_cast<Event*>(&done_));
  }
  virtual ~RpcCall() { poller_->RemoveCall(); }
  RpcCall(const RpcCall&) = delete;
  RpcCall& operator=(const RpcCall&) = delete;

  // For a client. Another thread may see it come before this returns: nothing
  // is done with a new call after it.
  virtual void Wait() = 0;

 protected:
  // Makes the call that waits for the next client.
  virtual void Renew() = 0;
  virtual void Begin() = 0;
  // Nobody waits for the answer any more.
  virtual void Cancel() {}

  Poller* poller() const { return poller_; }
  grpc::ServerContext* context() { return &context_; }
  void* arrival_tag() { return static_cast<Event*>(&arrival_); }
  void* finish_tag() { return static_cast<Event*>(&finish_); }

 private:
  void OnArrival(bool ok) {
    if (!ok) return delete this;  // the server shuts down; no "done" comes
    Renew();
    Begin();
    End();
  }
  void OnDone(bool) {
    if (context_.IsCancelled()) Cancel();
    End();
  }
  void OnFinish(bool) { End(); }
  void End() {
    if (left_.fetch_sub(1) == 1) delete this;
  }

  Poller* const poller_;
  grpc::ServerContext context_;
  std::atomic<int> left_{3};  // of Begin, Finish and "done"
  EventOf<RpcCall, &RpcCall::OnArrival> arrival_{this};
  EventOf<RpcCall, &RpcCall::OnDone> done_{this};
  EventOf<RpcCall, &RpcCall::OnFinish> finish_{this};
};

// How gRPC is asked for the next call of a method: a generated service's
// Request... function.
template <class Service, class Request, class Response>
using UnaryAccept = void (Service::*)(
    grpc::ServerContext*, Request*, grpc::ServerAsyncResponseWriter<Response>*,
    grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*);

// One request and one response.
template <class Service, class Request, class Response>
class UnaryCall : public RpcCall {
 public:
  UnaryCall(Poller* poller, Service* service,
            UnaryAccept<Service, Request, Response> accept)
      : RpcCall(poller),
        service_(service),
        accept_(accept),
        writer_(context()) {}

  void Wait() final {
    (service_->*accept_)(context(), &request_, &writer_, poller()->queue(),
                         poller()->queue(), arrival_tag());
  }

 protected:
  // The last use of this object.
  void FinishWith(const grpc::Status& status) {
    writer_.Finish(response_, status, finish_tag());
  }

  Service* const service_;
  const UnaryAccept<Service, Request, Response> accept_;
  Request request_;
  Response response_;

 private:
  grpc::ServerAsyncResponseWriter<Response> writer_;
};

template <class Request, class Response>
using UnaryHandler = std::function<grpc::Status(const grpc::ServerContext&,
                                                const Request&, Response*)>;

// One that is answered at once.
template <class Service, class Request, class Response>
class DirectCall final : public UnaryCall<Service, Request, Response> {
 public:
  DirectCall(Poller* poller, Service* service,
             UnaryAccept<Service, Request, Response> accept,
             UnaryHandler<Request, Response> handler)
      : UnaryCall<Service, Request, Response>(poller, service, accept),
        handler_(std::move(handler)) {}

 private:
  void Renew() override {
    (new DirectCall(this->poller(), this->service_, this->accept_, handler_))
        ->Wait();
  }
  void Begin() override {
    this->FinishWith(
        handler_(*this->context(), this->request_, &this->response_));
  }

  const UnaryHandler<Request, Response> handler_;
};

// Answers the calls of a method by a function.
template <class Service, class Request, class Response>
void Answer(Poller* poller, std::common_type_t<Service>* service,
            UnaryAccept<Service, Request, Response> accept,
            std::common_type_t<UnaryHandler<Request, Response>> handler) {
  (new DirectCall<Service, Request, Response>(poller, service, accept,
                                              std::move(handler)))
      ->Wait();
}

}  // namespace tenon::service

#endif  // TENON_SERVICE_RPC_CALL_H_
