#ifndef TENON_OPS_SAMPLER_SAMPLER_CPU_SELECT_H_
#define TENON_OPS_SAMPLER_SAMPLER_CPU_SELECT_H_

#include <cstdint>

#include "ops/sampler/sampler_cpu_kernels.h"

// Selection by weight for the filters of the CPU backend. Private to
// ops/sampler.

namespace tenon {

// What a value weighs: 1, or the FixedMass of its Weight.
struct Weigh {
  bool by_mass = false;
  float best = 0.0f;
  float scale = 0.0f;

  uint64_t Of(float value) const {
    return by_mass ? FixedMass(strict::Weight(value, best, scale)) : 1;
  }
};

// The value at which the weights of all larger or equal values reach a target.
struct Selection {
  bool found = false;  // false where all weights together do not reach it
  float value = 0.0f;
  uint64_t needed = 0;  // of the weight of values equal to `value`, at least 1
  int64_t ties = 0;     // values equal to `value`
};

// Bounded work whatever the values are. `scratch` has room for `count` and
// kCpuSlack.
Selection SelectFromTop(const SamplerCpuKernels& kernels, const float* values,
                        int64_t count, const Weigh& weigh, uint64_t target,
                        float* scratch);

// The same in a fixed number of passes, by radix selection. fill(begin, count,
// weights) writes the weights of values[begin, begin + count), at most
// kSubTile.
template <class Fill>
Selection RadixSelect(const float* values, int64_t count, uint64_t target,
                      Fill&& fill) {
  uint64_t bins[kRadixBins];
  uint64_t weights[kSubTile];
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int i = 0; i < kRadixPasses; ++i) {
    const RadixPass pass = GetRadixPass(i);
    for (uint64_t& bin : bins) bin = 0;
    for (int64_t begin = 0; begin < count; begin += kSubTile) {
      const int64_t size = count - begin < kSubTile ? count - begin : kSubTile;
      fill(begin, size, weights);
      for (int64_t j = 0; j < size; ++j) {
        const uint32_t key = OrderedKey(values[begin + j]);
        if (pass.Matches(key, prefix)) bins[pass.Bin(key)] += weights[j];
      }
    }
    int bin = kRadixBins - 1;
    while (bin >= 0 && above + bins[bin] < target) above += bins[bin--];
    if (bin < 0) return {};
    prefix |= static_cast<uint32_t>(bin) << pass.shift;
  }
  Selection result = {true, FromOrderedKey(prefix), target - above, 0};
  for (int64_t j = 0; j < count; ++j) result.ties += values[j] == result.value;
  return result;
}

// A `fill` for it: the FixedMass of Weight(x[i], best, scale).
class MassFill {
 public:
  MassFill(const SamplerCpuKernels& kernels, const float* x, float best,
           float scale)
      : kernels_(kernels), x_(x), best_(best), scale_(scale) {}

  void operator()(int64_t begin, int64_t count, uint64_t* mass) const {
    float weights[kSubTile];
    kernels_.weights(x_ + begin, count, best_, scale_, weights);
    for (int64_t i = 0; i < count; ++i) mass[i] = FixedMass(weights[i]);
  }

 private:
  const SamplerCpuKernels& kernels_;
  const float* x_;
  float best_;
  float scale_;
};

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_CPU_SELECT_H_
