#include "ops/sampler/sampler_cpu_filters.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "ops/sampler/sampler_cpu_select.h"

namespace tenon {
namespace {

// The filters of one row at work on its candidates.
class Filters {
 public:
  Filters(const CpuRow& row, Candidates* candidates)
      : row_(row), plan_(row.plan), c_(*candidates) {}

  KeptTokens Run(const SamplingParams& params, float mu);

 private:
  float SigmaFloor() const;
  // A floor that leaves out little but what top-p will drop; a guess.
  float GuessTopPFloor(float lower_bound, uint64_t target) const;
  void CollectForTopP(float floor);

  void Compact(const KeptRange& range) {
    known_mass_ = 0;
    c_.count = row_.kernels.compact(range, row_.num_tiles(), c_.x, c_.places,
                                    c_.count);
  }
  uint64_t Mass() const {
    if (known_mass_ != 0) return known_mass_;
    return row_.kernels.mass(c_.x, c_.count, row_.best, plan_.scale);
  }
  Weigh ByMass() const { return {true, row_.best, plan_.scale}; }

  // Keeps the best whose weights reach the target, ties by id; false, and all
  // kept, where they do not.
  bool KeepBest(const Weigh& weigh, uint64_t target);
  int32_t IdOfTie(float value, uint64_t rank) const;
  void KeepMinP(float best);
  void KeepTypical();
  void DropTopChoices();
  KeptTokens KeepMirostat(float mu);

