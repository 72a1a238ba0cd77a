#ifndef TENON_OPS_LINEAR_LINEAR_FP8_CLUSTER_CUDA_CUH_
#define TENON_OPS_LINEAR_LINEAR_FP8_CLUSTER_CUDA_CUH_

#include "ops/linear/linear_fp8_pack_cuda.cuh"
#include "ops/linear/linear_stream_cuda.cuh"
#include "ops/quantize/fp8_scale.h"

// fp8 weights and some tens of tokens on Hopper: still a matter of reading the
// weights once, but every block can no longer quantise all of x. A launch of
// its own does that (linear_fp8_pack_cuda.cu) and leaves x as tensor cores want
// it in shared memory, while the weights of this one are already on their way.
//
// Clusters of two or four blocks, a block to a multiprocessor: a cluster takes
// rows of the weight, each of its blocks a slice of the depth, so that no block
// reads all of x. In a block one warp fills a ring with boxes of weight, and
// two teams (warpgroups) multiply: 64 tokens by kCols rows of the weight, a
// block of 128 columns at a time, scaled and added in float32. Then the slices
// meet: each block finishes some of the tokens, for which all blocks send it
// their sums.

namespace tenon::linear_fp8_cluster {

using linear_fp8::PackedX;

inline constexpr int kMaxSlices = 4;
inline constexpr int kTeams = 2;
inline constexpr int kTeamThreads = 128;
inline constexpr int kMultiplyThreads = kTeams * kTeamThreads;
static_assert(kMultiplyThreads == linear_stream::kMultiplyThreads);
inline constexpr int kThreads = kMultiplyThreads + 32;

inline constexpr int kBlockBytes = kFp8GroupSize;  // of a row in a box
inline constexpr int kMaxStages = 32;
inline constexpr int kMaxSliceBlocks = 16;

// Of weights on their way to one multiprocessor at a time.
inline constexpr int kInFlightBytes = 32 * 1024;

struct Args {
  linear_stream::Args linear;
  PackedX x;
  int slices;  // of the depth: the blocks of a cluster
  int blocks;  // of 128 columns
  int passes;  // over the depth, of kTeams * kCols rows of weight
  // Tokens that a block finishes: whole eights.
  int finished;
  int stages, in_flight;
  // Floats from token to token of what a block receives.
  int received_pitch;
};

// Where things are in shared memory.
struct Layout {
  int ring, received, x_scales, weight_scales, barriers, bytes;
};

struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t x[kMaxSliceBlocks];
  uint64_t received;
};

// `passes`: of a cluster.
__host__ __device__ __forceinline__ Layout MakeLayout(const Args& a, int cols,
                                                      int passes) {
  const int blocks = (a.blocks + a.slices - 1) / a.slices;
  Layout l;
  l.ring = blocks * a.x.rows * kBlockBytes;
  l.received = l.ring + a.stages * cols * kBlockBytes;
  l.x_scales = l.received + a.slices * a.finished * a.received_pitch * 4;
  l.weight_scales = l.x_scales + blocks * a.x.rows * 4;
  l.barriers = l.weight_scales + blocks * passes * kTeams * cols / 8 * 4;
  l.barriers = (l.barriers + 7) / 8 * 8;
  // The left operand always has 64 rows, the last ones of which mean nothing.
  const int read = l.ring + (64 - a.x.rows) * kBlockBytes;
  l.bytes = l.barriers + static_cast<int>(sizeof(Barriers));
  l.bytes = l.bytes > read ? l.bytes : read;
  return l;
}

#if TENON_SM90A

using linear_stream::At;
using linear_stream::CopyBulk;
using linear_stream::SyncMultiplying;

// What a block has to do.
struct Work {
  __device__ __forceinline__ explicit Work(const Args& a) {
    rank = blockIdx.x % a.slices;
    cluster = blockIdx.x / a.slices;
    clusters = gridDim.x / a.slices;
    begin = a.blocks * rank / a.slices;
    blocks = a.blocks * (rank + 1) / a.slices - begin;
    passes = (a.passes - cluster + clusters - 1) / clusters;
  }

  // The row of the weight that column `col` of the block's sums belongs to.
  template <int kCols>
  __device__ __forceinline__ int Feature(int col) const {
    constexpr int kPass = kTeams * kCols;
    return (cluster + col / kPass * clusters) * kPass + col % kPass;
  }

  int rank, cluster, clusters;
  int begin, blocks;  // of the depth
  int passes;
};

