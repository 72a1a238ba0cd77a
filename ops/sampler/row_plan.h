#ifndef TENON_OPS_SAMPLER_ROW_PLAN_H_
#define TENON_OPS_SAMPLER_ROW_PLAN_H_

#include <cstdint>
#include <limits>

#include "ops/sampler/row_tiles.h"
#include "ops/sampler/sampler.h"
#include "ops/sampler/strict_math.h"

// How a row is sampled: its parameters made ready, and its filters in numbers,
// for both backends. Private to ops/sampler. What tiles, cutoffs and masses are
// is in row_tiles.h.

namespace tenon {

// SamplingParams made ready for a vocabulary. Values that
// ValidateSamplingParams rejects give some token, never undefined behaviour.
struct RowPlan {
  bool greedy = true;  // the best token alone
  FilterOrder order = FilterOrder::kSequential;

  // What filters, `sum` of SubTile and kUnfiltered logprobs see; `scale` is
  // log2(e) / temperature, finite and normal.
  double temperature = 1.0;
  float scale = 0.0f;
  // What mirostat and the draw see; another than the above only for kLlamaCpp.
  double draw_temperature = 1.0;
  float draw_scale = 0.0f;

  int32_t top_k = 0;             // 0: off, else 1 < top_k < vocab
  float top_p = 1.0f;            // 1: off, else below
  float min_p = 0.0f;            // 0: off, else at most 1
  float typical_p = 1.0f;        // 1: off, else between 0 and 1
  float top_n_sigma = 0.0f;      // 0: off
  float xtc_probability = 0.0f;  // 0: off
  float xtc_threshold = 0.0f;
  float mirostat_tau = 0.0f;  // 0: off
  float mirostat_eta = 0.0f;

  // 1 and 0 where off.
  float repetition_penalty = 1.0f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  bool use_bitmask = false;
  bool only_allowed = false;
  int32_t num_top_logprobs = 0;

