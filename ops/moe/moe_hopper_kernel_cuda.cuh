#ifndef TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_

#include <cstdint>
#include <type_traits>

#include "ops/core/hopper_cuda.cuh"
#include "ops/moe/expert_matrices.h"
#include "ops/quantize/quantize_cuda.cuh"

// One kernel for both projections of the experts, from one token to many
// thousands: persistent blocks stream weights by TMA through a ring of stages
// in shared memory and multiply them with wgmma. Weights are the 64-row operand
// and tokens the narrow one ("swap-AB"), so a tile has as many tokens as its
// expert has, to a multiple of 8 or 32.
//
// A block has one warpgroup that loads, and kGroups that multiply. Each of
// those has two blocks of 64 rows of weights: the same rows of gate and up,
// whose products meet in one thread; or 128 rows of down.
//
// A sum over the depth has one order, whatever the shape: bits of a row depend
// on its token and its expert alone.

namespace tenon::moe_hopper {

enum class Projection { kGateUp, kDown };

struct Params {
  CUtensorMap weights[2];     // gate and up; down twice
  CUtensorMap hidden;         // down: its tokens, by position
  const void* x;              // gate and up: their tokens, gathered by slot
  uint32_t x_row_bytes;       // all of x is less than 4 GiB
  const float* token_scales;  // fp8: [rows, depth_steps] of x or hidden
  ExpertScales weight_scales[2];
  const int32_t* expert_offsets;
  const int32_t* sorted_slots;
  const float* topk_weights;  // down
  int64_t topk_weights_stride;
  void* out;          // gate and up: hidden; down: weighted
  float* out_scales;  // fp8, gate and up: those of hidden
  int64_t out_row_bytes;
  int32_t num_experts;
  int32_t top_k;
  int32_t depth_bytes;  // of a row
  int32_t depth_steps;  // of 128 bytes
  int32_t rows;         // of weights: intermediate, or hidden size
  int32_t row_tiles;
  bool out_is_half;  // fp8, down: round to float16, not bfloat16
};

// kTokens: most tokens of a tile. kGroups: warpgroups that multiply.
template <class T_, Projection kProjection_, int kTokens_, int kGroups_>
struct Shape {
  using T = T_;
  static constexpr Projection kProjection = kProjection_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;
  static constexpr bool kGateUp = kProjection == Projection::kGateUp;
  static constexpr bool kFp8 = std::is_same_v<T, __nv_fp8_e4m3>;

  static constexpr int kThreads = 128 * (1 + kGroups);
  // Rows of out that a tile makes.
  static constexpr int kTileRows = (kGateUp ? 64 : 128) * kGroups;

  // Shared memory. A stage: weights [group][2][64 rows], tokens, 128 bytes
  // each.
  static constexpr int kBlockBytes = 64 * 128;
  static constexpr int kWeightBytes = kGroups * 2 * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // Results on their way out, by group: two buffers of some tokens by 64 rows.
  static constexpr int kOutTokens = kTokens < 64 ? kTokens : kFp8 ? 32 : 64;
  static constexpr int kOutBytes = kOutTokens * 128;
  static constexpr int kScaleBytes = kFp8 ? kTokens * 4 : 0;    // of a stage
  static constexpr int kSlotBytes = kGateUp ? 0 : kTokens * 8;  // of a group
  static constexpr int kMaxBytes = kFp8 && kGateUp ? 3 * kTokens * 4 : 0;
  static constexpr int kFixedBytes =
      kGroups * (2 * kOutBytes + kSlotBytes) + kMaxBytes;
  static constexpr int kSharedLimit = 227 * 1024;
  static constexpr int kMostStages =
      (kSharedLimit - kFixedBytes) / (kStageBytes + kScaleBytes + 16);
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;

