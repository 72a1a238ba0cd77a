#ifndef TENON_OPS_MOE_MOE_FEW_BLOCK_CUDA_CUH_
#define TENON_OPS_MOE_MOE_FEW_BLOCK_CUDA_CUH_

#include <cstdint>
#include <type_traits>

#include "ops/core/hopper_cuda.cuh"
#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_gemm_cuda.cuh"
#include "ops/moe/moe_kernel_config.h"

// What the warps of moe_few_kernel_cuda.cuh have in common: parameters, shared
// memory, and what they tell each other.

namespace tenon::moe_few {

inline constexpr int kBlockBytes = 8 * 128;  // of 8 rows of weights
inline constexpr int kTileColumns = 16;  // of hidden, in a tile of gate and up
inline constexpr int kTileSteps = 4;     // of the depth, in a stage of it
inline constexpr int kUnitRows = 8;      // ranges of out are multiples of it
inline constexpr int kMaxUnits = 8;      // of a range: 64 rows are an operand
inline constexpr int kMaxDownSteps = 8;  // of the depth, in a stage of down
inline constexpr int kStageBytes = 16 * kBlockBytes;
inline constexpr int kStageScales = 16;  // one for each block
inline constexpr int kMaxStages = kMoeMaxFewStages;
inline constexpr int kMinStages = kMoeMinFewStages;
inline constexpr int kTokenWarps = 8;  // that load tokens and write hidden
inline constexpr int kThreads = 128 + kTokenWarps * 32 + 32;
inline constexpr int kMaxHiddenBuffers = 4;
inline constexpr int kNumBarriers =
    2 * (kMaxStages + kTokenWarps + kMaxHiddenBuffers) + 1;

// T: of weights. kTokens: most tokens of a call, columns of a product.
template <class T_, int kTokens_>
struct Shape {
  using T = T_;
  static constexpr int kTokens = kTokens_;
  // Whole rounds of the 128 threads that look at the choice.
  static constexpr int kMaxSlots = kTokens == 8 ? 128 : kMoeFewSlots;
  static constexpr bool kFp8 = std::is_same_v<T, __nv_fp8_e4m3>;
  static constexpr int kTokenBlockBytes = kTokens * 128;
  static constexpr int kHiddenBuffers = kTokens == 8 ? kMaxHiddenBuffers : 2;
  // Twice as many teams as buffers load hidden: one loads while another one's
  // buffer is in use. A team's warps share the tokens of an expert.
  static constexpr int kTeams = 2 * kHiddenBuffers;
  static constexpr int kTeamWarps = kTokenWarps / kTeams;
  // A tile of gate and up on its way to memory: which, then kTokens x
  // kTileColumns of float32. Or another message, of the same form.
  static constexpr int kTileBytes = 16 + kTokens * kTileColumns * 4;
};

// Named barriers.
inline constexpr int kMultiplyBarrier = 1;
inline constexpr int kMarkBarrier = 2;
inline constexpr int kChoiceBarrier = 3;
inline constexpr int kTeamBarrier = 4;  // and one for each further team

// What a message to those warps says instead of an expert.
inline constexpr int kTileRange = -1;
inline constexpr int kTileEnd = -2;

// Offsets in shared memory. The ring comes first.
struct Layout {
  int32_t x;              // [steps][tokens][128 bytes], swizzled
  int32_t hidden;         // buffers of the same
  int32_t x_scales;       // fp8: [steps][tokens]
  int32_t hidden_scales;  // fp8: buffers of the same
  int32_t headers;        // int4 for each stage
  int32_t stage_scales;   // fp8: [kStageScales] for each stage
  int32_t tiles;          // [kTokenWarps]
  int32_t values;         // [slots][value_stride]: results of down
  int32_t value_stride;
  int32_t chosen;    // [slots]: an expert that tokens chose, these as bits, and
                     // its first pair
  int32_t slots;     // [slots]: pair (or -1) and routing weight
  int32_t experts;   // [num_experts]: tokens as bits, then place in `chosen`
  int32_t count;     // of chosen experts
  int32_t barriers;  // 8 bytes each
  int32_t bytes;
};

// A pair is a token and an expert that it chose, however often.
struct Params {
  // [experts, blocks of 128 bytes of the depth, rows, 128 bytes].
  CUtensorMap gate, up, down;
  const void* x;
  int64_t x_row_bytes;
  const float* x_scales;  // fp8: [tokens, x_steps]
  ExpertScales gate_scales, up_scales, down_scales;
  const int32_t* ids;
  int64_t ids_stride;
  const float* weights;
  int64_t weights_stride;
  // Rows by pair, of intermediate elements: T, or float32 where T is fp8.
  void* hidden;
  // The number of the next tile; then for each chosen expert that of its tiles
  // of gate and up that are in `hidden`; kMoeFewCounterStride apart. All 0 at
  // first.
  int32_t* counters;
  const void* residual;  // may be null
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  int32_t tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t intermediate;
  int32_t hidden_size;
  int32_t x_steps;       // of 128 bytes of x's depth
  int32_t hidden_steps;  // of hidden's
  int32_t down_steps;    // of these, in a stage of down
  int32_t stages;
  int32_t ranges;    // of out's columns
  bool out_is_half;  // fp8: out is float16, not bfloat16
  Layout layout;

