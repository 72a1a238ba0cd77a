#include "ops/core/dtype.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/testing/random.h"

namespace tenon {
namespace {

// A small float format, written down from its definition.
template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kBits = 16, kMantissa = 10, kBias = 15;
  static constexpr uint32_t kInfinity =
      0x7c00;  // codes from here on: not finite
  static constexpr bool kSaturates = false;
};
template <>
struct Format<BFloat16> {
  static constexpr int kBits = 16, kMantissa = 7, kBias = 127;
  static constexpr uint32_t kInfinity = 0x7f80;
  static constexpr bool kSaturates = false;
};
template <>
struct Format<Float8E4M3> {
  static constexpr int kBits = 8, kMantissa = 3, kBias = 7;
  static constexpr uint32_t kInfinity = 0x7f;  // the NaN: there is no infinity
  static constexpr bool kSaturates = true;
};

// The value of a non-negative code. kInfinity gives the power of two at which
// an unbounded format would go on: rounding to it means overflow.
template <class T>
double ValueOf(uint32_t code) {
  using F = Format<T>;
  const int exponent = static_cast<int>(code >> F::kMantissa);
  const int fraction = static_cast<int>(code & ((1u << F::kMantissa) - 1));
  if (exponent == 0) return std::ldexp(fraction, 1 - F::kBias - F::kMantissa);
  return std::ldexp(fraction + (1 << F::kMantissa),
                    exponent - F::kBias - F::kMantissa);
}

template <class T>
std::vector<double> Magnitudes() {
  std::vector<double> values;
  for (uint32_t code = 0; code <= Format<T>::kInfinity; ++code) {
    values.push_back(ValueOf<T>(code));
  }
  return values;
}

// Searches the nearest of `magnitudes`, ties to the even code.
template <class T>
uint32_t SlowFromFloat(const std::vector<double>& magnitudes, float value) {
  using F = Format<T>;
  const uint32_t sign = std::signbit(value) ? 1u << (F::kBits - 1) : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto above =
      std::lower_bound(magnitudes.begin(), magnitudes.end(), magnitude);
  uint32_t code;
  if (above == magnitudes.end()) {
    code = F::kInfinity;
  } else {
    code = static_cast<uint32_t>(above - magnitudes.begin());
    if (*above != magnitude) {
      const double to_above = *above - magnitude;
      const double to_below = magnitude - magnitudes[code - 1];
      if (to_below < to_above || (to_below == to_above && code % 2 == 1))
        --code;
    }
  }
  if (F::kSaturates) code = std::min(code, F::kInfinity - 1);
  return sign | code;
}

template <class T>
class SmallFloatTest : public ::testing::Test {};
using SmallFloats = ::testing::Types<Float16, BFloat16, Float8E4M3>;
TYPED_TEST_SUITE(SmallFloatTest, SmallFloats);

TYPED_TEST(SmallFloatTest, EveryCodeRoundTrips) {
  using F = Format<TypeParam>;
  const uint32_t sign = 1u << (F::kBits - 1);
  for (uint32_t code = 0; code < 2 * sign; ++code) {
    TypeParam typed;
    typed.bits = static_cast<decltype(typed.bits)>(code);
    const float value = ToFloat(typed);
    const uint32_t magnitude = code & (sign - 1);
    const uint32_t back = FromFloat<TypeParam>(value).bits;
    ASSERT_EQ(std::signbit(value), (code & sign) != 0) << code;
    if (magnitude > F::kInfinity ||
        (F::kSaturates && magnitude == F::kInfinity)) {
      ASSERT_TRUE(std::isnan(value)) << code;
      typed.bits = static_cast<decltype(typed.bits)>(back);
      ASSERT_TRUE(std::isnan(ToFloat(typed))) << code;
      ASSERT_EQ(back & sign, code & sign) << code;
      continue;
    }
    if (magnitude == F::kInfinity) {
      ASSERT_TRUE(std::isinf(value)) << code;
    } else {
      ASSERT_EQ(std::fabs(static_cast<double>(value)),
                ValueOf<TypeParam>(magnitude))
          << code;
    }
    ASSERT_EQ(back, code);
  }
}

TYPED_TEST(SmallFloatTest, RoundsToNearestEven) {
  const std::vector<double> magnitudes = Magnitudes<TypeParam>();
  const auto check = [&](float value) {
    ASSERT_EQ(FromFloat<TypeParam>(value).bits,
              SlowFromFloat<TypeParam>(magnitudes, value))
        << value;
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (size_t i = 1; i < magnitudes.size(); ++i) {
    // The halfway point has one bit more than the format, so it is a float.
    const double middle = (magnitudes[i - 1] + magnitudes[i]) / 2;
    for (float sign : {1.0f, -1.0f}) {
      const float tie = static_cast<float>(middle) * sign;
      for (float value : {tie, std::nextafter(tie, 0.0f),
                          std::nextafter(tie, sign * kInfinity)}) {
        ASSERT_NO_FATAL_FAILURE(check(value));
      }
    }
  }
  for (float value :
       {0.0f, -0.0f, 1e-45f, -1e-45f, std::numeric_limits<float>::min(),
        std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
        448.0f, 464.0f, 465.0f, 65504.0f, 65519.99f, 65520.0f, 1e30f}) {
    ASSERT_NO_FATAL_FAILURE(check(value));
  }
  for (int64_t bits : testing::UniformIntegers(500000, 1, 0, 0xffffffff)) {
    const float value = FloatFromBits(static_cast<uint32_t>(bits));
    if (!std::isfinite(value)) continue;
    ASSERT_NO_FATAL_FAILURE(check(value));
  }
  for (float value : testing::Normal(500000, 2)) {
    ASSERT_NO_FATAL_FAILURE(check(value));
  }
}

TYPED_TEST(SmallFloatTest, KeepsInfinityAndNan) {
  using F = Format<TypeParam>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const uint32_t sign = 1u << (F::kBits - 1);
  const uint32_t largest = F::kSaturates ? F::kInfinity - 1 : F::kInfinity;
  EXPECT_EQ(FromFloat<TypeParam>(kInfinity).bits, largest);
  EXPECT_EQ(FromFloat<TypeParam>(-kInfinity).bits, largest | sign);
  // Quiet, signalling (payload only in the bits that rounding drops), negative.
  for (uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xff800001u, 0xffffffffu}) {
    EXPECT_TRUE(std::isnan(ToFloat(FromFloat<TypeParam>(FloatFromBits(bits)))))
        << bits;
  }
}

TEST(DTypeTest, SizesAndNames) {
  EXPECT_EQ(DTypeSize(DType::kFloat32), 4u);
  EXPECT_EQ(DTypeSize(DType::kFloat16), 2u);
  EXPECT_EQ(DTypeSize(DType::kBFloat16), 2u);
  EXPECT_EQ(DTypeSize(DType::kFloat8E4M3), 1u);
  EXPECT_EQ(DTypeSize(DType::kInt32), 4u);
  EXPECT_EQ(DTypeSize(DType::kInt64), 8u);
  EXPECT_EQ(DTypeSize(DType::kUInt8), 1u);
  EXPECT_EQ(DTypeSize(DType::kInvalid), 0u);
  EXPECT_EQ(DTypeSize(static_cast<DType>(99)), 0u);
  EXPECT_STREQ(DTypeName(DType::kFloat8E4M3), "float8_e4m3");
  EXPECT_STREQ(DTypeName(static_cast<DType>(-1)), "invalid");
}

}  // namespace
}  // namespace tenon
