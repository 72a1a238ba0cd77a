#ifndef TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_
#define TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_

#include <cstdint>

#include "ops/core/device_info.h"
#include "ops/core/dtype.h"
#include "ops/sampler/row_plan.h"

// The loops of the CPU backend that are worth vector instructions. All
// instruction sets give the same bits. Private to ops/sampler.

namespace tenon {

// The logits of one row, and what changes them.
struct LogitsRow {
  const void* data = nullptr;
  DType dtype = DType::kInvalid;
  int64_t vocab = 0;
  int64_t num_tiles = 0;              // NumSubTiles(vocab)
  const uint32_t* bitmask = nullptr;  // null: none
  const LogitEdit* edits = nullptr;
  int64_t num_edits = 0;
  const RowPlan* plan = nullptr;  // for edits

  bool modified() const {
    return bitmask != nullptr || num_edits > 0 ||
           (plan != nullptr && plan->only_allowed);
  }
};

// Where values lie to two bounds, low < high or equal.
struct Split {
  uint64_t mass_above = 0;  // of values > high
  int64_t num_above = 0;
  int64_t num_high = 0;  // equal to high
  int64_t num_low = 0;   // equal to low and less than high
  int64_t num_between = 0;
};

struct SamplerCpuKernels {
  // The kSubTile logits that count of a sub-tile by place, -inf past the
  // vocabulary's end.
  void (*load)(const LogitsRow& row, int64_t tile, float* x);

  // Summaries of sub-tiles [first, last), out[0] being that of `first`. Without
  // `sums` only the maxima are made.
  void (*summarize)(const LogitsRow& row, int64_t first, int64_t last,
                    float scale, bool sums, SubTile* out);

  // Moments of a sub-tile of `x`, before those of sub-tiles are added up.
  Moments (*moments)(const float* x);

  // Appends the values of a sub-tile that are at least `floor` and not -inf,
  // and their places counted from `first_place`; returns their number. The
  // outputs have room for kSubTile.
  int64_t (*collect)(const float* x, float floor, int32_t first_place,
                     float* values, int32_t* places);

  // e[i] = Weight(x[i], best, scale) for finite best >= x[i].
  void (*weights)(const float* x, int64_t count, float best, float scale,
                  float* e);
  // Sums of FixedMass(Weight(...)) and of FixedSurprise.
  uint64_t (*mass)(const float* x, int64_t count, float best, float scale);
  uint64_t (*surprise)(const float* x, int64_t count, float best, float scale);

  // Leaves in place the values, and their places, that the range keeps; returns
  // their number.
  int64_t (*compact)(const KeptRange& range, int64_t num_tiles, float* x,
                     int32_t* places, int64_t count);

  // Writes the values between the two bounds to `between`, which may be x and
  // otherwise has room for a vector more than `count`. Mass as above.
  Split (*split)(const float* x, int64_t count, float high, float low,
                 float best, float scale, float* between);

  // The largest value; -inf for none.
  float (*max)(const float* x, int64_t count);
};

// For at most what DetectCpuIsa() returns.
const SamplerCpuKernels& GetSamplerCpuKernels(CpuIsa isa);

// The floats of slack that a vector's store may write past its result.
inline constexpr int kCpuSlack = 16;

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_
