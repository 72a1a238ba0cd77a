#ifndef TENON_OPS_SAMPLER_ROW_TILES_H_
#define TENON_OPS_SAMPLER_ROW_TILES_H_

#include <cstdint>
#include <limits>

#include "ops/sampler/sampler.h"
#include "ops/sampler/strict_math.h"

// What both backends share, so that they take the same decisions, bit for bit.
// Private to ops/sampler. Functions are constexpr or TENON_HOST_DEVICE, so that
// device code may call them too.
//
// A row is handled in two stages. "Summarise" reads all logits once and leaves
// the maximum and the sum of weights of every sub-tile. "Decide" works on these
// and reads again only the sub-tiles that can matter. A row without filters
// needs just one of them; filters keep a range of the tokens in the order
// (logit descending, id ascending), and its two ends are found in a
// bounded number of passes whatever the logits are.
//
// Bits that do not depend on who adds up what in which order:
//   - The sum of a sub-tile is of floats, in the fixed order given at SubTile.
//   - All sums across sub-tiles, and all sums of filters, are of integers.
//   - Moments (top-n-sigma) are doubles in the fixed order given at Moments.
//   - Everything else is strict_math.h.

namespace tenon {

// Places of a sub-tile: 16 chunks of 16 consecutive ids, chunk c of sub-tile t
// being chunk c * NumSubTiles + t of the row. A chunk of bfloat16 is a sector
// of memory, 32 bytes; one of float32 is a vector of AVX-512.
inline constexpr int kChunk = 16;
inline constexpr int kChunksOfSubTile = 16;
inline constexpr int kSubTile = kChunk * kChunksOfSubTile;
inline constexpr int64_t kMaxVocab = int64_t{1} << 20;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The id at a place; past the end of the vocabulary for a few. Its inverse is
// DrawOrder: DrawOrder(IdAt(tile, place, tiles), vocab) == tile * 256 + place.
constexpr int64_t IdAt(int64_t tile, int place, int64_t num_tiles) {
  return (place / kChunk * num_tiles + tile) * kChunk + place % kChunk;
}

// The fixed order of `sum`, e[c][l] being the weight at lane l of chunk c, 0
// past the end of the vocabulary:
//   A[g][l] = ((e[g][l] + e[g + 4][l]) + e[g + 8][l]) + e[g + 12][l], g < 4
//   B[l] = (A[0][l] + A[1][l]) + (A[2][l] + A[3][l])
//   C[l] = B[l] + B[l + 8], l < 8;  D[l] = C[l] + C[l + 4], l < 4
//   sum = (D[0] + D[2]) + (D[1] + D[3])
struct SubTile {
  float max;  // NaN where any logit that is not masked is NaN
  float sum;  // of Weight(x, max, plan.scale); 0 where max is not finite
};

// One end of what filters keep: the tokens with a larger logit than `value`,
// and of those with just this logit the ones up to id `last_id`.
struct Cutoff {
  float value = -kInfinity;
  int32_t last_id = std::numeric_limits<int32_t>::max();

  constexpr bool Keeps(float logit, int32_t id) const {
    return logit > value || (logit == value && id <= last_id);
  }
};

// The other end: the tokens with a smaller logit than `value`, and of those
// with just this logit the ones from id `first_id`.
struct Ceiling {
  float value = kInfinity;
  int32_t first_id = 0;

  constexpr bool Keeps(float logit, int32_t id) const {
    return logit < value || (logit == value && id >= first_id);
  }
};

struct KeptRange {
  Ceiling from;
  Cutoff to;