  // False: a plain draw from the sub-tiles' sums.
  constexpr bool filtered() const {
    return top_k != 0 || top_p < 1.0f || min_p > 0.0f || typical_p < 1.0f ||
           top_n_sigma > 0.0f || xtc_probability > 0.0f ||
           mirostat_tau > 0.0f || scale != draw_scale;
  }
  // top-p counts what top-k and top-n-sigma kept, not the whole distribution.
  constexpr bool top_p_of_kept() const { return order != FilterOrder::kJoint; }
  // Whether they keep anything less than all.
  constexpr bool narrowed() const { return top_k != 0 || top_n_sigma > 0.0f; }
  // typical-p comes before top-p and min-p.
  constexpr bool typical_first() const {
    return order == FilterOrder::kLlamaCpp && typical_p < 1.0f;
  }
  // min-p may come first, as no other filter needs the sum of what it drops.
  constexpr bool min_p_first() const {
    return min_p > 0.0f && !typical_first() &&
           !(top_p < 1.0f && narrowed() && top_p_of_kept());
  }
};

constexpr float ScaleOf(double temperature) {
  constexpr float kMin = std::numeric_limits<float>::min();
  constexpr float kMax = std::numeric_limits<float>::max();
  // A scale that is no normal number would make 0 * inf of the best.
  const double scale = 1.4426950408889634 / temperature;
  return scale < kMin ? kMin : scale > kMax ? kMax : static_cast<float>(scale);
}

// scale of raw logprobs: that of temperature 1.
inline constexpr float kRawScale = ScaleOf(1.0);

// The value where it is positive and finite, else the nearest that is; 0 for
// NaN.
constexpr float PositiveOr0(float value) {
  constexpr float kMax = std::numeric_limits<float>::max();
  return value > 0.0f ? (value < kMax ? value : kMax) : 0.0f;
}

constexpr RowPlan MakeRowPlan(const SamplingParams& params, int64_t vocab) {
  RowPlan plan;
  const bool random = params.temperature > 0.0f;
  plan.order = params.filter_order;
  const bool llama = plan.order == FilterOrder::kLlamaCpp;
  if (random) plan.draw_temperature = PositiveOr0(params.temperature);
  if (!llama) plan.temperature = plan.draw_temperature;
  plan.draw_scale = ScaleOf(plan.draw_temperature);
  plan.scale = llama ? ScaleOf(1.0) : plan.draw_scale;
  if (params.top_k > 1 && params.top_k < vocab) plan.top_k = params.top_k;
  if (params.top_p < 1.0f) plan.top_p = params.top_p;
  if (params.min_p > 0.0f) plan.min_p = params.min_p < 1.0f ? params.min_p : 1;
  if (params.typical_p > 0.0f && params.typical_p < 1.0f) {
    plan.typical_p = params.typical_p;
  }
  plan.top_n_sigma = PositiveOr0(params.top_n_sigma);
  if (params.xtc_threshold <= 0.5f) {
    plan.xtc_probability = PositiveOr0(params.xtc_probability);
    plan.xtc_threshold = PositiveOr0(params.xtc_threshold);
  }
  plan.mirostat_tau = PositiveOr0(params.mirostat_tau);
  plan.mirostat_eta = params.mirostat_eta;
  // llama.cpp's typical-p comes before top-p and can drop the best.
  const bool best_alone =
      params.top_p <= 0.0f && !(llama && plan.typical_p < 1.0f);
  plan.greedy = !random || params.top_k == 1 || best_alone;
  if (params.repetition_penalty > 0.0f) {
    plan.repetition_penalty = params.repetition_penalty;
  }
  plan.frequency_penalty = params.frequency_penalty;
  plan.presence_penalty = params.presence_penalty;
  plan.use_bitmask = (params.flags & kUseBitmask) != 0;
  plan.only_allowed = (params.flags & kOnlyAllowed) != 0;
  if (params.num_top_logprobs > 0) {
    plan.num_top_logprobs = params.num_top_logprobs < kMaxTopLogprobs
                                ? params.num_top_logprobs
                                : kMaxTopLogprobs;
  }
  return plan;
}

// The logit that counts, of one that the bitmask has let pass.
TENON_HOST_DEVICE inline float ApplyEdit(const RowPlan& plan,
                                         const LogitEdit& edit, float x) {
  if ((edit.state & LogitEdit::kBan) != 0) return -kInfinity;
  if (plan.only_allowed && (edit.state & LogitEdit::kAllow) == 0) {
    return -kInfinity;
  }
  x = strict::Add(x, edit.bias);
  const uint32_t count = edit.state & LogitEdit::kCountMask;
  if (count != 0 || (edit.state & LogitEdit::kInPrompt) != 0) {
    x = x > 0.0f ? strict::Div(x, plan.repetition_penalty)
                 : strict::Mul(x, plan.repetition_penalty);
  }
  if (count != 0) {
    x = strict::Sub(
        x, strict::Mul(plan.frequency_penalty, static_cast<float>(count)));
    x = strict::Sub(x, plan.presence_penalty);
  }
  return strict::Add(x, edit.offset);
}

// Edits [begin, end) of a row, inside what there is whatever the offsets are.
struct EditRange {
  int64_t begin = 0;
  int64_t end = 0;
};
constexpr EditRange EditsOfRow(const SamplerParams& params, int64_t row) {
  if (params.edits == nullptr) return {};
  const int32_t* offsets = params.edit_offsets.As<const int32_t>();
  EditRange range{offsets[row], offsets[row + 1]};
  if (range.begin < 0) range.begin = 0;
  if (range.end > params.num_edits) range.end = params.num_edits;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// The mirostat state of a call.
struct MirostatState {
  float* mu = nullptr;  // null: mirostat is off
  int64_t size = 0;
  const int32_t* places = nullptr;  // [rows, 2]; null: that of row i is mu[i]
  int64_t places_stride = 0;

  // Where a row reads its mu (0) or leaves it (1); null: nowhere.
  TENON_HOST_DEVICE float* Place(int64_t row, int which) const {
    const int64_t place =
        places != nullptr ? places[row * places_stride + which] : row;
    return place >= 0 && place < size ? mu + place : nullptr;
  }
  // Of rows with mirostat_tau: mu before the draw and, whatever came of it,
  // after it.
  TENON_HOST_DEVICE float MuOf(int64_t row,
                               const SamplingParams& params) const {
    if ((params.flags & kSetMirostatMu) != 0) return params.mirostat_mu;
    const float* place = Place(row, 0);
    return place != nullptr ? *place : 2.0f * params.mirostat_tau;
  }
  TENON_HOST_DEVICE void Leave(int64_t row, float next) const {
    float* place = Place(row, 1);
    if (place != nullptr) *place = next;
  }
};
constexpr MirostatState MirostatStateOf(const SamplerParams& params) {
  MirostatState state;
  if (!params.mirostat_mu.present()) return state;
  state.mu = params.mirostat_mu.As<float>();
  state.size = params.mirostat_mu.shape[0];
  if (!params.mirostat_places.present()) return state;
  state.places = params.mirostat_places.As<const int32_t>();
  state.places_stride = params.mirostat_places.stride[0];
  return state;
}

// The filters in numbers. `best` is the largest logit, finite; `mass` a sum of
// FixedMass or TileMass(kMassBits) of the tokens a filter chooses from, as
// Weight(x, best, plan.scale) gives it.

// min-p keeps logits from here on; `best` is the largest that is kept.
TENON_HOST_DEVICE inline float MinPThreshold(const RowPlan& plan, float best) {
  return FloatAbove(
      strict::Add(static_cast<double>(best),
                  strict::Mul(plan.temperature,
                              strict::Log(static_cast<double>(plan.min_p)))));
}

// top-p and typical-p keep tokens up to this mass: ceil(p * mass), at least 1.
TENON_HOST_DEVICE inline uint64_t MassTarget(float p, uint64_t mass) {
  const double exact =
      strict::Mul(static_cast<double>(p), static_cast<double>(mass));
  if (!(exact > 0.0)) return 1;
  const uint64_t whole = static_cast<uint64_t>(exact);
  return static_cast<double>(whole) < exact ? whole + 1 : whole;
}

// Where `count` tokens have `mass` together, those with less than (1 - top_p) *
// mass / count each cannot make up what top-p leaves out: its cutoff is not
// among them. The search may start from this logit; half of that mass leaves
// room for rounding. Only a bound: no result depends on it.
TENON_HOST_DEVICE inline float TopPLowerBound(const RowPlan& plan, float best,
                                              uint64_t mass, int64_t count) {
  const double negligible = 0.5 * (1.0 - plan.top_p) *
                            (static_cast<double>(mass) / kMassOfBest) /
                            static_cast<double>(count);
  return FloatBelow(best + plan.temperature * strict::Log(negligible));
}

// Of all logits above -inf. Doubles in a fixed order: in a sub-tile as that of
// SubTile::sum, with x and x * x (fused: squares = fma(x, x, squares), starting
// from 0) in place of e, -inf and what is past the end being passed over; then
// over sub-tiles P[j] = the sum over t = j, j + 32, j + 64, ... in this order,
// j < 32, and P[j] = P[j] + P[j + s] for s = 16, 8, 4, 2, 1, the result being
// P[0].
struct Moments {
  double sum;
  double squares;
  int64_t count;
};

// top-n-sigma keeps logits from here on.
TENON_HOST_DEVICE inline float SigmaThreshold(const RowPlan& plan, float best,
                                              const Moments& moments) {
  const double count = static_cast<double>(moments.count);
  const double mean = strict::Div(moments.sum, count);
  const double variance =
      strict::Sub(strict::Div(moments.squares, count), strict::Mul(mean, mean));
  const double sigma = strict::Sqrt(variance > 0.0 ? variance : 0.0);
  const float threshold = FloatAbove(
      strict::Sub(static_cast<double>(best),
                  strict::Mul(static_cast<double>(plan.top_n_sigma), sigma)));
  return threshold < best ? threshold : best;
}

// typical-p: the entropy in bits, but for the logarithm of the sum, which every
// token's surprise has as well, is `surprise` / `mass`, a sum of these.
TENON_HOST_DEVICE inline uint64_t FixedSurprise(float x, float best,
                                                float scale) {
  const float bits = strict::Mul(strict::Sub(best, x), scale);
  const float weight = strict::Exp2(-bits);
  return weight > 0.0f ? FixedMass(strict::Mul(weight, bits)) : 0;
}

// The logit of a token whose surprise is the entropy, and how far from it a
// token is: typical-p keeps the nearest. Radix selection takes the negative.
TENON_HOST_DEVICE inline float TypicalCentre(const RowPlan& plan, float best,
                                             uint64_t surprise, uint64_t mass) {
  const double bits =
      strict::Div(static_cast<double>(surprise), static_cast<double>(mass));
  return static_cast<float>(
      strict::Sub(static_cast<double>(best),
                  strict::Div(bits, static_cast<double>(plan.scale))));
}
TENON_HOST_DEVICE inline float TypicalDistance(float x, float centre) {
  const float difference = strict::Sub(x, centre);
  return difference < 0.0f ? -difference : difference;
}

// XTC: whether it drops tokens, and the FixedMass from which a token counts as
// a top choice. Of the kept top choices the last in rank stays; what ranks
// before it goes.
constexpr bool XtcActs(const RowPlan& plan, const SamplingParams& params) {
  return plan.xtc_probability > 0.0f &&
         UniformAt(params.seed, params.position, RandomStream::kXtc) <
             plan.xtc_probability;
}
TENON_HOST_DEVICE inline uint64_t XtcMass(const RowPlan& plan, uint64_t mass) {
  return MassTarget(plan.xtc_threshold, mass);
}

// mirostat keeps logits from here on. `best` is the largest that is kept, and
// `mass` relative to it, by draw_scale.
TENON_HOST_DEVICE inline double Log2OfMass(uint64_t mass) {
  return strict::Mul(
      strict::Log(strict::Mul(static_cast<double>(mass), 0x1p-43)),
      1.4426950408889634);
}
TENON_HOST_DEVICE inline float MirostatThreshold(const RowPlan& plan,
                                                 float best, uint64_t mass,
                                                 float mu) {
  const double below =
      strict::Div(strict::Sub(static_cast<double>(mu), Log2OfMass(mass)),
                  static_cast<double>(plan.draw_scale));
  const float threshold =
      FloatAbove(strict::Sub(static_cast<double>(best), below));
  return threshold < best ? threshold : best;
}

// mu after token of logit x, `mass` that of what mirostat kept.
TENON_HOST_DEVICE inline float NextMirostatMu(const RowPlan& plan, float best,
                                              uint64_t mass, float mu,
                                              float x) {
  const double surprise = strict::Add(
      strict::Mul(
          strict::Sub(static_cast<double>(best), static_cast<double>(x)),
          static_cast<double>(plan.draw_scale)),
      Log2OfMass(mass));
  return static_cast<float>(strict::Sub(
      static_cast<double>(mu),
      strict::Mul(
          static_cast<double>(plan.mirostat_eta),
          strict::Sub(surprise, static_cast<double>(plan.mirostat_tau)))));
}

// The logarithm of a mass in units of 2^-bits.
TENON_HOST_DEVICE inline double LogOfMass(uint64_t mass, int bits) {
  const uint64_t exponent = static_cast<uint64_t>(1023 - bits) << 52;
  const double unit = __builtin_bit_cast(double, exponent);
  return strict::Log(strict::Mul(static_cast<double>(mass), unit));
}

// The logprob of logit x where the sum has this LogOfMass, of the best's.
TENON_HOST_DEVICE inline float LogprobOf(float x, float best,
                                         double temperature, double log_mass) {
  const double gap =
      strict::Sub(static_cast<double>(x), static_cast<double>(best));
  // The best's needs no division, which CUDA takes long for with a 0.
  const double scaled = gap == 0.0 ? 0.0 : strict::Div(gap, temperature);
  const double logprob = strict::Sub(scaled, log_mass);
  // -0, which the sign of zeros among the logits can make, is 0.
  return strict::Add(static_cast<float>(logprob), 0.0f);
}
TENON_HOST_DEVICE inline float LogprobOf(float x, float best,
                                         double temperature, uint64_t mass,
                                         int bits) {
  return LogprobOf(x, best, temperature, LogOfMass(mass, bits));
}

// The probability of a token of this Weight, `mass` in units of 2^-43 being the
// sum.
TENON_HOST_DEVICE inline float ProbabilityOf(float weight, uint64_t mass) {
  return static_cast<float>(
      strict::Div(strict::Mul(static_cast<double>(weight), kMassOfBest),
                  static_cast<double>(mass)));
}

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_ROW_PLAN_H_
