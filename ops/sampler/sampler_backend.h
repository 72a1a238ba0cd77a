#ifndef TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_
#define TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_

#include "ops/sampler/row_plan.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// Backends trust `params`: Sampler() has validated them. The workspace holds
// SubTile[rows][NumSubTiles(vocab)] and then, on the CPU only,
// double[rows][NumSubTiles(vocab)].
Status SamplerCpu(const SamplerParams& params, Stream stream);
Status SamplerCuda(const SamplerParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_
