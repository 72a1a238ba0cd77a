#include "ops/core/dtype.h"

namespace tenon {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;

// A small float of kMantissa fraction bits and exponent bias kBias, without its
// sign, from and to the bits of a non-negative float.
template <int kMantissa, int kBias>
struct SmallFloat {
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kRebias = uint32_t{127 - kBias} << 23;
  static constexpr uint32_t kMinNormal = uint32_t{128 - kBias} << 23;

  // Rounds to nearest even. Precondition: no NaN, and small enough not to round
  // past the largest value.
  static uint32_t Encode(uint32_t bits) {
    if (bits < kMinNormal) {
      // The last bit of this float is worth one subnormal step: the addition
      // rounds, and leaves the steps in the low bits.
      constexpr uint32_t kStep = uint32_t{151 - kBias - kMantissa} << 23;
      return FloatBits(FloatFromBits(bits) + FloatFromBits(kStep)) - kStep;
    }
    constexpr uint32_t kBelowHalf = (1u << (kShift - 1)) - 1;
    return (bits - kRebias + kBelowHalf + (bits >> kShift & 1u)) >> kShift;
  }

  static uint32_t Decode(uint32_t magnitude) {
    const uint32_t bits = magnitude << kShift;
    if (magnitude >> kMantissa == 0) {  // zero or subnormal: as if normal, less
                                        // the implicit leading one
      return FloatBits(FloatFromBits(bits + kMinNormal) -
                       FloatFromBits(kMinNormal));
    }
    return bits + kRebias;
  }
};
using Half = SmallFloat<10, 15>;
using E4M3 = SmallFloat<3, 7>;

}  // namespace

float ToFloat(Float16 value) {
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
    return FloatFromBits(sign | kInfinityBits | (magnitude & 0x3ffu) << 13);
  }
  return FloatFromBits(sign | Half::Decode(magnitude));
}

template <>
Float16 FromFloat<Float16>(float value) {
  const uint32_t sign = FloatBits(value) >> 16 & 0x8000u;
  const uint32_t bits = FloatBits(value) & 0x7fffffffu;
  uint32_t magnitude;
  if (bits > kInfinityBits) {
    magnitude = 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    magnitude = 0x7c00u;  // 65520, halfway past the largest value, and above
  } else {
    magnitude = Half::Encode(bits);
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

float ToFloat(Float8E4M3 value) {
  const uint32_t sign = uint32_t{value.bits} << 24 & 0x80000000u;
  const uint32_t magnitude = value.bits & 0x7fu;
  if (magnitude == 0x7fu) return FloatFromBits(sign | 0x7fc00000u);
  return FloatFromBits(sign | E4M3::Decode(magnitude));
}

template <>
Float8E4M3 FromFloat<Float8E4M3>(float value) {
  const uint32_t sign = FloatBits(value) >> 24 & 0x80u;
  const uint32_t bits = FloatBits(value) & 0x7fffffffu;
  uint32_t magnitude;
  if (bits > kInfinityBits) {
    magnitude = 0x7fu;
  } else if (bits >= 0x43e00000u) {
    magnitude = 0x7eu;  // 448 and above
  } else {
    magnitude = E4M3::Encode(bits);
  }
  return {static_cast<uint8_t>(sign | magnitude)};
}

}  // namespace tenon
