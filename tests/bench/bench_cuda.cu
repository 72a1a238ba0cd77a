#include <algorithm>

#include "ops/core/core_cuda.cuh"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {
namespace {

constexpr int kThreads = 512;
constexpr int kReadersPerCore = 4;  // blocks
constexpr int kCopiesPerThread = 4;
constexpr int64_t kMaxFillBlocks = 4096;

__global__ void __launch_bounds__(kThreads, kReadersPerCore)
    ReadAllKernel(const uint4* data, int64_t count, unsigned* result) {
  uint4 sum = {0, 0, 0, 0};
  const int64_t stride = int64_t{gridDim.x} * kThreads;
#pragma unroll 8
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += stride) {
    const uint4 v = data[i];
    sum.x ^= v.x;
    sum.y ^= v.y;
    sum.z ^= v.z;
    sum.w ^= v.w;
  }
  // Practically never true, but the compiler cannot know: the loads stay.
  const unsigned all = sum.x ^ sum.y ^ sum.z ^ sum.w;
  if (all == 0x9e3779b9u) *result = all;
}

__global__ void CopyAllKernel(const uint4* __restrict__ from,
                              uint4* __restrict__ to, int64_t count) {
  const int64_t first =
      blockIdx.x * int64_t{kThreads * kCopiesPerThread} + threadIdx.x;
  uint4 v[kCopiesPerThread];
#pragma unroll
  for (int j = 0; j < kCopiesPerThread; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < count) v[j] = from[i];
  }
#pragma unroll
  for (int j = 0; j < kCopiesPerThread; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < count) to[i] = v[j];
  }
}

// Spreads the bits of a counter (splitmix64).
__device__ __forceinline__ uint64_t Hash(uint64_t v) {
  v += 0x9e3779b97f4a7c15u;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
  return v ^ (v >> 31);
}

template <class T>
__device__ __forceinline__ T Convert(float value) {
  if constexpr (sizeof(T) == 1) {
    return T(value);  // saturates
  } else {
    return cuda::FromFloat<T>(value);
  }
}

template <class T>
__global__ void FillNormalKernel(T* data, int64_t count, float stddev,
                                 uint64_t seed) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count;
       i += stride) {
    const uint64_t bits = Hash(Hash(seed) + i);
    const float radius = sqrtf(
        -2.0f * __logf((static_cast<uint32_t>(bits >> 32) + 0.5f) * kUnit));
    const float turn = 6.2831853f * kUnit * static_cast<uint32_t>(bits);
    data[i] = Convert<T>(stddev * radius * __cosf(turn));
  }
}

int Attribute(cudaDeviceAttr attribute, Device device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, device.index);
  return value;
}

// A graph captured from a stream, and two events to time it.
class TimedGraph {
 public:
  ~TimedGraph() {
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  Status Capture(cudaStream_t stream, const std::function<Status()>& calls) {
    TENON_RETURN_IF_ERROR(
        Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
              "cudaStreamBeginCapture"));
    const Status captured = calls();
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph_);
    TENON_RETURN_IF_ERROR(captured);
    TENON_RETURN_IF_ERROR(Check(ended, "cudaStreamEndCapture"));
    TENON_RETURN_IF_ERROR(
        Check(cudaGraphInstantiate(&exec_, graph_, 0), "cudaGraphInstantiate"));
    TENON_RETURN_IF_ERROR(Check(cudaEventCreate(&begin_), "cudaEventCreate"));
    return Check(cudaEventCreate(&end_), "cudaEventCreate");
  }

  Status Launch(cudaStream_t stream) {
    return Check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
  }

  StatusOr<double> Time(cudaStream_t stream) {
    TENON_RETURN_IF_ERROR(
        Check(cudaEventRecord(begin_, stream), "cudaEventRecord"));
    TENON_RETURN_IF_ERROR(Launch(stream));
    TENON_RETURN_IF_ERROR(
        Check(cudaEventRecord(end_, stream), "cudaEventRecord"));
    TENON_RETURN_IF_ERROR(Check(cudaEventSynchronize(end_), "benchmark graph"));
    float milliseconds = 0.0f;
    TENON_RETURN_IF_ERROR(
        Check(cudaEventElapsedTime(&milliseconds, begin_, end_),
              "cudaEventElapsedTime"));
    return milliseconds * 1e-3;
  }

 private:
  static Status Check(cudaError_t error, const char* what) {
    return cuda::ToStatus(error, what);
  }

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace

