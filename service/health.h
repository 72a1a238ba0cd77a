#ifndef TENON_SERVICE_HEALTH_H_
#define TENON_SERVICE_HEALTH_H_

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "service/proto/grpc/health/v1/health.grpc.pb.h"
#include "service/rpc.h"

namespace tenon::service {

// grpc.health.v1. gRPC has one of its own, whose threads would wait for events
// beside the Poller's and so be woken by every call.
class HealthService final : public RpcService {
 public:
  HealthService();
  ~HealthService() override;

  grpc::Service* service() override { return &service_; }
  void Start(Poller* poller) override;

  void Set(const std::string& name, bool serving);

 private:
  class Watch;
  using Serving = grpc::health::v1::HealthCheckResponse::ServingStatus;

  // SERVICE_UNKNOWN for names that were never set. With the mutex.
  Serving StatusOf(const std::string& name) const;

  grpc::health::v1::Health::AsyncService service_;
  std::mutex mutex_;  // guards what follows, and every Watch
  std::map<std::string, Serving> status_;
  std::list<Watch*> watches_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_HEALTH_H_
