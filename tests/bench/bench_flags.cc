// The command line of a benchmark program.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "tests/bench/bench.h"

namespace tenon::bench {
namespace {

[[noreturn]] void ExitUsage(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(2);
}

Device ParseDevice(const std::string& value) {
  if (value == "cpu") return {DeviceType::kCpu, 0};
  if (value == "cuda") return {DeviceType::kCuda, 0};
  char* rest = nullptr;
  const long index = std::strtol(value.c_str(), &rest, 10);
  if (value.empty() || *rest != '\0' || index < 0 || index > 1023) {
    ExitUsage("--device: not cpu, cuda or the number of a CUDA device: " +
              value);
  }
  return {DeviceType::kCuda, static_cast<int32_t>(index)};
}

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> items;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    items.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

DType ParseDType(const std::string& name, bool fp8) {
  const std::pair<const char*, DType> short_names[] = {
      {"fp32", DType::kFloat32},
      {"fp16", DType::kFloat16},
      {"bf16", DType::kBFloat16},
      {"fp8", DType::kFloat8E4M3}};
  for (const auto& [short_name, dtype] : short_names) {
    if (dtype == DType::kFloat8E4M3 && !fp8) continue;
    if (name == short_name || name == DTypeName(dtype)) return dtype;
  }
  ExitUsage(std::string("--dtype: not fp32, fp16") +
            (fp8 ? ", bf16 or fp8: " : " or bf16: ") + name);
}

std::vector<int64_t> ParseList(const std::string& flag,
                               const std::string& text) {
  std::vector<int64_t> values;
  for (const std::string& item : Split(text)) {
    char* rest = nullptr;
    values.push_back(std::strtoll(item.c_str(), &rest, 10));
    if (item.empty() || *rest != '\0' || values.back() < 1) {
      ExitUsage(flag + ": not a list of counts: " + text);
    }
  }
  return values;
}

std::string Usage(const Options& options) {
  std::string names;
  for (const auto& [name, destination] : options.flags)
    names += name + " VALUE, ";
  return "flags (tests/bench/README.md): " + names +
         "--device cpu|cuda|N, --op TEXT, --shape TEXT, --dtype NAME[,NAME], "
         "--tokens N[,N], --threads N, --replays N, --hot, --json";
}

}  // namespace

void Bench::ParseFlags(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--help") {
      std::printf("%s\n", Usage(options_).c_str());
      std::exit(0);
    }
    if (flag == "--json" || flag == "--hot") {
      (flag == "--json" ? json_ : hot_) = true;
      continue;
    }
    if (i + 1 == argc) ExitUsage(flag + ": unknown flag or value missing");
    ParseFlag(flag, argv[++i]);
  }
}

void Bench::ParseFlag(const std::string& flag, const std::string& value) {
  for (const auto& [name, destination] : options_.flags) {
    if (flag != name) continue;
    *destination = value;
    return;
  }
  if (flag == "--device") {
    info_.device = ParseDevice(value);
  } else if (flag == "--op") {
    op_ = value;
  } else if (flag == "--shape") {
    shape_ = value;
  } else if (flag == "--dtype") {
    dtypes_.clear();
    for (const std::string& item : Split(value)) {
      dtypes_.push_back(ParseDType(item, options_.fp8));
    }
  } else if (flag == "--tokens") {
    tokens_ = ParseList(flag, value);
  } else if (flag == "--threads") {
    num_threads_ = static_cast<int>(ParseList(flag, value)[0]);
  } else if (flag == "--replays") {
    replays_ = static_cast<int>(ParseList(flag, value)[0]);
  } else {
    ExitUsage(flag + " " + value + ": unknown; " + Usage(options_));
  }
}

}  // namespace tenon::bench
