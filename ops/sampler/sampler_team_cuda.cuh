#ifndef TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_

#include "ops/core/hopper_cuda.cuh"
#include "ops/sampler/sampler_decide_row_cuda.cuh"

// Several blocks that work on one row: a cluster on Hopper, one block
// elsewhere. All threads of all blocks call these together.

namespace tenon::cuda {

inline constexpr int kTeamBlocks = 8;  // at most

// The same pointer, known to be to shared memory: accesses take fewer
// instructions.
template <class T>
__device__ __forceinline__ T* AsShared(T* pointer) {
  return static_cast<T*>(__cvta_shared_to_generic(
      static_cast<uint32_t>(__cvta_generic_to_shared(pointer))));
}

class Team {
 public:
  // What blocks tell each other: sets taking turns, as a block may be one
  // barrier ahead.
  struct Scratch {
    Block::Scratch block;
    uint64_t values[2][kTeamBlocks];
  };

  __device__ explicit Team(Scratch* scratch)
      : block_(&scratch->block), s_(*scratch) {
#if TENON_SM90A
    asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank_));
    asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size_));
#endif
  }

  __device__ Block& block() { return block_; }
  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ bool leads() const { return rank_ == 0; }
  // Of all warps of the team.
  __device__ int warp() const {
    return rank_ * kDecideWarps + static_cast<int>(threadIdx.x / 32);
  }
  __device__ int num_warps() const { return size_ * kDecideWarps; }

  __device__ __forceinline__ void Sync() {
#if TENON_SM90A
    if (size_ > 1) {
      SyncCluster();
      return;
    }
#endif
    __syncthreads();
  }
  // The same place of shared memory in another block.
  template <class T>
  __device__ __forceinline__ T* In(int rank, T* own) const {
#if TENON_SM90A
    return static_cast<T*>(__cluster_map_shared_rank(own, rank));
#else
    return own;
#endif
  }

  // Over all blocks, the same on every thread.
  __device__ __noinline__ uint64_t Sum(uint64_t value);
  // The largest of both halves, each for itself.
  __device__ __noinline__ Block::Pair Max(Block::Pair pair);

  // Every block's value, which is the same on all of its threads.
  __device__ __noinline__ const uint64_t* Exchange(uint64_t value);
  // Block's, as a call.
  __device__ __noinline__ uint64_t InclusiveSum(uint64_t value,
                                                uint64_t* total);

 private:
  Block block_;
  Scratch& s_;
  int rank_ = 0;
  int size_ = 1;
  int turn_ = 0;
};

__device__ __noinline__ inline const uint64_t* Team::Exchange(uint64_t value) {
  uint64_t* const values = AsShared(s_.values[turn_]);
  turn_ ^= 1;
  if (threadIdx.x < static_cast<unsigned>(size_)) {
    *In(static_cast<int>(threadIdx.x), &values[rank_]) = value;
  }
  Sync();
  return values;
}

__device__ __noinline__ inline uint64_t Team::InclusiveSum(uint64_t value,
                                                           uint64_t* total) {
  return block_.InclusiveSum(value, total);
}

__device__ __noinline__ inline uint64_t Team::Sum(uint64_t value) {
  const uint64_t* const values = AsShared(Exchange(block_.Sum(value)));
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = 0; i < size_; ++i) sum += values[i];
  return sum;
}

__device__ __noinline__ inline Block::Pair Team::Max(Block::Pair pair) {
  pair = block_.Max(pair);
  const uint64_t* const values =
      AsShared(Exchange((uint64_t{pair.a} << 32) | pair.b));
#pragma unroll 1
  for (int i = 0; i < size_; ++i) {
    pair.a = max(pair.a, static_cast<uint32_t>(values[i] >> 32));
    pair.b = max(pair.b, static_cast<uint32_t>(values[i]));
  }
  return pair;
}

// LogitsOf() as a call.
__device__ __noinline__ inline LaneLogits LogitsOfPart(const DecideRow& row,
                                                       int tile,
                                                       LanePart part) {
  return LogitsOf(row, tile, part);
}

// Has whole warps call visit(tile, logits) for all sub-tiles.
template <class Visit>
__device__ __forceinline__ void ForEachTile(const Team& team,
                                            const DecideRow& row, Visit visit) {
  const auto load = [&](int tile) {
    // Past the last one: nothing is loaded, as no id is there.
    return LoadPart(row,
                    tile < row.num_tiles ? tile : row.num_tiles * kSubTile);
  };
  LanePart ahead = load(team.warp());
  for (int tile = team.warp(); tile < row.num_tiles;) {
    const LanePart part = ahead;
    const int next = tile + team.num_warps();
    ahead = load(next);
    visit(tile, LogitsOfPart(row, tile, part));
    tile = next;
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_
