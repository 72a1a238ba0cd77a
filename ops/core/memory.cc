#include "ops/core/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "ops/core/build_config.h"
#include "ops/core/core_backend.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kHugePage = size_t{2} << 20;

Status AllocateCpu(size_t bytes, void** data) {
  // Weights are streamed: huge pages save most of the address translation.
  const bool huge = bytes >= 4 * kHugePage;
  const size_t alignment = huge ? kHugePage : kAlignment;
  if (posix_memalign(data, alignment, bytes) != 0) {
    return ResourceExhaustedError("Buffer: no ", bytes, " bytes of CPU memory");
  }
  if (huge) madvise(*data, bytes, MADV_HUGEPAGE);
  return Status();
}

}  // namespace

StatusOr<Buffer> Buffer::Allocate(Device device, size_t bytes,
                                  MemoryKind kind) {
  Buffer buffer;
  buffer.device_ = device;
  buffer.kind_ = kind;
  if (bytes == 0) return buffer;
  void* data = nullptr;
  switch (device.type) {
    case DeviceType::kCpu:
      TENON_RETURN_IF_ERROR(AllocateCpu(bytes, &data));
      break;
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        TENON_RETURN_IF_ERROR(cuda::Allocate(device, kind, bytes, &data));
        break;
      }
      return NoBackendError("Buffer", device);
  }
  buffer.data_ = data;
  buffer.size_ = bytes;
  return buffer;
}

void Buffer::Free() {
  if (data_ == nullptr) return;
  if (device_.type == DeviceType::kCpu) {
    std::free(data_);
  } else if constexpr (kCudaBuilt) {
    cuda::Free(device_, kind_, data_);
  }
  data_ = nullptr;
}

Status CopyMemory(void* to, Device to_device, const void* from,
                  Device from_device, size_t bytes, Stream stream) {
  if (bytes == 0) return Status();
  const Device device =
      to_device.type == DeviceType::kCuda ? to_device : from_device;
  switch (device.type) {
    case DeviceType::kCpu:
      std::memcpy(to, from, bytes);
      return Status();
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        return cuda::Copy(device, to, from, bytes, stream);
      }
      break;
  }
  return NoBackendError("CopyMemory", device);
}

Status CopyPinned(void* to, const void* from, Device device, size_t bytes,
                  Stream stream) {
  if (bytes == 0) return Status();
  switch (device.type) {
    case DeviceType::kCpu:
      std::memcpy(to, from, bytes);
      return Status();
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        return cuda::CopyPinned(device, to, from, bytes, stream);
      }
      break;
  }
  return NoBackendError("CopyPinned", device);
}

Status CopyPinnedRows(void* to, const void* from, Device device, int64_t rows,
                      int64_t words, int64_t stride, Stream stream) {
  if (rows <= 0 || words <= 0) return Status();
  switch (device.type) {
    case DeviceType::kCpu:
      for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(static_cast<uint32_t*>(to) + row * stride,
                    static_cast<const uint32_t*>(from) + row * stride,
                    static_cast<size_t>(words) * sizeof(uint32_t));
      }
      return Status();
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        return cuda::CopyPinnedRows(device, to, from, rows, words, stride,
                                    stream);
      }
      break;
  }
  return NoBackendError("CopyPinnedRows", device);
}

Status FillMemory(void* data, Device device, int byte, size_t bytes,
                  Stream stream) {
  if (bytes == 0) return Status();
  switch (device.type) {
    case DeviceType::kCpu:
      std::memset(data, byte, bytes);
      return Status();
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        return cuda::Fill(device, data, byte, bytes, stream);
      }
      break;
  }
  return NoBackendError("FillMemory", device);
}

Status Synchronize(Device device, Stream stream) {
  switch (device.type) {
    case DeviceType::kCpu:
      return Status();
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return cuda::Synchronize(device, stream);
      break;
  }
  return NoBackendError("Synchronize", device);
}

StatusOr<OwnedStream> OwnedStream::Create(Device device, int num_threads) {
  OwnedStream owned;
  owned.device_ = device;
  switch (device.type) {
    case DeviceType::kCpu:
      owned.stream_.cpu = new CpuThreadPool(num_threads);
      return owned;
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        TENON_RETURN_IF_ERROR(cuda::CreateStream(device, &owned.stream_.cuda));
        return owned;
      }
      break;
  }
  return NoBackendError("OwnedStream", device);
}

OwnedStream::~OwnedStream() {
  delete stream_.cpu;
  if constexpr (kCudaBuilt) {
    if (stream_.cuda != nullptr) cuda::DestroyStream(device_, stream_.cuda);
  }
}

}  // namespace tenon
