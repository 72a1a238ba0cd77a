#include <cuda_runtime.h>

#include "tests/abi/faults.h"

// Where the linker's --wrap leads the library's calls of the CUDA runtime.

using tenon::testing::CountHeld;
using tenon::testing::FaultKind;
using tenon::testing::FaultStrikes;

namespace {

// A call that may fail, and takes `held` things when it does not.
template <class Call>
cudaError_t Try(cudaError_t error, int held, Call&& call) {
  if (FaultStrikes(FaultKind::kCuda)) return error;
  const cudaError_t result = call();
  if (result == cudaSuccess) CountHeld(FaultKind::kCuda, held);
  return result;
}

// One that gives something back, which also happens where it is said to fail.
template <class Call>
cudaError_t GiveBack(Call&& call) {
  const bool strikes = FaultStrikes(FaultKind::kCuda);
  const cudaError_t result = call();
  if (result == cudaSuccess) CountHeld(FaultKind::kCuda, -1);
  return strikes ? cudaErrorLaunchFailure : result;
}

}  // namespace

// Defines __wrap_<name>, which passes its parameters on.
#define TENON_WRAP(error, held, name, parameters, arguments)          \
  extern "C" cudaError_t CUDARTAPI __real_##name parameters;          \
  extern "C" cudaError_t CUDARTAPI __wrap_##name parameters {         \
    return Try(error, held, [&] { return __real_##name arguments; }); \
  }
#define TENON_WRAP_GIVE_BACK(name, parameters, arguments)     \
  extern "C" cudaError_t CUDARTAPI __real_##name parameters;  \
  extern "C" cudaError_t CUDARTAPI __wrap_##name parameters { \
    return GiveBack([&] { return __real_##name arguments; }); \
  }

TENON_WRAP(cudaErrorUnknown, 0, cudaDeviceGetAttribute,
           (int* value, cudaDeviceAttr attribute, int device),
           (value, attribute, device))
TENON_WRAP(cudaErrorUnknown, 0, cudaFuncGetAttributes,
           (cudaFuncAttributes * attributes, const void* function),
           (attributes, function))
TENON_WRAP(cudaErrorUnknown, 0, cudaFuncSetAttribute,
           (const void* function, cudaFuncAttribute attribute, int value),
           (function, attribute, value))
TENON_WRAP(cudaErrorUnknown, 0, cudaGetDevice, (int* device), (device))
TENON_WRAP(cudaErrorNoDevice, 0, cudaGetDeviceCount, (int* count), (count))
#if CUDART_VERSION >= 13000
TENON_WRAP(cudaErrorUnknown, 0, cudaGetDeviceProperties,
           (cudaDeviceProp * properties, int device), (properties, device))
#else
TENON_WRAP(cudaErrorUnknown, 0, cudaGetDeviceProperties_v2,
           (cudaDeviceProp * properties, int device), (properties, device))
#endif
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaLaunchKernelExC,
           (const cudaLaunchConfig_t* config, const void* function,
            void** arguments),
           (config, function, arguments))
TENON_WRAP(cudaErrorMemoryAllocation, 1, cudaMalloc,
           (void** memory, size_t size), (memory, size))
TENON_WRAP(cudaErrorMemoryAllocation, 1, cudaMallocHost,
           (void** memory, size_t size), (memory, size))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaMemcpyAsync,
           (void* to, const void* from, size_t size, cudaMemcpyKind kind,
            cudaStream_t stream),
           (to, from, size, kind, stream))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaMemsetAsync,
           (void* to, int value, size_t size, cudaStream_t stream),
           (to, value, size, stream))
TENON_WRAP(cudaErrorUnknown, 0, cudaOccupancyMaxActiveClusters,
           (int* count, const void* function, const cudaLaunchConfig_t* config),
           (count, function, config))
TENON_WRAP(cudaErrorUnknown, 0, cudaSetDevice, (int device), (device))
TENON_WRAP(cudaErrorMemoryAllocation, 1, cudaStreamCreateWithFlags,
           (cudaStream_t * stream, unsigned int flags), (stream, flags))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaStreamSynchronize,
           (cudaStream_t stream), (stream))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaStreamBeginCapture,
           (cudaStream_t stream, cudaStreamCaptureMode mode), (stream, mode))
TENON_WRAP(cudaErrorUnknown, 0, cudaGraphGetNodes,
           (cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count),
           (graph, nodes, count))
TENON_WRAP(cudaErrorMemoryAllocation, 1, cudaGraphInstantiate,
           (cudaGraphExec_t * executable, cudaGraph_t graph,
            unsigned long long flags),
           (executable, graph, flags))
TENON_WRAP(cudaErrorMemoryAllocation, 0, cudaGraphUpload,
           (cudaGraphExec_t executable, cudaStream_t stream),
           (executable, stream))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaGraphLaunch,
           (cudaGraphExec_t executable, cudaStream_t stream),
           (executable, stream))
TENON_WRAP(cudaErrorUnknown, 0, cudaMemGetInfo, (size_t * free, size_t* total),
           (free, total))
TENON_WRAP(cudaErrorMemoryAllocation, 1, cudaEventCreateWithFlags,
           (cudaEvent_t * event, unsigned int flags), (event, flags))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaEventRecord,
           (cudaEvent_t event, cudaStream_t stream), (event, stream))
TENON_WRAP(cudaErrorLaunchFailure, 0, cudaEventSynchronize, (cudaEvent_t event),
           (event))
TENON_WRAP_GIVE_BACK(cudaEventDestroy, (cudaEvent_t event), (event))
TENON_WRAP_GIVE_BACK(cudaGraphDestroy, (cudaGraph_t graph), (graph))
TENON_WRAP_GIVE_BACK(cudaGraphExecDestroy, (cudaGraphExec_t executable),
                     (executable))
TENON_WRAP_GIVE_BACK(cudaFree, (void* memory), (memory))
TENON_WRAP_GIVE_BACK(cudaFreeHost, (void* memory), (memory))
TENON_WRAP_GIVE_BACK(cudaStreamDestroy, (cudaStream_t stream), (stream))

// A stream that is told to stop recording stops, also where that fails; the
// graph is lost then.
extern "C" cudaError_t CUDARTAPI
__real_cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
extern "C" cudaError_t CUDARTAPI
__wrap_cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const bool strikes = FaultStrikes(FaultKind::kCuda);
  const cudaError_t result = __real_cudaStreamEndCapture(stream, graph);
  if (strikes) {
    if (*graph != nullptr) __real_cudaGraphDestroy(*graph);
    *graph = nullptr;
    return cudaErrorLaunchFailure;
  }
  if (*graph != nullptr) CountHeld(FaultKind::kCuda, 1);
  return result;
}
