#ifndef TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_

#include <cstdint>
#include <type_traits>

#include "ops/core/hopper_cuda.cuh"
#include "ops/moe/moe_gemm_cuda.cuh"

// What a block of the experts' kernels on Hopper is made of, its tiles, and the
// warpgroup that loads them. See moe_hopper_kernel_cuda.cuh.

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
  MoeRoutingWeights routing;  // down
  void* out;                  // gate and up: hidden; down: weighted
  float* out_scales;          // fp8, gate and up: those of hidden
  int64_t out_row_bytes;
  int32_t num_experts;
  int32_t top_k;
  int32_t depth_bytes;  // of a row
  int32_t depth_steps;  // of 128 bytes
  int32_t rows;         // of weights: intermediate, or hidden size
  int32_t row_tiles;
  bool out_is_half;  // fp8, down: round to float16, not bfloat16
};

// kTokens: most tokens of a tile. kGroups: warpgroups that multiply. kPaired:
// two blocks, a cluster, have tiles with the same weights, of which each loads
// half for both, and share the tokens.
template <class T_, Projection kProjection_, int kTokens_, int kGroups_,
          bool kPaired_ = false>
struct Shape {
  using T = T_;
  static constexpr Projection kProjection = kProjection_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;
  static constexpr bool kGateUp = kProjection == Projection::kGateUp;
  static constexpr bool kFp8 = std::is_same_v<T, __nv_fp8_e4m3>;
  // Tokens are the 64-row operand, half of them in each of two warpgroups;
  // otherwise weights are.
  static constexpr bool kWide = kTokens == 128;
  static_assert(!kWide || kGroups == 2, "64 tokens to a warpgroup");
  static constexpr bool kPaired = kPaired_;
  static constexpr int kBlocks = kPaired ? 2 : 1;

  static constexpr int kThreads = 128 * (1 + kGroups);
  // Rows of out that a tile makes.
  static constexpr int kTileRows = (kGateUp ? 64 : 128) * kGroups;
  static constexpr int kPerStep = 128 / sizeof(T);  // elements of depth
  // With few tokens 128 experts take one trip to memory; with many, registers
  // are dearer.
  static constexpr int kExpertsPerLane = kTokens > 32 ? 1 : 4;

  // Of a thread, with two warpgroups that multiply; 64 Ki in all.
  static constexpr int kLoadRegisters = kPaired && kGateUp && !kWide ? 72
                                        : kGateUp || kPaired         ? 56
                                                                     : 40;
  static constexpr int kMultiplyRegisters =
      (64 * 1024 / 128 - kLoadRegisters) / 2 / 8 * 8;

  // Shared memory. A stage has blocks of 64 rows of weights, two for each
  // warpgroup, then the tokens' rows; 128 bytes each.
  static constexpr int kBlockBytes = 64 * 128;
  static constexpr int kWeightBytes = kGroups * 2 * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // Scales of a stage, of its tokens, then those of its weights, which would be
  // late if they were read when they are needed: one for each block; wide, for
  // each two blocks.
  static constexpr int kWeightScales = !kFp8 ? 0 : kWide ? 2 : kGroups * 2;
  static constexpr int kScaleBytes =
      kFp8 ? (kTokens + kWeightScales + 3) / 4 * 16 : 0;
  // Results on their way out, of a warpgroup. Narrow: buffers of kOutTokens
  // tokens by 64 rows. Wide: for each warp 16 tokens by 128 bytes, 16 bytes
  // apart.
  static constexpr int kOutTokens = kPaired ? 48 : kTokens;
  static constexpr int kOutBytes = kWide ? 4 * 16 * 144 : 2 * kOutTokens * 128;
  // Tiles on their way to the warpgroups that multiply, two by turns: the tile;
  // for down also slot and weight of each token.
  static constexpr int kTileBytes = 16 + (kGateUp ? 0 : kTokens * 8);
  // Narrow: the largest magnitudes of each token, three by turns.
  static constexpr int kMaxBytes =
      !kWide && kFp8 && kGateUp ? 3 * kTokens * 4 : 0;
  static constexpr int kFixedBytes =
      kGroups * kOutBytes + 2 * (kTileBytes + 16) + kMaxBytes;
  static constexpr int kSharedLimit = 227 * 1024;
  static constexpr int kMostStages =
      (kSharedLimit - kFixedBytes) / (kStageBytes + kScaleBytes + 16);
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;

