#ifndef TENON_TESTS_BENCH_BENCH_H_
#define TENON_TESTS_BENCH_BENCH_H_

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ops/core/device_info.h"
#include "ops/core/memory.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"
#include "tests/testing/shapes.h"

namespace tenon {
class CublasLt;
}  // namespace tenon

namespace tenon::bench {

// What a run of one case moves and computes, counted by hand from its shape:
// each input read once, each output written once. 0: not counted.
struct Case {
  std::string op;
  std::string shape;
  int64_t tokens = 0;
  DType dtype = DType::kInvalid;
  double bytes = 0.0;
  double flops = 0.0;
  std::string note{};
  double experts = 0.0;  // distinct ones that the tokens hit
  // Bytes that a copy in comparison reads and writes, timed in the same way.
  double copy_bytes = 0.0;
  int64_t launches = 0;  // kernels of a step
};

struct Measurement {
  Case what;
  double microseconds = 0.0;       // median of one call
  double copy_microseconds = 0.0;  // of a copy of what.copy_bytes
};

// The machine's own ceilings, measured in the same run.
struct Ceilings {
  double read_gb_per_s = 0.0;
  double copy_gb_per_s = 0.0;  // bytes read plus bytes written
  double matmul_tflops = 0.0;  // CPU: float32 fused multiply-adds; CUDA: an
                               // 8192^3 bfloat16 product by cuBLASLt
  // CUDA: the same in float8_e4m3 with one scale per tensor; 0: not measured.
  double fp8_matmul_tflops = 0.0;

  // 0 where none was measured.
  double MatmulTflops(DType dtype) const {
    return dtype == DType::kFloat8E4M3 ? fp8_matmul_tflops : matmul_tflops;
  }
  // Microseconds that the bytes take to read or the flops to compute,
  // whichever is more.
  double LimitMicroseconds(const Case& what) const;
};

// What distinguishes a program from others.
struct Options {
  bool experts = false;       // columns: distinct experts hit
  bool limit = false;         // the ceilings' least time, and its share of ours
  bool tokens_per_s = false;  // column
  bool copy = false;          // a copy of the same bytes, and our time over its
  bool fp8 = false;           // --dtype fp8 is one of its dtypes
  // Flags with a value beside the common ones, and where the value goes.
  std::vector<std::pair<std::string, std::string*>> flags{};
};

// One benchmark program: parses the flags, measures the ceilings, times cases,
// prints a table (or JSON). README.md tells how to read it.
//   --device cpu|cuda|N default: cuda where there is one; N: CUDA device N
//   --op TEXT           only ops whose name contains TEXT
//   --shape TEXT        only shapes whose name contains TEXT
//   --dtype NAME[,NAME] these dtypes instead of the program's own: fp32, fp16,
//                       bf16, where there is a meaning fp8
//   --tokens N[,N...]   these token counts instead of the program's own
//   --threads N         CPU threads; default: all
//   --replays N         CUDA: timed runs of a graph; default: 21
//   --hot               one set of inputs, left in the cache
//   --json              JSON instead of the table
class Bench {
 public:
  // Exits with code 2 and one line on a wrong flag or a missing device.
  Bench(int argc, char** argv, const std::string& name,
        const Options& options = Options());
  ~Bench();

  Device device() const { return info_.device; }
  const DeviceInfo& info() const { return info_; }
  bool cuda() const { return device().type == DeviceType::kCuda; }
  Stream stream() const { return stream_.get(); }
  int num_threads() const { return num_threads_; }  // CPU; 0: all
  const Ceilings& ceilings() const { return ceilings_; }
  CublasLt* cublas_lt() const { return cublas_lt_.get(); }  // may be null

  // What to run: the flag's values, or the program's own for the device. On the
  // CPU only the first model runs unless a flag asks for others.
  std::vector<testing::ModelShape> Shapes() const;
  std::vector<DType> DTypes(std::initializer_list<DType> own) const;
  std::vector<int64_t> Tokens(std::initializer_list<int64_t> on_cuda,
                              std::initializer_list<int64_t> on_cpu) const;

