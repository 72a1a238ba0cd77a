#include "ops/core/dtype.h"

#include <cmath>

namespace tenon {
namespace {

// Rounds |value| to `mantissa_bits` fraction bits with the smallest normal
// exponent `min_exponent`; below it the spacing stays constant (subnormals).
// Exact: scaling by powers of two, and nearbyint in the default mode.
float RoundMagnitude(float magnitude, int mantissa_bits, int min_exponent) {
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = f * 2^exponent, f in [.5, 1)
  exponent = exponent - 1 < min_exponent ? min_exponent : exponent - 1;
  const int spacing = exponent - mantissa_bits;
  return std::ldexp(std::nearbyint(std::ldexp(magnitude, -spacing)), spacing);
}

// Encodes an already representable magnitude.
uint32_t EncodeMagnitude(float magnitude, int mantissa_bits, int min_exponent) {
  if (magnitude == 0.0f) return 0;
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent -= 1;
  if (exponent < min_exponent) {
    return static_cast<uint32_t>(
        std::ldexp(magnitude, mantissa_bits - min_exponent));
  }
  const uint32_t fraction =
      static_cast<uint32_t>(std::ldexp(magnitude, mantissa_bits - exponent));
  return (static_cast<uint32_t>(exponent - min_exponent) << mantissa_bits) +
         fraction;
}

float DecodeMagnitude(uint32_t bits, int mantissa_bits, int min_exponent) {
  const uint32_t exponent = bits >> mantissa_bits;
  const uint32_t fraction = bits & ((1u << mantissa_bits) - 1);
  if (exponent == 0) {
    return std::ldexp(static_cast<float>(fraction),
                      min_exponent - mantissa_bits);
  }
  return std::ldexp(
      static_cast<float>(fraction + (1u << mantissa_bits)),
      static_cast<int>(exponent) - 1 + min_exponent - mantissa_bits);
}

}  // namespace

float ToFloat(Float16 value) {
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
    return FloatFromBits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  return FloatFromBits(sign | FloatBits(DecodeMagnitude(magnitude, 10, -14)));
}

template <>
Float16 FromFloat<Float16>(float value) {
  const uint16_t sign = static_cast<uint16_t>(FloatBits(value) >> 16 & 0x8000u);
  if (std::isnan(value)) return {static_cast<uint16_t>(sign | 0x7e00u)};
  const float magnitude = std::fabs(value);
  // 65520 is halfway between the largest value and the next power of two.
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  const float rounded = RoundMagnitude(magnitude, 10, -14);
  return {static_cast<uint16_t>(sign | EncodeMagnitude(rounded, 10, -14))};
}

float ToFloat(Float8E4M3 value) {
  const uint32_t sign = uint32_t{value.bits} << 24 & 0x80000000u;
  const uint32_t magnitude = value.bits & 0x7fu;
  if (magnitude == 0x7fu) return FloatFromBits(sign | 0x7fc00000u);
  return FloatFromBits(sign | FloatBits(DecodeMagnitude(magnitude, 3, -6)));
}

template <>
Float8E4M3 FromFloat<Float8E4M3>(float value) {
  const uint8_t sign = static_cast<uint8_t>(FloatBits(value) >> 24 & 0x80u);
  if (std::isnan(value)) return {static_cast<uint8_t>(sign | 0x7fu)};
  const float magnitude = std::fmin(std::fabs(value), 448.0f);
  const float rounded = RoundMagnitude(magnitude, 3, -6);
  return {static_cast<uint8_t>(sign | EncodeMagnitude(rounded, 3, -6))};
}

}  // namespace tenon
