#include "tests/bench/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "ops/core/build_config.h"
#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {
namespace {

constexpr int kHotCalls = 48;
constexpr int kMinCalls = 8;  // of a graph

double Median(const StatusOr<std::vector<double>>& values) {
  CheckOk(values.status());
  return bench::Median(*values);
}

// The shortest of call(0) to call(count - 1), in seconds. Other programs on the
// host should not lower a ceiling, so calls are short and the best one counts.
double BestSeconds(int count, const std::function<void(int)>& call) {
  double best = 0.0;
  for (int i = 0; i < count; ++i) {
    const double begin = Seconds();
    call(i);
    const double seconds = Seconds() - begin;
    best = i == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

}  // namespace

double Seconds() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void CheckOk(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message());
  std::exit(1);
}

Bench::Bench(int argc, char** argv, const std::string& name,
             const Options& options)
    : name_(name), options_(options) {
  if (NumCudaDevices() > 0) info_.device.type = DeviceType::kCuda;
  ParseFlags(argc, argv);
  const StatusOr<DeviceInfo> info = GetDeviceInfo(device());
  if (!info.ok()) {
    std::fprintf(stderr, "%s\n", info.status().message());
    std::exit(2);
  }
  info_ = *info;
  StatusOr<OwnedStream> stream = OwnedStream::Create(device(), num_threads_);
  CheckOk(stream.status());
  stream_ = *std::move(stream);
  if (cuda()) {
    MeasureCudaCeilings();
  } else {
    MeasureCpuCeilings();
  }
  if (!json_) PrintHeader();
}

Bench::~Bench() = default;

std::vector<testing::ModelShape> Bench::Shapes() const {
  std::vector<testing::ModelShape> shapes;
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    if (std::string(shape.name).find(shape_) == std::string::npos) continue;
    shapes.push_back(shape);
    if (!cuda() && shape_.empty()) break;
  }
  return shapes;
}

std::vector<DType> Bench::DTypes(std::initializer_list<DType> own) const {
  if (!dtypes_.empty()) return dtypes_;
  return own;
}

std::vector<int64_t> Bench::Tokens(
    std::initializer_list<int64_t> on_cuda,
    std::initializer_list<int64_t> on_cpu) const {
  if (!tokens_.empty()) return tokens_;
  return cuda() ? on_cuda : on_cpu;
}

int Bench::memory_bus_bits() const {
  if constexpr (kCudaBuilt) {
    if (cuda()) return MemoryBusBitsCuda(device());
  }
  return 0;
}

double Bench::CacheBytes() const {
  // A virtual machine may report a last-level cache that it has a slice of.
  return std::clamp(static_cast<double>(info_.l2_bytes), 32e6, 256e6);
}

int Bench::NumSets(double bytes) const {
  return static_cast<int>(
      std::clamp(2.0 * CacheBytes() / std::max(bytes, 1.0) + 1.0, 2.0, 64.0));
}

void Bench::Run(const Case& what, int num_sets,
                const std::function<Status(int)>& call) {
  if (!Wants(what.op)) return;
  Add(what, Time(what.bytes, num_sets, call));
}

double Bench::Time(double bytes, int num_sets,
                   const std::function<Status(int)>& call) {
  return 1e6 *
         (cuda() ? TimeCuda(bytes, num_sets, call) : TimeCpu(num_sets, call));
}

void Bench::Add(const Case& what, double microseconds) {
  const double copy = what.copy_bytes > 0.0 ? TimeCopy(what.copy_bytes) : 0.0;
  results_.push_back({what, microseconds, copy});
  if (!json_) PrintRow(results_.back());
}

