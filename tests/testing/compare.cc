#include "tests/testing/compare.h"

#include <cmath>
#include <cstdlib>
#include <limits>

namespace tenon::testing {
namespace {

// Maps the bits of a float dtype to integers in the order of the values.
int64_t Ordinal(DType dtype, double value) {
  uint32_t bits = 0;
  int width = 32;
  switch (dtype) {
    case DType::kFloat16:
      bits = FromFloat<Float16>(static_cast<float>(value)).bits;
      width = 16;
      break;
    case DType::kBFloat16:
      bits = FromFloat<BFloat16>(static_cast<float>(value)).bits;
      width = 16;
      break;
    case DType::kFloat8E4M3:
      bits = FromFloat<Float8E4M3>(static_cast<float>(value)).bits;
      width = 8;
      break;
    default:
      bits = FloatBits(static_cast<float>(value));
      break;
  }
  const int64_t sign = int64_t{1} << (width - 1);
  const int64_t magnitude = bits & (sign - 1);
  return (bits & sign) != 0 ? -magnitude : magnitude;
}

}  // namespace

// Through float: double rounding can only matter for a value within 2^-29 of a
// tie, and the comparisons allow for an ulp.
double RoundTo(DType dtype, double value) {
  const float f = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat16:
      return ToFloat(FromFloat<Float16>(f));
    case DType::kBFloat16:
      return ToFloat(FromFloat<BFloat16>(f));
    case DType::kFloat8E4M3:
      return ToFloat(FromFloat<Float8E4M3>(f));
    default:
      return f;
  }
}

int64_t UlpDistance(DType dtype, double a, double b) {
  if (std::isnan(a) || std::isnan(b)) {
    return std::isnan(a) && std::isnan(b) ? 0
                                          : std::numeric_limits<int64_t>::max();
  }
  return std::llabs(Ordinal(dtype, a) - Ordinal(dtype, b));
}

::testing::AssertionResult IsClose(const std::vector<double>& actual,
                                   const std::vector<double>& expected,
                                   DType dtype, const Closeness& closeness) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, expected " << expected.size();
  }
  if (actual.empty()) return ::testing::AssertionSuccess();
  int64_t exact = 0;
  double signed_sum = 0.0;
  double absolute_sum = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const int64_t distance = UlpDistance(dtype, actual[i], expected[i]);
    const double difference = actual[i] - expected[i];
    if (distance > closeness.max_ulp &&
        !(std::fabs(difference) <= closeness.absolute)) {
      return ::testing::AssertionFailure()
             << "element " << i << " is " << actual[i] << ", expected "
             << expected[i] << " (" << distance << " ulp of "
             << DTypeName(dtype) << ")";
    }
    exact += distance == 0;
    if (std::isfinite(difference)) {
      // Relative to the sign of the value: truncation shrinks magnitudes.
      signed_sum += expected[i] < 0 ? -difference : difference;
      absolute_sum += std::fabs(difference);
    }
  }
  const double count = static_cast<double>(actual.size());
  if (static_cast<double>(exact) < closeness.min_exact * count) {
    return ::testing::AssertionFailure()
           << exact << " of " << actual.size() << " elements are bit-equal";
  }
  // For unbiased errors the signed sum is about 1/sqrt(n) of the absolute one,
  // and some percent where few distinct values are rounded; truncation makes
  // the two sums equal.
  if (closeness.check_bias && actual.size() >= 1000 &&
      std::fabs(signed_sum) > (0.1 + 8.0 / std::sqrt(count)) * absolute_sum) {
    return ::testing::AssertionFailure()
           << "mean signed error " << signed_sum / count
           << " is not near zero: mean absolute error " << absolute_sum / count;
  }
  return ::testing::AssertionSuccess();
}

double RelativeFrobeniusError(const std::vector<double>& actual,
                              const std::vector<double>& expected) {
  if (actual.size() != expected.size()) {
    return std::numeric_limits<double>::infinity();
  }
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm == 0.0 ? std::sqrt(error) : std::sqrt(error / norm);
}

}  // namespace tenon::testing
