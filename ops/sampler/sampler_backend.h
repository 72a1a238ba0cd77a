#ifndef TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_
#define TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_

#include <cstddef>

#include "ops/sampler/row_plan.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// Backends trust `params`: Sampler() has validated them, but for what lies in
// the memory of the device. Offsets of edits are clamped (EditsOfRow).
Status SamplerCpu(const SamplerParams& params, Stream stream);
Status SamplerCuda(const SamplerParams& params, Stream stream);

// For at least one row.
size_t SamplerCpuWorkspaceBytes(const SamplerParams& params);
size_t SamplerCudaWorkspaceBytes(const SamplerParams& params);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_BACKEND_H_
