#include "ops/core/core_backend.h"
#include "ops/core/core_cuda.cuh"

namespace tenon::cuda {
namespace {

constexpr int kCopyThreads = 256;
// Beyond this the copy engine's bandwidth outweighs its latency.
constexpr size_t kMaxKernelCopy = size_t{64} << 10;

// `from` may be the host's: read past the caches.
__global__ void __launch_bounds__(kCopyThreads)
    CopyKernel(void* to, const void* from, unsigned bytes) {
  WaitForPreviousKernels();
  const unsigned i = blockIdx.x * kCopyThreads + threadIdx.x;
  const unsigned chunks = bytes / sizeof(uint4);
  if (i < chunks) {
    static_cast<uint4*>(to)[i] = __ldcv(static_cast<const uint4*>(from) + i);
  } else if (i - chunks < bytes % sizeof(uint4)) {
    const unsigned at = bytes - 1 - (i - chunks);
    static_cast<char*>(to)[at] = __ldcv(static_cast<const char*>(from) + at);
  }
}

// A block for each row and each kCopyThreads words of it.
__global__ void __launch_bounds__(kCopyThreads)
    CopyRowsKernel(uint32_t* to, const uint32_t* from, int64_t words,
                   int64_t stride) {
  WaitForPreviousKernels();
  const int64_t word = int64_t{blockIdx.y} * kCopyThreads + threadIdx.x;
  if (word >= words) return;
  const int64_t at = blockIdx.x * stride + word;
  to[at] = __ldcv(from + at);
}

}  // namespace

int NumDevices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver is not the caller's error
    return 0;
  }
  return count;
}

Status GetInfo(Device device, DeviceInfo* info) {
  const int count = NumDevices();
  if (device.index < 0 || device.index >= count) {
    return UnavailableError("GetDeviceInfo: no CUDA device ", device.index,
                            ", this host has ", count);
  }
  cudaDeviceProp properties;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaGetDeviceProperties(&properties, device.index),
               "cudaGetDeviceProperties"));
  info->name = properties.name;
  info->num_cores = properties.multiProcessorCount;
  info->compute_capability = properties.major * 10 + properties.minor;
  info->l2_bytes = properties.l2CacheSize;
  info->total_memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return Status();
}

Status Allocate(Device device, MemoryKind kind, size_t bytes, void** data) {
  if (device.index < 0 || device.index >= NumDevices()) {
    return UnavailableError("Buffer: no CUDA device ", device.index);
  }
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  const cudaError_t error = kind == MemoryKind::kPinned
                                ? cudaMallocHost(data, bytes)
                                : cudaMalloc(data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // reported here, not to the caller's next check
    return ResourceExhaustedError(
        "Buffer: no ", bytes, " bytes of ",
        kind == MemoryKind::kPinned ? "pinned" : "CUDA", " memory");
  }
  return ToStatus(error, "Buffer");
}

void Free(Device device, MemoryKind kind, void* data) {
  const DeviceGuard guard(device);
  if (kind == MemoryKind::kPinned) {
    cudaFreeHost(data);
  } else {
    cudaFree(data);
  }
}

Status Copy(Device device, void* to, const void* from, size_t bytes,
            Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, Native(stream)),
      "CopyMemory");
}

Status CopyPinned(Device device, void* to, const void* from, size_t bytes,
                  Stream stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % sizeof(uint4) == 0 &&
                       reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0;
  if (!aligned || bytes > kMaxKernelCopy) {
    return Copy(device, to, from, bytes, stream);
  }
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  const auto count = static_cast<unsigned>(bytes);
  const unsigned threads = count / sizeof(uint4) + count % sizeof(uint4);
  return LaunchDependent("CopyPinned", stream,
                         dim3(CeilDiv(threads, unsigned{kCopyThreads})),
                         dim3(kCopyThreads), 0, CopyKernel, to, from, count);
}

Status CopyPinnedRows(Device device, void* to, const void* from, int64_t rows,
                      int64_t words, int64_t stride, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  const dim3 grid(static_cast<unsigned>(rows),
                  static_cast<unsigned>(CeilDiv(words, int64_t{kCopyThreads})));
  return LaunchDependent("CopyPinnedRows", stream, grid, dim3(kCopyThreads), 0,
                         CopyRowsKernel, static_cast<uint32_t*>(to),
                         static_cast<const uint32_t*>(from), words, stride);
}

Status Fill(Device device, void* data, int byte, size_t bytes, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(cudaMemsetAsync(data, byte, bytes, Native(stream)),
                  "FillMemory");
}

Status Synchronize(Device device, Stream stream) {
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(cudaStreamSynchronize(Native(stream)), "Synchronize");
}

Status CreateStream(Device device, void** stream) {
  if (device.index < 0 || device.index >= NumDevices()) {
    return UnavailableError("OwnedStream: no CUDA device ", device.index);
  }
  const DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  return ToStatus(
      cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream),
                                cudaStreamNonBlocking),
      "OwnedStream");
}

void DestroyStream(Device device, void* stream) {
  const DeviceGuard guard(device);
  cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

}  // namespace tenon::cuda