  constexpr bool Keeps(float logit, int32_t id) const {
    return from.Keeps(logit, id) && to.Keeps(logit, id);
  }
};

// Floats as integers of the same order. The two zeros are one value.
constexpr uint32_t OrderedKey(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
constexpr float FromOrderedKey(uint32_t key) {
  return __builtin_bit_cast(
      float, (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// The nearest finite floats not above and not below `value`.
constexpr float FloatBelow(double value) {
  constexpr float kMax = std::numeric_limits<float>::max();
  if (!(value > -kMax)) return -kMax;
  if (value >= kMax) return kMax;
  const float nearest = static_cast<float>(value);
  if (nearest <= value) return nearest;
  if (nearest == 0.0f) return -std::numeric_limits<float>::denorm_min();
  return FromOrderedKey(OrderedKey(nearest) - 1);
}
constexpr float FloatAbove(double value) { return -FloatBelow(-value); }

// Probabilities in proportion to the best token's, in fixed point: integer sums
// are the same in any order. The sum of kMaxVocab of them fits 64 bits.
inline constexpr int kMassBits = 43;
inline constexpr double kMassOfBest = 0x1p43;
constexpr uint64_t FixedMass(float weight) {
  return static_cast<uint64_t>(weight * static_cast<float>(kMassOfBest));
}

// The same of a whole sub-tile, in units of 2^-bits: `weight` is that of its
// maximum. The product is exact.
TENON_HOST_DEVICE inline uint64_t TileMass(float sum, float weight, int bits) {
  const uint64_t exponent = static_cast<uint64_t>(1023 + bits) << 52;
  const double unit = __builtin_bit_cast(double, exponent);
  return static_cast<uint64_t>(strict::Mul(
      strict::Mul(static_cast<double>(sum), static_cast<double>(weight)),
      unit));
}

// Units for the sub-tiles of a plain draw, as fine as 64 bits allow: `total` is
// the sum of their TileMass of kMassBits, at least kMassOfBest. The sum in the
// new units is between 2^61 and 2^63.
TENON_HOST_DEVICE inline int DrawBits(uint64_t total) {
#if defined(__CUDA_ARCH__)
  const int zeros = __clzll(static_cast<long long>(total));
#else
  const int zeros = __builtin_clzll(total);
#endif
  return kMassBits + zeros - 2;
}

// Where u = numerator * 2^-54 falls in a sum of masses: floor(u * total), less
// than `total`. The entry drawn is the first at which the running sum of masses
// in draw order, itself included, exceeds this.
TENON_HOST_DEVICE inline uint64_t DrawTarget(uint64_t numerator,
                                             uint64_t total) {
  return strict::MulHigh(numerator << 10, total);
}

// In a plain draw the sub-tile is chosen by TileMass and the token in it by the
// FixedMass of Weight(x, its max, scale), sum of these `weight`. `residual` is
// the target less the masses of the sub-tiles before, `mass` the sub-tile's
// own.
TENON_HOST_DEVICE inline double FractionInTile(uint64_t residual,
                                               uint64_t mass) {
  return strict::Div(strict::Add(static_cast<double>(residual), 0.5),
                     static_cast<double>(mass));
}
TENON_HOST_DEVICE inline uint64_t TargetInTile(double fraction,
                                               uint64_t weight) {
  const uint64_t target =
      static_cast<uint64_t>(strict::Mul(fraction, static_cast<double>(weight)));
  return target < weight ? target : weight - 1;
}

TENON_HOST_DEVICE inline uint64_t TargetInTile(uint64_t residual, uint64_t mass,
                                               uint64_t weight) {
  return TargetInTile(FractionInTile(residual, mass), weight);
}

// The digits of a key that radix selection looks at, the highest first.
inline constexpr int kRadixPasses = 3;
inline constexpr int kRadixBins = 2048;
struct RadixPass {
  int shift;
  uint32_t digit_mask;
  uint32_t prefix_mask;  // of the digits that earlier passes have settled

  constexpr bool Matches(uint32_t key, uint32_t prefix) const {
    return ((key ^ prefix) & prefix_mask) == 0;
  }
  constexpr int Bin(uint32_t key) const {
    return static_cast<int>((key >> shift) & digit_mask);
  }
  // The smallest and largest values that can match.
  constexpr float Lowest(uint32_t prefix) const {
    return prefix <= OrderedKey(-kInfinity) ? -kInfinity
                                            : FromOrderedKey(prefix);
  }
  constexpr float Highest(uint32_t prefix) const {
    const uint32_t key = prefix | ~prefix_mask;
    return key >= OrderedKey(kInfinity) ? kInfinity : FromOrderedKey(key);
  }
};
constexpr RadixPass GetRadixPass(int pass) {
  return pass == 0   ? RadixPass{21, 0x7ffu, 0u}
         : pass == 1 ? RadixPass{10, 0x7ffu, 0xffe00000u}
                     : RadixPass{0, 0x3ffu, 0xfffffc00u};
}

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_ROW_TILES_H_
