#ifndef TENON_TESTS_FUZZ_CHECK_H_
#define TENON_TESTS_FUZZ_CHECK_H_

#include <cstdint>
#include <string>

namespace tenon::fuzz {

// Ends the process in a way that the fuzzer reports, with its input.
[[noreturn]] void Fail(const std::string& what);

// A fuzzer that is given --min_mutated=N fails at its end when it made fewer
// than N mutated calls.
struct Counters {
  int64_t calls = 0;     // of functions under test
  int64_t mutated = 0;   // of these, with at least one hostile argument
  int64_t rejected = 0;  // of these, that returned an error
};
Counters& counters();

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_CHECK_H_
