#include "tests/bench/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "ops/core/build_config.h"
#include "ops/core/device_info.h"
#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {
namespace {

[[noreturn]] void ExitUsage(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(2);
}

double Seconds() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

DType ParseDType(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                      DType::kFloat8E4M3}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  ExitUsage("--dtype: unknown dtype " + name);
}

std::vector<int64_t> ParseList(const std::string& flag,
                               const std::string& text) {
  std::vector<int64_t> values;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    char* rest = nullptr;
    const std::string item = text.substr(begin, end - begin);
    values.push_back(std::strtoll(item.c_str(), &rest, 10));
    if (item.empty() || *rest != '\0' || values.back() < 0) {
      ExitUsage(flag + ": not a list of counts: " + text);
    }
    begin = end + 1;
  }
  return values;
}

// Median seconds of ten calls, after one.
double TimeCalls(const std::function<void()>& call) {
  call();
  std::vector<double> seconds;
  for (int i = 0; i < 10; ++i) {
    const double begin = Seconds();
    call();
    seconds.push_back(Seconds() - begin);
  }
  return Median(seconds);
}

}  // namespace

void CheckOk(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message());
  std::exit(1);
}

Bench::Bench(int argc, char** argv, const std::string& name) : name_(name) {
  device_.type = NumCudaDevices() > 0 ? DeviceType::kCuda : DeviceType::kCpu;
  int threads = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--json") {
      json_ = true;
      continue;
    }
    if (i + 1 == argc) ExitUsage(flag + ": unknown flag or value missing");
    const std::string value = argv[++i];
    if (flag == "--device" && (value == "cpu" || value == "cuda")) {
      device_.type = value == "cpu" ? DeviceType::kCpu : DeviceType::kCuda;
    } else if (flag == "--dtype") {
      dtype_ = ParseDType(value);
    } else if (flag == "--shape") {
      shape_ = value;
    } else if (flag == "--tokens") {
      tokens_ = ParseList(flag, value);
    } else if (flag == "--threads") {
      threads = static_cast<int>(ParseList(flag, value)[0]);
    } else {
      ExitUsage(flag + " " + value +
                ": unknown; flags are --device cpu|cuda, --dtype NAME, "
                "--shape TEXT, --tokens N[,N], --threads N, --json");
    }
  }
  StatusOr<DeviceInfo> info = GetDeviceInfo(device_);
  if (!info.ok()) ExitUsage(info.status().message());
  device_name_ = info->name;
  cache_bytes_ = static_cast<double>(info->l2_bytes);
  StatusOr<OwnedStream> stream = OwnedStream::Create(device_, threads);
  CheckOk(stream.status());
  stream_ = *std::move(stream);
  MeasureCeilings();
  if (json_) return;
  std::printf("%s on %s", name_.c_str(), device_name_.c_str());
  std::printf("; measured read bandwidth %.1f GB/s, matrix rate %.2f TFLOP/s\n",
              ceilings_.read_gb_per_s, ceilings_.matmul_tflops);
  std::printf("%-24s %-22s %7s %-9s %11s %9s %6s %9s %6s\n", "op", "shape",
              "tokens", "dtype", "us", "GB/s", "%read", "TFLOP/s", "%mm");
}

bool Bench::Selected(const std::string& shape, int64_t tokens,
                     DType dtype) const {
  return shape.find(shape_) != std::string::npos &&
         (tokens_.empty() ||
          std::find(tokens_.begin(), tokens_.end(), tokens) != tokens_.end()) &&
         (dtype_ == DType::kInvalid || dtype_ == dtype);
}

int Bench::NumSets(double bytes) const {
  // A virtual machine may report a last-level cache that it has a slice of.
  const double cache = std::min(std::max(cache_bytes_, 32e6), 256e6);
  return static_cast<int>(
      std::clamp(2.0 * cache / std::max(bytes, 1.0) + 1.0, 2.0, 64.0));
}

void Bench::Run(const Case& what, int num_sets,
                const std::function<Status(int)>& call) {
  std::vector<double> seconds;
  if (device_.type == DeviceType::kCuda) {
    if constexpr (kCudaBuilt) {
      StatusOr<std::vector<double>> timed =
          TimeGraphCuda(device_, stream(), num_sets, 21, call);
      CheckOk(timed.status());
      for (double s : *timed) seconds.push_back(s / num_sets);
    }
  } else {
    for (int i = 0; i < std::min(num_sets, 4); ++i) CheckOk(call(i));
    const double begin = Seconds();
    for (int i = 0; i < 1000 && (i < 5 || Seconds() - begin < 0.5); ++i) {
      const double start = Seconds();
      CheckOk(call(i % num_sets));
      seconds.push_back(Seconds() - start);
    }
  }
  Add(what, Median(seconds) * 1e6);
}

void Bench::Add(const Case& what, double microseconds) {
  results_.push_back({what, microseconds});
  if (!json_) PrintRow(results_.back());
}

