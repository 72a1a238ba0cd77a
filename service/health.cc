#include "service/health.h"

#include <iterator>

#include "service/rpc_call.h"

namespace tenon::service {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using AsyncHealth = grpc::health::v1::Health::AsyncService;

// Of a service's name. A watch keeps it, and needs no token.
constexpr size_t kMaxName = 200;

}  // namespace

// Tells a client of every change, the last one if it is slow to read.
class HealthService::Watch final : public RpcCall {
 public:
  Watch(Poller* poller, HealthService* health)
      : RpcCall(poller), health_(health), stream_(context()) {}
  ~Watch() override {
    std::lock_guard<std::mutex> lock(health_->mutex_);
    if (is_listed_) health_->watches_.erase(self_);
  }

  void Wait() override {
    health_->service_.RequestWatch(context(), &request_, &stream_,
                                   poller()->queue(), poller()->queue(),
                                   arrival_tag());
  }

  // With the mutex, as all that follows.
  void Update() {
    if (is_busy_) return;
    const Serving now = health_->StatusOf(request_.service());
    if (is_over_) {
      is_busy_ = true;
      stream_.Finish(grpc::Status(grpc::StatusCode::CANCELLED, "cancelled"),
                     finish_tag());
    } else if (now != told_) {
      is_busy_ = true;
      told_ = now;
      HealthCheckResponse response;
      response.set_status(now);
      stream_.Write(response, static_cast<Event*>(&written_));
    }
  }

 private:
  void Renew() override { (new Watch(poller(), health_))->Wait(); }

  void Begin() override {
    std::lock_guard<std::mutex> lock(health_->mutex_);
    health_->watches_.push_back(this);
    self_ = std::prev(health_->watches_.end());
    is_listed_ = true;
    if (request_.service().size() <= kMaxName) return Update();
    if (is_busy_) return;
    is_busy_ = true;
    stream_.Finish(
        grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "name too long"),
        finish_tag());
  }

  void OnWritten(bool ok) {
    std::lock_guard<std::mutex> lock(health_->mutex_);
    is_busy_ = false;
    if (!ok) is_over_ = true;
    Update();
  }

  // Also where the server shuts down.
  void Cancel() override {
    std::lock_guard<std::mutex> lock(health_->mutex_);
    is_over_ = true;
    Update();
  }

  HealthService* const health_;
  HealthCheckRequest request_;
  grpc::ServerAsyncWriter<HealthCheckResponse> stream_;
  std::list<Watch*>::iterator self_;
  bool is_listed_ = false;
  bool is_busy_ = false;  // writing, or finished
  bool is_over_ = false;
  Serving told_ = HealthCheckResponse::UNKNOWN;
  EventOf<Watch, &Watch::OnWritten> written_{this};
};

HealthService::HealthService() = default;
HealthService::~HealthService() = default;

HealthService::Serving HealthService::StatusOf(const std::string& name) const {
  const auto found = status_.find(name);
  return found == status_.end() ? HealthCheckResponse::SERVICE_UNKNOWN
                                : found->second;
}

void HealthService::Start(Poller* poller) {
  Answer(poller, &service_, &AsyncHealth::RequestCheck,
         [this](const grpc::ServerContext&, const HealthCheckRequest& request,
                HealthCheckResponse* response) {
           std::lock_guard<std::mutex> lock(mutex_);
           const Serving status = StatusOf(request.service());
           if (status == HealthCheckResponse::SERVICE_UNKNOWN) {
             return grpc::Status(grpc::StatusCode::NOT_FOUND,
                                 "service name unknown");
           }
           response->set_status(status);
           return grpc::Status::OK;
         });
  (new Watch(poller, this))->Wait();
}

void HealthService::Set(const std::string& name, bool serving) {
  const Serving status =
      serving ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  std::lock_guard<std::mutex> lock(mutex_);
  Serving& current = status_[name];
  if (current == status) return;
  current = status;
  for (Watch* watch : watches_) watch->Update();
}

}  // namespace tenon::service
