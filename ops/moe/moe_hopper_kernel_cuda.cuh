#ifndef TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_

#include <type_traits>

#include "ops/moe/moe_hopper_loader_cuda.cuh"
#include "ops/moe/moe_hopper_narrow_cuda.cuh"
#include "ops/moe/moe_hopper_wide_cuda.cuh"

// The kernel of a projection of the experts: persistent blocks, one on each
// multiprocessor, that take tiles (tokens of one expert by rows of its weights)
// in turn. One warpgroup loads weights by TMA, and tokens, into a ring of
// stages in shared memory, and runs ahead into the next tile; one or two
// multiply with wgmma and write results. With many tokens blocks come in pairs
// that share the weights they load: what goes from L2 to the multiprocessors
// bounds the products.
//
// A sum over the depth has one order, whatever the shape: bits of a row depend
// on its token and its expert alone.

namespace tenon::moe_hopper {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    ProjectionKernel(const __grid_constant__ Params p) {
#if TENON_SM90A
  using Multiplier =
      std::conditional_t<S::kWide, WideMultiplier<S>, NarrowMultiplier<S>>;
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = cuda::SharedAddress(shared_memory);
  if (threadIdx.x == 0) {
    const Ring<S> ring(shared);
    for (int i = 0; i < S::kStages; ++i) {
      cuda::InitBarrier(ring.Full(i), S::kFullArrivals);
      cuda::InitBarrier(ring.Empty(i), S::kEmptyArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      cuda::InitBarrier(ring.TileFull(i), 32);
      cuda::InitBarrier(ring.TileEmpty(i), 128 * S::kGroups);
    }
    cuda::FenceBarrierInit();
    cuda::PrefetchTensorMap(&p.weights[0]);
    cuda::PrefetchTensorMap(&p.weights[1]);
    if (!S::kGateUp) cuda::PrefetchTensorMap(&p.hidden);
  }
  if constexpr (S::kMaxBytes > 0) Multiplier(p, shared).ClearMaxima();
  if constexpr (S::kPaired) {
    cuda::SyncCluster();
  } else {
    __syncthreads();
  }
  // The down projection knows its experts from before the previous kernel: its
  // first weights are on their way while that one ends.
  if (S::kGateUp) cuda::WaitForPreviousKernels();
  if (threadIdx.x < 128) {
    if constexpr (S::kGroups == 2) cuda::DecreaseRegisters<S::kLoadRegisters>();
    Loader<S> loader(p, shared);
    if (threadIdx.x < 32) {
      loader.LoadWeights();
    } else if (threadIdx.x - 32 < S::kTokenThreads) {
      if (!S::kGateUp) cuda::WaitForPreviousKernels();
      loader.LoadTokens();
    } else if (threadIdx.x < 96) {
      loader.TellTiles();
    }
    __syncwarp();
  } else {
    if constexpr (S::kGroups == 2)
      cuda::IncreaseRegisters<S::kMultiplyRegisters>();
    Multiplier(p, shared).Multiply();
  }
  // Neither block leaves while the other one may still write to it.
  if constexpr (S::kPaired) cuda::SyncCluster();
#endif
}

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_
