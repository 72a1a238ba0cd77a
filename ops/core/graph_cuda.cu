#include <memory>
#include <type_traits>

#include "ops/core/core_backend.h"
#include "ops/core/core_cuda.cuh"

namespace tenon::cuda {
namespace {

constexpr char kGraph[] = "Graph";

struct DestroyCaptured {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
struct DestroyExecutable {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using Captured =
    std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyCaptured>;
using Executable =
    std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyExecutable>;

Captured TakeCaptured(Stream stream, cudaError_t* error) {
  cudaGraph_t graph = nullptr;
  *error = cudaStreamEndCapture(Native(stream), &graph);
  return Captured(graph);
}

Status Instantiate(cudaGraph_t graph, Stream stream, GraphInfo* info,
                   Executable* executable) {
  size_t nodes = 0;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaGraphGetNodes(graph, nullptr, &nodes), kGraph));
  size_t free_before = 0;
  size_t free_after = 0;
  size_t total = 0;
  TENON_RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_before, &total), kGraph));
  cudaGraphExec_t instance = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&instance, graph, 0);
  executable->reset(instance);
  TENON_RETURN_IF_ERROR(ToStatus(error, kGraph));
  // Now, rather than with the first launch.
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaGraphUpload(instance, Native(stream)), kGraph));
  TENON_RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free_after, &total), kGraph));
  info->num_nodes = static_cast<int64_t>(nodes);
  info->device_bytes = free_before > free_after
                           ? static_cast<int64_t>(free_before - free_after)
                           : 0;
  return Status();
}

}  // namespace

Status BeginCapture(Device device, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  // Other threads may go on allocating.
  return ToStatus(
      cudaStreamBeginCapture(Native(stream), cudaStreamCaptureModeThreadLocal),
      kGraph);
}

void AbandonCapture(Device device, Stream stream) {
  const DeviceGuard guard(device);
  cudaError_t error;
  TakeCaptured(stream, &error);
  (void)cudaGetLastError();  // the work's own error is the one to tell
}

Status EndCapture(Device device, Stream stream, GraphInfo* info, void** graph) {
  const DeviceGuard guard(device);
  cudaError_t error;
  const Captured captured = TakeCaptured(stream, &error);
  TENON_RETURN_IF_ERROR(ToStatus(error, kGraph));
  Executable executable;
  TENON_RETURN_IF_ERROR(Instantiate(captured.get(), stream, info, &executable));
  *graph = executable.release();
  return Status();
}

Status LaunchGraph(Device device, void* graph, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(
      cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), Native(stream)),
      kGraph);
}

void DestroyGraph(Device device, void* graph) {
  const DeviceGuard guard(device);
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

Status CreateEvent(Device device, void** event) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(
      cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event),
                               cudaEventDisableTiming),
      "Event");
}

Status RecordEvent(Device device, void* event, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(
      cudaEventRecord(static_cast<cudaEvent_t>(event), Native(stream)),
      "Event");
}

Status WaitForEvent(Device device, void* event) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(cudaEventSynchronize(static_cast<cudaEvent_t>(event)),
                  "Event");
}

void DestroyEvent(Device device, void* event) {
  const DeviceGuard guard(device);
  cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

}  // namespace tenon::cuda
