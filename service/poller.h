#ifndef TENON_SERVICE_POLLER_H_
#define TENON_SERVICE_POLLER_H_

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace grpc {
class ServerCompletionQueue;
}  // namespace grpc

namespace tenon::service {

// What gRPC's completion queue hands back: something that was asked for has
// happened, or, not ok, will not happen any more.
class Event {
 public:
  virtual void Happened(bool ok) = 0;

 protected:
  ~Event() = default;
};

// An event that is a member function of its owner.
template <class Owner, void (Owner::*kHandler)(bool ok)>
class EventOf final : public Event {
 public:
  explicit EventOf(Owner* owner) : owner_(owner) {}
  void Happened(bool ok) override { (owner_->*kHandler)(ok); }

 private:
  Owner* const owner_;
};

// The threads that read from clients and handle what gRPC's completion queue
// has. It is one thread: what it reads, it handles, without waking another,
// which would cost more than all else about a call that is refused. A second
// one stands in while the first runs an engine step, and then until the next
// event that it gets: so two events of one call may be handled at once.
class Poller {
 public:
  explicit Poller(std::unique_ptr<grpc::ServerCompletionQueue> queue);
  // After the server's Shutdown. Waits for the last call to end.
  ~Poller();

  grpc::ServerCompletionQueue* queue() { return queue_.get(); }
  void Start();

  // The calling thread will not be back for a while.
  void StandIn();

  // Calls that events can be of.
  void AddCall() { num_calls_.fetch_add(1, std::memory_order_relaxed); }
  void RemoveCall();

 private:
  bool HandleNext();
  void Poll();
  void StandBy();

  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::atomic<int64_t> num_calls_{0};
  std::atomic<bool> is_busy_{false};  // the first thread; set with mutex_
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread first_;
  std::thread second_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_POLLER_H_
