#ifndef TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_
#define TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace tenon::reference {

enum class Order { kSequential, kJoint, kLlamaCpp };

// What a sampler may do with one row, in float64.
struct Sampling {
  double temperature = 1.0;  // 0: greedy
  int64_t top_k = 0;         // 0 or -1: off
  double top_p = 1.0;
  double min_p = 0.0;
  Order order = Order::kSequential;
  double typical_p = 1.0;
  double top_n_sigma = 0.0;
  double xtc_threshold = 2.0;  // above 1/2: it does not act
  double mirostat_mu = std::numeric_limits<double>::infinity();
};

// The distribution that a token is drawn from.
struct Distribution {
  std::vector<double> probability;  // after the filters; 0: not kept
  std::vector<double> logprob;      // of all tokens, before the filters
  // How far the filters were from keeping another set, as a difference of
  // probabilities or logits, and the most that one token could change.
  double margin = 1.0;
  double margin_mass = 0.0;
};

// Ids by (logit descending, id ascending).
inline std::vector<int64_t> RankTokens(const std::vector<double>& logits) {
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), int64_t{0});
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  return ids;
}

// Filters in the order they are called; `ids` are those kept, by rank.
class FilterChain {
 public:
  // Logits are finite or -inf, one at least finite.
  FilterChain(const std::vector<double>& logits, double temperature)
      : logits_(logits), ids_(RankTokens(logits)), best_(logits[ids_[0]]) {
    SetTemperature(temperature);
    while (logits_[ids_.back()] == -HUGE_VAL) ids_.pop_back();
    total_ = Mass();
  }

  void SetTemperature(double temperature) { temperature_ = temperature; }
  const std::vector<int64_t>& ids() const { return ids_; }
  // Not normalised: the weights of ties, and their sums, are exact. Relative to
  // the best that is kept, so that there is one that weighs something.
  double Weight(int64_t id) const {
    return std::exp((logits_[id] - best_) / temperature_);
  }
  double Mass() const {
    double sum = 0.0;
    for (int64_t id : ids_) sum += Weight(id);
    return sum;
  }
  double total() const { return total_; }
  double margin() const { return margin_; }
  double margin_mass() const { return margin_mass_; }

  void TopNSigma(double n) {
    double sum = 0.0, squares = 0.0;
    for (int64_t id : ids_) sum += logits_[id];
    const double mean = sum / static_cast<double>(ids_.size());
    for (int64_t id : ids_) {
      squares += (logits_[id] - mean) * (logits_[id] - mean);
    }
    KeepAtLeast(best_ -
                n * std::sqrt(squares / static_cast<double>(ids_.size())));
  }
  void TopK(int64_t k) {
    if (k < static_cast<int64_t>(ids_.size())) ids_.resize(k);
  }
  // `of` is the mass that top_p is a part of.
  void TopP(double top_p, double of) {
    double sum = 0.0;
    for (size_t i = 0; i < ids_.size(); ++i) {
      sum += Weight(ids_[i]);
      Decide(std::abs(sum / of - top_p), Weight(ids_[i]) / sum);
      if (sum >= top_p * of) {
        ids_.resize(i + 1);
        return;
      }
    }
  }
  void MinP(double min_p) {
    KeepAtLeast(logits_[ids_[0]] + temperature_ * std::log(min_p));
  }
  void Typical(double typical_p) {
    const double mass = Mass();
    double entropy = 0.0;
    for (int64_t id : ids_) {
      const double p = Weight(id) / mass;
      if (p > 0.0) entropy -= p * std::log(p);
    }
    const auto distance = [&](int64_t id) {
      return std::abs((best_ - logits_[id]) / temperature_ + std::log(mass) -
                      entropy);
    };
    std::vector<int64_t> nearest = ids_;
    std::stable_sort(nearest.begin(), nearest.end(), [&](int64_t a, int64_t b) {
      return distance(a) < distance(b);
    });
    double sum = 0.0;
    double radius = 0.0;
    for (int64_t id : nearest) {
      if (sum >= typical_p * mass) {
        // The next group: on both sides of the entropy it may be near, too.
        if (logits_[id] != logits_[nearest[0]]) {
          Decide(distance(id) - radius, Weight(id) / mass);
        }
        if (distance(id) > radius + 1e-13) break;
      }
      sum += Weight(id);
      radius = distance(id);
      Decide(std::abs(sum / mass - typical_p), Weight(id) / mass);
    }
    KeepIf([&](int64_t id) { return distance(id) <= radius + 1e-13; });
  }
  void Xtc(double threshold) {
    const double mass = Mass();
    size_t last = 0;
    for (size_t i = 0; i < ids_.size(); ++i) {
      const double p = Weight(ids_[i]) / mass;
      Decide(std::abs(p - threshold), 1.0);
      if (p >= threshold) last = i;
    }
    ids_.erase(ids_.begin(), ids_.begin() + static_cast<int64_t>(last));
    best_ = logits_[ids_[0]];
  }
  void Mirostat(double mu) {
    best_ = logits_[ids_[0]];
    const double mass = Mass();
    const double log2_mass = std::log2(mass);
    size_t kept = 1;
    for (; kept < ids_.size(); ++kept) {
      const double surprise =
          (best_ - logits_[ids_[kept]]) / temperature_ / std::log(2.0) +
          log2_mass;
      Decide(std::abs(surprise - mu), Weight(ids_[kept]) / mass);
      if (surprise > mu) break;
    }
    ids_.resize(kept);
  }
  void KeptBestIsBest() { best_ = logits_[ids_[0]]; }

