#include "ops/core/core_cuda.cuh"
#include "tests/testing/cuda_graph.h"

namespace tenon::testing {

Status RunAsCudaGraph(Stream stream, int replays,
                      const std::function<Status()>& body) {
  const cudaStream_t native = cuda::Native(stream);
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaStreamBeginCapture(native, cudaStreamCaptureModeGlobal), "capture"));
  const Status status = body();
  cudaGraph_t graph = nullptr;
  const cudaError_t end = cudaStreamEndCapture(native, &graph);
  TENON_RETURN_IF_ERROR(status);
  TENON_RETURN_IF_ERROR(cuda::ToStatus(end, "end of capture"));
  cudaGraphExec_t exec = nullptr;
  cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
  for (int i = 0; i < replays && error == cudaSuccess; ++i) {
    error = cudaGraphLaunch(exec, native);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(native);
  if (exec != nullptr) cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return cuda::ToStatus(error, "graph");
}

}  // namespace tenon::testing
