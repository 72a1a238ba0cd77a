#include <algorithm>
#include <cmath>

#include "ops/core/cpu_thread_pool.h"
#include "ops/sampler/philox.h"
#include "ops/sampler/sampler_backend.h"
#include "ops/sampler/sampler_cpu_kernels.h"

namespace tenon {
namespace {

// One row between its summary and its token.
struct Row {
  const SamplerCpuKernels& kernels;
  LogitsRow logits;
  int64_t num_tiles = 0;
  const SubTile* tiles = nullptr;
  double* mass = nullptr;  // scratch, one per sub-tile
  RowPlan plan;
  float best = 0.0f;   // the largest logit; NaN where any is NaN
  double total = 0.0;  // of the probabilities, the best token's being 1
};

float BestLogit(const Row& row) {
  float best = -INFINITY;
  for (int64_t i = 0; i < row.num_tiles; ++i) {
    if (std::isnan(row.tiles[i].max)) return NAN;
    best = std::max(best, row.tiles[i].max);
  }
  return best;
}

struct Pick {
  int64_t index = 0;
  double fraction = 0.0;  // of the picked weight that lies before the target
};

// The first entry where the running sum of weights exceeds the target; the last
// one that weighs anything where rounding leaves none. Some weight is positive.
template <class Weight>
Pick PickByWeight(const Weight* weights, int64_t count, double target) {
  Pick pick;
  double before = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = weights[i];
    if (!(weight > 0.0)) continue;
    pick = {i, std::clamp((target - before) / weight, 0.0, 1.0)};
    before += weight;
    if (before > target) break;
  }
  return pick;
}

// Calls visit(tile, x) with the logits of every sub-tile that has kept tokens,
// -inf in place of those not kept.
template <class Visit>
void ForEachKeptTile(const Row& row, const Cutoff& cutoff, Visit&& visit) {
  float x[kSubTile];
  for (int64_t i = 0; i < row.num_tiles; ++i) {
    if (row.tiles[i].max < cutoff.value) continue;
    row.kernels.load(row.logits, i, cutoff, x);
    visit(i, x);
  }
}

// The value at which the weights of all larger or equal values reach a target.
struct Selection {
  bool found = false;  // false where all weights together do not reach it
  float value = 0.0f;
  uint64_t needed = 0;  // of the weight of `value`, at least 1
};

// for_each(lowest, highest, add) calls add(value, weight) at least for the
// candidates in [lowest, highest], in any order.
template <class ForEach>
Selection SelectFromTop(uint64_t target, ForEach&& for_each) {
  uint64_t bins[kRadixBins];
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int i = 0; i < kRadixPasses; ++i) {
    const RadixPass pass = GetRadixPass(i);
    std::fill(bins, bins + kRadixBins, uint64_t{0});
    for_each(pass.Lowest(prefix), pass.Highest(prefix),
             [&](float value, uint64_t weight) {
               const uint32_t key = OrderedKey(value);
               if (pass.Matches(key, prefix)) bins[pass.Bin(key)] += weight;
             });
    int bin = kRadixBins - 1;
    while (bin >= 0 && above + bins[bin] < target) above += bins[bin--];
    if (bin < 0) return {};
    prefix |= static_cast<uint32_t>(bin) << pass.shift;
  }
  return {true, FromOrderedKey(prefix), target - above};
}

// Calls visit(x, count) with the logits that `within` keeps in [lowest,
// highest], sub-tile by sub-tile.
template <class Visit>
void ForEachInRange(const Row& row, const Cutoff& within, float lowest,
                    float highest, Visit&& visit) {
  const Cutoff cutoff = lowest > within.value ? Cutoff{lowest} : within;
  float x[kSubTile];
  for (int64_t i = 0; i < row.num_tiles; ++i) {
    if (row.tiles[i].max < cutoff.value) continue;
    visit(x, row.kernels.collect(row.logits, i, cutoff, highest, x));
  }
}

// Keeps what is larger than `value`, and the first `count` tokens that equal
// it.
Cutoff CutoffAtTie(const Row& row, float value, uint64_t count) {
  const double target = static_cast<double>(count) - 0.5;
  const Cutoff at_least = {value};
  float ties[kSubTile];
  for (int64_t i = 0; i < row.num_tiles; ++i) {
    row.mass[i] =
        row.tiles[i].max < value
            ? 0.0
            : row.kernels.collect(row.logits, i, at_least, value, ties);
  }
  const Pick tile = PickByWeight(row.mass, row.num_tiles, target);
  row.kernels.load(row.logits, tile.index, at_least, ties);
  for (float& x : ties) x = x == value ? 1.0f : 0.0f;
  const Pick token =
      PickByWeight(ties, kSubTile, tile.fraction * row.mass[tile.index]);
  return {value, static_cast<int32_t>(tile.index * kSubTile + token.index)};
}

