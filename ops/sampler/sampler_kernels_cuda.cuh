#ifndef TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_

#include "ops/sampler/sampler_row_cuda.cuh"

// The three launches of Sampler on CUDA.

namespace tenon {

// Leaves call.scratch, but for the states.
Status LaunchSummarize(const cuda::SamplerCall& call, Stream stream);
// The same for many rows that are aligned, without edits, masks and raw tiles;
// on Hopper.
Status LaunchSummarizeStream(const cuda::SamplerCall& call, Stream stream);
// Makes the outputs of it, a block per row, and states that tell what it leaves
// undone.
Status LaunchDecide(const cuda::SamplerCall& call, Stream stream);
// Does that, several blocks per row.
Status LaunchWide(const cuda::SamplerCall& call, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_KERNELS_CUDA_CUH_
