#include "ops/sampler/sampler_cpu_select.h"

#include <algorithm>
#include <functional>

namespace tenon {
namespace {

constexpr int64_t kFew = 128;

Selection SelectOfFew(const float* values, int64_t count, const Weigh& weigh,
                      uint64_t target) {
  float sorted[kFew];
  std::copy(values, values + count, sorted);
  std::sort(sorted, sorted + count, std::greater<float>());
  uint64_t above = 0;
  for (int64_t i = 0; i < count;) {
    int64_t end = i + 1;
    while (end < count && sorted[end] == sorted[i]) ++end;
    const uint64_t all = weigh.Of(sorted[i]) * static_cast<uint64_t>(end - i);
    if (all > 0 && above + all >= target) {
      return {true, sorted[i], target - above, end - i};
    }
    above += all;
    i = end;
  }
  return {};
}

// Two values of a sample between which the wanted one probably lies.
void GuessBounds(const float* values, int64_t count, const Weigh& weigh,
                 uint64_t target, float* high, float* low) {
  constexpr int kSample = kFew;
  constexpr int kMargin = 17;  // three standard deviations of a rank
  float sample[kSample];
  double mass[kSample];
  for (int i = 0; i < kSample; ++i) sample[i] = values[i * count / kSample];
  std::sort(sample, sample + kSample, std::greater<float>());
  double total = 0.0;
  for (int i = 0; i < kSample; ++i) {
    total += static_cast<double>(weigh.Of(sample[i]));
    mass[i] = total;
  }
  const double each = static_cast<double>(count) / kSample;
  int rank = 0;
  while (rank < kSample - 1 &&
         mass[rank] * each < static_cast<double>(target)) {
    ++rank;
  }
  *high = sample[std::max(rank - kMargin, 0)];
  *low = sample[std::min(rank + kMargin, kSample - 1)];
}

}  // namespace

Selection SelectFromTop(const SamplerCpuKernels& kernels, const float* values,
                        int64_t count, const Weigh& weigh, uint64_t target,
                        float* scratch) {
  // Every round leaves about a fourth, unless the values are made to defeat it.
  constexpr int kMaxRounds = 6;
  const float* left = values;
  int64_t num_left = count;
  uint64_t needed = target;
  for (int round = 0; round < kMaxRounds && num_left > kFew; ++round) {
    float high, low;
    GuessBounds(left, num_left, weigh, needed, &high, &low);
    const Split split = kernels.split(left, num_left, high, low, weigh.best,
                                      weigh.scale, scratch);
    left = scratch;
    num_left = split.num_between;
    const uint64_t above = weigh.by_mass
                               ? split.mass_above
                               : static_cast<uint64_t>(split.num_above);
    if (needed <= above) break;
    needed -= above;
    const uint64_t at_high =
        weigh.Of(high) * static_cast<uint64_t>(split.num_high);
    if (needed <= at_high) return {true, high, needed, split.num_high};
    needed -= at_high;
    const uint64_t between =
        weigh.by_mass ? kernels.mass(left, num_left, weigh.best, weigh.scale)
                      : static_cast<uint64_t>(num_left);
    if (needed <= between) {
      if (num_left <= kFew) return SelectOfFew(left, num_left, weigh, needed);
      continue;
    }
    needed -= between;
    const uint64_t at_low =
        weigh.Of(low) * static_cast<uint64_t>(split.num_low);
    if (needed <= at_low) return {true, low, needed, split.num_low};
    break;
  }
  if (count <= kFew) return SelectOfFew(values, count, weigh, target);
  if (weigh.by_mass) {
    return RadixSelect(values, count, target,
                       MassFill(kernels, values, weigh.best, weigh.scale));
  }
  return RadixSelect(values, count, target,
                     [](int64_t, int64_t size, uint64_t* weights) {
                       std::fill(weights, weights + size, uint64_t{1});
                     });
}

}  // namespace tenon
