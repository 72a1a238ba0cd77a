#ifndef TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_
#define TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_

#include <cstdint>

#include "ops/core/device_info.h"
#include "ops/core/dtype.h"
#include "ops/sampler/row_plan.h"

// The loops of the CPU backend that are worth vector instructions. Private to
// ops/sampler.

namespace tenon {

// The logits of one row.
struct LogitsRow {
  const void* data = nullptr;
  DType dtype = DType::kInvalid;
  int64_t vocab = 0;
};

struct SamplerCpuKernels {
  // Summaries of sub-tiles [first, last), out[0] being that of `first`. Without
  // `sums` only the maxima are made.
  void (*summarize)(const LogitsRow& row, int64_t first, int64_t last,
                    float scale, bool sums, SubTile* out);

  // The kSubTile logits of a sub-tile, -inf past the vocabulary's end and where
  // the cutoff drops a token.
  void (*load)(const LogitsRow& row, int64_t sub_tile, const Cutoff& cutoff,
               float* x);

  // The logits of a sub-tile that the cutoff keeps and that are at most
  // `upper`, in order of id and without gaps; returns their number. x holds
  // kSubTile.
  int64_t (*collect)(const LogitsRow& row, int64_t sub_tile,
                     const Cutoff& cutoff, float upper, float* x);

  // e[i] = exp2((x[i] - max) * scale) for finite max >= x[i]; returns their
  // sum. An element's bits do not depend on the others.
  float (*exponentials)(const float* x, int64_t count, float max, float scale,
                        float* e);
};

// For at most what DetectCpuIsa() returns.
const SamplerCpuKernels& GetSamplerCpuKernels(CpuIsa isa);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_CPU_KERNELS_H_
