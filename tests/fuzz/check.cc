#include "tests/fuzz/check.h"

#include <cstdio>
#include <cstdlib>

namespace tenon::fuzz {

void Fail(const std::string& what) {
  std::fprintf(stderr, "FUZZ FAILURE: %s\n", what.c_str());
  std::abort();
}

Counters& counters() {
  static Counters counters;
  return counters;
}

}  // namespace tenon::fuzz

// Read by AddressSanitizer, where there is one: too much memory is an error to
// report, as it is without it.
extern "C" __attribute__((visibility("default"))) const char*
__asan_default_options() {
  return "allocator_may_return_null=1";
}
