#ifndef TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_

#include "ops/sampler/sampler_row_cuda.cuh"

// The two launches of Sampler on CUDA.

namespace tenon {

// Leaves the rows' sub-tiles in call.scratch.
Status LaunchSummarize(const cuda::SamplerCall& call, Stream stream);
// Makes the outputs of them.
Status LaunchDecide(const cuda::SamplerCall& call, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_
