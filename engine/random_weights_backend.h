#ifndef TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_
#define TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_

#include <cstdint>

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
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t first_element = 0;  // of the part, in the whole tensor ...
  int64_t full_cols = 0;      // ... which has this many columns
  uint64_t key = 0;           // of seed and tensor
  bool is_norm = false;
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

Status FillRandomCpu(const RandomPart& part, Stream stream);
Status FillRandomCuda(const RandomPart& part, Stream stream);

}  // namespace tenon

#endif  // TENON_ENGINE_RANDOM_WEIGHTS_BACKEND_H_