  // Of a range's columns of out, in units.
  __host__ __device__ int FirstUnit(int range) const {
    return static_cast<int>(int64_t{range} * (hidden_size / kUnitRows) /
                            ranges);
  }
  __device__ int TilesOfExpert() const { return intermediate / kTileColumns; }
};

#if TENON_SM90A

// What a stage of the ring holds, or, without data, what the loader says.
enum class StepKind : int {
  kGateUp,
  kDown,
  kRange,   // a range of down begins
  kFinish,  // and ends
  kEnd,
};

struct Step {
  StepKind kind;
  bool first, last;  // of the tile, or of the expert in the range
  int steps;         // of the depth
  int depth;         // the first one
  int chosen;        // expert
  int at;            // gate and up: first column of hidden; kRange: which

  __device__ __forceinline__ int4 Pack() const {
    return make_int4(static_cast<int>(kind) | first << 8 | last << 9,
                     steps | depth << 8, chosen, at);
  }
  static __device__ __forceinline__ Step From(uint32_t header) {
    const auto v = cuda::LoadShared<int4>(header);
    return {static_cast<StepKind>(v.x & 0xff),
            (v.x >> 8 & 1) != 0,
            (v.x >> 9 & 1) != 0,
            v.y & 0xff,
            v.y >> 8,
            v.z,
            v.w};
  }
};

// A place in a ring, and the parity of its phase.
struct Turn {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next(int count) {
    if (++index == count) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The use of one of hidden's buffers, of which a warp does not have every turn.
template <class S>
struct Use {
  __device__ __forceinline__ explicit Use(int use)
      : buffer(use % S::kHiddenBuffers),
        parity(static_cast<uint32_t>(use) / S::kHiddenBuffers & 1) {}
  const int buffer;
  const uint32_t parity;
};

// An expert that tokens chose.
struct Choice {
  int expert;
  uint32_t tokens;  // a bit each
  int first_pair;

  __device__ __forceinline__ bool Has(int token) const {
    return (tokens >> token & 1) != 0;
  }
  __device__ __forceinline__ int PairOf(int token) const {
    return first_pair + __popc(tokens & ((1u << token) - 1));
  }
};

template <class S>
class Block {
 public:
  __device__ __forceinline__ Block(const Params& p, uint32_t shared)
      : p_(p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        warp_(static_cast<int>(threadIdx.x) / 32) {}

  // Before anything of this call is read.
  __device__ __forceinline__ void SetUp() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p_.stages; ++i) {
        cuda::InitBarrier(Full(i), S::kFp8 ? 1 + 32 : 1);
        cuda::InitBarrier(Empty(i), 4);
      }
      for (int i = 0; i < kTokenWarps; ++i) {
        cuda::InitBarrier(TileFull(i), 64);
        cuda::InitBarrier(TileEmpty(i), 32);
      }
      for (int i = 0; i < S::kHiddenBuffers; ++i) {
        cuda::InitBarrier(HiddenFull(i), S::kTeamWarps * 32);
        cuda::InitBarrier(HiddenEmpty(i), 4);
      }
      cuda::InitBarrier(XFull(), kTokenWarps * 32);
      cuda::FenceBarrierInit();
      cuda::PrefetchTensorMap(&p_.gate);
      cuda::PrefetchTensorMap(&p_.up);
      cuda::PrefetchTensorMap(&p_.down);
    }
    for (int e = threadIdx.x; e < p_.num_experts; e += kThreads) {
      cuda::StoreShared(ExpertAt(e), 0);
    }
    __syncthreads();
  }