// By reading, which leaves nothing to be written back later. Caches do not
// replace strictly by age, hence more than their size.
Status Bench::EmptyCache() {
  const int64_t bytes = static_cast<int64_t>(CacheBytes() * 3.0) / 4096 * 4096;
  constexpr int64_t kResultBytes = 256;
  if (cache_filler_.size() == 0) {
    StatusOr<Buffer> filler = Buffer::Allocate(device(), bytes + kResultBytes);
    TENON_RETURN_IF_ERROR(filler.status());
    cache_filler_ = *std::move(filler);
    TENON_RETURN_IF_ERROR(
        FillMemory(cache_filler_.data(), device(), 1, bytes, stream()));
  }
  char* data = static_cast<char*>(cache_filler_.data());
  if constexpr (kCudaBuilt) {
    if (cuda()) {
      return ReadAllCuda(data, bytes, data + bytes, device(), stream());
    }
  }
  ReadAllCpu(data, bytes, stream());
  return Status();
}

double Bench::TimeCpu(int num_sets, const std::function<Status(int)>& call) {
  if (hot_) num_sets = 1;
  for (int i = 0; i < 2; ++i) CheckOk(call(i % num_sets));
  std::vector<double> seconds;
  const double first = Seconds();
  for (int i = 0; i < 1000 && (i < 3 || Seconds() - first < 0.5); ++i) {
    if (!hot_ && i % num_sets == 0) CheckOk(EmptyCache());
    const double begin = Seconds();
    CheckOk(call(i % num_sets));
    seconds.push_back(Seconds() - begin);
  }
  return Median(seconds);
}

double Bench::TimeCuda(double bytes, int num_sets,
                       const std::function<Status(int)>& call) {
  if constexpr (kCudaBuilt) {
    if (hot_) {
      return Median(TimeGraphCuda(device(), stream(), kHotCalls, replays_,
                                  nullptr, [&](int) { return call(0); })) /
             kHotCalls;
    }
    // Several rounds of few sets, so that the edges of a graph do not count:
    // the events, and what is written to memory after the last one. Few sets
    // are large ones, so a round leaves nothing in the cache for the next.
    const bool short_calls = num_sets < kMinCalls && bytes < 1e9;
    const int calls =
        short_calls ? (kMinCalls / num_sets + 1) * num_sets : num_sets;
    return Median(TimeGraphCuda(
               device(), stream(), calls, replays_,
               [&] { return EmptyCache(); },
               [&](int i) { return call(i % num_sets); })) /
           calls;
  }
  return 0.0;
}

double Bench::Estimate(int num_sets, const std::function<Status(int)>& call) {
  if constexpr (kCudaBuilt) {
    if (cuda()) {
      return 1e6 / num_sets *
             Median(TimeGraphCuda(
                 device(), stream(), num_sets, 1, [&] { return EmptyCache(); },
                 call));
    }
  }
  CheckOk(EmptyCache());
  const double begin = Seconds();
  CheckOk(call(0));
  return 1e6 * (Seconds() - begin);
}

// From one place to another, with as many sets as a case of these bytes.
double Bench::TimeCopy(double bytes) {
  const auto known = copy_microseconds_.find(bytes);
  if (known != copy_microseconds_.end()) return known->second;
  constexpr int64_t kGranule = 256;
  const int64_t size =
      (static_cast<int64_t>(bytes / 2.0) + kGranule - 1) / kGranule * kGranule;
  const int sets = NumSets(bytes);
  Tensors tensors(device());
  std::vector<char*> data(static_cast<size_t>(sets));
  for (char*& d : data) {
    d = tensors.Random(DType::kBFloat16, {size}).As<char>();
  }
  return copy_microseconds_[bytes] = Time(bytes, sets, [&](int i) {
           if constexpr (kCudaBuilt) {
             if (cuda()) {
               return CopyAllCuda(
                   data[i], data[i] + size,
                   (static_cast<int64_t>(bytes / 2.0) + 15) / 16 * 16, device(),
                   stream());
             }
           }
           CopyAllCpu(data[i], data[i] + size, size, stream());
           return Status();
         });
}

