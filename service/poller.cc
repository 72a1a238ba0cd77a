#include "service/poller.h"

#include <grpcpp/grpcpp.h>
#include <pthread.h>

#include <utility>

namespace tenon::service {

Poller::Poller(std::unique_ptr<grpc::ServerCompletionQueue> queue)
    : queue_(std::move(queue)) {}

void Poller::Start() {
  first_ = std::thread(&Poller::Poll, this);
  second_ = std::thread(&Poller::StandBy, this);
  pthread_setname_np(first_.native_handle(), "tenon-poll");
  pthread_setname_np(second_.native_handle(), "tenon-standby");
}

Poller::~Poller() {
  {
    // Nothing may be asked of a queue that shuts down.
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return num_calls_ == 0; });
    stopping_ = true;
  }
  wake_.notify_all();
  queue_->Shutdown();
  if (!first_.joinable()) return;
  first_.join();
  second_.join();
}

void Poller::RemoveCall() {
  if (num_calls_.fetch_sub(1) != 1) return;
  std::lock_guard<std::mutex> lock(mutex_);
  wake_.notify_all();
}

void Poller::StandIn() {
  if (std::this_thread::get_id() != first_.get_id()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_busy_ = true;
  }
  wake_.notify_all();
}

bool Poller::HandleNext() {
  void* tag = nullptr;
  bool ok = false;
  if (!queue_->Next(&tag, &ok)) return false;
  static_cast<Event*>(tag)->Happened(ok);
  return true;
}

void Poller::Poll() {
  while (HandleNext()) {
    is_busy_.store(false, std::memory_order_relaxed);
  }
}

void Poller::StandBy() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return is_busy_ || stopping_; });
    if (stopping_) return;
    lock.unlock();
    while (is_busy_ && HandleNext()) {
    }
    lock.lock();
  }
}

}  // namespace tenon::service
