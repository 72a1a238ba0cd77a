#ifndef TENON_TESTS_TESTING_MEMORY_USE_H_
#define TENON_TESTS_TESTING_MEMORY_USE_H_

#include <cstdint>

#include "ops/core/tensor_view.h"

namespace tenon::testing {

// Of this process that lie in RAM; -1 where the system does not say.
int64_t ResidentBytes();

// Of a CUDA device, by all processes; 0 on the CPU. -1 after an error.
int64_t UsedDeviceBytes(Device device);
// Only linked in where kCudaBuilt.
int64_t UsedCudaBytes(Device device);

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_MEMORY_USE_H_
