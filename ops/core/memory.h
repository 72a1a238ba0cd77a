#ifndef TENON_OPS_CORE_MEMORY_H_
#define TENON_OPS_CORE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

// Memory for the engine, tests and tools. Ops use none of this: they work in
// memory that the caller gives them.

namespace tenon {

enum class MemoryKind {
  kDevice,  // of the device it was asked for
  kPinned,  // host memory that the CUDA device copies from and to by itself
};

// Of host memory that is copied from and to the device.
constexpr MemoryKind HostMemoryKind(Device device) {
  return device.type == DeviceType::kCuda ? MemoryKind::kPinned
                                          : MemoryKind::kDevice;
}

// Owns one allocation, aligned to 256 bytes; its contents start undefined.
class Buffer {
 public:
  Buffer() = default;
  // ResourceExhausted where there is not that much memory.
  static StatusOr<Buffer> Allocate(Device device, size_t bytes,
                                   MemoryKind kind = MemoryKind::kDevice);
  ~Buffer() { Free(); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(device_, other.device_);
    std::swap(kind_, other.kind_);
    return *this;
  }

  void* data() const { return data_; }
  size_t size() const { return size_; }
  Device device() const { return device_; }

 private:
  void Free();

  void* data_ = nullptr;
  size_t size_ = 0;
  Device device_;
  MemoryKind kind_ = MemoryKind::kDevice;
};

// Copies between any two of host and device memory, in stream order when either
// is on a CUDA device (a host side that is not pinned may make the call wait).
Status CopyMemory(void* to, Device to_device, const void* from,
                  Device from_device, size_t bytes, Stream stream);

// Copies between the device's memory and pinned host memory (of
// HostMemoryKind), in stream order. Few bytes are copied by a kernel: the copy
// engine takes longer to be handed the stream and to hand it back.
Status CopyPinned(void* to, const void* from, Device device, size_t bytes,
                  Stream stream);

// The same for the first `words` 32-bit words of rows that are `stride` words
// apart on both sides; always by a kernel.
Status CopyPinnedRows(void* to, const void* from, Device device, int64_t rows,
                      int64_t words, int64_t stride, Stream stream);

// Sets `bytes` bytes, in stream order on a CUDA device.
Status FillMemory(void* data, Device device, int byte, size_t bytes,
                  Stream stream);

// Waits for all that was enqueued on the stream.
Status Synchronize(Device device, Stream stream);

// A stream for the device: a new cudaStream_t, or on the CPU a thread pool.
class OwnedStream {
 public:
  OwnedStream() = default;
  // num_threads as for CpuThreadPool; ignored on CUDA.
  static StatusOr<OwnedStream> Create(Device device, int num_threads = 0);
  ~OwnedStream();
  OwnedStream(OwnedStream&& other) noexcept { *this = std::move(other); }
  OwnedStream& operator=(OwnedStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    std::swap(device_, other.device_);
    return *this;
  }
  Stream get() const { return stream_; }

 private:
  Stream stream_;
  Device device_;
};

}  // namespace tenon

#endif  // TENON_OPS_CORE_MEMORY_H_
