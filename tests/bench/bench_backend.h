#ifndef TENON_TESTS_BENCH_BENCH_BACKEND_H_
#define TENON_TESTS_BENCH_BENCH_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "ops/core/dtype.h"
#include "ops/core/memory.h"

// Private to tests/bench.

namespace tenon::bench {

// Seconds of each of `repeats` replays of one graph that holds call(0) to
// call(num_calls - 1). `before` is enqueued ahead of each replay, outside the
// time; empty: the graph itself is.
StatusOr<std::vector<double>> TimeGraphCuda(
    Device device, Stream stream, int num_calls, int repeats,
    const std::function<Status()>& before,
    const std::function<Status(int)>& call);

// Enqueues a kernel that reads `bytes` bytes (a multiple of 16) and keeps their
// xor in the four bytes at `result`.
Status ReadAllCuda(const void* data, int64_t bytes, void* result, Device device,
                   Stream stream);

// Enqueues a kernel that copies `bytes` bytes (a multiple of 16), 16 at a time.
Status CopyAllCuda(const void* from, void* to, int64_t bytes, Device device,
                   Stream stream);

// Enqueues a kernel that fills `count` elements (float32, float16, bfloat16 or
// float8_e4m3) with normal values, other ones for each seed.
Status FillNormalCuda(void* data, DType dtype, int64_t count, float stddev,
                      uint64_t seed, Device device, Stream stream);

// An fp8 matrix product of cuBLASLt with one scale per tensor, its fastest:
// out [size, size] bfloat16 = x * weight^T, both [size, size] float8_e4m3.
class Fp8MatmulCuda {
 public:
  // Unavailable where there is no library or the device does not do it.
  static StatusOr<std::unique_ptr<Fp8MatmulCuda>> Create(int64_t size,
                                                         Device device);
  virtual ~Fp8MatmulCuda() = default;
  virtual Status Run(const void* x, const void* weight, void* out,
                     Stream stream) = 0;
};

// The highest clock of the device's multiprocessors; 0: unknown.
int ClockMhzCuda(Device device);

// Width of the device's memory bus; 0: unknown.
int MemoryBusBitsCuda(Device device);

// The same on the CPU, on the stream's threads; bytes a multiple of 256.
uint64_t ReadAllCpu(const void* data, int64_t bytes, Stream stream);
void CopyAllCpu(const void* from, void* to, int64_t bytes, Stream stream);

// Runs `iterations` rounds of independent vector multiply-adds on every thread
// of the stream; returns the floating-point operations done.
double MultiplyAddCpu(int64_t iterations, Stream stream);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_BENCH_BACKEND_H_
