#ifndef TENON_OPS_SAMPLER_SAMPLER_CPU_DRAW_H_
#define TENON_OPS_SAMPLER_SAMPLER_CPU_DRAW_H_

#include <cstdint>

#include "ops/sampler/sampler_cpu_filters.h"

// Draws of the CPU backend. Private to ops/sampler.

namespace tenon {

// The largest maximum; NaN where any is.
float BestOf(const SubTile* tiles, int64_t count);

// CpuRow::total, of a row whose best logit is finite.
uint64_t TotalOf(const CpuRow& row);

float LogitAt(const CpuRow& row, int64_t id);

// The lowest id that has the best logit.
int64_t FirstBestToken(const CpuRow& row);

// Draws from the sub-tiles' sums; `numerator` is UniformNumerator.
int64_t DrawPlain(const CpuRow& row, uint64_t numerator);

// Draws from what the filters have left.
int64_t DrawKept(const CpuRow& row, const Candidates& candidates,
                 const KeptTokens& kept, uint64_t numerator);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_CPU_DRAW_H_
