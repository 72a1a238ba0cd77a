#include <algorithm>
#include <cmath>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/quantize/fp8_scale.h"
#include "ops/quantize/quantize_backend.h"

namespace tenon {
namespace {

// NaN does not count: it compares false.
float MaxMagnitude(const float* x, int64_t count, float amax) {
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// FromFloat<Float8E4M3> without branches, but for NaN, whose sign is dropped as
// GPUs do.
Float8E4M3 Round(float value) {
  const uint32_t sign = FloatBits(value) >> 24 & 0x80u;
  const uint32_t bits = FloatBits(value) & 0x7fffffffu;
  // Below 2^-6 e4m3 has steps of 2^-9, the last bit of floats from 2^14 on: the
  // sum with 2^14 rounds, and has the number of steps in its low bits.
  const uint32_t small = FloatBits(FloatFromBits(bits) + 0x1p14f) & 0x7fu;
  // Elsewhere 20 bits fewer of fraction, and 120 less of exponent.
  const uint32_t large =
      (bits - (120u << 23) + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
  const uint32_t magnitude =
      bits < (121u << 23) ? small : std::min(large, 0x7eu);
  const bool is_nan = bits > 0x7f800000u;
  return {static_cast<uint8_t>(is_nan ? 0x7fu : sign | magnitude)};
}

void Scale(const float* x, int64_t count, float inverse, Float8E4M3* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Round(x[i] * inverse);
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
                   int64_t r, int64_t c) {
  float& scale = p.scales.As<float>()[r * p.scales.stride[0] + c];
  if (blocks.rows == 1 && blocks.cols == kFp8GroupSize) {  // one piece
    ForEachPiece(p, blocks, r, c,
                 [&](const float* values, int64_t count, Float8E4M3* out) {
                   scale = QuantizeFp8Group(values, count, out);
                 });
    return;
  }
  float amax = 0.0f;
  ForEachPiece(p, blocks, r, c,
               [&](const float* values, int64_t count, Float8E4M3*) {
                 amax = MaxMagnitude(values, count, amax);
               });
  const Fp8Scale of_block = Fp8ScaleOf(amax);
  ForEachPiece(p, blocks, r, c,
               [&](const float* values, int64_t count, Float8E4M3* out) {
                 Scale(values, count, of_block.inverse, out);
               });
  scale = of_block.scale;
}

}  // namespace

float QuantizeFp8Group(const float* x, int64_t count, Float8E4M3* out) {
  const Fp8Scale scale = Fp8ScaleOf(MaxMagnitude(x, count, 0.0f));
  Scale(x, count, scale.inverse, out);
  return scale.scale;
}

Status QuantizeFp8Cpu(const QuantizeFp8Params& p, Stream stream) {
  const Fp8Blocks blocks = Fp8BlocksOf(p);
  // Blocks of about 16k elements a piece, so that threads are worth waking.
  const int64_t grain = 16384 / (blocks.rows * blocks.cols) + 1;
  ParallelFor(stream, blocks.count_r * blocks.count_c, grain,
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  QuantizeBlock(p, blocks, i / blocks.count_c,
                                i % blocks.count_c);
                }
              });
  return Status();
}

}  // namespace tenon
