#ifndef TENON_TESTS_TESTING_COMPARE_H_
#define TENON_TESTS_TESTING_COMPARE_H_

#include <gtest/gtest.h>

#include <vector>

#include "ops/core/dtype.h"

namespace tenon::testing {

// Rounds to the nearest value of the dtype, ties to even.
double RoundTo(DType dtype, double value);

// Distance in representable values of the dtype; large when exactly one of the
// two is NaN.
int64_t UlpDistance(DType dtype, double a, double b);

struct Closeness {
  int64_t max_ulp = 1;       // of the dtype, against the rounded reference
  double min_exact = 0.999;  // share of elements that must be bit-equal
  double absolute = 0.0;     // a difference up to this is always accepted
  bool check_bias = true;    // mean signed error must be near zero
};

// Whether `actual`, computed in `dtype`, is as close as asked to the fp64
// reference `expected`. The bias check catches truncation, which stays within
// one ulp everywhere and still shrinks every norm.
::testing::AssertionResult IsClose(const std::vector<double>& actual,
                                   const std::vector<double>& expected,
                                   DType dtype, const Closeness& closeness);

// ||actual - expected|| / ||expected||.
double RelativeFrobeniusError(const std::vector<double>& actual,
                              const std::vector<double>& expected);

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_COMPARE_H_