template <int kCols>
__device__ __forceinline__ void LoadWeights(const Args& a, const Work& work,
                                            const CUtensorMap& weight,
                                            Barriers& barriers, uint32_t ring) {
  constexpr int kStageBytes = kCols * kBlockBytes;
  linear_stream::Slot slot, arriving;
  int n = 0;
  for (int pass = 0; pass < work.passes; ++pass) {
    for (int block = 0; block < work.blocks; ++block) {
      for (int team = 0; team < kTeams; ++team, ++n) {
        if (n >= a.in_flight) {
          cuda::Wait(At(barriers.full[arriving.index]), arriving.parity);
          arriving.Next(a.stages);
        }
        const uint32_t full = At(barriers.full[slot.index]);
        cuda::Wait(At(barriers.empty[slot.index]), slot.parity ^ 1);
        cuda::ArriveExpectBytes(full, kStageBytes);
        cuda::LoadBox(ring + slot.index * kStageBytes, &weight, 0,
                      work.Feature<kCols>((pass * kTeams + team) * kCols),
                      (work.begin + block) * kBlockBytes, full);
        slot.Next(a.stages);
      }
    }
  }
}

// Asks for this block's part of x, a lane for each block of the depth.
__device__ __forceinline__ void LoadX(const Args& a, const Work& work,
                                      Barriers& barriers, uint32_t x,
                                      uint32_t scales) {
  const int block = threadIdx.x;
  if (block >= work.blocks) return;
  const int bytes = a.x.rows * kBlockBytes;
  const int scale_bytes = a.x.rows * 4;
  const uint32_t barrier = At(barriers.x[block]);
  cuda::ArriveExpectBytes(barrier, bytes + scale_bytes);
  const int64_t from = work.begin + block;
  CopyBulk(x + block * bytes, a.x.q + from * bytes, bytes, barrier);
  CopyBulk(scales + block * scale_bytes, a.x.scales + from * a.x.rows,
           scale_bytes, barrier);
}

// weight_scales[block][rows of weight / 8], in shared memory.
template <int kCols>
__device__ __forceinline__ void LoadWeightScales(const Args& a,
                                                 const Work& work, float* to) {
  const linear_stream::Args& l = a.linear;
  const int groups = work.passes * kTeams * kCols / 8;
  for (int i = threadIdx.x; i < work.blocks * groups; i += kMultiplyThreads) {
    const int block = i / groups;
    const int feature = work.Feature<kCols>(i % groups * 8);
    float scale = 1.0f;
    if (l.block_scales != nullptr) {
      const int row = min(feature, l.out_features - 1) / kFp8GroupSize;
      scale = l.block_scales[row * l.block_scales_stride + work.begin + block];
    }
    to[i] = scale;
  }
}

// Of the thread's team: the products of a pass with all of the block's depth.
template <int kCols>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const Args& a, const Work& work,
                                        char* memory, const Layout& layout,
                                        Barriers& barriers)
      : a_(a),
        work_(work),
        barriers_(barriers),
        x_(cuda::SharedAddress(memory)),
        ring_(cuda::SharedAddress(memory) + layout.ring),
        x_scales_(reinterpret_cast<const float*>(memory + layout.x_scales) +
                  Row()),
        weight_scales_(
            reinterpret_cast<const float*>(memory + layout.weight_scales)),
        next_{Team()},
        last_{Team()},
        to_refill_((work.passes * work.blocks * kTeams - a.stages) / kTeams) {}

  __device__ __forceinline__ static int Team() {
    return threadIdx.x / kTeamThreads;
  }
  // The first of the thread's two rows; the other one is 8 further.
  __device__ __forceinline__ static int Row() {
    return threadIdx.x % kTeamThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }

  // Products of a block of 128 columns are made while those of the one before
  // are scaled and added.
  __device__ __forceinline__ void Run(int pass, float (&sums)[kCols / 2]) {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    const int last = work_.blocks - 1;
    float even[kCols / 2];
    float odd[kCols / 2];
    Begin(pass, 0, even);
    int block = 0;
#pragma unroll 1
    for (; block + 2 <= last; block += 2) {
      Begin(pass, block + 1, odd);
      cuda::WaitForWgmma<1>();
      Add(pass, block, even, sums);
      Begin(pass, block + 2, even);
      cuda::WaitForWgmma<1>();
      Add(pass, block + 1, odd, sums);
    }
    if (block < last) {
      Begin(pass, last, odd);
      cuda::WaitForWgmma<1>();
      Add(pass, block, even, sums);
      cuda::WaitForWgmma<0>();
      Add(pass, last, odd, sums);
    } else {
      cuda::WaitForWgmma<0>();
      Add(pass, block, even, sums);
    }
  }

 private:
  struct TeamSlot {
    int index;
    uint32_t parity = 0;

    __device__ __forceinline__ void Next(int stages) {
      if ((index += kTeams) < stages) return;
      index -= stages;
      parity ^= 1;
    }
  };

  // Starts to multiply.
  __device__ __forceinline__ void Begin(int pass, int block,
                                        float (&products)[kCols / 2]) {
    if (pass == 0) cuda::Wait(At(barriers_.x[block]), 0);
    cuda::Wait(At(barriers_.full[next_.index]), next_.parity);
    const uint64_t x =
        cuda::MatrixDescriptor(x_ + block * a_.x.rows * kBlockBytes);
    const uint64_t weight =
        cuda::MatrixDescriptor(ring_ + next_.index * kCols * kBlockBytes);
    next_.Next(a_.stages);
    cuda::FenceWgmma();
#pragma unroll
    for (int i = 0; i < kBlockBytes / 32; ++i) {
      cuda::Wgmma<__nv_fp8_e4m3, kCols>(products, x + 2 * i, weight + 2 * i,
                                        i > 0);
    }
    cuda::CommitWgmma();
  }

  // Gives the stage of a block back, and adds what its products are worth.
  __device__ __forceinline__ void Add(int pass, int block,
                                      const float (&products)[kCols / 2],
                                      float (&sums)[kCols / 2]) {
    if (to_refill_-- > 0) cuda::Arrive(At(barriers_.empty[last_.index]));
    last_.Next(a_.stages);
    if (Row() >= a_.x.rows) return;
    const float* const of_rows = x_scales_ + block * a_.x.rows;
    const float low = of_rows[0];
    const float high = of_rows[Row() + 8 < a_.x.rows ? 8 : 0];
    const float* const scales =
        weight_scales_ +
        ((block * work_.passes + pass) * kTeams + Team()) * (kCols / 8);
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const float of_low = low * scales[j];
      const float of_high = high * scales[j];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[4 * j + i] = fmaf(products[4 * j + i], of_low, sums[4 * j + i]);
        sums[4 * j + 2 + i] =
            fmaf(products[4 * j + 2 + i], of_high, sums[4 * j + 2 + i]);
      }
    }
  }

  const Args& a_;
  const Work& work_;
  Barriers& barriers_;
  const uint32_t x_;
  const uint32_t ring_;
  const float* const x_scales_;
  const float* const weight_scales_;
  TeamSlot next_, last_;  // to begin, to end
  int to_refill_;
};

