#ifndef TENON_SERVICE_RPC_H_
#define TENON_SERVICE_RPC_H_

#include <chrono>
#include <list>
#include <memory>
#include <mutex>

#include "service/step_loop.h"
#include "service/tokens.h"
#include "service/validator.h"

namespace grpc {
class ServerContext;
class Service;
}  // namespace grpc

namespace tenon::service {

class Poller;

// Streams that are open, so that idle ones can be ended. Thread-safe.
class OpenStreams {
 public:
  struct Stream {
    grpc::ServerContext* context;
    std::atomic<Clock::rep> last_use;  // max while a step is under way
  };
  explicit OpenStreams(std::atomic<int32_t>* count) : count_(count) {}

  std::list<Stream>::iterator Add(grpc::ServerContext* context);
  void Remove(std::list<Stream>::iterator stream);
  void CancelIdle(std::chrono::milliseconds idle);

 private:
  std::atomic<int32_t>* count_;
  std::mutex mutex_;
  std::list<Stream> streams_;  // guarded by mutex_
};

// Drain and Resume as the Control service asks for them.
class DrainControl {
 public:
  virtual ~DrainControl() = default;
  virtual void BeginDrain(std::chrono::milliseconds grace) = 0;
  virtual void EndDrain() = 0;
  virtual std::chrono::milliseconds default_grace() const = 0;
};

// What the RPCs need; all of it outlives them.
struct RpcContext {
  StepLoop* loop = nullptr;
  const Validator* validator = nullptr;
  const Limits* limits = nullptr;
  const TokenFile* decode_tokens = nullptr;
  const TokenFile* control_tokens = nullptr;
  OpenStreams* streams = nullptr;
  DrainControl* drain = nullptr;
  Time start;
};

// A service and its calls.
class RpcService {
 public:
  virtual ~RpcService() = default;
  // To register.
  virtual grpc::Service* service() = 0;
  // Takes calls from now on; the server has started.
  virtual void Start(Poller* poller) = 0;
};

std::unique_ptr<RpcService> MakeDecodeService(const RpcContext& context);
std::unique_ptr<RpcService> MakeControlService(const RpcContext& context);

}  // namespace tenon::service

#endif  // TENON_SERVICE_RPC_H_
