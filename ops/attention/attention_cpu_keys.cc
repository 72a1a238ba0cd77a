#include "ops/attention/attention_cpu_keys.h"

#include <algorithm>
#include <cmath>
#include <limits>

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#define HWY_BROKEN_EMU128 1  // no emulated vectors, whatever the compiler
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/attention_cpu_keys.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include "ops/core/cpu_matmul_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {
namespace attention_keys {  // other files have kernels of the same name

constexpr int kMaxKeys = kMaxCpuKeys;

HWY_INLINE Floats Broadcast(float value) {
#if HWY_TARGET != HWY_SCALAR
  return hn::Set(FloatTag(), value);
#else
  return Floats{} + value;
#endif
}

// 2^x for x <= 0, within 2 ulp; 0 below the normal numbers. The fraction in
// [-0.5, 0.5] goes through a polynomial, the integer into the exponent.
HWY_INLINE float Exp2(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  float y = 1.535336188319500e-4f;
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  const uint32_t exponent = (FloatBits(shifted) + 127u) << 23;
  return x < -126.0f ? 0.0f : y * FloatFromBits(exponent);
}

// scores[i] = k[i] . q for all i < count, in blocks of eight keys: each has one
// vector of sums, so neighbours do not change its bits.
HWY_INLINE void Scores(const AttentionKeys& keys, int count, int64_t head_dim,
                       const float* q, float* scores) {
  for (int first = 0; first < count; first += 8) {
    const float* k[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      k[i] = keys.k[std::min(first + i, count - 1)];
    }
    Floats sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = Zero();
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Floats x = Load(q + d);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        sum[i] = MultiplyAdd(x, Load(k[i] + d), sum[i]);
      }
    }
    AddLanes(sum[0], sum[1], sum[2], sum[3], scores + first);
    AddLanes(sum[4], sum[5], sum[6], sum[7], scores + first + 4);
  }
}

// out = out * rescale + sum of weights[i] * v[i], in the order of the keys.
HWY_INLINE void AddValues(const AttentionKeys& keys, int count,
                          int64_t head_dim, const float* weights, float rescale,
                          float* out) {
  constexpr int kVectors = 4;
  const Floats factor = Broadcast(rescale);
  for (int64_t d = 0; d < head_dim; d += kVectors * kLanes) {
    Floats sum[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[j] = MultiplyAdd(Load(out + d + j * kLanes), factor, Zero());
    }
    for (int i = 0; i < count; ++i) {
      const Floats weight = Broadcast(weights[i]);
      const float* v = keys.v[i] + d;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        sum[j] = MultiplyAdd(weight, Load(v + j * kLanes), sum[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) Store(sum[j], out + d + j * kLanes);
  }
}

void Fold(const AttentionKeys& keys, int count, int64_t head_dim,
          const AttentionRow& row) {
  constexpr int kUnit = 16;
  static_assert(kMaxKeys % kUnit == 0, "whole units");
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float weights[kMaxKeys];
  Scores(keys, count, head_dim, row.q, weights);
  float max = *row.max;
  for (int i = 0; i < count; ++i) max = std::max(max, weights[i]);
  const int padded = (count + kUnit - 1) / kUnit * kUnit;
  std::fill(weights + count, weights + padded, -kInfinity);
  float sums[kUnit] = {};
  for (int first = 0; first < padded; first += kUnit) {
    for (int i = 0; i < kUnit; ++i) {
      const float weight = Exp2(weights[first + i] - max);
      weights[first + i] = weight;
      sums[i] += weight;
    }
  }
  float sum = 0.0f;
  for (float s : sums) sum += s;
  const float rescale = *row.max == max ? 1.0f : std::exp2(*row.max - max);
  *row.max = max;
  *row.sum = *row.sum * rescale + sum;
  AddValues(keys, count, head_dim, weights, rescale, row.out);
}

}  // namespace attention_keys
}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace tenon {

void FoldKeys(CpuIsa isa, const AttentionKeys& keys, int count,
              int64_t head_dim, const AttentionRow& row) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::attention_keys::Fold(keys, count, head_dim, row);
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::attention_keys::Fold(keys, count, head_dim, row);
#endif
    default:
      return HWY_STATIC_DISPATCH(attention_keys::Fold)(keys, count, head_dim,
                                                       row);
  }
}

}  // namespace tenon

#endif  // HWY_ONCE