  const CpuRow& row_;
  const RowPlan& plan_;
  Candidates& c_;
  uint64_t known_mass_ = 0;  // Mass(); 0: not known
};

float Filters::SigmaFloor() const {
  double sum[32] = {};
  double squares[32] = {};
  int64_t count = 0;
  float x[kSubTile];
  for (int64_t tile = 0; tile < row_.num_tiles(); ++tile) {
    if (row_.tiles[tile].max == -INFINITY) continue;  // would add zeros
    row_.kernels.load(row_.logits, tile, x);
    const Moments moments = row_.kernels.moments(x);
    sum[tile % 32] += moments.sum;
    squares[tile % 32] += moments.squares;
    count += moments.count;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    for (int i = 0; i < offset; ++i) {
      sum[i] += sum[i + offset];
      squares[i] += squares[i + offset];
    }
  }
  return SigmaThreshold(plan_, row_.best, {sum[0], squares[0], count});
}

// From two sub-tiles, which are as good as a random sample: where the smallest
// tokens have three fourths of the mass that top-p may drop.
float Filters::GuessTopPFloor(float lower_bound, uint64_t target) const {
  constexpr int kSampled = 2;
  const int64_t tiles = row_.num_tiles();
  if (tiles < 64 || target >= row_.total) return lower_bound;
  float sample[kSampled * kSubTile];
  for (int i = 0; i < kSampled; ++i) {
    row_.kernels.load(row_.logits, (2 * i + 1) * tiles / (2 * kSampled),
                      sample + i * kSubTile);
  }
  std::sort(sample, sample + kSampled * kSubTile);
  float weight[kSampled * kSubTile];
  row_.kernels.weights(sample, kSampled * kSubTile, row_.best, plan_.scale,
                       weight);
  const double dropped = 0.75 * static_cast<double>(row_.total - target) /
                         kMassOfBest * kSampled / static_cast<double>(tiles);
  double sum = 0.0;
  for (int i = 0; i < kSampled * kSubTile; ++i) {
    sum += static_cast<double>(weight[i]);
    if (sum > dropped) return std::max(lower_bound, sample[i]);
  }
  return lower_bound;
}

// Where top-p is the only filter but for `floor`, its mass is known beforehand.
void Filters::CollectForTopP(float floor) {
  const uint64_t target = MassTarget(plan_.top_p, row_.total);
  floor = std::max(
      floor, TopPLowerBound(plan_, row_.best, row_.total, row_.logits.vocab));
  const float guess = GuessTopPFloor(floor, target);
  CollectFrom(row_, guess, &c_);
  if (KeepBest(ByMass(), target) || guess == floor) return;
  CollectFrom(row_, floor, &c_);
  KeepBest(ByMass(), target);
}

// The id of the `rank`-th (from 1) candidate with this logit, in order of id.
int32_t Filters::IdOfTie(float value, uint64_t rank) const {
  // Ids go by chunk of the sub-tile, then as the candidates do.
  const auto chunk_of = [&](int64_t i) {
    return c_.places[i] % kSubTile / kChunk;
  };
  // Neighbours are of one chunk: separate counts do not wait for each other.
  uint64_t counts[4][kChunksOfSubTile] = {};
  for (int64_t i = 0; i < c_.count; ++i) {
    counts[i % 4][chunk_of(i)] += c_.x[i] == value;
  }
  int chunk = 0;
  for (; chunk < kChunksOfSubTile - 1; ++chunk) {
    const uint64_t in_chunk = counts[0][chunk] + counts[1][chunk] +
                              counts[2][chunk] + counts[3][chunk];
    if (rank <= in_chunk) break;
    rank -= in_chunk;
  }
  for (int64_t i = 0; i < c_.count; ++i) {
    if (c_.x[i] == value && chunk_of(i) == chunk && --rank == 0) {
      return static_cast<int32_t>(IdOfPlace(row_, c_.places[i]));
    }
  }
  return Cutoff().last_id;
}

bool Filters::KeepBest(const Weigh& weigh, uint64_t target) {
  const Selection selection =
      SelectFromTop(row_.kernels, c_.x, c_.count, weigh, target, c_.spare);
  if (!selection.found) return false;
  const uint64_t each = weigh.Of(selection.value);
  const uint64_t ties = (selection.needed + each - 1) / each;
  KeptRange range;
  range.to.value = selection.value;
  if (ties < static_cast<uint64_t>(selection.ties)) {
    range.to.last_id = IdOfTie(selection.value, ties);
  }
  Compact(range);
  if (weigh.by_mass) known_mass_ = target - selection.needed + ties * each;
  return true;
}

void Filters::KeepMinP(float best) {
  KeptRange range;
  range.to.value = MinPThreshold(plan_, best);
  if (range.to.value > best) range.to.value = best;
  Compact(range);
}

void Filters::KeepTypical() {
  const uint64_t mass = Mass();
  const float centre = TypicalCentre(
      plan_, row_.best,
      row_.kernels.surprise(c_.x, c_.count, row_.best, plan_.scale), mass);
  float* const nearness = c_.spare;
  for (int64_t i = 0; i < c_.count; ++i) {
    nearness[i] = -TypicalDistance(c_.x[i], centre);
  }
  const Selection selection =
      RadixSelect(nearness, c_.count, MassTarget(plan_.typical_p, mass),
                  MassFill(row_.kernels, c_.x, row_.best, plan_.scale));
  if (!selection.found) return;
  KeptRange range;
  range.from.value = -INFINITY;
  range.to.value = INFINITY;
  for (int64_t i = 0; i < c_.count; ++i) {
    if (nearness[i] < selection.value) continue;
    range.from.value = std::max(range.from.value, c_.x[i]);
    range.to.value = std::min(range.to.value, c_.x[i]);
  }
  Compact(range);
}

void Filters::DropTopChoices() {
  const uint64_t least = XtcMass(plan_, Mass());
  // Below this logit nothing weighs as much, with room for rounding.
  const double share = 0.999 * static_cast<double>(least) / kMassOfBest;
  const float bound =
      FloatBelow(row_.best + plan_.temperature * std::log(share));
  KeptRange range;
  float x[kSubTile + kCpuSlack];
  int32_t at[kSubTile + kCpuSlack];
  float block[kSubTile];
  for (int64_t begin = 0; begin < c_.count; begin += kSubTile) {
    const int64_t size = std::min<int64_t>(kSubTile, c_.count - begin);
    std::fill(std::copy(c_.x + begin, c_.x + begin + size, block),
              block + kSubTile, -INFINITY);
    const int64_t found =
        row_.kernels.collect(block, bound, static_cast<int32_t>(begin), x, at);
    for (int64_t i = 0; i < found; ++i) {
      if (ByMass().Of(x[i]) < least) continue;
      const int32_t id =
          static_cast<int32_t>(IdOfPlace(row_, c_.places[at[i]]));
      if (x[i] < range.from.value ||
          (x[i] == range.from.value && id > range.from.first_id)) {
        range.from = {x[i], id};
      }
    }
  }
  Compact(range);
}

KeptTokens Filters::KeepMirostat(float mu) {
  KeptTokens kept = {row_.kernels.max(c_.x, c_.count), 0};
  const bool same_mass =
      kept.best == row_.best && plan_.draw_scale == plan_.scale;
  const auto mass = [&] {
    return same_mass
               ? Mass()
               : row_.kernels.mass(c_.x, c_.count, kept.best, plan_.draw_scale);
  };
  kept.mass = mass();
  if (plan_.mirostat_tau > 0.0f) {
    KeptRange range;
    range.to.value = MirostatThreshold(plan_, kept.best, kept.mass, mu);
    Compact(range);
    kept.mass = mass();
  }
  return kept;
}

KeptTokens Filters::Run(const SamplingParams& params, float mu) {
  const bool typical_first = plan_.typical_first();
  const bool top_p = plan_.top_p < 1.0f;
  float floor = -INFINITY;
  if (plan_.top_n_sigma > 0.0f) floor = SigmaFloor();
  if (plan_.top_k != 0) {
    floor = std::max(floor, KthBestTile(row_, plan_.top_k, &c_));
  }
  if (plan_.min_p_first())
    floor = std::max(floor, MinPThreshold(plan_, row_.best));

  if (top_p && !plan_.narrowed() && !typical_first) {
    CollectForTopP(floor);
  } else {
    CollectFrom(row_, floor, &c_);
    if (plan_.top_k != 0) {
      KeepBest(Weigh(), static_cast<uint64_t>(plan_.top_k));
    }
    if (typical_first) KeepTypical();
    if (top_p) {
      const uint64_t mass = plan_.top_p_of_kept() ? Mass() : row_.total;
      const uint64_t target = MassTarget(plan_.top_p, mass);
      if (plan_.min_p > 0.0f && !typical_first) KeepMinP(row_.best);
      KeepBest(ByMass(), target);
    }
    if (plan_.min_p > 0.0f && typical_first) {
      KeepMinP(row_.kernels.max(c_.x, c_.count));
    }
  }
  if (plan_.typical_p < 1.0f && !typical_first) KeepTypical();
  if (XtcActs(plan_, params)) DropTopChoices();
  return KeepMirostat(mu);
}

}  // namespace

void CollectFrom(const CpuRow& row, float floor, Candidates* candidates) {
  Candidates& c = *candidates;
  c.count = 0;
  float x[kSubTile];
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
    const float max = row.tiles[tile].max;
    if (max < floor || max == -INFINITY) continue;
    row.kernels.load(row.logits, tile, x);
    c.count +=
        row.kernels.collect(x, floor, static_cast<int32_t>(tile * kSubTile),
                            c.x + c.count, c.places + c.count);
  }
}

float KthBestTile(const CpuRow& row, int64_t k, Candidates* scratch) {
  const int64_t tiles = row.num_tiles();
  if (k > tiles) return -INFINITY;
  float* const maxima = scratch->spare;
  for (int64_t i = 0; i < tiles; ++i) maxima[i] = row.tiles[i].max;
  std::nth_element(maxima, maxima + (k - 1), maxima + tiles,
                   std::greater<float>());
  return maxima[k - 1];
}

KeptTokens FilterRow(const CpuRow& row, const SamplingParams& params, float mu,
                     Candidates* candidates) {
  return Filters(row, candidates).Run(params, mu);
}

}  // namespace tenon
