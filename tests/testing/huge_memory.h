#ifndef TENON_TESTS_TESTING_HUGE_MEMORY_H_
#define TENON_TESTS_TESTING_HUGE_MEMORY_H_

#include <sys/mman.h>

#include <utility>

#include "ops/core/memory.h"

namespace tenon::testing {

// Address space for tensors whose offsets exceed 2^31 elements. On the CPU only
// the pages that are touched take memory; on a CUDA device all of it does, so
// data() is null where there is not enough.
class HugeMemory {
 public:
  HugeMemory(Device device, size_t bytes) : bytes_(bytes) {
    if (device.type == DeviceType::kCuda) {
      StatusOr<Buffer> buffer = Buffer::Allocate(device, bytes);
      if (!buffer.ok()) return;
      buffer_ = *std::move(buffer);
      data_ = buffer_.data();
      return;
    }
    mapping_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ != MAP_FAILED) data_ = mapping_;
  }
  ~HugeMemory() {
    if (mapping_ != MAP_FAILED) munmap(mapping_, bytes_);
  }
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;

  void* data() const { return data_; }

 private:
  size_t bytes_ = 0;
  void* data_ = nullptr;
  void* mapping_ = MAP_FAILED;
  Buffer buffer_;
};

// Copies entry `index` of dimension 0 (contiguous within) between two views of
// the same shape and device.
inline Status CopyEntry(const TensorView& to, const TensorView& from,
                        int64_t index) {
  const size_t size = DTypeSize(to.dtype);
  const int64_t count = NumElements(to) / to.shape[0];
  return CopyMemory(Rows(to, index, 1).data, to.device,
                    Rows(from, index, 1).data, from.device,
                    static_cast<size_t>(count) * size, Stream());
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_HUGE_MEMORY_H_
