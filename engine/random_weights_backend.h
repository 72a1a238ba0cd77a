#ifndef TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_
#define TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_

#include <cstdint>

#include "engine/tensor_parallel.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

// Private to the engine.

namespace tenon {

// A rank's part of a tensor, packed, to be filled with random values.
struct RandomPart {
  void* data = nullptr;
  DType dtype = DType::kInvalid;
  Device device;
  Share rows;  // of the whole tensor ...
  Share cols;
  int64_t full_cols = 0;  // ... which has this many columns
  uint64_t key = 0;       // of seed and tensor
  bool is_norm = false;

  // Of float8_e4m3: a scale for each block_rows rows and block_cols columns.
  float* scales = nullptr;  // [scale_rows, scale_stride], zero from scale_cols
  int64_t scale_rows = 0;
  int64_t scale_cols = 0;
  int64_t scale_stride = 0;
  int64_t block_rows = 1;
  int64_t block_cols = 1;
};

// Bijective and well mixed (the finaliser of SplitMix64).
constexpr uint64_t MixBits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The value of one element: the sum of four uniform integers of 16 bits, which
// is nearly normal, scaled. All exact but one multiplication, so that every
// device makes the same bits, whatever it may fuse.
constexpr float RandomWeight(uint64_t key, int64_t element, bool is_norm) {
  constexpr int32_t kMean = 2 * 65535;
  constexpr float kSigma = 37837.2f;  // 65536 / sqrt(3)
  constexpr float kMatrixScale = 0.02f / kSigma;
  constexpr float kNormScale = 0.1f / kSigma;
  constexpr int32_t kNormOffset = 378372;  // 1 / kNormScale
  const uint64_t bits =
      MixBits(key + static_cast<uint64_t>(element) * 0x9e3779b97f4a7c15u);
  const int32_t sum =
      static_cast<int32_t>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                           (bits >> 32 & 0xffff) + (bits >> 48));
  return is_norm ? static_cast<float>(sum - kMean + kNormOffset) * kNormScale
                 : static_cast<float>(sum - kMean) * kMatrixScale;
}

// The scale of a block, of the whole tensor's blocks: 2^-12 to 2^-11, so that
// no RandomWeight is beyond the largest float8_e4m3. Exact.
constexpr float RandomScale(uint64_t key, int64_t block) {
  constexpr float kUnit = 1.0f / (1 << 20);
  const uint64_t bits =
      MixBits(~key + static_cast<uint64_t>(block) * 0x9e3779b97f4a7c15u);
  return static_cast<float>(256 + (bits & 0xff)) * kUnit;
}

// The scale of the rank's element (row, col), which is not padding.
constexpr float RandomScaleAt(const RandomPart& part, int64_t row,
                              int64_t col) {
  const int64_t blocks_in_row =
      (part.full_cols + part.block_cols - 1) / part.block_cols;
  return RandomScale(
      part.key, part.rows.WholeIndex(row) / part.block_rows * blocks_in_row +
                    part.cols.WholeIndex(col) / part.block_cols);
}

// What goes to scales[row * scale_stride + col].
constexpr float RandomScaleEntry(const RandomPart& part, int64_t row,
                                 int64_t col) {
  if (col >= part.scale_cols) return 0.0f;
  return RandomScaleAt(part, row * part.block_rows, col * part.block_cols);
}

// The value of the rank's element (row, col), in units of its scale.
constexpr float RandomWeightAt(const RandomPart& part, int64_t row,
                               int64_t col) {
  const int64_t whole_row = part.rows.WholeIndex(row);
  const int64_t whole_col = part.cols.WholeIndex(col);
  if (whole_row < 0 || whole_col < 0) return 0.0f;
  const float weight = RandomWeight(
      part.key, whole_row * part.full_cols + whole_col, part.is_norm);
  if (part.scales == nullptr) return weight;
  return weight / RandomScaleAt(part, row, col);
}

Status FillRandomCpu(const RandomPart& part, Stream stream);
Status FillRandomCuda(const RandomPart& part, Stream stream);

}  // namespace tenon

#endif  // TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_
