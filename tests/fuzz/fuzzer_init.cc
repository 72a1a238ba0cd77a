#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/fuzz/check.h"

// Runs before libFuzzer's loop; libFuzzer itself skips arguments that begin
// with two dashes.

namespace {

long min_mutated = 0;

void ReportCounts() {
  const tenon::fuzz::Counters& counters = tenon::fuzz::counters();
  std::fprintf(stderr, "%lld calls, %lld mutated, %lld rejected\n",
               static_cast<long long>(counters.calls),
               static_cast<long long>(counters.mutated),
               static_cast<long long>(counters.rejected));
  if (counters.mutated >= min_mutated) return;
  std::fprintf(stderr, "expected at least %ld mutated calls\n", min_mutated);
  std::_Exit(1);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerInitialize(
    int* argc, char*** argv) {
  constexpr char kFlag[] = "--min_mutated=";
  for (int i = 1; i < *argc; ++i) {
    if (std::strncmp((*argv)[i], kFlag, sizeof(kFlag) - 1) == 0) {
      min_mutated = std::atol((*argv)[i] + sizeof(kFlag) - 1);
    }
  }
  std::atexit(ReportCounts);
  return 0;
}