  // By the first 128 threads: which tokens chose which expert; then, when the
  // loader has numbered them, the pair of each slot.
  __device__ __forceinline__ void FindChoices() const {
    constexpr int kRounds = S::kMaxSlots / 128;
    const int slots = p_.tokens * p_.top_k;
    int id[kRounds];
    float weight[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int slot = r * 128 + static_cast<int>(threadIdx.x);
      const int token = slot / p_.top_k;
      const int column = slot - token * p_.top_k;
      id[r] = -1;
      weight[r] = 0.0f;
      if (slot < slots) {
        id[r] = p_.ids[token * p_.ids_stride + column];
        weight[r] = p_.weights[token * p_.weights_stride + column];
      }
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int token = (r * 128 + static_cast<int>(threadIdx.x)) / p_.top_k;
      if (static_cast<uint32_t>(id[r]) >=
          static_cast<uint32_t>(p_.num_experts)) {
        id[r] = -1;
      } else {
        atomicOr(
            static_cast<unsigned*>(__cvta_shared_to_generic(ExpertAt(id[r]))),
            1u << token);
      }
    }
    cuda::ArriveThreads(kMarkBarrier, 128 + 32);
    cuda::SyncThreads(kChoiceBarrier, kThreads);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int slot = r * 128 + static_cast<int>(threadIdx.x);
      if (slot >= slots) break;
      int pair = -1;
      if (id[r] >= 0) {
        const Choice choice = ChoiceOf(cuda::LoadShared<int>(ExpertAt(id[r])));
        pair = choice.PairOf(slot / p_.top_k);
      }
      cuda::StoreShared(SlotAt(slot),
                        make_int2(pair, __float_as_int(weight[r])));
    }
  }

 protected:
  __device__ __forceinline__ uint32_t Full(int stage) const {
    return Barrier(stage);
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const {
    return Barrier(kMaxStages + stage);
  }
  __device__ __forceinline__ uint32_t TileFull(int i) const {
    return Barrier(2 * kMaxStages + i);
  }
  __device__ __forceinline__ uint32_t TileEmpty(int i) const {
    return Barrier(2 * kMaxStages + kTokenWarps + i);
  }
  __device__ __forceinline__ uint32_t HiddenFull(int i) const {
    return Barrier(2 * kMaxStages + 2 * kTokenWarps + i);
  }
  __device__ __forceinline__ uint32_t HiddenEmpty(int i) const {
    return Barrier(2 * kMaxStages + 2 * kTokenWarps + kMaxHiddenBuffers + i);
  }
  __device__ __forceinline__ uint32_t XFull() const {
    return Barrier(kNumBarriers - 1);
  }
  __device__ __forceinline__ uint32_t StageAt(int stage) const {
    return shared_ + stage * kStageBytes;
  }
  __device__ __forceinline__ uint32_t HeaderAt(int stage) const {
    return shared_ + p_.layout.headers + stage * 16;
  }
  __device__ __forceinline__ uint32_t StageScalesAt(int stage) const {
    return shared_ + p_.layout.stage_scales + stage * kStageScales * 4;
  }
  __device__ __forceinline__ uint32_t TileAt(int i) const {
    return shared_ + p_.layout.tiles + i * S::kTileBytes;
  }
  __device__ __forceinline__ uint32_t ValueAt(int pair, int row) const {
    return shared_ + p_.layout.values +
           (pair * p_.layout.value_stride + row) * 4;
  }
  __device__ __forceinline__ uint32_t ChosenAt(int chosen) const {
    return shared_ + p_.layout.chosen + chosen * 16;
  }
  __device__ __forceinline__ Choice ChoiceOf(int chosen) const {
    const auto v = cuda::LoadShared<int4>(ChosenAt(chosen));
    return {v.x, static_cast<uint32_t>(v.y), v.z};
  }
  // Hidden's buffers, in shared memory.
  __device__ __forceinline__ int HiddenAt(int buffer) const {
    return p_.layout.hidden + buffer * p_.hidden_steps * S::kTokenBlockBytes;
  }
  __device__ __forceinline__ int HiddenScalesAt(int buffer) const {
    return p_.layout.hidden_scales + buffer * p_.hidden_steps * S::kTokens * 4;
  }
  __device__ __forceinline__ uint32_t SlotAt(int slot) const {
    return shared_ + p_.layout.slots + slot * 8;
  }
  __device__ __forceinline__ uint32_t ExpertAt(int expert) const {
    return shared_ + p_.layout.experts + expert * 4;
  }
  __device__ __forceinline__ uint32_t CountAt() const {
    return shared_ + p_.layout.count;
  }
  // Of chosen expert i.
  __device__ __forceinline__ int32_t* ReadyTiles(int i) const {
    return p_.counters + (1 + i) * kMoeFewCounterStride;
  }
  // Waits until all of its hidden is in memory. By one thread; others may read
  // after a barrier, past L1.
  __device__ __forceinline__ void WaitForHidden(int i) const {
    int ready;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n"
                   : "=r"(ready)
                   : "l"(ReadyTiles(i))
                   : "memory");
    } while (ready < p_.TilesOfExpert());
  }

  const Params& p_;
  const uint32_t shared_;
  const int lane_;
  const int warp_;

 private:
  __device__ __forceinline__ uint32_t Barrier(int i) const {
    return shared_ + p_.layout.barriers + i * 8;
  }
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_few

#endif  // TENON_OPS_MOE_MOE_FEW_BLOCK_CUDA_CUH_
