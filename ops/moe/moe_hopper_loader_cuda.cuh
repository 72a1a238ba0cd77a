#ifndef TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_

#include <cstdint>
#include <type_traits>

#include "ops/core/hopper_cuda.cuh"
#include "ops/moe/expert_matrices.h"

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
  // Tokens are the 64-row operand, half of them in each of two warpgroups;
  // otherwise weights are.
  static constexpr bool kWide = kTokens == 128;
  static_assert(!kWide || kGroups == 2, "64 tokens to a warpgroup");

  static constexpr int kThreads = 128 * (1 + kGroups);
  // Rows of out that a tile makes.
  static constexpr int kTileRows = (kGateUp ? 64 : 128) * kGroups;
  static constexpr int kPerStep = 128 / sizeof(T);  // elements of depth
  // With few tokens 128 experts take one trip to memory; with many, registers
  // are dearer.
  static constexpr int kExpertsPerLane = kWide ? 1 : 4;

  // Of a thread, with two warpgroups that multiply; 64 Ki in all.
  static constexpr int kLoadRegisters = kGateUp ? 56 : 40;
  static constexpr int kMultiplyRegisters = kGateUp ? 224 : 232;

  // Shared memory. A stage has blocks of 64 rows of weights, two for each
  // warpgroup, then the tokens' rows; 128 bytes each.
  static constexpr int kBlockBytes = 64 * 128;
  static constexpr int kWeightBytes = kGroups * 2 * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kScaleBytes = kFp8 ? kTokens * 4 : 0;  // of a stage
  // Results on their way out, of a warpgroup. Narrow: two buffers of the tokens
  // by 64 rows. Wide: for each warp 16 tokens by 128 bytes, 16 bytes apart.
  static constexpr int kOutBytes = kWide ? 4 * 16 * 144 : 2 * kTokens * 128;
  // Narrow: slot and weight of each token, for each warpgroup; the largest
  // magnitudes of each token, three by turns.
  static constexpr int kSlotBytes = kWide || kGateUp ? 0 : kTokens * 8;
  static constexpr int kMaxBytes =
      !kWide && kFp8 && kGateUp ? 3 * kTokens * 4 : 0;
  static constexpr int kFixedBytes =
      kGroups * (kOutBytes + kSlotBytes) + kMaxBytes;
  static constexpr int kSharedLimit = 227 * 1024;
  static constexpr int kMostStages =
      (kSharedLimit - kFixedBytes) / (kStageBytes + kScaleBytes + 16);
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;

  static constexpr int kOutAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kOutAt + kGroups * kOutBytes;
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
  // At an empty one: every thread that read scales there; or, where only wgmma
  // reads, one for each warp.
  static constexpr int kEmptyArrivals = kGroups * (kFp8 ? 128 : 4);
};

// silu(gate) * up, with the fast exponential: within a few units in the last
// place of float32.
__device__ __forceinline__ float SwiGlu(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#if TENON_SM90A

struct Tile {
  int expert;
  int begin;  // position in sorted_slots of the first token
  int count;  // of tokens
  int row;    // first row of weights
};

// Finds the tiles of a block one after the other. They are numbered by expert,
// then tokens, then rows. All lanes of a warp take part; each has kPerLane
// experts at a time.
template <int kPerLane>
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
    tile->begin = begin + token_tile * tokens_;
    tile->count = min(end - tile->begin, tokens_);
    tile->row = (rest - token_tile * p_.row_tiles) * rows_;
    return true;
  }

 private:
  __device__ __forceinline__ int NumTiles(int tokens) const {
    return cuda::CeilDiv(tokens, tokens_) * p_.row_tiles;
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
  const int tokens_;
  const int rows_;
  int first_expert_ = 0;
  int tiles_before_ = 0;
  int offsets_[kPerLane + 1];
  int last_;  // one past the tiles of the lane's experts
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
  __device__ __forceinline__ uint32_t Out(int group) const {
    return shared_ + S::kOutAt + group * S::kOutBytes;
  }
  __device__ __forceinline__ uint32_t Slots(int group) const {
    return shared_ + S::kSlotsAt + group * S::kSlotBytes;
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

  __device__ __forceinline__ void LoadWeights() {
    TileFinder<S::kExpertsPerLane> finder(p_, kTokens, S::kTileRows);
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
            // Of gate and up a warpgroup has one block each; or, wide, both
            // have all.
            const int q = S::kWide ? b / 2 : b % 2;
            const int row = S::kGateUp ? (S::kWide ? b % 2 : b / 2) : b;
            cuda::LoadBox(Weights(stage.index) + b * S::kBlockBytes,
                          &p_.weights[q], tile.expert, tile.row + row * 64,
                          step * kPerStep, full);
          }
        }
        stage.Next();
      }
    }
  }

  // By the kTokenThreads threads after warp 0.
  __device__ __forceinline__ void LoadTokens() {
    TileFinder<S::kExpertsPerLane> finder(p_, kTokens, S::kTileRows);
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

 private:
  using Ring<S>::Full;
  using Ring<S>::Empty;
  using Ring<S>::Weights;
  using Ring<S>::Tokens;
  using Ring<S>::Scales;
  static constexpr int kStages = S::kStages;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kPerStep = S::kPerStep;

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
        (S::kWide ? tile.count : kTokens) - first_row, kRowsAtOnce);
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

  const Params& p_;
  const int lane_;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_LOADER_CUDA_CUH_
