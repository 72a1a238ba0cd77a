#ifndef TENON_OPS_SAMPLER_ROW_PLAN_H_
#define TENON_OPS_SAMPLER_ROW_PLAN_H_

#include <cstdint>
#include <limits>

#include "ops/sampler/sampler.h"

// What both backends share, so that they take the same decisions. Private to
// ops/sampler. Functions are constexpr, so that device code may call them too.
//
// A row is handled in two stages. "Summarise" reads all logits once and leaves
// the maximum and the sum of exponentials of every sub-tile. "Decide" works on
// these and reads again only the sub-tiles that can matter. Every filter keeps
// a prefix of the tokens in the order (logit descending, id ascending), so that
// any combination of filters is one Cutoff; it is found by radix selection, in
// a fixed number of passes whatever the logits are.

namespace tenon {

// Tokens of a sub-tile, consecutive ids.
inline constexpr int kSubTile = 256;
inline constexpr int64_t kMaxVocab = int64_t{1} << 20;

constexpr int64_t NumSubTiles(int64_t vocab) {
  return (vocab + kSubTile - 1) / kSubTile;
}

struct SubTile {
  float max;  // NaN where any logit is NaN
  float sum;  // of exp2((logit - max) * scale); 0 where all are -inf
};

// Keeps the tokens with a larger logit than `value`, and of those with just
// this logit the ones up to id `last_id`.
struct Cutoff {
  float value = -std::numeric_limits<float>::infinity();
  int32_t last_id = std::numeric_limits<int32_t>::max();

  constexpr bool Keeps(float logit, int32_t id) const {
    return logit > value || (logit == value && id <= last_id);
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
inline constexpr double kMassOfBest = 0x1p43;
constexpr uint64_t FixedMass(float exponential) {
  return static_cast<uint64_t>(exponential * static_cast<float>(kMassOfBest));
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
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    return prefix <= OrderedKey(-kInfinity) ? -kInfinity
                                            : FromOrderedKey(prefix);
  }
  constexpr float Highest(uint32_t prefix) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const uint32_t key = prefix | ~prefix_mask;
    return key >= OrderedKey(kInfinity) ? kInfinity : FromOrderedKey(key);
  }
};
constexpr RadixPass GetRadixPass(int pass) {
  return pass == 0   ? RadixPass{21, 0x7ffu, 0u}
         : pass == 1 ? RadixPass{10, 0x7ffu, 0xffe00000u}
                     : RadixPass{0, 0x3ffu, 0xfffffc00u};
}

// SamplingParams made ready for a vocabulary. Values that
// ValidateSamplingParams rejects give some token, never undefined behaviour.
struct RowPlan {
  bool greedy = true;  // the best token alone
  double temperature = 1.0;
  float scale = 0.0f;  // log2(e) / temperature, finite and normal
  int32_t top_k = 0;   // 0: off, else 1 < top_k < vocab
  float top_p = 1.0f;  // 1: off, else 0 < top_p < 1
  float min_p = 0.0f;  // 0: off, else at most 1
  bool sequential = true;

  constexpr bool filtered() const {
    return top_k != 0 || top_p < 1.0f || min_p > 0.0f;
  }
};

constexpr RowPlan MakeRowPlan(const SamplingParams& params, int64_t vocab) {
  constexpr float kMin = std::numeric_limits<float>::min();
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr double kLog2E = 1.4426950408889634;
  RowPlan plan;
  const bool random = params.temperature > 0.0f;
  if (random) {
    plan.temperature = params.temperature < kMax ? params.temperature : kMax;
  }
  // A temperature that is no normal number would make 0 * inf of the best.
  const double scale = kLog2E / plan.temperature;
  plan.scale = scale < kMin   ? kMin
               : scale > kMax ? kMax
                              : static_cast<float>(scale);
  plan.greedy = !random || params.top_k == 1 || params.top_p <= 0.0f;
  if (params.top_k > 1 && params.top_k < vocab) plan.top_k = params.top_k;
  if (params.top_p > 0.0f && params.top_p < 1.0f) plan.top_p = params.top_p;
  if (params.min_p > 0.0f) plan.min_p = params.min_p < 1.0f ? params.min_p : 1;
  plan.sequential = params.filter_order == FilterOrder::kSequential;
  return plan;
}

// The filters in numbers. `best` is the row's largest logit, finite.

// min-p keeps logits from here on; `log` is the natural logarithm of min_p.
constexpr float MinPThreshold(const RowPlan& plan, float best, double log) {
  return FloatAbove(best + plan.temperature * log);
}

// top-p keeps the best tokens up to this fixed-point mass; `mass` is that of
// all tokens it chooses from, the best one's being 1.
constexpr uint64_t TopPTarget(const RowPlan& plan, double mass) {
  const double exact = plan.top_p * mass * kMassOfBest;
  const uint64_t whole = static_cast<uint64_t>(exact);
  const uint64_t target = whole + (static_cast<double>(whole) < exact ? 1 : 0);
  return target > 0 ? target : 1;
}

// Where `count` tokens have `mass` together, those with less than (1 - top_p) *
// mass / count each cannot make up what top-p leaves out: its cutoff is not
// among them. This returns half of that, which leaves room for rounding, and
// with its logarithm the next function gives a logit that the search may start
// from.
constexpr double TopPNegligibleMass(const RowPlan& plan, double mass,
                                    double count) {
  return 0.5 * (1.0 - plan.top_p) * mass / count;
}
constexpr float TopPLowerBound(const RowPlan& plan, float best, double log) {
  return FloatBelow(best + plan.temperature * log);
}

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_ROW_PLAN_H_
