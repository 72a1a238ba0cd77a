#ifndef TENON_OPS_CORE_DTYPE_H_
#define TENON_OPS_CORE_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tenon {

// Element types of a tensor. Zero is never a valid one.
enum class DType : int32_t {
  kInvalid = 0,
  kFloat32 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kFloat8E4M3 = 4,  // "e4m3fn": no infinities, largest value 448
  kInt32 = 5,
  kInt64 = 6,
  kUInt8 = 7,
};

// Bytes of one element; 0 for kInvalid.
constexpr size_t DTypeSize(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat8E4M3:
    case DType::kUInt8:
      return 1;
    case DType::kInvalid:
      break;
  }
  return 0;
}

constexpr const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
    case DType::kInvalid:
      break;
  }
  return "invalid";
}

// Storage types of the host code. Device code uses CUDA's own types, which have
// the same bits. Conversions from float round to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

inline uint32_t FloatBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float ToFloat(float value) { return value; }
inline float ToFloat(BFloat16 value) {
  return FloatFromBits(uint32_t{value.bits} << 16);
}
float ToFloat(Float16 value);
float ToFloat(Float8E4M3 value);

template <class T>
T FromFloat(float value);
template <>
inline float FromFloat<float>(float value) {
  return value;
}
template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = FloatBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN, made quiet
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
Float16 FromFloat<Float16>(float value);
// Saturates to +-448; NaN becomes NaN.
template <>
Float8E4M3 FromFloat<Float8E4M3>(float value);

template <class T>
inline constexpr DType kDTypeOf = DType::kInvalid;
template <>
inline constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float8E4M3> = DType::kFloat8E4M3;
template <>
inline constexpr DType kDTypeOf<int32_t> = DType::kInt32;
template <>
inline constexpr DType kDTypeOf<int64_t> = DType::kInt64;

}  // namespace tenon

#endif  // TENON_OPS_CORE_DTYPE_H_
