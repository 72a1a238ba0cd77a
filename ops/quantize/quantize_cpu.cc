#include <algorithm>
#include <cmath>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/quantize/fp8_scale.h"
#include "ops/quantize/quantize_backend.h"
#include "ops/quantize/quantize_cpu_isa.h"

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#define HWY_BROKEN_EMU128 1  // no emulated vectors, whatever the compiler
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/quantize/quantize_cpu.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {
namespace quantize {  // other files have functions of the same name

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using BitsTag = hn::Rebind<uint32_t, FloatTag>;

// Either way NaN does not count: it compares false.
float MaxMagnitude(const float* x, int64_t count, float amax) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto most = hn::Set(d, amax);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto magnitude = hn::Abs(hn::LoadU(d, x + i));
    most = hn::IfThenElse(hn::Gt(magnitude, most), magnitude, most);
  }
  amax = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// FromFloat<Float8E4M3> of a vector, but for NaN, whose sign is dropped as GPUs
// do.
template <class V>
HWY_INLINE auto ToE4M3Bits(V value) {
  const FloatTag d;
  const BitsTag bits_tag;
  const auto set = [&](uint32_t v) HWY_ATTR { return hn::Set(bits_tag, v); };
  const auto all = hn::BitCast(bits_tag, value);
  const auto bits = hn::And(all, set(0x7fffffffu));
  const auto sign = hn::And(hn::ShiftRight<24>(all), set(0x80u));
  // Below 2^-6 e4m3 has steps of 2^-9, the last bit of floats from 2^14 on: the
  // sum with 2^14 rounds, and has the number of steps in its low bits.
  const auto small = hn::And(
      hn::BitCast(bits_tag, hn::Add(hn::BitCast(d, bits), hn::Set(d, 0x1p14f))),
      set(0x7fu));
  // Elsewhere 20 bits fewer of fraction, and 120 less of exponent.
  const auto odd = hn::And(hn::ShiftRight<20>(bits), set(1));
  const auto large = hn::ShiftRight<20>(
      hn::Add(hn::Sub(bits, set(120u << 23)), hn::Add(odd, set(0x7ffffu))));
  // Compared as floats, which the bits of magnitudes are in the order of.
  const auto is_small = hn::RebindMask(
      bits_tag, hn::Lt(hn::BitCast(d, bits), hn::Set(d, 0x1p-6f)));
  const auto is_above = hn::RebindMask(
      bits_tag, hn::Gt(hn::BitCast(d, bits), hn::Set(d, 448.0f)));
  const auto saturated = hn::IfThenElse(is_above, set(0x7eu), large);
  const auto finite = hn::Or(sign, hn::IfThenElse(is_small, small, saturated));
  const auto is_nan = hn::RebindMask(bits_tag, hn::IsNaN(value));
  return hn::IfThenElse(is_nan, set(0x7fu), finite);
}

void Scale(const float* x, int64_t count, float inverse, Float8E4M3* out) {
  const FloatTag d;
  const hn::Rebind<int32_t, FloatTag> i32;
  const hn::Rebind<uint8_t, FloatTag> u8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto scale = hn::Set(d, inverse);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto rounded = ToE4M3Bits(hn::Mul(hn::LoadU(d, x + i), scale));
    hn::StoreU(hn::DemoteTo(u8, hn::BitCast(i32, rounded)), u8, &out[i].bits);
  }
  for (; i < count; ++i) {
    out[i].bits = static_cast<uint8_t>(
        hn::GetLane(ToE4M3Bits(hn::Set(d, x[i] * inverse))));
  }
}

QuantizeKernels Kernels() { return {MaxMagnitude, Scale}; }

}  // namespace quantize
}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace tenon {

QuantizeKernels QuantizeKernelsFor(CpuIsa isa) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::quantize::Kernels();
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::quantize::Kernels();
#endif
    default:
      return HWY_STATIC_DISPATCH(quantize::Kernels)();
  }
}

namespace {

float QuantizeGroup(const QuantizeKernels& kernels, const float* x,
                    int64_t count, Float8E4M3* out) {
  const Fp8Scale scale = Fp8ScaleOf(kernels.max_magnitude(x, count, 0.0f));
  kernels.scale(x, count, scale.inverse, out);
  return scale.scale;
}

// Calls f(values, count, out) for the elements of block (r, c) as floats, in
// pieces.
template <class F>
void ForEachPiece(const QuantizeFp8Params& p, const Fp8Blocks& blocks,
                  int64_t r, int64_t c, const F& f) {
  constexpr int64_t kPiece = 512;
  float values[kPiece];
  const int64_t rows = std::min(p.x.shape[0], (r + 1) * blocks.rows);
  const int64_t cols = std::min(p.x.shape[1], (c + 1) * blocks.cols);
  const int64_t element = static_cast<int64_t>(DTypeSize(p.x.dtype));
  for (int64_t row = r * blocks.rows; row < rows; ++row) {
    for (int64_t col = c * blocks.cols; col < cols; col += kPiece) {
      const int64_t count = std::min(cols - col, kPiece);
      CpuConvertToFloat(
          p.x.dtype,
          p.x.As<const char>() + (row * p.x.stride[0] + col) * element, count,
          values);
      f(values, count, p.out.As<Float8E4M3>() + row * p.out.stride[0] + col);
    }
  }
}

void QuantizeBlock(const QuantizeFp8Params& p, const Fp8Blocks& blocks,
                   const QuantizeKernels& kernels, int64_t r, int64_t c) {
  float& scale = p.scales.As<float>()[r * p.scales.stride[0] + c];
  if (blocks.rows == 1 && blocks.cols == kFp8GroupSize) {  // one piece
    ForEachPiece(p, blocks, r, c,
                 [&](const float* values, int64_t count, Float8E4M3* out) {
                   scale = QuantizeGroup(kernels, values, count, out);
                 });
    return;
  }
  float amax = 0.0f;
  ForEachPiece(p, blocks, r, c,
               [&](const float* values, int64_t count, Float8E4M3*) {
                 amax = kernels.max_magnitude(values, count, amax);
               });
  const Fp8Scale of_block = Fp8ScaleOf(amax);
  ForEachPiece(p, blocks, r, c,
               [&](const float* values, int64_t count, Float8E4M3* out) {
                 kernels.scale(values, count, of_block.inverse, out);
               });
  scale = of_block.scale;
}

}  // namespace

float QuantizeFp8Group(const float* x, int64_t count, Float8E4M3* out) {
  return QuantizeGroup(QuantizeKernelsFor(DetectCpuIsa()), x, count, out);
}

Status QuantizeFp8Cpu(const QuantizeFp8Params& p, Stream stream) {
  const QuantizeKernels kernels = QuantizeKernelsFor(DetectCpuIsa());
  const Fp8Blocks blocks = Fp8BlocksOf(p);
  // Blocks of about 16k elements a piece, so that threads are worth waking.
  const int64_t grain = 16384 / (blocks.rows * blocks.cols) + 1;
  ParallelFor(stream, blocks.count_r * blocks.count_c, grain,
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  QuantizeBlock(p, blocks, kernels, i / blocks.count_c,
                                i % blocks.count_c);
                }
              });
  return Status();
}

}  // namespace tenon

#endif  // HWY_ONCE
