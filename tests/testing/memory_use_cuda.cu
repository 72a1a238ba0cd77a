#include "ops/core/core_cuda.cuh"
#include "tests/testing/memory_use.h"

namespace tenon::testing {

int64_t UsedCudaBytes(Device device) {
  const cuda::DeviceGuard guard(device);
  size_t free = 0;
  size_t total = 0;
  if (!guard.status().ok() || cudaMemGetInfo(&free, &total) != cudaSuccess) {
    return -1;
  }
  return static_cast<int64_t>(total - free);
}

}  // namespace tenon::testing