  // How many copies of inputs of `bytes` bytes to rotate through.
  int NumSets(double bytes) const;

  // Times call(set) for set = 0, 1, ..., num_sets - 1, 0, ...; on CUDA as one
  // graph of num_sets calls. The cache is emptied between rounds, so a call
  // finds only what its predecessors in the round share with it. Exits with
  // code 1 if a call fails.
  void Run(const Case& what, int num_sets,
           const std::function<Status(int set)>& call);

  // Microseconds of a call from one round of the sets, within some percent: to
  // tell what is not worth a measurement.
  double Estimate(int num_sets, const std::function<Status(int set)>& call);

  // How wide the memory bus of the device is; 0: unknown, or the CPU.
  int memory_bus_bits() const;

  // Whether --op leaves an op in; Run asks itself.
  bool Wants(const std::string& op) const {
    return op.find(op_) != std::string::npos;
  }

  // Adds a measurement made by the caller.
  void Add(const Case& what, double microseconds);

  const std::vector<Measurement>& measurements() const { return results_; }

  // Prints what is left to print; the exit code of the program.
  int Finish();

 private:
  void ParseFlags(int argc, char** argv);
  void MeasureCpuCeilings();
  void MeasureCudaCeilings();
  void MeasureCudaMatmuls(
      const std::function<double(const std::function<Status()>& call)>& time);
  double Time(double bytes, int num_sets,
              const std::function<Status(int)>& call);
  double TimeCopy(double bytes);
  double CacheBytes() const;
  Status EmptyCache();
  double TimeCpu(int num_sets, const std::function<Status(int)>& call);
  double TimeCuda(double bytes, int num_sets,
                  const std::function<Status(int)>& call);
  void ParseFlag(const std::string& flag, const std::string& value);
  void PrintHeader() const;
  void PrintRow(const Measurement& measurement) const;
  void PrintJson() const;

  std::string name_;
  Options options_;
  DeviceInfo info_;
  OwnedStream stream_;
  std::unique_ptr<CublasLt> cublas_lt_;
  Ceilings ceilings_;
  Buffer cache_filler_;
  std::vector<Measurement> results_;
  std::map<double, double> copy_microseconds_;  // by bytes

  // Flags.
  std::string op_;
  std::string shape_;
  std::vector<DType> dtypes_;
  std::vector<int64_t> tokens_;
  int num_threads_ = 0;
  int replays_ = 21;
  bool hot_ = false;
  bool json_ = false;
};

// Makes tensors on one device and keeps them alive. Exits with code 1 where
// there is no memory.
class Tensors {
 public:
  explicit Tensors(Device device) : device_(device) {}

  // Normal values scaled by `stddev`, other ones in each tensor.
  TensorView Random(DType dtype, std::initializer_list<int64_t> shape,
                    float stddev = 1.0f);
  TensorView Zeros(DType dtype, std::initializer_list<int64_t> shape);
  template <class T>
  TensorView Of(const std::vector<T>& values,
                std::initializer_list<int64_t> shape) {
    return MakeTensor(CopyOf(values), kDTypeOf<T>, device_, shape);
  }

  template <class T>
  T* CopyOf(const std::vector<T>& values) {
    return static_cast<T*>(Copy(values.data(), values.size() * sizeof(T)));
  }
  // Scratch memory.
  void* Bytes(size_t bytes);

 private:
  void* Copy(const void* data, size_t bytes);

  Device device_;
  int64_t num_random_ = 0;
  std::vector<Buffer> buffers_;
};

// The elements of a contiguous tensor on any device.
std::vector<int32_t> ReadInt32(const TensorView& tensor);

// Of a clock that only moves forward.
double Seconds();

double Median(std::vector<double> values);

// Prints the message and exits with code 1 unless OK.
void CheckOk(const Status& status);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_BENCH_H_
