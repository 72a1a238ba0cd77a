#ifndef TENON_OPS_SAMPLER_SAMPLER_FOLLOWERS_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_FOLLOWERS_CUDA_CUH_

#include "ops/core/hopper_cuda.cuh"

// How the first block of a cluster tells the others, as soon as it knows it,
// whether there is anything for them to do: mostly they leave long before the
// first block is done, which waits for nothing.

namespace tenon::cuda {

class Followers {
 public:
  struct Scratch {
    uint64_t barrier;
    uint32_t tasks;
  };

  // All threads of all blocks call this first.
  __device__ Followers(Scratch* scratch, int log2_blocks)
      : scratch_(scratch), blocks_(1 << log2_blocks) {
#if TENON_SM90A
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      const uint32_t barrier = SharedAddress(&scratch->barrier);
      InitBarrier(barrier, 1);
      FenceBarrierInit();
      ArriveExpectBytes(barrier, sizeof(uint32_t));
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
  }

  // All threads of the first block call this at most once; what its last warp
  // wrote to memory before, others see.
  __device__ __forceinline__ void Tell(uint32_t tasks) {
    told_ = true;
#if TENON_SM90A
    if (blocks_ == 1 || threadIdx.x + 32 < blockDim.x) return;
    WaitForStart();
    const int rank = static_cast<int>(threadIdx.x % 32);
    if (rank == 0 || rank >= blocks_) return;
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], "
        "%1, [%2];\n" ::"r"(
            ClusterAddress(SharedAddress(&scratch_->tasks), rank)),
        "r"(tasks), "r"(ClusterAddress(SharedAddress(&scratch_->barrier), rank))
        : "memory");
#endif
  }
  __device__ bool told() const { return told_; }

  // What the other blocks are told.
  __device__ __forceinline__ uint32_t Wait() {
#if TENON_SM90A
    // The thread that made the barrier asks for all of the block.
    if (threadIdx.x == 0) cuda::Wait(SharedAddress(&scratch_->barrier), 0);
    __syncthreads();
#endif
    return scratch_->tasks;
  }

  // All threads of all blocks call this last: the cluster's barrier can be used
  // after it.
  __device__ __forceinline__ void End() {
#if TENON_SM90A
    const bool has_waited = told_ && threadIdx.x + 32 >= blockDim.x;
    if (blocks_ > 1 && !has_waited) WaitForStart();
#endif
  }

 private:
#if TENON_SM90A
  static __device__ __forceinline__ void WaitForStart() {
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
  }
#endif

  Scratch* scratch_;
  int blocks_;
  bool told_ = false;
};

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_FOLLOWERS_CUDA_CUH_
