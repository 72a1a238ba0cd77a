// The vectors of cpu_matmul.cc: Floats, kLanes floats; Zero, Fill, Load and
// Store with conversion, MultiplyAdd, AddLanes and PadBlock. Through Highway
// where it knows the vectors of the target, in the compiler's own otherwise.

#if defined(TENON_OPS_CORE_CPU_MATMUL_LANES_INL_H_) == \
    defined(HWY_TARGET_TOGGLE)  // per-target include guard
#ifdef TENON_OPS_CORE_CPU_MATMUL_LANES_INL_H_
#undef TENON_OPS_CORE_CPU_MATMUL_LANES_INL_H_
#else
#define TENON_OPS_CORE_CPU_MATMUL_LANES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "ops/core/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using Floats = hn::Vec<FloatTag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));

HWY_INLINE Floats Zero() { return hn::Zero(FloatTag()); }
HWY_INLINE Floats Fill(float value) { return hn::Set(FloatTag(), value); }

HWY_INLINE Floats Load(const float* from) {
  return hn::LoadU(FloatTag(), from);
}

HWY_INLINE Floats Load(const BFloat16* from) {
  const hn::Rebind<uint32_t, FloatTag> d32;
  const hn::Rebind<uint16_t, FloatTag> d16;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, &from->bits));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(bits));
}

HWY_INLINE Floats Load(const Float16* from) {
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  return hn::PromoteTo(
      FloatTag(),
      hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(from)));
}

// Through float16, which has e4m3's bits 7 places further left but for the
// exponent's bias, 8 more. e4m3's one NaN is float16's 1.875: bit 14 is added.
HWY_INLINE Floats Load(const Float8E4M3* from) {
  const hn::Rebind<int8_t, FloatTag> d8;
  const hn::Rebind<int16_t, FloatTag> d16;
  const hn::Rebind<hwy::float16_t, FloatTag> half;
  const auto bits =
      hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(from)));
  const auto placed = hn::And(hn::ShiftLeft<7>(bits),
                              hn::Set(d16, static_cast<int16_t>(0xbf80)));
  const auto magnitude = hn::And(bits, hn::Set(d16, int16_t{0x7f}));
  const auto nan =
      hn::And(hn::ShiftLeft<7>(hn::Add(magnitude, hn::Set(d16, int16_t{1}))),
              hn::Set(d16, int16_t{0x4000}));
  return hn::Mul(
      hn::PromoteTo(FloatTag(), hn::BitCast(half, hn::Or(placed, nan))),
      hn::Set(FloatTag(), 256.0f));
}

HWY_INLINE void Store(Floats v, float* to) { hn::StoreU(v, FloatTag(), to); }

HWY_INLINE void Store(Floats v, BFloat16* to) {
  const hn::Rebind<uint32_t, FloatTag> d32;
  const hn::Rebind<int32_t, FloatTag> di32;
  const hn::Rebind<uint16_t, FloatTag> d16;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1u));
  const auto rounded =
      hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fffu))));
  const auto quiet =
      hn::Or(hn::ShiftRight<16>(bits), hn::Set(d32, 0x40u));  // NaN stays NaN
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  const auto narrow = hn::IfThenElse(is_nan, quiet, rounded);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, narrow)), d16, &to->bits);
}

HWY_INLINE void Store(Floats v, Float16* to) {
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(to));
}

// GCC likes to fold a load into each of its uses, which then compete for the
// load ports. (Clang does not, nor does it take vectors of this size here.)
HWY_INLINE void KeepInRegister(Floats& v) {
#if HWY_ARCH_X86 && !HWY_COMPILER_CLANG
  asm("" : "+v"(v.raw));
#else
  (void)v;
#endif
}

// a * b + c
HWY_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) {
  return hn::MulAdd(a, b, c);
}

template <class D, class V>
HWY_INLINE auto AddBlocks(D d, V v) {
  if constexpr (hn::MaxLanes(d) <= 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return AddBlocks(half,
                     hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// Stores the sums of the lanes of a, b, c and e, all by the same tree.
HWY_INLINE void AddLanes(Floats a, Floats b, Floats c, Floats e, float* to) {
  const FloatTag d;
  const hn::Repartition<double, FloatTag> d64;
  const auto ab = hn::BitCast(
      d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce = hn::BitCast(
      d64, hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  const Floats abce = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab, ce)),
                              hn::BitCast(d, hn::InterleaveUpper(d64, ab, ce)));
  hn::StoreU(AddBlocks(d, abce), hn::CappedTag<float, 4>(), to);
}

#else  // HWY_TARGET == HWY_SCALAR

constexpr int kLanes = 4;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));

inline Floats Zero() { return Floats{}; }
inline Floats Fill(float value) { return Floats{value, value, value, value}; }

// Shifted into place, the bits of a half are its value times 2^-112, subnormals
// included; infinity and NaN need the largest exponent.
inline float HalfToFloat(Float16 half) {
  const uint32_t magnitude = half.bits & 0x7fffu;
  const float scaled = FloatFromBits(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude > 0x7bffu ? 0x7f800000u : 0u;
  const uint32_t sign = (half.bits & 0x8000u) << 16;
  return FloatFromBits(FloatBits(scaled) | special | sign);
}

inline Floats Load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Floats Load(const BFloat16* from) {
  return Floats{ToFloat(from[0]), ToFloat(from[1]), ToFloat(from[2]),
                ToFloat(from[3])};
}
inline Floats Load(const Float16* from) {
  return Floats{HalfToFloat(from[0]), HalfToFloat(from[1]),
                HalfToFloat(from[2]), HalfToFloat(from[3])};
}

inline Floats Load(const Float8E4M3* from) {
  return Floats{ToFloat(from[0]), ToFloat(from[1]), ToFloat(from[2]),
                ToFloat(from[3])};
}

template <class T>
inline void Store(Floats v, T* to) {
  for (int i = 0; i < kLanes; ++i) to[i] = FromFloat<T>(v[i]);
}

inline void KeepInRegister(Floats&) {}

inline Floats MultiplyAdd(Floats a, Floats b, Floats c) { return a * b + c; }

inline void AddLanes(Floats a, Floats b, Floats c, Floats e, float* to) {
  const Floats vectors[] = {a, b, c, e};
  for (int i = 0; i < 4; ++i) {
    const Floats v = vectors[i];
    to[i] = (v[0] + v[2]) + (v[1] + v[3]);
  }
}

#endif

// A zero-padded copy of the last, partial block.
template <class T>
HWY_INLINE const T* PadBlock(const T* from, int64_t count, T* padded) {
  std::fill(std::copy(from, from + count, padded), padded + kLanes, T{});
  return padded;
}

}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#endif  // TENON_OPS_CORE_CPU_MATMUL_LANES_INL_H_