  static constexpr int kOutAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kOutAt + kGroups * kOutBytes;
  static constexpr int kTilesAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kMaxAt = kTilesAt + 2 * kTileBytes;
  static constexpr int kBarriersAt = kMaxAt + kMaxBytes;
  static constexpr int kSharedBytes = kBarriersAt + (kStages + 2) * 16;
  static_assert(kStages >= 3 && kSharedBytes <= kSharedLimit, "room");

  // Tokens of a box of TMA.
  static constexpr int kTokenBox = kPaired && !kWide ? 16 : kTokens;
  // Warps of the loading warpgroup that fetch tokens, after warp 0, which
  // fetches weights. The last warp of the four tells which tiles there are.
  static constexpr int kTokenThreads = kGateUp ? 96 : 32;
  // Arrivals at a full stage: weights and the scale of each block, and tokens
  // by TMA or by copies of each thread.
  static constexpr int kFullArrivals =
      1 + kWeightScales +
      (kGateUp ? kTokenThreads : (kFp8 ? 1 + kTokenThreads : 1));
  // At an empty one: one for each warp of each block; of fp8 one for every
  // thread, as each reads scales there, and one for each warp of the other
  // block of a pair.
  static constexpr int kEmptyArrivals =
      kGroups * ((kFp8 ? 128 : 4) + (kPaired ? 4 : 0));
};

#if TENON_SM90A

struct Tile {
  int expert;  // below 0: there is no tile, nor one after it
  int begin;   // position in sorted_slots of the first token
  int count;   // of tokens; of one block of a pair it may be 0
  int row;     // first row of weights
};

// Finds the tiles of a block one after the other. They are numbered by expert,
// then tokens, then rows. All lanes of a warp take part; each has kPerLane
// experts at a time.
template <class S>
class TileFinder {
 public:
  __device__ __forceinline__ explicit TileFinder(const Params& p)
      : p_(p), index_(blockIdx.x / S::kBlocks) {
    LoadExperts();
  }

  // The block's next tile. False where there is none.
  __device__ __forceinline__ bool Next(Tile* tile) {
    const int index = index_;
    index_ += gridDim.x / S::kBlocks;
    int total = __shfl_sync(~0u, last_, 31);
    while (index - tiles_before_ >= total) {
      if (first_expert_ + 32 * kPerLane >= p_.num_experts) return false;
      tiles_before_ += total;
      first_expert_ += 32 * kPerLane;
      LoadExperts();
      total = __shfl_sync(~0u, last_, 31);
    }
    int rest = index - tiles_before_;
    const int lane = __ffs(__ballot_sync(~0u, last_ > rest)) - 1;
    if (lane > 0) rest -= __shfl_sync(~0u, last_, lane - 1);
    int expert = first_expert_ + lane * kPerLane;
    int begin = 0, end = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int next_begin = __shfl_sync(~0u, offsets_[i], lane);
      const int next_end = __shfl_sync(~0u, offsets_[i + 1], lane);
      if (found) continue;
      begin = next_begin;
      end = next_end;
      const int tiles = NumTiles(end - begin);
      found = rest < tiles;
      if (!found) {
        rest -= tiles;
        ++expert;
      }
    }
    const int token_tile = rest / p_.row_tiles;
    tile->expert = expert;
    tile->row = (rest - token_tile * p_.row_tiles) * S::kTileRows;
    if constexpr (S::kPaired) {
      // Narrow: all pairs of the expert have about as many tokens. Wide: 128,
      // but the last. A pair's blocks have about as many each, in steps of what
      // is computed.
      constexpr int kStep = S::kWide ? 64 : 8;
      int tokens = 2 * S::kTokens;
      if (!S::kWide) {
        const int pairs = cuda::CeilDiv(end - begin, 2 * S::kTokens);
        tokens = cuda::CeilDiv(end - begin, 2 * kStep * pairs) * 2 * kStep;
      }
      begin += token_tile * tokens;
      end = min(end, begin + tokens);
      const int share = cuda::CeilDiv(end - begin, 2 * kStep) * kStep;
      const int first = begin + static_cast<int>(blockIdx.x % 2) * share;
      tile->begin = min(first, end - 1);
      tile->count = max(min(end - first, share), 0);
    } else {
      tile->begin = begin + token_tile * S::kTokens;
      tile->count = min(end - tile->begin, S::kTokens);
    }
    return true;
  }

 private:
  static constexpr int kPerLane = S::kExpertsPerLane;

  __device__ __forceinline__ int NumTiles(int tokens) const {
    return cuda::CeilDiv(tokens, S::kTokens * S::kBlocks) * p_.row_tiles;
  }

  __device__ __forceinline__ void LoadExperts() {
    const int first =
        first_expert_ + static_cast<int>(threadIdx.x % 32) * kPerLane;
#pragma unroll
    for (int i = 0; i <= kPerLane; ++i) {
      offsets_[i] = p_.expert_offsets[min(first + i, p_.num_experts)];
    }
    int tiles = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      tiles += NumTiles(offsets_[i + 1] - offsets_[i]);
    }
    last_ = cuda::WarpInclusiveSum(tiles);
  }

  const Params& p_;
  int index_;  // of the next tile
  int first_expert_ = 0;
  int tiles_before_ = 0;
  int offsets_[kPerLane + 1];
  int last_;  // one past the tiles of the lane's experts
};

