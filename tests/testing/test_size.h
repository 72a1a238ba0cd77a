#ifndef TENON_TESTS_TESTING_TEST_SIZE_H_
#define TENON_TESTS_TESTING_TEST_SIZE_H_

#include <cstddef>
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

// How much tests do, where an environment variable asks for more or for less
// than the usual. It never changes what they check.

namespace tenon::testing {

// TENON_LONG_TESTS=1: also what takes a GPU minutes.
inline bool LongTests() { return std::getenv("TENON_LONG_TESTS") != nullptr; }

// TENON_SMALL_TESTS=1: the smallest sizes that take the same kernels, and few
// of them. For tools that watch every access: kernels are 100 to 1000 times
// slower under compute-sanitizer's racecheck, and the usual tests do not end.
inline bool SmallTests() { return std::getenv("TENON_SMALL_TESTS") != nullptr; }

// TENON_TEST_WITHOUT_CUBLASLT=1: as where there is no cuBLASLt, whose kernels
// such tools report, or fail at.
inline bool TestsUseCublasLt() {
  return std::getenv("TENON_TEST_WITHOUT_CUBLASLT") == nullptr;
}

template <class T>
T SmallOr(std::common_type_t<T> small, T usual) {
  return SmallTests() ? small : usual;
}

// All of them, or in small tests `count`: the first, the last, and others
// evenly between (of one, the first).
template <class T>
std::vector<T> Fewer(std::vector<T> all, size_t count = 2) {
  if (!SmallTests() || all.size() <= count) return all;
  std::vector<T> fewer;
  for (size_t i = 0; i < count; ++i) {
    fewer.push_back(all[i * (all.size() - 1) / (count > 1 ? count - 1 : 1)]);
  }
  return fewer;
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_TEST_SIZE_H_