void Bench::MeasureCeilings() {
  const int64_t bytes = int64_t{device_.type == DeviceType::kCuda ? 4 : 1}
                        << 30;
  StatusOr<Buffer> data = Buffer::Allocate(device_, bytes);
  CheckOk(data.status());
  CheckOk(FillMemory(data->data(), device_, 0x5a, bytes, stream()));
  if (device_.type == DeviceType::kCpu) {
    const double read =
        TimeCalls([&] { ReadAllCpu(data->data(), bytes, stream()); });
    ceilings_.read_gb_per_s = static_cast<double>(bytes) / read * 1e-9;
    double flops = 0.0;
    const double fma =
        TimeCalls([&] { flops = MultiplyAddCpu(2000000, stream()); });
    ceilings_.matmul_tflops = flops / fma * 1e-12;
    return;
  }
  if constexpr (kCudaBuilt) {
    StatusOr<Buffer> result = Buffer::Allocate(device_, 256);
    CheckOk(result.status());
    StatusOr<std::vector<double>> read =
        TimeGraphCuda(device_, stream(), 1, 11, [&](int) {
          return ReadAllCuda(data->data(), bytes, result->data(), stream());
        });
    CheckOk(read.status());
    ceilings_.read_gb_per_s = static_cast<double>(bytes) / Median(*read) * 1e-9;

    constexpr int64_t kSize = 8192;
    const Buffer a = RandomBuffer(device_, DType::kBFloat16, kSize * kSize, 1);
    const Buffer b = RandomBuffer(device_, DType::kBFloat16, kSize * kSize, 2);
    const auto matrix = [&](const void* p) {
      return MakeTensor(p, DType::kBFloat16, device_, {kSize, kSize});
    };
    StatusOr<std::unique_ptr<CublasLt>> lt = CublasLt::Create(device_);
    CheckOk(lt.status());
    LinearParams p;
    p.x = matrix(a.data());
    p.weight = matrix(b.data());
    p.out = matrix(data->data());
    p.cublas_lt = lt->get();
    p.workspace_size = LinearWorkspaceBytes(p);
    StatusOr<Buffer> workspace = Buffer::Allocate(device_, p.workspace_size);
    CheckOk(workspace.status());
    p.workspace = workspace->data();
    StatusOr<std::vector<double>> matmul = TimeGraphCuda(
        device_, stream(), 1, 11, [&](int) { return Linear(p, stream()); });
    CheckOk(matmul.status());
    ceilings_.matmul_tflops =
        2.0 * kSize * kSize * kSize / Median(*matmul) * 1e-12;
  }
}

void Bench::PrintRow(const Measurement& m) const {
  const double gb_per_s = m.what.bytes / m.microseconds * 1e-3;
  const double tflops = m.what.flops / m.microseconds * 1e-6;
  std::printf("%-24s %-22s %7lld %-9s %11.2f %9.1f %5.1f%% %9.2f %5.1f%%\n",
              m.what.op.c_str(), m.what.shape.c_str(),
              static_cast<long long>(m.what.tokens), DTypeName(m.what.dtype),
              m.microseconds, gb_per_s,
              100.0 * gb_per_s / ceilings_.read_gb_per_s, tflops,
              100.0 * tflops / ceilings_.matmul_tflops);
  std::fflush(stdout);
}

void Bench::PrintJson() const {
  std::printf("{\"bench\": \"%s\", \"device\": \"%s\",\n", name_.c_str(),
              device_name_.c_str());
  std::printf(" \"read_gb_per_s\": %.1f, \"matmul_tflops\": %.3f,\n",
              ceilings_.read_gb_per_s, ceilings_.matmul_tflops);
  std::printf(" \"results\": [");
  const char* separator = "\n";
  for (const Measurement& m : results_) {
    std::printf(
        "%s  {\"op\": \"%s\", \"shape\": \"%s\", \"tokens\": %lld, "
        "\"dtype\": \"%s\", \"us\": %.3f, \"bytes\": %.0f, \"flops\": %.0f}",
        separator, m.what.op.c_str(), m.what.shape.c_str(),
        static_cast<long long>(m.what.tokens), DTypeName(m.what.dtype),
        m.microseconds, m.what.bytes, m.what.flops);
    separator = ",\n";
  }
  std::printf("\n ]}\n");
}

int Bench::Finish() {
  if (json_) PrintJson();
  return 0;
}

Buffer BufferOf(Device device, const void* data, size_t bytes) {
  StatusOr<Buffer> buffer = Buffer::Allocate(device, bytes);
  CheckOk(buffer.status());
  CheckOk(CopyMemory(buffer->data(), device, data, Device(), bytes, Stream()));
  CheckOk(Synchronize(device, Stream()));
  return *std::move(buffer);
}

Buffer RandomBuffer(Device device, DType dtype, int64_t count, uint64_t seed,
                    float stddev) {
  // One random block, repeated: drawing gigabytes would take longer than the
  // benchmark. Its odd length keeps rows from repeating each other.
  constexpr int64_t kBlock = (1 << 20) - 3;
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(0.0f, stddev);
  const size_t size = DTypeSize(dtype);
  std::vector<char> block(static_cast<size_t>(std::min(count, kBlock)) * size);
  for (size_t i = 0; i < block.size(); i += size) {
    const float value = normal(rng);
    if (dtype == DType::kFloat32) {
      std::memcpy(&block[i], &value, size);
    } else {
      const uint16_t bits = dtype == DType::kFloat16
                                ? FromFloat<Float16>(value).bits
                                : FromFloat<BFloat16>(value).bits;
      std::memcpy(&block[i], &bits, size);
    }
  }
  StatusOr<Buffer> buffer =
      Buffer::Allocate(device, static_cast<size_t>(count) * size);
  CheckOk(buffer.status());
  for (size_t at = 0; at < buffer->size(); at += block.size()) {
    CheckOk(CopyMemory(static_cast<char*>(buffer->data()) + at, device,
                       block.data(), Device(),
                       std::min(block.size(), buffer->size() - at), Stream()));
  }
  CheckOk(Synchronize(device, Stream()));
  return *std::move(buffer);
}

}  // namespace tenon::bench