Cutoff SelectTopK(const Row& row) {
  const uint64_t k = static_cast<uint64_t>(row.plan.top_k);
  Cutoff at_least;
  // The k-th largest of the sub-tiles' maxima is a lower bound of the k-th
  // largest logit, and leaves few sub-tiles to read.
  if (row.plan.top_k <= row.num_tiles) {
    const auto for_each_max = [&](float, float, auto&& add) {
      for (int64_t i = 0; i < row.num_tiles; ++i) add(row.tiles[i].max, 1);
    };
    at_least.value = SelectFromTop(k, for_each_max).value;
  }
  const auto for_each_logit = [&](float lowest, float highest, auto&& add) {
    ForEachInRange(row, at_least, lowest, highest,
                   [&](const float* x, int64_t count) {
                     for (int64_t i = 0; i < count; ++i) add(x[i], 1);
                   });
  };
  const Selection kth = SelectFromTop(k, for_each_logit);
  return CutoffAtTie(row, kth.value, kth.needed);
}

// Narrows `within` to its best tokens that make up the target.
Cutoff SelectTopP(const Row& row, const Cutoff& within, uint64_t target,
                  float lower_bound) {
  Cutoff searched = within;
  const auto search_from = [&](float value) {
    if (value > searched.value) searched = {value};
  };
  search_from(lower_bound);
  const auto add_masses = [&](const float* x, int64_t count, auto&& add) {
    float e[kSubTile];
    row.kernels.exponentials(x, count, row.best, row.plan.scale, e);
    for (int64_t i = 0; i < count; ++i) add(x[i], FixedMass(e[i]));
  };
  // Where the sub-tiles' maxima alone reach the target, the cutoff is not below
  // where they do.
  const auto for_each_max = [&](float lowest, float highest, auto&& add) {
    for (int64_t i = 0; i < row.num_tiles; ++i) {
      const float max = row.tiles[i].max;
      if (max > searched.value && max >= lowest && max <= highest) {
        add_masses(&max, 1, add);
      }
    }
  };
  const Selection bound = SelectFromTop(target, for_each_max);
  if (bound.found) search_from(bound.value);
  const auto for_each_logit = [&](float lowest, float highest, auto&& add) {
    ForEachInRange(
        row, searched, lowest, highest,
        [&](const float* x, int64_t count) { add_masses(x, count, add); });
  };
  const Selection selection = SelectFromTop(target, for_each_logit);
  if (!selection.found) return within;
  float mass;
  row.kernels.exponentials(&selection.value, 1, row.best, row.plan.scale,
                           &mass);
  const uint64_t each = FixedMass(mass);
  return CutoffAtTie(row, selection.value,
                     (selection.needed + each - 1) / each);
}

uint64_t KeptMass(const Row& row, const Cutoff& cutoff) {
  uint64_t total = 0;
  ForEachKeptTile(row, cutoff, [&](int64_t, float* x) {
    row.kernels.exponentials(x, kSubTile, row.best, row.plan.scale, x);
    for (int i = 0; i < kSubTile; ++i) total += FixedMass(x[i]);
  });
  return total;
}

// All filters as one.
Cutoff SelectKept(const Row& row) {
  const RowPlan& plan = row.plan;
  Cutoff cutoff;
  uint64_t mass = static_cast<uint64_t>(row.total * kMassOfBest);
  int64_t count = row.logits.vocab;
  if (plan.top_k != 0) {
    cutoff = SelectTopK(row);
    if (plan.top_p_of_kept() && plan.top_p < 1.0f) {
      mass = KeptMass(row, cutoff);
      count = plan.top_k;
    }
  }
  if (plan.min_p > 0.0f) {
    const float value = MinPThreshold(plan, row.best);
    if (value > cutoff.value) cutoff = {value};
  }
  if (plan.top_p < 1.0f) {
    cutoff = SelectTopP(row, cutoff, MassTarget(plan.top_p, mass),
                        TopPLowerBound(plan, row.best, mass, count));
  }
  return cutoff;
}

// The sub-tiles' probabilities from their sums, and their total.
double FillMassFromSums(const Row& row) {
  constexpr int64_t kBatch = 64;
  float max[kBatch];
  float e[kBatch];
  double total = 0.0;
  for (int64_t begin = 0; begin < row.num_tiles; begin += kBatch) {
    const int64_t size = std::min(kBatch, row.num_tiles - begin);
    for (int64_t i = 0; i < size; ++i) max[i] = row.tiles[begin + i].max;
    row.kernels.exponentials(max, size, row.best, row.plan.scale, e);
    for (int64_t i = 0; i < size; ++i) {
      row.mass[begin + i] = double{row.tiles[begin + i].sum} * double{e[i]};
      total += row.mass[begin + i];
    }
  }
  return total;
}

