#include "ops/core/graph.h"

#include "ops/core/build_config.h"
#include "ops/core/core_backend.h"
#include "ops/core/validate.h"

namespace tenon {

StatusOr<Graph> Graph::Capture(Device device, Stream stream,
                               const std::function<Status()>& enqueue) {
  if (device.type == DeviceType::kCuda) {
    if constexpr (kCudaBuilt) {
      Graph graph;
      graph.device_ = device;
      TENON_RETURN_IF_ERROR(cuda::BeginCapture(device, stream));
      Status status;
      try {
        status = enqueue();
      } catch (...) {  // no memory for the message of an error
        cuda::AbandonCapture(device, stream);
        throw;
      }
      if (!status.ok()) {
        cuda::AbandonCapture(device, stream);
        return status;
      }
      TENON_RETURN_IF_ERROR(
          cuda::EndCapture(device, stream, &graph.info_, &graph.graph_));
      return graph;
    }
  }
  return NoBackendError("Graph", device);
}

Graph::~Graph() {
  if constexpr (kCudaBuilt) {
    if (graph_ != nullptr) cuda::DestroyGraph(device_, graph_);
  }
}

Status Graph::Launch(Stream stream) const {
  if constexpr (kCudaBuilt) {
    if (graph_ != nullptr) return cuda::LaunchGraph(device_, graph_, stream);
  }
  return NoBackendError("Graph", device_);
}

StatusOr<Event> Event::Create(Device device) {
  Event event;
  event.device_ = device;
  switch (device.type) {
    case DeviceType::kCpu:
      return event;
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        TENON_RETURN_IF_ERROR(cuda::CreateEvent(device, &event.event_));
        return event;
      }
      break;
  }
  return NoBackendError("Event", device);
}

Event::~Event() {
  if constexpr (kCudaBuilt) {
    if (event_ != nullptr) cuda::DestroyEvent(device_, event_);
  }
}

Status Event::Record(Stream stream) {
  if constexpr (kCudaBuilt) {
    if (event_ != nullptr) return cuda::RecordEvent(device_, event_, stream);
  }
  return Status();
}

Status Event::Wait() const {
  if constexpr (kCudaBuilt) {
    if (event_ != nullptr) return cuda::WaitForEvent(device_, event_);
  }
  return Status();
}

}  // namespace tenon