 private:
  void Decide(double margin, double mass) {
    if (margin >= margin_) return;
    margin_ = margin;
    margin_mass_ = mass;
  }
  void KeepIf(const std::function<bool(int64_t)>& keep) {
    ids_.erase(std::remove_if(ids_.begin(), ids_.end(),
                              [&](int64_t id) { return !keep(id); }),
               ids_.end());
  }
  // Equal to the threshold is no matter of rounding where it is the best.
  void KeepAtLeast(double threshold) {
    size_t kept = 1;
    for (; kept < ids_.size(); ++kept) {
      const double above = logits_[ids_[kept]] - threshold;
      if (above != 0.0) Decide(std::abs(above), 1.0);
      if (above < 0.0) break;
    }
    ids_.resize(kept);
  }

  const std::vector<double>& logits_;
  std::vector<int64_t> ids_;
  double best_;
  double temperature_ = 1.0;
  double total_ = 0.0;
  double margin_ = 1.0;
  double margin_mass_ = 0.0;
};

inline void ApplyFilters(const Sampling& s, double temperature,
                         FilterChain* chain) {
  const bool llama = s.order == Order::kLlamaCpp;
  const auto typical = [&] {
    if (s.typical_p > 0.0 && s.typical_p < 1.0) chain->Typical(s.typical_p);
  };
  if (s.top_n_sigma > 0.0) chain->TopNSigma(s.top_n_sigma);
  if (s.top_k > 0) chain->TopK(s.top_k);
  if (llama) typical();
  if (s.top_p < 1.0) {
    chain->TopP(s.top_p,
                s.order == Order::kJoint ? chain->total() : chain->Mass());
  }
  if (s.min_p > 0.0) chain->MinP(s.min_p);
  if (!llama) typical();
  if (s.xtc_threshold <= 0.5) chain->Xtc(s.xtc_threshold);
  chain->SetTemperature(temperature);
  chain->KeptBestIsBest();
  if (s.mirostat_mu < HUGE_VAL) chain->Mirostat(s.mirostat_mu);
}

// softmax(logits / temperature), of which the filters keep some, renormalised.
// Logits are finite or -inf, one at least finite.
inline Distribution KeptDistribution(const std::vector<double>& logits,
                                     const Sampling& sampling) {
  const bool greedy = sampling.temperature == 0.0;
  const double draw_t = greedy ? 1.0 : sampling.temperature;
  const double filter_t = sampling.order == Order::kLlamaCpp ? 1.0 : draw_t;
  FilterChain chain(logits, filter_t);
  Distribution d;
  const double best = logits[chain.ids()[0]];
  for (double x : logits) {
    d.logprob.push_back((x - best) / filter_t - std::log(chain.total()));
  }
  if (greedy) {
    chain.TopK(1);
  } else {
    ApplyFilters(sampling, draw_t, &chain);
  }
  d.margin = chain.margin();
  d.margin_mass = chain.margin_mass();
  const double mass = chain.Mass();
  d.probability.assign(logits.size(), 0.0);
  for (int64_t id : chain.ids()) d.probability[id] = chain.Weight(id) / mass;
  return d;
}

// What penalties make of a logit.
struct Penalties {
  bool masked = false;
  double bias = 0.0;
  double repetition = 1.0;  // 1 where the token did not occur
  double frequency = 0.0;
  double presence = 0.0;
  double count = 0.0;  // in the output
  double offset = 0.0;
};
inline double Penalize(double x, const Penalties& p) {
  if (p.masked) return -HUGE_VAL;
  x += p.bias;
  x = x > 0.0 ? x / p.repetition : x * p.repetition;
  if (p.count > 0.0) x -= p.frequency * p.count + p.presence;
  return x + p.offset;
}

// Running sums of the probabilities in draw order: chunks of 16 ids are dealt
// out to ceil(vocab / 256) piles; pile by pile, in each by id.
class Cdf {
 public:
  explicit Cdf(const std::vector<double>& probability) {
    const int64_t vocab = static_cast<int64_t>(probability.size());
    const int64_t piles = (vocab + 255) / 256;
    double sum = 0.0;
    for (int64_t pile = 0; pile < piles; ++pile) {
      for (int64_t chunk = pile; chunk * 16 < vocab; chunk += piles) {
        for (int64_t id = chunk * 16; id < std::min(chunk * 16 + 16, vocab);
             ++id) {
          low_.resize(probability.size());
          high_.resize(probability.size());
          low_[id] = sum;
          high_[id] = sum += probability[id];
          ids_.push_back(id);
          sums_.push_back(sum);
        }
      }
    }
  }

  // The first id at which the running sum exceeds `uniform`.
  int64_t Invert(double uniform) const {
    const auto at = std::upper_bound(sums_.begin(), sums_.end(), uniform);
    return at == sums_.end() ? -1 : ids_[at - sums_.begin()];
  }
  // How far `uniform` is from the interval that draws `token`; 0 inside it.
  double Distance(int64_t token, double uniform) const {
    return std::max({0.0, low_[token] - uniform, uniform - high_[token]});
  }
  double low(int64_t token) const { return low_[token]; }

 private:
  std::vector<int64_t> ids_;  // in draw order, as sums_
  std::vector<double> sums_;
  std::vector<double> low_;  // by id
  std::vector<double> high_;
};

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_SAMPLER_REFERENCE_H_