// The token at which the kept distribution's cumulative sum exceeds `uniform`.
int64_t DrawToken(const Row& row, double uniform) {
  Cutoff cutoff;
  double total = row.total;
  if (row.plan.filtered()) {
    cutoff = SelectKept(row);
    std::fill(row.mass, row.mass + row.num_tiles, 0.0);
    total = 0.0;
    ForEachKeptTile(row, cutoff, [&](int64_t tile, float* x) {
      row.mass[tile] =
          row.kernels.exponentials(x, kSubTile, row.best, row.plan.scale, x);
      total += row.mass[tile];
    });
  }
  const Pick tile = PickByWeight(row.mass, row.num_tiles, uniform * total);
  float x[kSubTile];
  row.kernels.load(row.logits, tile.index, cutoff, x);
  // Relative to the sub-tile's own maximum, as its sum was made.
  row.kernels.exponentials(x, kSubTile, row.tiles[tile.index].max,
                           row.plan.scale, x);
  double sum = 0.0;
  for (float e : x) sum += double{e};
  const Pick token = PickByWeight(x, kSubTile, tile.fraction * sum);
  return tile.index * kSubTile + token.index;
}

int64_t FirstBestToken(const Row& row) {
  int64_t tile = 0;
  while (row.tiles[tile].max != row.best) ++tile;
  float x[kSubTile];
  row.kernels.load(row.logits, tile, Cutoff(), x);
  return tile * kSubTile + (std::find(x, x + kSubTile, row.best) - x);
}

float LogitOf(const Row& row, int64_t token) {
  float x[kSubTile];
  row.kernels.load(row.logits, token / kSubTile, Cutoff(), x);
  return x[token % kSubTile];
}

struct Outcome {
  SampleStatus status = SampleStatus::kOk;
  int64_t token = -1;
  double logprob = NAN;
};

Outcome Decide(Row& row, const SamplingParams& params, bool with_logprob) {
  row.best = BestLogit(row);
  if (std::isnan(row.best)) return {SampleStatus::kNonFinite};
  if (row.best == -INFINITY) return {SampleStatus::kNoSupport};
  if (row.best == INFINITY) {
    return {SampleStatus::kOk, FirstBestToken(row), 0.0};
  }
  Outcome outcome;
  if (!row.plan.greedy || with_logprob) row.total = FillMassFromSums(row);
  outcome.token = row.plan.greedy
                      ? FirstBestToken(row)
                      : DrawToken(row, UniformAt(params.seed, params.position,
                                                 RandomStream::kTarget));
  if (with_logprob) {
    const double gap = double{LogitOf(row, outcome.token)} - double{row.best};
    outcome.logprob = gap / row.plan.temperature - std::log(row.total);
  }
  return outcome;
}

}  // namespace

size_t SamplerCpuWorkspaceBytes(const SamplerParams& p) {
  return static_cast<size_t>(p.logits.shape[0] * NumSubTiles(p.vocab())) *
         (sizeof(SubTile) + sizeof(double));
}

Status SamplerCpu(const SamplerParams& p, Stream stream) {
  const int64_t rows = p.logits.shape[0];
  const int64_t vocab = p.logits.shape[1];
  const int64_t num_tiles = NumSubTiles(vocab);
  const bool with_logprob = p.logprobs.present();
  const SamplerCpuKernels& kernels = GetSamplerCpuKernels(DetectCpuIsa());
  SubTile* const tiles = static_cast<SubTile*>(p.workspace);
  double* const mass = reinterpret_cast<double*>(tiles + rows * num_tiles);
  const auto logits_of = [&](int64_t row) {
    const int64_t offset = row * p.logits.stride[0] *
                           static_cast<int64_t>(DTypeSize(p.logits.dtype));
    return LogitsRow{p.logits.As<const char>() + offset, p.logits.dtype, vocab};
  };

  // Rows in pieces, so that threads help where there are few rows.
  constexpr int64_t kPiece = 64;
  const int64_t pieces = (num_tiles + kPiece - 1) / kPiece;
  const int64_t grain = kPiece / num_tiles + 1;
  ParallelFor(stream, rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces;
      const int64_t first = i % pieces * kPiece;
      const RowPlan plan = MakeRowPlan(p.params[row], vocab);
      kernels.summarize(logits_of(row), first,
                        std::min(first + kPiece, num_tiles), plan.scale,
                        !plan.greedy || with_logprob,
                        tiles + row * num_tiles + first);
    }
  });
  ParallelFor(stream, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Row row = {kernels,
                 logits_of(i),
                 num_tiles,
                 tiles + i * num_tiles,
                 mass + i * num_tiles,
                 MakeRowPlan(p.params[i], vocab)};
      const Outcome outcome = Decide(row, p.params[i], with_logprob);
      p.tokens.As<int32_t>()[i] = static_cast<int32_t>(outcome.token);
      p.statuses.As<int32_t>()[i] = static_cast<int32_t>(outcome.status);
      if (with_logprob) {
        p.logprobs.As<float>()[i] = static_cast<float>(outcome.logprob);
      }
    }
  });
  return Status();
}

}  // namespace tenon
