#ifndef TENON_TESTS_OPS_LAUNCH_KERNEL_H_
#define TENON_TESTS_OPS_LAUNCH_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"

namespace tenon::testing {

// Launches a kernel with so much dynamic shared memory (a multiple of 4), and
// some static, all of which it writes and reads. Adds its bytes to *sum, on the
// device. Only linked in where kCudaBuilt.
Status LaunchWithShared(Stream stream, size_t bytes, int64_t* sum);

// How much of it a launch may have now.
StatusOr<size_t> SharedLimit();

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_LAUNCH_KERNEL_H_