// fp8: the scales along the depth of matrix q in row `row` of the weights, or
// in the last one; null where rows have one each, which is applied at the end.
__device__ __forceinline__ const float* BlockScales(const Params& p, int expert,
                                                    int row, int q) {
  const ExpertScales& s = p.weight_scales[q];
  if (s.block_rows == 1) return nullptr;
  return s.data + expert * s.expert_stride +
         min(row, p.rows - 1) / s.block_rows * s.row_stride;
}

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

// Addresses in a block's shared memory.
template <class S>
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(uint32_t shared) : shared_(shared) {}

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
  // The one with that number of the stage's scales of weights.
  __device__ __forceinline__ uint32_t WeightScale(int stage, int index) const {
    return Scales(stage) + (S::kTokens + index) * 4;
  }
  __device__ __forceinline__ uint32_t Out(int group) const {
    return shared_ + S::kOutAt + group * S::kOutBytes;
  }
  // Of tiles on their way: the tile, then slots, then their weights.
  __device__ __forceinline__ uint32_t TileFull(int turn) const {
    return Full(S::kStages + turn);
  }
  __device__ __forceinline__ uint32_t TileEmpty(int turn) const {
    return Empty(S::kStages + turn);
  }
  __device__ __forceinline__ uint32_t TileAt(int turn) const {
    return shared_ + S::kTilesAt + turn * S::kTileBytes;
  }
  __device__ __forceinline__ uint32_t SlotAt(int turn, int token) const {
    return TileAt(turn) + 16 + token * 4;
  }
  __device__ __forceinline__ uint32_t WeightAt(int turn, int token) const {
    return SlotAt(turn, S::kTokens + token);
  }
  __device__ __forceinline__ uint32_t Maxima() const {
    return shared_ + S::kMaxAt;
  }

 private:
  const uint32_t shared_;
};

// The warpgroup that loads: warp 0 weights, others tokens.
template <class S>
class Loader : private Ring<S> {
 public:
  __device__ __forceinline__ Loader(const Params& p, uint32_t shared)
      : Ring<S>(shared), p_(p), lane_(threadIdx.x % 32) {}

  // By warp 0.
  __device__ __forceinline__ void LoadWeights() {
    TileFinder<S> finder(p_);
    Stage<kStages> stage;
    Stage<2> turn;
    Tile tile;
    while (finder.Next(&tile)) {
      if (S::kGateUp) TellTile(tile, &turn);
      const float* const scales = WeightScales(tile);
      for (int step = 0; step < p_.depth_steps; ++step) {
        cuda::Wait(Empty(stage.index), stage.parity ^ 1);
        if (lane_ == 0) LoadWeights(tile, step, stage.index);
        CopyWeightScale(scales, step, stage.index);
        stage.Next();
      }
    }
    if (S::kGateUp) TellTile({-1, 0, 0, 0}, &turn);
  }

  // Down: by one warp. Whoever multiplies waits neither for slots nor for their
  // weights.
  __device__ __forceinline__ void TellTiles() {
    TileFinder<S> finder(p_);
    Stage<2> turn;
    Tile tile;
    while (finder.Next(&tile)) TellTile(tile, &turn);
    TellTile({-1, 0, 0, 0}, &turn);
  }

  // By the kTokenThreads threads after warp 0.
  __device__ __forceinline__ void LoadTokens() {
    TileFinder<S> finder(p_);
    Stage<kStages> stage;
    Tile tile;
    while (finder.Next(&tile)) {
      if constexpr (S::kGateUp) {
        GatherTokens(tile, &stage);
      } else {
        LoadHidden(tile, &stage);
      }
    }
  }