void Bench::MeasureCpuCeilings() {
  // A slice is read again when all others have been.
  constexpr int kSlices = 32;
  constexpr int64_t kBytes = int64_t{32} << 20;
  Tensors tensors(device());
  char* data = static_cast<char*>(tensors.Bytes(kSlices * kBytes));
  CheckOk(FillMemory(data, device(), 0x5a, kSlices * kBytes, stream()));
  const double read = BestSeconds(4 * kSlices, [&](int i) {
    ReadAllCpu(data + i % kSlices * kBytes, kBytes, stream());
  });
  ceilings_.read_gb_per_s = kBytes / read * 1e-9;
  const double copy = BestSeconds(4 * kSlices, [&](int i) {
    char* slice = data + i % kSlices * kBytes;
    CopyAllCpu(slice, slice + kBytes / 2, kBytes / 2, stream());
  });
  ceilings_.copy_gb_per_s = kBytes / copy * 1e-9;
  double flops = 0.0;
  const double multiply_add =
      BestSeconds(100, [&](int) { flops = MultiplyAddCpu(200000, stream()); });
  ceilings_.matmul_tflops = flops / multiply_add * 1e-12;
}

void Bench::MeasureCudaCeilings() {
  if constexpr (kCudaBuilt) {
    constexpr int64_t kBytes = int64_t{4} << 30;
    constexpr int kReplays = 11;
    Tensors tensors(device());
    char* data = static_cast<char*>(tensors.Bytes(kBytes));
    void* result = tensors.Bytes(256);
    CheckOk(FillMemory(data, device(), 0x5a, kBytes, stream()));
    const auto time = [&](const std::function<Status()>& call) {
      return Median(TimeGraphCuda(device(), stream(), 1, kReplays, nullptr,
                                  [&](int) { return call(); }));
    };
    ceilings_.read_gb_per_s =
        kBytes * 1e-9 / time([&] {
          return ReadAllCuda(data, kBytes, result, device(), stream());
        });
    ceilings_.copy_gb_per_s =
        kBytes * 1e-9 / time([&] {
          return CopyAllCuda(data, data + kBytes / 2, kBytes / 2, device(),
                             stream());
        });

    MeasureCudaMatmuls(time);
  }
}

void Bench::MeasureCudaMatmuls(
    const std::function<double(const std::function<Status()>& call)>& time) {
  if constexpr (kCudaBuilt) {
    constexpr int64_t kSize = 8192;
    constexpr double kTera = 2e-12 * kSize * kSize * kSize;
    Tensors tensors(device());
    StatusOr<std::unique_ptr<CublasLt>> lt = CublasLt::Create(device());
    if (lt.ok()) {
      cublas_lt_ = *std::move(lt);
    } else {
      std::fprintf(stderr,
                   "the matrix rate is that of the built-in kernels: %s\n",
                   lt.status().message());
    }
    LinearParams p;
    p.x = tensors.Random(DType::kBFloat16, {kSize, kSize});
    p.weight = tensors.Random(DType::kBFloat16, {kSize, kSize});
    p.out = tensors.Zeros(DType::kBFloat16, {kSize, kSize});
    p.cublas_lt = cublas_lt();
    p.workspace_size = LinearWorkspaceBytes(p);
    p.workspace = tensors.Bytes(p.workspace_size);
    ceilings_.matmul_tflops = kTera / time([&] { return Linear(p, stream()); });

    if (!options_.fp8) return;
    StatusOr<std::unique_ptr<Fp8MatmulCuda>> fp8 =
        Fp8MatmulCuda::Create(kSize, device());
    if (!fp8.ok()) {
      std::fprintf(stderr, "no fp8 matrix rate: %s\n", fp8.status().message());
      return;
    }
    const TensorView x = tensors.Random(DType::kFloat8E4M3, {kSize, kSize});
    const TensorView w = tensors.Random(DType::kFloat8E4M3, {kSize, kSize});
    ceilings_.fp8_matmul_tflops =
        kTera /
        time([&] { return (*fp8)->Run(x.data, w.data, p.out.data, stream()); });
  }
}

int Bench::Finish() {
  if (json_) PrintJson();
  return 0;
}

}  // namespace tenon::bench