  static constexpr int kOutAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kOutAt + kGroups * 2 * kOutBytes;
  static constexpr int kSlotsAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kMaxAt = kSlotsAt + kGroups * kSlotBytes;
  static constexpr int kBarriersAt = kMaxAt + kMaxBytes;
  static constexpr int kSharedBytes = kBarriersAt + kStages * 16;
  static_assert(kStages >= 3 && kSharedBytes <= kSharedLimit, "room");

  // Warps of the loading warpgroup that fetch tokens; warp 0 fetches weights.
  static constexpr int kTokenThreads = kGateUp ? 96 : 32;
  // Arrivals at a full stage: weights, and tokens by TMA or by copies of each
  // thread.
  static constexpr int kFullArrivals =
      kGateUp ? 1 + kTokenThreads : (kFp8 ? 2 + kTokenThreads : 2);
};

#if TENON_SM90A

struct Tile {
  int expert;
  int begin;  // position in sorted_slots of the first token
  int count;  // of tokens
  int row;    // first row of weights
};

// Finds the tiles of a block one after the other. They are numbered by expert,
// then tokens, then rows. All lanes of a warp take part.
class TileFinder {
 public:
  __device__ __forceinline__ TileFinder(const Params& p, int tokens, int rows)
      : p_(p), tokens_(tokens), rows_(rows) {
    LoadExperts();
  }

  // Tile `index`, which may not be less than in the call before. False where
  // there is none.
  __device__ __forceinline__ bool Find(int index, Tile* tile) {
    int total = __shfl_sync(~0u, last_, 31);
    while (index - tiles_before_ >= total) {
      if (first_expert_ + 32 >= p_.num_experts) return false;
      tiles_before_ += total;
      first_expert_ += 32;
      LoadExperts();
      total = __shfl_sync(~0u, last_, 31);
    }
    const int in_chunk = index - tiles_before_;
    const int lane = __ffs(__ballot_sync(~0u, last_ > in_chunk)) - 1;
    const int before = lane == 0 ? 0 : __shfl_sync(~0u, last_, lane - 1);
    const int in_expert = in_chunk - before;
    const int token_tile = in_expert / p_.row_tiles;
    const int begin = __shfl_sync(~0u, begin_, lane);
    const int count = __shfl_sync(~0u, count_, lane);
    tile->expert = first_expert_ + lane;
    tile->begin = begin + token_tile * tokens_;
    tile->count = min(count - token_tile * tokens_, tokens_);
    tile->row = (in_expert - token_tile * p_.row_tiles) * rows_;
    return true;
  }

 private:
  // A lane has an expert.
  __device__ __forceinline__ void LoadExperts() {
    const int expert = first_expert_ + static_cast<int>(threadIdx.x % 32);
    begin_ = count_ = 0;
    if (expert < p_.num_experts) {
      begin_ = p_.expert_offsets[expert];
      count_ = p_.expert_offsets[expert + 1] - begin_;
    }
    last_ =
        cuda::WarpInclusiveSum(cuda::CeilDiv(count_, tokens_) * p_.row_tiles);
  }