 private:
  using Ring<S>::Full;
  using Ring<S>::Empty;
  using Ring<S>::Weights;
  using Ring<S>::Tokens;
  using Ring<S>::Scales;
  static constexpr int kStages = S::kStages;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kPerStep = S::kPerStep;

  // Tells the warpgroups that multiply their next tile.
  __device__ __forceinline__ void TellTile(const Tile& tile,
                                           Stage<2>* turn) const {
    int slots[kRounds];
    float weights[kRounds];
    if constexpr (!S::kGateUp) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int token = r * 32 + lane_;
        slots[r] =
            token < tile.count ? p_.sorted_slots[tile.begin + token] : -1;
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        weights[r] = slots[r] < 0 ? 0.0f : p_.routing[slots[r]];
      }
    }
    cuda::Wait(this->TileEmpty(turn->index), turn->parity ^ 1);
    if (lane_ == 0) {
      cuda::StoreShared(
          this->TileAt(turn->index),
          make_int4(tile.expert, tile.begin, tile.count, tile.row));
    }
    if constexpr (!S::kGateUp) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int token = r * 32 + lane_;
        if (token >= kTokens) break;
        cuda::StoreShared(this->SlotAt(turn->index, token), slots[r]);
        cuda::StoreShared(this->WeightAt(turn->index, token), weights[r]);
      }
    }
    cuda::Arrive(this->TileFull(turn->index));
    turn->Next();
  }
  static constexpr int kRounds = cuda::CeilDiv(kTokens, 32);

  // One step of the depth, by one thread.
  __device__ __forceinline__ void LoadWeights(const Tile& tile, int step,
                                              int stage) const {
    const uint32_t full = Full(stage);
    cuda::ArriveExpectBytes(full, S::kWeightBytes);
#pragma unroll
    for (int b = 0; b < 2 * S::kGroups; ++b) {
      // Of gate and up a warpgroup has one block each; or, wide, both have all.
      const int q = S::kWide ? b / 2 : b % 2;
      const int row =
          tile.row + (S::kGateUp ? (S::kWide ? b % 2 : b / 2) : b) * 64;
      const uint32_t to = Weights(stage) + b * S::kBlockBytes;
      const CUtensorMap* const map = &p_.weights[q];
      if constexpr (!S::kPaired) {
        cuda::LoadBox(to, map, tile.expert, row, step * kPerStep, full);
      } else if (b % 2 == blockIdx.x % 2) {
        cuda::LoadBoxToCluster(to, map, tile.expert, row, step * kPerStep, full,
                               0b11);
      }
    }
  }

  // The scales along the depth of the weights that this lane has to fetch them
  // of; null where there is none.
  __device__ __forceinline__ const float* WeightScales(const Tile& tile) const {
    if constexpr (S::kWeightScales > 0) {
      const int block = S::kWide ? (S::kGateUp ? 0 : lane_ * 2)
                                 : (S::kGateUp ? lane_ / 2 : lane_);
      const int row = tile.row + block * 64;
      if (lane_ < S::kWeightScales) {
        return BlockScales(p_, tile.expert, row, lane_ % 2);
      }
    }
    return nullptr;
  }
  __device__ __forceinline__ void CopyWeightScale(const float* scales, int step,
                                                  int stage) const {
    if constexpr (S::kWeightScales > 0) {
      if (lane_ >= S::kWeightScales) return;
      if (scales != nullptr) {
        cuda::CopyOrZero4(this->WeightScale(stage, lane_), scales + step, true);
      }
      cuda::ArriveAfterCopies(Full(stage));
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
    const int rounds = cuda::CeilDiv(
        (kTokens > 32 ? tile.count : kTokens) - first_row, kRowsAtOnce);
    uint32_t from[kRounds];  // of the row, in bytes
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = max(min(first_row + r * kRowsAtOnce, tile.count - 1), 0);
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
      constexpr int kBoxBytes = S::kTokenBox * 128;
      const int boxes =
          S::kPaired ? cuda::CeilDiv(tile.count, S::kTokenBox) : 1;
      if (lane_ == 0) cuda::ArriveExpectBytes(full, boxes * kBoxBytes);
      __syncwarp();
      if (lane_ < boxes) {
        cuda::LoadBox(Tokens(stage->index) + lane_ * kBoxBytes, &p_.hidden, 0,
                      tile.begin + lane_ * S::kTokenBox, step * kPerStep, full);
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
        const int position = tile.begin + max(min(row, tile.count - 1), 0);
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

  const Params& p_;
  const int lane_;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_
