#ifndef TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_

#include "ops/core/hopper_cuda.cuh"
#include "ops/sampler/sampler_decide_row_cuda.cuh"

// Several blocks that work on one row: a cluster on Hopper, one block
// elsewhere. All threads of all blocks call these together.

namespace tenon::cuda {

inline constexpr int kTeamBlocks = 8;  // on Hopper

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
    SyncCluster();
#else
    __syncthreads();
#endif
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
  __device__ uint64_t Sum(uint64_t value) {
    const uint64_t* const values = Exchange(block_.Sum(value));
    uint64_t sum = 0;
    for (int i = 0; i < size_; ++i) sum += values[i];
    return sum;
  }
  __device__ uint32_t Max(uint32_t value) {
    const uint64_t* const values = Exchange(block_.Max({value, 0}).a);
    uint32_t max = 0;
    for (int i = 0; i < size_; ++i) {
      max = ::max(max, static_cast<uint32_t>(values[i]));
    }
    return max;
  }
  __device__ uint32_t Min(uint32_t value) { return ~Max(~value); }

  // Every block's value, which is the same on all of its threads.
  __device__ const uint64_t* Exchange(uint64_t value) {
    uint64_t* const values = s_.values[turn_];
    turn_ ^= 1;
    if (threadIdx.x < static_cast<unsigned>(size_)) {
      *In(static_cast<int>(threadIdx.x), &values[rank_]) = value;
    }
    Sync();
    return values;
  }

 private:
  Block block_;
  Scratch& s_;
  int rank_ = 0;
  int size_ = 1;
  int turn_ = 0;
};

// Has whole warps call visit(tile, logits) for the sub-tiles with a maximum of
// at least `floor`, a few of them loaded at a time.
template <class Visit>
__device__ __forceinline__ void ForEachTile(const Team& team,
                                            const DecideRow& row,
                                            uint32_t floor, Visit visit) {
  constexpr int kAhead = 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warps = team.num_warps();
  // 32 sub-tiles a warp and round, dealt out like cards.
  for (int base = team.warp(); base < row.num_tiles; base += 32 * warps) {
    const int own = base + lane * warps;
    unsigned left =
        __ballot_sync(~0u, own < row.num_tiles && row.tile_key[own] >= floor);
    while (left != 0) {
      int tiles[kAhead];
      LanePart parts[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        // Past the last one: nothing is loaded, as no id is there.
        tiles[u] = row.num_tiles * kSubTile;
        if (left != 0) {
          tiles[u] = base + (__ffs(static_cast<int>(left)) - 1) * warps;
        }
        left &= left - 1;
        parts[u] = LoadPart(row, tiles[u]);
      }
#pragma unroll 1
      for (int u = 0; u < kAhead; ++u) {
        // Unrolled only here: visits are long.
        int tile = tiles[0];
        LanePart part = parts[0];
#pragma unroll
        for (int v = 1; v < kAhead; ++v) {
          if (u == v) {
            tile = tiles[v];
            part = parts[v];
          }
        }
        if (tile < row.num_tiles) visit(tile, LogitsOf(row, tile, part));
      }
    }
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TEAM_CUDA_CUH_
