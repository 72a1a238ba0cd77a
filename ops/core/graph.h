#ifndef TENON_OPS_CORE_GRAPH_H_
#define TENON_OPS_CORE_GRAPH_H_

#include <cstdint>
#include <functional>
#include <utility>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

// Work of a CUDA stream recorded once and launched as a whole, and marks in a
// stream to wait for. Like memory.h for the engine, tests and tools: ops use
// none of this.

namespace tenon {

struct GraphInfo {
  int64_t num_nodes = 0;     // kernels, copies and fills
  int64_t device_bytes = 0;  // by which the device's free memory shrank
};

// A CUDA graph, ready to be launched. Owns nothing that its work uses.
class Graph {
 public:
  Graph() = default;
  // Calls enqueue(), whose work on `stream` is recorded instead of run: it must
  // not synchronise or allocate, and all that it launches has run once before.
  // A graph holds the arguments of that one call, pointers included.
  static StatusOr<Graph> Capture(Device device, Stream stream,
                                 const std::function<Status()>& enqueue);
  ~Graph();
  Graph(Graph&& other) noexcept { *this = std::move(other); }
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    std::swap(device_, other.device_);
    std::swap(info_, other.info_);
    return *this;
  }

  // Runs the work, in stream order.
  Status Launch(Stream stream) const;
  const GraphInfo& info() const { return info_; }

 private:
  void* graph_ = nullptr;
  Device device_;
  GraphInfo info_;
};

// A point in a stream that the host waits for. On the CPU, where work is done
// when it was enqueued, it does nothing.
class Event {
 public:
  Event() = default;
  static StatusOr<Event> Create(Device device);
  ~Event();
  Event(Event&& other) noexcept { *this = std::move(other); }
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    std::swap(device_, other.device_);
    return *this;
  }

  // Marks the end of all that was enqueued on the stream.
  Status Record(Stream stream);
  // Returns when the last mark is reached, with the device's error if there is
  // one.
  Status Wait() const;

 private:
  void* event_ = nullptr;
  Device device_;
};

}  // namespace tenon

#endif  // TENON_OPS_CORE_GRAPH_H_
