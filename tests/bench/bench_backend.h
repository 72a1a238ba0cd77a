#ifndef TENON_TESTS_BENCH_BENCH_BACKEND_H_
#define TENON_TESTS_BENCH_BENCH_BACKEND_H_

#include <functional>
#include <vector>

#include "ops/core/memory.h"

// Private to tests/bench.

namespace tenon::bench {

// Seconds of each of `repeats` replays of one graph that holds all num_sets
// calls.
StatusOr<std::vector<double>> TimeGraphCuda(
    Device device, Stream stream, int num_sets, int repeats,
    const std::function<Status(int)>& call);

// Enqueues a kernel that reads `bytes` bytes and keeps their xor.
Status ReadAllCuda(const void* data, int64_t bytes, void* result,
                   Stream stream);

// The same on the CPU, on the stream's threads.
uint64_t ReadAllCpu(const void* data, int64_t bytes, Stream stream);

// Runs `iterations` rounds of independent vector multiply-adds on every thread
// of the stream; returns the floating-point operations done.
double MultiplyAddCpu(int64_t iterations, Stream stream);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_BENCH_BACKEND_H_
