#ifndef TENON_OPS_MOE_MOE_HOPPER_MULTIPLIER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_MULTIPLIER_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_hopper_loader_cuda.cuh"

// What the warpgroups that multiply have in common: tiles, stages, scales. See
// moe_hopper_kernel_cuda.cuh.

namespace tenon::moe_hopper {

// silu(gate) * up, with the fast exponential: within a few units in the last
// place of float32.
__device__ __forceinline__ float SwiGlu(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#if TENON_SM90A

template <class S>
class MultiplierBase : protected Ring<S> {
 protected:
  __device__ __forceinline__ MultiplierBase(const Params& p, uint32_t shared)
      : Ring<S>(shared),
        p_(p),
        lane_(threadIdx.x % 32),
        group_(static_cast<int>(threadIdx.x) / 128 - 1) {}

  // Waits for the block's next tile. False where there is none.
  __device__ __forceinline__ bool NextTile(Tile* tile) const {
    cuda::Wait(this->TileFull(turn_.index), turn_.parity);
    const auto v = cuda::LoadShared<int4>(this->TileAt(turn_.index));
    *tile = {v.x, v.y, v.z, v.w};
    return tile->expert >= 0;
  }
  // The thread is done with the tile, its slots and weights.
  __device__ __forceinline__ void EndTile() {
    cuda::Arrive(this->TileEmpty(turn_.index));
    turn_.Next();
  }
  // The slot of a token of the tile, below 0 where it has none.
  __device__ __forceinline__ int SlotOf(int token) const {
    return cuda::LoadShared<int>(this->SlotAt(turn_.index, token));
  }
  template <class V>
  __device__ __forceinline__ V WeightOf(int token) const {
    return cuda::LoadShared<V>(this->WeightAt(turn_.index, token));
  }

  // The thread is done with a stage; see Shape::kEmptyArrivals.
  __device__ __forceinline__ void Release(int stage) const {
    const uint32_t empty = this->Empty(stage);
    if (S::kFp8 || lane_ == 0) cuda::Arrive(empty);
    if (S::kPaired && lane_ == 0) {
      cuda::ArriveInCluster(cuda::ClusterAddress(empty, blockIdx.x % 2 ^ 1));
    }
  }
  // Goes on past the stages of a tile without tokens.
  __device__ __forceinline__ void SkipTile(Stage<S::kStages>* stage) const {
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(this->Full(stage->index), stage->parity);
      Release(stage->index);
      stage->Next();
    }
  }

  const Params& p_;
  const int lane_;
  const int group_;
  Stage<2> turn_;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_MULTIPLIER_CUDA_CUH_
