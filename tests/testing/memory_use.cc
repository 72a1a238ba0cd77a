#include "tests/testing/memory_use.h"

#include <unistd.h>

#include <fstream>

#include "ops/core/build_config.h"

namespace tenon::testing {

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0;
  int64_t resident = 0;
  if (!(file >> total >> resident)) return -1;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t UsedDeviceBytes(Device device) {
  if constexpr (kCudaBuilt) {
    if (device.type == DeviceType::kCuda) return UsedCudaBytes(device);
  }
  return 0;
}

}  // namespace tenon::testing
