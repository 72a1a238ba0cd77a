#ifndef TENON_OPS_SAMPLER_SAMPLER_CPU_FILTERS_H_
#define TENON_OPS_SAMPLER_SAMPLER_CPU_FILTERS_H_

#include <cstdint>

#include "ops/sampler/sampler_cpu_kernels.h"

// The filters of the CPU backend. Private to ops/sampler.

namespace tenon {

// One row between its summaries and its token.
struct CpuRow {
  const SamplerCpuKernels& kernels;
  LogitsRow logits;
  RowPlan plan;
  const SubTile* tiles = nullptr;
  float best = 0.0f;   // the largest logit; NaN where any is NaN
  uint64_t total = 0;  // of the sub-tiles' TileMass(kMassBits)

  int64_t num_tiles() const { return logits.num_tiles; }
};

// Tokens in draw order. The arrays are scratch that rows take turns to use,
// each with room for CandidateCapacity(vocab).
struct Candidates {
  float* x = nullptr;
  int32_t* places = nullptr;  // DrawOrder of the token
  float* spare = nullptr;     // of no meaning between calls
  int64_t count = 0;
};
constexpr int64_t CandidateCapacity(int64_t vocab) {
  return NumSubTiles(vocab) * kSubTile + 4 * kCpuSlack;
}

inline int64_t IdOfPlace(const CpuRow& row, int64_t place) {
  return IdAt(place / kSubTile, static_cast<int>(place % kSubTile),
              row.num_tiles());
}

// Makes all tokens with at least this logit, and more than -inf, candidates.
void CollectFrom(const CpuRow& row, float floor, Candidates* candidates);

// The logit of the k-th best sub-tile, a lower bound of that of the k-th best
// token; -inf where there are fewer sub-tiles.
float KthBestTile(const CpuRow& row, int64_t k, Candidates* scratch);

// What a filtered row is drawn from: the candidates, each with the FixedMass of
// Weight(x, best, plan.draw_scale), `mass` together.
struct KeptTokens {
  float best = 0.0f;
  uint64_t mass = 0;
};

// Leaves what the row's filters keep. The row has a finite best logit and is
// not greedy.
KeptTokens FilterRow(const CpuRow& row, const SamplingParams& params, float mu,
                     Candidates* candidates);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_CPU_FILTERS_H_