// Sends a team's sums to the blocks that finish their tokens.
template <int kCols>
__device__ __forceinline__ void SendSums(const Args& a, const Work& work,
                                         int pass, uint32_t received,
                                         uint32_t barrier,
                                         const float (&sums)[kCols / 2]) {
  const int team = threadIdx.x / kTeamThreads;
  const int lane = threadIdx.x % 32;
  const int col = (pass * kTeams + team) * kCols + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = threadIdx.x % kTeamThreads / 32 * 16 + half * 8;
    const int block = first / a.finished;
    if (block >= a.slices) continue;
    const int row = work.rank * a.finished + first % a.finished + lane / 4;
    const uint32_t to = cuda::ClusterAddress(
        received + (row * a.received_pitch + col) * 4, block);
    const uint32_t counter = cuda::ClusterAddress(barrier, block);
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
          "[%0], {%1, %2}, [%3];\n" ::"r"(to + j * 32),
          "f"(sums[4 * j + 2 * half]), "f"(sums[4 * j + 2 * half + 1]),
          "r"(counter)
          : "memory");
    }
  }
}

// Adds up what all blocks sent, in their order, a warp for a token.
template <class T, int kCols>
__device__ __forceinline__ void Finish(const Args& a, const Work& work,
                                       const float* received,
                                       uint32_t barrier) {
  constexpr int kAtOnce = 4;
  const int cols = work.passes * kTeams * kCols;
  const int slice = a.finished * a.received_pitch;
  for (int row = threadIdx.x / 32; row < a.finished;
       row += kMultiplyThreads / 32) {
    const float* const sums = received + row * a.received_pitch;
    for (int begin = threadIdx.x % 32; begin < cols; begin += 32 * kAtOnce) {
      linear_stream::Output<T, true> outputs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int col = begin + 32 * i;
        outputs[i].Begin(
            a.linear, work.rank * a.finished + row,
            col < cols ? work.Feature<kCols>(col) : a.linear.out_features);
      }
      cuda::Wait(barrier, 0);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!outputs[i].exists) continue;
        float sum = sums[begin + 32 * i];
#pragma unroll
        for (int s = 1; s < kMaxSlices; ++s) {
          if (s >= a.slices) break;
          sum = __fadd_rn(sum, sums[s * slice + begin + 32 * i]);
        }
        outputs[i].Store(a.linear, sum);
      }
    }
  }
}

// Every block has begun, with its barriers initialised, once all have waited.
__device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

#endif  // TENON_SM90A

}  // namespace tenon::linear_fp8_cluster

#endif  // TENON_OPS_LINEAR_LINEAR_FP8_CLUSTER_CUDA_CUH_
