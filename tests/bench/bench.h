#ifndef TENON_TESTS_BENCH_BENCH_H_
#define TENON_TESTS_BENCH_BENCH_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ops/core/memory.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon::bench {

// What a run of one case moves and computes, counted by hand from its shape:
// each input read once, each output written once.
struct Case {
  std::string op;
  std::string shape;
  int64_t tokens = 0;
  DType dtype = DType::kInvalid;
  double bytes = 0.0;
  double flops = 0.0;
};

struct Measurement {
  Case what;
  double microseconds = 0.0;  // median of one call
};

// The machine's own ceilings, measured in the same run.
struct Ceilings {
  double read_gb_per_s = 0.0;
  double matmul_tflops = 0.0;  // CPU: float32 fused multiply-adds; CUDA: an
                               // 8192^3 bfloat16 product by cuBLASLt
};

// One benchmark program: parses the flags, measures the ceilings, times cases,
// prints a table (or JSON).
//   --device cpu|cuda   default: cuda where there is one
//   --dtype NAME        only this dtype
//   --shape TEXT        only shapes whose name contains TEXT
//   --tokens N[,N...]   only these token counts
//   --threads N         CPU threads; default: all
//   --json              JSON instead of the table
class Bench {
 public:
  // Exits with code 2 and one line on a wrong flag or a missing device.
  Bench(int argc, char** argv, const std::string& name);

  Device device() const { return device_; }
  Stream stream() const { return stream_.get(); }
  const Ceilings& ceilings() const { return ceilings_; }

  // Whether the flags select this case.
  bool Selected(const std::string& shape, int64_t tokens, DType dtype) const;

  // How many copies of inputs of `bytes` bytes to rotate through, so that a
  // call finds none of them in the last-level cache.
  int NumSets(double bytes) const;

  // Times call(set) for set = 0, 1, ..., num_sets - 1, 0, ...; on CUDA as one
  // graph of num_sets calls. Exits with code 1 if a call fails.
  void Run(const Case& what, int num_sets,
           const std::function<Status(int set)>& call);

  // Adds a measurement made by the caller.
  void Add(const Case& what, double microseconds);

  const std::vector<Measurement>& measurements() const { return results_; }

  // Prints what is left to print; the exit code of the program.
  int Finish();

 private:
  void MeasureCeilings();
  void PrintRow(const Measurement& measurement) const;
  void PrintJson() const;

  std::string name_;
  Device device_;
  std::string device_name_;
  OwnedStream stream_;
  Ceilings ceilings_;
  double cache_bytes_ = 0.0;
  bool json_ = false;
  DType dtype_ = DType::kInvalid;
  std::string shape_;
  std::vector<int64_t> tokens_;
  std::vector<Measurement> results_;
};

// A buffer of `count` normal values of the dtype (float32, float16, bfloat16),
// scaled by `stddev`. Exits with code 1 where there is no memory.
Buffer RandomBuffer(Device device, DType dtype, int64_t count, uint64_t seed,
                    float stddev = 1.0f);

// A buffer with these bytes.
Buffer BufferOf(Device device, const void* data, size_t bytes);

template <class T>
Buffer BufferOf(Device device, const std::vector<T>& values) {
  return BufferOf(device, values.data(), values.size() * sizeof(T));
}

// Prints the message and exits with code 1 unless OK.
void CheckOk(const Status& status);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_BENCH_H_