Status ReadAllCuda(const void* data, int64_t bytes, void* result, Device device,
                   Stream stream) {
  const cuda::DeviceGuard guard(device);
  const int blocks =
      kReadersPerCore * Attribute(cudaDevAttrMultiProcessorCount, device);
  return cuda::Launch("ReadAll", stream, dim3(blocks), dim3(kThreads), 0,
                      ReadAllKernel, static_cast<const uint4*>(data),
                      bytes / int64_t{sizeof(uint4)},
                      static_cast<unsigned*>(result));
}

Status CopyAllCuda(const void* from, void* to, int64_t bytes, Device device,
                   Stream stream) {
  const cuda::DeviceGuard guard(device);
  const int64_t count = bytes / int64_t{sizeof(uint4)};
  const int64_t blocks =
      cuda::CeilDiv(count, int64_t{kThreads * kCopiesPerThread});
  return cuda::Launch("CopyAll", stream, dim3(static_cast<unsigned>(blocks)),
                      dim3(kThreads), 0, CopyAllKernel,
                      static_cast<const uint4*>(from), static_cast<uint4*>(to),
                      count);
}

Status FillNormalCuda(void* data, DType dtype, int64_t count, float stddev,
                      uint64_t seed, Device device, Stream stream) {
  const cuda::DeviceGuard guard(device);
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks =
        std::min(cuda::CeilDiv(count, int64_t{kThreads}), kMaxFillBlocks);
    if (blocks == 0) return Status();
    return cuda::Launch("FillNormal", stream,
                        dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                        FillNormalKernel<T>, static_cast<T*>(data), count,
                        stddev, seed);
  };
  if (dtype == DType::kFloat8E4M3) return fill(__nv_fp8_e4m3());
  return cuda::WithFloatType(dtype, fill);
}

int ClockMhzCuda(Device device) {
  return Attribute(cudaDevAttrClockRate, device) / 1000;
}

int MemoryBusBitsCuda(Device device) {
  return Attribute(cudaDevAttrGlobalMemoryBusWidth, device);
}

StatusOr<std::vector<double>> TimeGraphCuda(
    Device device, Stream stream, int num_calls, int repeats,
    const std::function<Status()>& before,
    const std::function<Status(int)>& call) {
  const cuda::DeviceGuard guard(device);
  const cudaStream_t native = cuda::Native(stream);
  const auto all_calls = [&]() -> Status {
    for (int i = 0; i < num_calls; ++i) TENON_RETURN_IF_ERROR(call(i));
    return Status();
  };
  // Once outside the graph: modules load, the matrix library makes its plans.
  TENON_RETURN_IF_ERROR(all_calls());
  TENON_RETURN_IF_ERROR(Synchronize(device, stream));
  TimedGraph graph;
  TENON_RETURN_IF_ERROR(graph.Capture(native, all_calls));
  constexpr int kWarmup = 3;
  std::vector<double> seconds;
  for (int i = 0; i < kWarmup + repeats; ++i) {
    // Also keeps the device busy while the host enqueues the graph, whose
    // launch would otherwise be part of the time.
    TENON_RETURN_IF_ERROR(before ? before() : graph.Launch(native));
    const StatusOr<double> time = graph.Time(native);
    TENON_RETURN_IF_ERROR(time.status());
    if (i >= kWarmup) seconds.push_back(*time);
  }
  return seconds;
}

}  // namespace tenon::bench