  const Params& p_;
  const int tokens_;
  const int rows_;
  int first_expert_ = 0;
  int tiles_before_ = 0;
  int begin_, count_;
  int last_;  // one past the expert's last tile
};

// A stage of the ring, and the parity of its phase.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

template <class S>
class Kernel {
 public:
  __device__ __forceinline__ Kernel(const Params& p, uint32_t shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        cuda::InitBarrier(Full(i), S::kFullArrivals);
        cuda::InitBarrier(Empty(i), 4 * S::kGroups);
      }
      cuda::FenceBarrierInit();
      cuda::PrefetchTensorMap(&p_.weights[0]);
      cuda::PrefetchTensorMap(&p_.weights[1]);
      if (!S::kGateUp) cuda::PrefetchTensorMap(&p_.hidden);
    }
    if (S::kMaxBytes > 0) ClearMaxima();
    __syncthreads();
    // The down projection knows its experts from before the previous kernel:
    // its first weights are on their way while that one ends.
    if (S::kGateUp) cuda::WaitForPreviousKernels();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < 4) {
      if constexpr (S::kGroups == 2) cuda::DecreaseRegisters<56>();
      if (warp == 0) {
        LoadWeights();
      } else if (threadIdx.x - 32 < S::kTokenThreads) {
        if (!S::kGateUp) cuda::WaitForPreviousKernels();
        LoadTokens();
      }
    } else {
      if constexpr (S::kGroups == 2) cuda::IncreaseRegisters<224>();
      Multiply(warp / 4 - 1);
    }
  }

 private:
  using T = typename S::T;
  static constexpr int kStages = S::kStages;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kPerStep = 128 / sizeof(T);

  __device__ __forceinline__ uint32_t Full(int stage) const {
    return shared_ + S::kBarriersAt + stage * 16;
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const {
    return Full(stage) + 8;
  }
  __device__ __forceinline__ uint32_t Weights(int stage) const {
    return shared_ + stage * S::kStageBytes;
  }
  __device__ __forceinline__ uint32_t Tokens(int stage) const {
    return Weights(stage) + S::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t Scales(int stage) const {
    return shared_ + S::kScalesAt + stage * S::kScaleBytes;
  }
  // Of all variants of the product, the least that has room for `count`.
  static __device__ __forceinline__ int RoundedCount(int count) {
    return kTokens == 128 ? (count + 31) / 32 * 32 : kTokens;
  }

  // -------------------------------------------------------------------------
  // Loading
  // -------------------------------------------------------------------------

  __device__ __forceinline__ void LoadWeights() {
    TileFinder finder(p_, kTokens, S::kTileRows);
    Stage<kStages> stage;
    Tile tile;
    for (int i = blockIdx.x; finder.Find(i, &tile); i += gridDim.x) {
      for (int step = 0; step < p_.depth_steps; ++step) {
        cuda::Wait(Empty(stage.index), stage.parity ^ 1);
        if (lane_ == 0) {
          const uint32_t full = Full(stage.index);
          cuda::ArriveExpectBytes(full, S::kWeightBytes);
#pragma unroll
          for (int b = 0; b < 2 * S::kGroups; ++b) {
            const int row = tile.row + (S::kGateUp ? b / 2 : b) * 64;
            cuda::LoadBox(Weights(stage.index) + b * S::kBlockBytes,
                          &p_.weights[b % 2], tile.expert, row, step * kPerStep,
                          full);
          }
        }
        stage.Next();
      }
    }
  }

  __device__ __forceinline__ void LoadTokens() {
    TileFinder finder(p_, kTokens, S::kTileRows);
    Stage<kStages> stage;
    Tile tile;
    for (int i = blockIdx.x; finder.Find(i, &tile); i += gridDim.x) {
      if constexpr (S::kGateUp) {
        GatherTokens(tile, &stage);
      } else {
        LoadHidden(tile, &stage);
      }
    }
  }

  // Rows of x, swizzled as TMA would have them. Rows of a tile that have no
  // token get any: columns of a product do not depend on one another.
  __device__ __forceinline__ void GatherTokens(const Tile& tile,
                                               Stage<kStages>* stage) {
    constexpr int kRowsAtOnce = S::kTokenThreads / 8;
    constexpr int kRounds = cuda::CeilDiv(kTokens, kRowsAtOnce);
    static_assert(kRowsAtOnce % 8 == 4, "the swizzle alternates");
    const int thread = static_cast<int>(threadIdx.x) - 32;
    const int chunk = thread % 8;
    const int first_row = thread / 8;
    const int rounds =
        cuda::CeilDiv(RoundedCount(tile.count) - first_row, kRowsAtOnce);
    uint32_t from[kRounds];  // of the row, in bytes
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = min(first_row + r * kRowsAtOnce, tile.count - 1);
      const int token = p_.sorted_slots[tile.begin + row] / p_.top_k;
      from[r] = static_cast<uint32_t>(token) * p_.x_row_bytes;
    }
    const int to[2] = {
        first_row * 128 + (chunk ^ (first_row & 7)) * 16,
        first_row * 128 + (chunk ^ (first_row + kRowsAtOnce & 7)) * 16};
    const char* x = static_cast<const char*>(p_.x) + chunk * 16;
    const int depth_bytes = p_.depth_bytes - chunk * 16;
    uint32_t scales[kScaleRounds];
    FindScales(tile, scales);
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(Empty(stage->index), stage->parity ^ 1);
      const uint32_t tokens = Tokens(stage->index);
      const bool exists = step * 128 < depth_bytes;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (r < rounds) {
          cuda::CopyOrZero16(tokens + to[r % 2] + r * kRowsAtOnce * 128,
                             x + from[r], exists);
        }
      }
      x += 128;
      CopyScales(scales, step, stage->index);
      cuda::ArriveAfterCopies(Full(stage->index));
      stage->Next();
    }
  }

  __device__ __forceinline__ void LoadHidden(const Tile& tile,
                                             Stage<kStages>* stage) {
    uint32_t scales[kScaleRounds];
    FindScales(tile, scales);
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(Empty(stage->index), stage->parity ^ 1);
      const uint32_t full = Full(stage->index);
      if (lane_ == 0) {
        cuda::ArriveExpectBytes(full, S::kTokenBytes);
        cuda::LoadBox(Tokens(stage->index), &p_.hidden, 0, tile.begin,
                      step * kPerStep, full);
      }
      if constexpr (S::kFp8) {
        CopyScales(scales, step, stage->index);
        cuda::ArriveAfterCopies(full);
      }
      stage->Next();
    }
  }

  // The scales of a tile's tokens, of which this thread fetches some.
  static constexpr int kScaleRounds =
      S::kFp8 ? cuda::CeilDiv(kTokens, S::kTokenThreads) : 1;

  __device__ __forceinline__ void FindScales(
      const Tile& tile, uint32_t (&scales)[kScaleRounds]) const {
    if constexpr (S::kFp8) {
#pragma unroll
      for (int r = 0; r < kScaleRounds; ++r) {
        const int row =
            static_cast<int>(threadIdx.x) - 32 + r * S::kTokenThreads;
        const int position = tile.begin + min(row, tile.count - 1);
        const int at =
            S::kGateUp ? p_.sorted_slots[position] / p_.top_k : position;
        scales[r] = static_cast<uint32_t>(at) * p_.depth_steps;
      }
    }
  }
  __device__ __forceinline__ void CopyScales(
      const uint32_t (&scales)[kScaleRounds], int step, int stage) const {
    if constexpr (S::kFp8) {
      const float* const from = p_.token_scales + step;
#pragma unroll
      for (int r = 0; r < kScaleRounds; ++r) {
        const int row =
            static_cast<int>(threadIdx.x) - 32 + r * S::kTokenThreads;
        if (row < kTokens) {
          cuda::CopyOrZero4(Scales(stage) + row * 4, from + scales[r], true);
        }
      }
    }
  }

  // -------------------------------------------------------------------------
  // Multiplying
  // -------------------------------------------------------------------------

  __device__ __forceinline__ void Multiply(int group) {
    TileFinder finder(p_, kTokens, S::kTileRows);
    Stage<kStages> stage;
    Tile tile;
    int turn = 0;  // of the tile, among three
    for (int i = blockIdx.x; finder.Find(i, &tile); i += gridDim.x) {
      if constexpr (kTokens == 128) {
        if (tile.count <= 32) {
          MultiplyTile<32>(tile, group, turn, &stage);
        } else if (tile.count <= 64) {
          MultiplyTile<64>(tile, group, turn, &stage);
        } else if (tile.count <= 96) {
          MultiplyTile<96>(tile, group, turn, &stage);
        } else {
          MultiplyTile<128>(tile, group, turn, &stage);
        }
      } else {
        MultiplyTile<kTokens>(tile, group, turn, &stage);
      }
      turn = turn == 2 ? 0 : turn + 1;
    }
  }

  // One tile of up to kN tokens, by one warpgroup.
  template <int kN>
  __device__ __forceinline__ void MultiplyTile(const Tile& tile, int group,
                                               int turn,
                                               Stage<kStages>* stage) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    // On its way during the products.
    int slot = -1;
    float weight = 0.0f;
    if (!S::kGateUp && thread < tile.count) {
      slot = p_.sorted_slots[tile.begin + thread];
      const int token = slot / p_.top_k;
      weight = p_.topk_weights[token * p_.topk_weights_stride +
                               (slot - token * p_.top_k)];
    }
    float acc[2][kN / 2];
    if constexpr (S::kFp8) {
      AddScaledProducts<kN>(tile, group, stage, acc);
    } else {
      AddProducts<kN>(group, stage, acc);
    }
    if constexpr (S::kGateUp) {
      FinishGateUp<kN>(tile, group, turn, acc);
    } else {
      FinishDown<kN>(tile, group, slot, weight, acc);
    }
  }

  __device__ __forceinline__ void Release(int stage) const {
    if (lane_ == 0) cuda::Arrive(Empty(stage));
  }

  template <int kN>
  __device__ __forceinline__ void AddProducts(int group, Stage<kStages>* stage,
                                              float (&acc)[2][kN / 2]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) acc[q][i] = 0.0f;
    }
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(Full(stage->index), stage->parity);
      if (S::kGateUp) cuda::FenceAsyncProxy();  // tokens came by cp.async
      const uint64_t a = cuda::MatrixDescriptor(Weights(stage->index) +
                                                group * 2 * S::kBlockBytes);
      const uint64_t b = cuda::MatrixDescriptor(Tokens(stage->index));
      cuda::FenceWgmma();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          cuda::Wgmma<T, kN>(acc[q], a + q * (S::kBlockBytes >> 4) + 2 * k,
                             b + 2 * k, true);
        }
      }
      cuda::CommitWgmma();
      cuda::WaitForWgmma<1>();
      if (step > 0) Release(previous);
      previous = stage->index;
      stage->Next();
    }
    cuda::WaitForWgmma<0>();
    Release(previous);
  }

  // fp8: each step is a block of the scales.
  template <int kN>
  __device__ __forceinline__ void AddScaledProducts(const Tile& tile, int group,
                                                    Stage<kStages>* stage,
                                                    float (&acc)[2][kN / 2]) {
    const float* scales[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const ExpertScales& s = p_.weight_scales[q];
      scales[q] = s.block_rows == 1 ? nullptr  // applied at the end
                                    : s.data + tile.expert * s.expert_stride +
                                          BlockRow(tile, group, q) /
                                              s.block_rows * s.row_stride;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) acc[q][i] = 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      const float scale[2] = {scales[0] != nullptr ? scales[0][step] : 1.0f,
                              scales[1] != nullptr ? scales[1][step] : 1.0f};
      cuda::Wait(Full(stage->index), stage->parity);
      if (S::kGateUp) cuda::FenceAsyncProxy();  // tokens came by cp.async
      const uint64_t a = cuda::MatrixDescriptor(Weights(stage->index) +
                                                group * 2 * S::kBlockBytes);
      const uint64_t b = cuda::MatrixDescriptor(Tokens(stage->index));
      const uint32_t token_scales =
          Scales(stage->index) + lane_ % 4 * 2 * sizeof(float);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float products[kN / 2];
        cuda::FenceWgmma();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          cuda::Wgmma<T, kN>(products, a + q * (S::kBlockBytes >> 4) + 2 * k,
                             b + 2 * k, k > 0);
        }
        cuda::CommitWgmma();
        cuda::WaitForWgmma<0>();
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
          const float2 s =
              cuda::LoadShared<float2>(token_scales + j * 8 * sizeof(float));
          const float s0 = s.x * scale[q];
          const float s1 = s.y * scale[q];
          acc[q][4 * j] = fmaf(products[4 * j], s0, acc[q][4 * j]);
          acc[q][4 * j + 1] = fmaf(products[4 * j + 1], s1, acc[q][4 * j + 1]);
          acc[q][4 * j + 2] = fmaf(products[4 * j + 2], s0, acc[q][4 * j + 2]);
          acc[q][4 * j + 3] = fmaf(products[4 * j + 3], s1, acc[q][4 * j + 3]);
        }
      }
      Release(stage->index);
      stage->Next();
    }
    ScaleRows<kN>(tile, group, acc);
  }

  // First row of weights of block q of a group.
  static __device__ __forceinline__ int BlockRow(const Tile& tile, int group,
                                                 int q) {
    return tile.row + (S::kGateUp ? group : group * 2 + q) * 64;
  }
  // The first of the two rows of a block that a lane has; the other is that
  // + 8.
  __device__ __forceinline__ int LaneRow() const {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4;
  }

  // Weights with a scale for each row.
  template <int kN>
  __device__ __forceinline__ void ScaleRows(const Tile& tile, int group,
                                            float (&acc)[2][kN / 2]) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const ExpertScales& s = p_.weight_scales[q];
      if (s.block_rows != 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = BlockRow(tile, group, q) + LaneRow() + half * 8;
        const float scale =
            row < p_.rows
                ? s.data[tile.expert * s.expert_stride + row * s.row_stride]
                : 0.0f;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
          acc[q][4 * j + 2 * half] *= scale;
          acc[q][4 * j + 2 * half + 1] *= scale;
        }
      }
    }
  }

  // -------------------------------------------------------------------------
  // Results
  // -------------------------------------------------------------------------

  __device__ __forceinline__ uint32_t Out(int group) const {
    return shared_ + S::kOutAt + (group * 2 + out_turn_) * S::kOutBytes;
  }
  __device__ __forceinline__ void NextOut() { out_turn_ ^= 1; }
  static __device__ __forceinline__ void SyncGroup(int group) {
    cuda::SyncThreads(1 + group, 128);
  }

  // Writes 16-bit results of one block of 64 rows to row_of(token), which is
  // null where there is no such token. `columns`: how many of the 64 exist, a
  // multiple of 8. They are turned in shared memory, some tokens at a time, in
  // two buffers by turns, so that one barrier each time suffices.
  template <int kN, class RowOf>
  __device__ __forceinline__ void Store(int group,
                                        const uint32_t (&packed)[kN / 4],
                                        int columns, const RowOf& row_of) {
    constexpr int kAtOnce = kN < S::kOutTokens ? kN : S::kOutTokens;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int chunk = thread % 8;
    // Two matrices, of 8 tokens by 8 rows, for each 8 tokens.
    const int i = lane_ % 8;
    const int out_chunk = thread / 32 * 2 + lane_ / 8 % 2;
    const uint32_t lane_to = (lane_ / 16 * 8 + i) * 128 + (out_chunk ^ i) * 16;
#pragma unroll
    for (int first = 0; first < kN; first += kAtOnce) {
      const uint32_t out = Out(group);
      if constexpr (kAtOnce == 8) {
        cuda::StoreMatricesTransposed(out + lane_to, {packed[0], packed[1]});
      } else {
#pragma unroll
        for (int j = 0; j < kAtOnce / 8; j += 2) {
          const uint32_t* v = &packed[(first / 8 + j) * 2];
          cuda::StoreMatricesTransposed(out + lane_to + j * 8 * 128,
                                        {v[0], v[1], v[2], v[3]});
        }
      }
      SyncGroup(group);
#pragma unroll
      for (int t = 0; t < kAtOnce; t += 16) {
        const int token = t + thread / 8;
        if (token >= kAtOnce) break;
        char* const row = row_of(first + token);
        if (row != nullptr && chunk * 8 < columns) {
          *reinterpret_cast<uint4*>(row + chunk * 16) = cuda::LoadShared<uint4>(
              out + token * 128 + (chunk ^ (token & 7)) * 16);
        }
      }
      NextOut();
    }
  }

  template <int kN>
  __device__ __forceinline__ void FinishGateUp(const Tile& tile, int group,
                                               int turn,
                                               float (&acc)[2][kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const float g = acc[0][i];
      acc[0][i] = __fdividef(g, 1.0f + __expf(-g)) * acc[1][i];
    }
    const int row = BlockRow(tile, group, 0);
    if constexpr (S::kFp8) {
      StoreQuantized<kN>(tile, group, row, turn, acc[0]);
    } else {
      uint32_t packed[kN / 4];
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) {
        packed[i] = cuda::Pack<T>(acc[0][2 * i], acc[0][2 * i + 1]);
      }
      Store<kN>(group, packed, p_.rows - row, [&](int token) -> char* {
        if (token >= tile.count) return nullptr;
        return static_cast<char*>(p_.out) +
               (tile.begin + token) * p_.out_row_bytes + row * sizeof(T);
      });
    }
  }

  template <int kN>
  __device__ __forceinline__ void FinishDown(const Tile& tile, int group,
                                             int slot, float weight,
                                             const float (&acc)[2][kN / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const uint32_t slots = shared_ + S::kSlotsAt + group * S::kSlotBytes;
    const uint32_t weights = slots + kTokens * 4;
    if (thread < kTokens) {
      cuda::StoreShared(slots + thread * 4, slot);
      cuda::StoreShared(weights + thread * 4, weight);
    }
    SyncGroup(group);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t packed[kN / 4];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float2 w = cuda::LoadShared<float2>(
            weights + (j * 8 + lane_ % 4 * 2) * sizeof(float));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float v0 = acc[q][4 * j + 2 * half] * w.x;
          const float v1 = acc[q][4 * j + 2 * half + 1] * w.y;
          if constexpr (S::kFp8) {
            packed[2 * j + half] = p_.out_is_half
                                       ? cuda::Pack<__half>(v0, v1)
                                       : cuda::Pack<__nv_bfloat16>(v0, v1);
          } else {
            packed[2 * j + half] = cuda::Pack<T>(v0, v1);
          }
        }
      }
      const int row = BlockRow(tile, group, q);
      Store<kN>(group, packed, p_.rows - row, [&](int token) -> char* {
        const int to = cuda::LoadShared<int>(slots + token * 4);
        return to < 0 ? nullptr
                      : static_cast<char*>(p_.out) + to * p_.out_row_bytes +
                            row * 2;
      });
    }
    SyncGroup(group);  // slots are read before the next tile's
  }

  // -------------------------------------------------------------------------
  // fp8 results of gate and up: one scale for a token's rows of the tile
  // -------------------------------------------------------------------------

  // Of the tokens of a tile. Tiles take turns with three of them: the next one
  // is set to zero ahead of the barrier that all warpgroups meet at in every
  // tile, when its readers, two tiles before, are past the barrier before.
  __device__ __forceinline__ uint32_t Maxima(int turn) const {
    return shared_ + S::kMaxAt + turn * kTokens * 4;
  }
  __device__ __forceinline__ void ClearMaxima() const {
    for (int i = threadIdx.x; i < 3 * kTokens; i += S::kThreads) {
      cuda::StoreShared(Maxima(0) + i * 4, 0);
    }
  }

  template <int kN>
  __device__ __forceinline__ void StoreQuantized(const Tile& tile, int group,
                                                 int row, int turn,
                                                 const float (&v)[kN / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const uint32_t maxima = Maxima(turn);
    if (group == 0 && thread < kTokens) {
      cuda::StoreShared(Maxima(turn == 2 ? 0 : turn + 1) + thread * 4, 0);
    }
    // Rows past the last are zeros.
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float m = fmaxf(fabsf(v[4 * j + c]), fabsf(v[4 * j + 2 + c]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
          m = fmaxf(m, __shfl_xor_sync(~0u, m, mask));
        }
        // Not negative, so that bits are ordered as values are.
        if (lane_ < 4) {
          atomicMax(static_cast<int*>(__cvta_shared_to_generic(
                        maxima + (j * 8 + lane_ * 2 + c) * 4)),
                    __float_as_int(m));
        }
      }
    }
    cuda::SyncThreads(1 + S::kGroups, 128 * S::kGroups);
    if (group == 0 && thread < tile.count) {
      const int64_t groups = NumFp8Groups(p_.rows);
      const float m = cuda::LoadShared<float>(maxima + thread * 4);
      p_.out_scales[(tile.begin + thread) * groups + tile.row / 128] =
          Fp8ScaleOf(m).scale;
    }
    StoreBytes<kN>(tile, group, row, maxima, v);
  }

  // Byte k of the words of four lanes whose lane / 4 % 4 is 0, 1, 2, 3, in that
  // order, for the lane where it is k.
  __device__ __forceinline__ uint32_t TransposeBytes(uint32_t own) const {
    uint32_t other = __shfl_xor_sync(~0u, own, 8);
    own = __byte_perm(own, other, (lane_ & 8) == 0 ? 0x5410 : 0x3276);
    other = __shfl_xor_sync(~0u, own, 4);
    return __byte_perm(own, other, (lane_ & 4) == 0 ? 0x6240 : 0x3715);
  }

  // 64 bytes for each token, through shared memory.
  template <int kN>
  __device__ __forceinline__ void StoreBytes(const Tile& tile, int group,
                                             int row, uint32_t maxima,
                                             const float (&v)[kN / 2]) {
    constexpr int kAtOnce = kN < S::kOutTokens ? kN : S::kOutTokens;
    constexpr int kStride = 80;  // no bank conflicts
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int quarter = lane_ / 4 % 4;
#pragma unroll
    for (int first = 0; first < kN; first += kAtOnce) {
#pragma unroll
      for (int j = first / 8; j < (first + kAtOnce) / 8; ++j) {
        const float2 m = cuda::LoadShared<float2>(
            maxima + (j * 8 + lane_ % 4 * 2) * sizeof(float));
        const float r0 = Fp8ScaleOf(m.x).inverse;
        const float r1 = Fp8ScaleOf(m.y).inverse;
        // Bytes (row, c), (row, c + 1), (row + 8, c), (row + 8, c + 1).
        const uint32_t bytes =
            cuda::ToFp8x4(v[4 * j] * r0, v[4 * j + 1] * r1, v[4 * j + 2] * r0,
                          v[4 * j + 3] * r1);
        // Four lanes with rows in a row exchange them, so that each has four
        // rows of one column.
        const uint32_t four = TransposeBytes(bytes);
        const int token = j * 8 - first + lane_ % 4 * 2 + quarter % 2;
        const int at = thread / 32 * 16 + quarter / 2 * 8 + lane_ / 16 * 4;
        cuda::StoreShared(Out(group) + token * kStride + at,
                          static_cast<int>(four));
      }
      SyncGroup(group);
#pragma unroll
      for (int t = 0; t < kAtOnce; t += 32) {
        const int token = t + thread / 4;
        const int at = thread % 4 * 16;
        if (token < kAtOnce && first + token < tile.count &&
            row + at < p_.rows) {
          char* const to = static_cast<char*>(p_.out) +
                           (tile.begin + first + token) * p_.out_row_bytes +
                           row + at;
          *reinterpret_cast<uint4*>(to) =
              cuda::LoadShared<uint4>(Out(group) + token * kStride + at);
        }
      }
      NextOut();
    }
  }

  const Params& p_;
  const uint32_t shared_;
  const int lane_;
  int out_turn_ = 0;  // which of two buffers
};

#endif  // TENON_SM90A

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    ProjectionKernel(const __grid_constant__ Params p) {
#if TENON_SM90A
  extern __shared__ __align__(1024) char shared[];
  Kernel<S>(p, cuda::SharedAddress(shared)).Run();
#endif
}

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_KERNEL_CUDA_CUH_
