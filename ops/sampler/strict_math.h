#ifndef TENON_OPS_SAMPLER_STRICT_MATH_H_
#define TENON_OPS_SAMPLER_STRICT_MATH_H_

#include <cmath>
#include <cstdint>

// Arithmetic with the same bits on the CPU and in CUDA kernels. Private to
// ops/sampler. Every function is a fixed sequence of operations that IEEE 754
// rounds correctly. The names stand where nvcc would otherwise fuse a multiply
// with an add; the CPU is compiled with -ffp-contract=off.

#if defined(__CUDACC__)
#define TENON_HOST_DEVICE __host__ __device__
#else
#define TENON_HOST_DEVICE
#endif

namespace tenon::strict {

TENON_HOST_DEVICE inline float Add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
TENON_HOST_DEVICE inline float Sub(float a, float b) { return Add(a, -b); }
TENON_HOST_DEVICE inline float Mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
TENON_HOST_DEVICE inline float Div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
TENON_HOST_DEVICE inline float Fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
TENON_HOST_DEVICE inline double Add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
TENON_HOST_DEVICE inline double Sub(double a, double b) { return Add(a, -b); }
TENON_HOST_DEVICE inline double Mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
TENON_HOST_DEVICE inline double Div(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}
TENON_HOST_DEVICE inline double Fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
TENON_HOST_DEVICE inline double Sqrt(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// 2^y = 2^whole * (1 + part * polynomial(part)), the polynomial being the best
// of degree 4 for |part| <= 1/2. Relative error at most 1.5e-7; 2^0 is 1.
inline constexpr float kExp2Coefficients[5] = {0x1.62e42ap-1f, 0x1.ebf9bap-3f,
                                               0x1.c6b70ep-5f, 0x1.3ceac8p-7f,
                                               0x1.5bb9fp-10f};
inline constexpr float kExp2Lowest = -127.0f;
// Adding it rounds to an integer and leaves that in the lowest bits.
inline constexpr float kExp2Round = 0x1.8p23f;

// For y <= 0: 0 from -127 down (also for -inf), between -127 and -126 something
// from 0 to 2^-126. The vector code of the CPU is this, operation by operation.
TENON_HOST_DEVICE inline float Exp2(float y) {
  y = y > kExp2Lowest ? y : kExp2Lowest;
  const float rounded = Add(y, kExp2Round);
  const float part = Sub(y, Sub(rounded, kExp2Round));
  // Device code takes values of a host array only as constants.
  constexpr float kC0 = kExp2Coefficients[0], kC1 = kExp2Coefficients[1],
                  kC2 = kExp2Coefficients[2], kC3 = kExp2Coefficients[3],
                  kC4 = kExp2Coefficients[4];
  float p = Fma(kC4, part, kC3);
  p = Fma(p, part, kC2);
  p = Fma(p, part, kC1);
  p = Fma(p, part, kC0);
  p = Fma(p, part, 1.0f);
  const uint32_t bits = __builtin_bit_cast(uint32_t, p);
  const uint32_t whole = __builtin_bit_cast(uint32_t, rounded);
#if defined(__CUDA_ARCH__)
  // One instruction, which the compiler mostly makes two.
  uint32_t result;
  asm("mad.lo.u32 %0, %1, 8388608, %2;" : "=r"(result) : "r"(whole), "r"(bits));
  return __builtin_bit_cast(float, result);
#else
  return __builtin_bit_cast(float, bits + (whole << 23));
#endif
}

// The weight of logit x <= best, `best` finite, scale = log2(e) / temperature.
TENON_HOST_DEVICE inline float Weight(float x, float best, float scale) {
  return Exp2(Mul(Sub(x, best), scale));
}

// The natural logarithm of a positive normal number, within 4 units in the last
// place (absolutely, near 1: 1e-16).
TENON_HOST_DEVICE inline double Log(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  constexpr double kLn2High = 0x1.62e42fefa38p-1;  // its products are exact
  constexpr double kLn2Low = 0x1.ef35793c7673p-45;
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  // x = m * 2^e with m from sqrt(1/2) to sqrt(2).
  const int64_t e = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m =
      __builtin_bit_cast(double, bits - (static_cast<uint64_t>(e) << 52));
  // ln m = 2 artanh(s).
  const double s = Div(Sub(m, 1.0), Add(m, 1.0));
  const double z = Mul(s, s);
  double series = 1.0 / 23.0;
  series = Fma(series, z, 1.0 / 21.0);
  series = Fma(series, z, 1.0 / 19.0);
  series = Fma(series, z, 1.0 / 17.0);
  series = Fma(series, z, 1.0 / 15.0);
  series = Fma(series, z, 1.0 / 13.0);
  series = Fma(series, z, 1.0 / 11.0);
  series = Fma(series, z, 1.0 / 9.0);
  series = Fma(series, z, 1.0 / 7.0);
  series = Fma(series, z, 1.0 / 5.0);
  series = Fma(series, z, 1.0 / 3.0);
  const double twice = Add(s, s);
  const double tail = Mul(Mul(series, z), twice);
  const double whole = static_cast<double>(e);
  return Fma(whole, kLn2High, Add(twice, Fma(whole, kLn2Low, tail)));
}

// High half of the product.
TENON_HOST_DEVICE inline uint64_t MulHigh(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

}  // namespace tenon::strict

#endif  // TENON_OPS_SAMPLER_STRICT_MATH_H_
