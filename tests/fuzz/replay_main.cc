#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/check.h"

// Stands in for libFuzzer where there is none: replay [--random=N] FILE...
// Runs a fuzzer on each file (on each file in it, for a directory), and on N
// inputs of a generator with a fixed seed.

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

int num_inputs = 0;

void Run(const std::vector<uint8_t>& input) {
  LLVMFuzzerTestOneInput(input.data(), input.size());
  ++num_inputs;
}

void RunFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(1);
  }
  std::fprintf(stderr, "%s\n", path.c_str());
  Run(std::vector<uint8_t>(std::istreambuf_iterator<char>(file), {}));
}

void RunRandom(int count) {
  std::mt19937_64 generator(1);
  for (int i = 0; i < count; ++i) {
    std::vector<uint8_t> input(generator() % 64);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(generator());
    Run(input);
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr char kRandom[] = "--random=";
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], kRandom, sizeof(kRandom) - 1) == 0) {
      RunRandom(std::atoi(argv[i] + sizeof(kRandom) - 1));
    } else if (std::filesystem::is_directory(argv[i])) {
      for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
        RunFile(entry.path());
      }
    } else {
      RunFile(argv[i]);
    }
  }
  const tenon::fuzz::Counters& counters = tenon::fuzz::counters();
  std::printf("%d inputs passed, %lld calls, %lld mutated, %lld rejected\n",
              num_inputs, static_cast<long long>(counters.calls),
              static_cast<long long>(counters.mutated),
              static_cast<long long>(counters.rejected));
  return 0;
}
