#ifndef TENON_OPS_MOE_MOE_FEW_LOADER_CUDA_CUH_
#define TENON_OPS_MOE_MOE_FEW_LOADER_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_few_block_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// The warps of moe_few_kernel_cuda.cuh that load: one weights, the others
// tokens. These also write hidden.

namespace tenon::moe_few {

#if TENON_SM90A

// The warp that takes tiles and loads their weights.
template <class S>
class Loader : private Block<S> {
 public:
  __device__ __forceinline__ Loader(const Params& p, uint32_t shared)
      : Block<S>(p, shared) {}

  __device__ __forceinline__ void Load() {
    int tile = TakeTile();  // on its way while experts are counted
    const int chosen = CountExperts();
    tile = __shfl_sync(~0u, tile, 0);
    const int per_expert = p_.TilesOfExpert();
    const int tiles = chosen * per_expert;
    while (tile < tiles) {
      const int next = TakeTile();
      const int expert = tile / per_expert;
      LoadGateUp(expert, (tile - expert * per_expert) * kTileColumns);
      tile = __shfl_sync(~0u, next, 0);
    }
    while (tile - tiles < p_.ranges) {
      LoadDown(tile - tiles, chosen);
      // A second range is for blocks that could not run yet. When all of gate
      // and up is done, those that run have theirs.
      if (lane_ == 0 && chosen > 0) this->WaitForHidden(chosen - 1);
      tile = __shfl_sync(~0u, TakeTile(), 0);
    }
    Say({StepKind::kEnd, false, false, 0, 0, 0, 0});
  }

 private:
  using Block<S>::Full;
  using Block<S>::Empty;
  using Block<S>::HeaderAt;
  using Block<S>::StageAt;
  using Block<S>::StageScalesAt;
  using Block<S>::ChosenAt;
  using Block<S>::ChoiceOf;
  using Block<S>::ExpertAt;
  using Block<S>::CountAt;
  using Block<S>::p_;
  using Block<S>::lane_;
  static constexpr bool kFp8 = S::kFp8;

  // On lane 0.
  __device__ __forceinline__ int TakeTile() const {
    return lane_ == 0 ? atomicAdd(p_.counters, 1) : 0;
  }

  // Numbers the experts that tokens chose, and pairs, both by expert.
  __device__ __forceinline__ int CountExperts() const {
    cuda::SyncThreads(kMarkBarrier, 128 + 32);
    constexpr int kPerLane = 4;
    int before = 0;  // pairs << 16 | experts
    for (int first = 0; first < p_.num_experts; first += 32 * kPerLane) {
      int tokens[kPerLane];
      int counts = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int expert = first + lane_ * kPerLane + i;
        tokens[i] = expert < p_.num_experts
                        ? cuda::LoadShared<int>(ExpertAt(expert))
                        : 0;
        counts += __popc(tokens[i]) << 16 | (tokens[i] != 0 ? 1 : 0);
      }
      const int inclusive = cuda::WarpInclusiveSum(counts);
      int at = before + inclusive - counts;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (tokens[i] == 0) continue;
        const int expert = first + lane_ * kPerLane + i;
        const int chosen = at & 0xffff;
        cuda::StoreShared(ChosenAt(chosen),
                          make_int4(expert, tokens[i], at >> 16, 0));
        cuda::StoreShared(ExpertAt(expert), chosen);
        at += __popc(tokens[i]) << 16 | 1;
      }
      before += __shfl_sync(~0u, inclusive, 31);
    }
    const int chosen = before & 0xffff;
    if (lane_ == 0) cuda::StoreShared(CountAt(), chosen);
    __syncwarp();
    cuda::ArriveThreads(kChoiceBarrier, kThreads);
    return chosen;
  }

  // A stage without data.
  __device__ __forceinline__ void Say(const Step& step) {
    cuda::Wait(Empty(stage_.index), stage_.parity ^ 1);
    if (lane_ == 0) {
      cuda::StoreShared(HeaderAt(stage_.index), step.Pack());
      cuda::Arrive(Full(stage_.index));
    }
    if constexpr (kFp8) cuda::ArriveAfterCopies(Full(stage_.index));
    stage_.Next(p_.stages);
  }

  // A stage of `boxes` boxes of `steps` blocks each, of which load(i, to, full)
  // loads one. fp8: scale() is where the scale of block lane % steps of box
  // lane / steps is, null where it has none.
  template <class LoadOne, class Scale>
  __device__ __forceinline__ void Fill(const Step& step, int boxes, int steps,
                                       const LoadOne& load,
                                       const Scale& scale) {
    cuda::Wait(Empty(stage_.index), stage_.parity ^ 1);
    const uint32_t full = Full(stage_.index);
    if (lane_ == 0) {
      cuda::StoreShared(HeaderAt(stage_.index), step.Pack());
      cuda::ArriveExpectBytes(full, boxes * steps * kBlockBytes);
      for (int i = 0; i < boxes; ++i) {
        load(i, StageAt(stage_.index) + i * steps * kBlockBytes, full);
      }
    }
    if constexpr (kFp8) {
      if (lane_ < boxes * steps) {
        const float* const from = scale();
        if (from != nullptr) {
          cuda::CopyOrZero4(StageScalesAt(stage_.index) + lane_ * 4, from,
                            true);
        }
      }
      cuda::ArriveAfterCopies(full);
    }
    stage_.Next(p_.stages);
  }

  // A tile of gate and up: two times 8 rows of each, by turns.
  __device__ __forceinline__ void LoadGateUp(int chosen, int column) {
    const int expert = ChoiceOf(chosen).expert;
    const ExpertScales& scales =
        lane_ / kTileSteps % 2 == 0 ? p_.gate_scales : p_.up_scales;
    for (int depth = 0; depth < p_.x_steps; depth += kTileSteps) {
      const int steps = min(kTileSteps, p_.x_steps - depth);
      const Step step = {StepKind::kGateUp,
                         depth == 0,
                         depth + kTileSteps >= p_.x_steps,
                         steps,
                         depth,
                         chosen,
                         column};
      Fill(
          step, 4, kTileSteps,
          [&](int i, uint32_t to, uint32_t full) {
            cuda::LoadBox(to, i % 2 == 0 ? &p_.gate : &p_.up,
                          make_int4(0, column + i / 2 * 8, depth, expert),
                          full);
          },
          [&] {
            return ScaleOf(scales, expert, column, depth + lane_ % kTileSteps,
                           p_.x_steps);
          });
    }
  }

  // A range of down, of all experts.
  __device__ __forceinline__ void LoadDown(int range, int chosen) {
    Say({StepKind::kRange, false, false, 0, 0, 0, range});
    const int first_unit = p_.FirstUnit(range);
    const int units = p_.FirstUnit(range + 1) - first_unit;
    const int unit = lane_ / p_.down_steps;
    const int unit_step = lane_ - unit * p_.down_steps;
    for (int i = 0; i < chosen; ++i) {
      const int expert = ChoiceOf(i).expert;
      for (int depth = 0; depth < p_.hidden_steps; depth += p_.down_steps) {
        const int steps = min(p_.down_steps, p_.hidden_steps - depth);
        const Step step = {StepKind::kDown,
                           depth == 0,
                           depth + p_.down_steps >= p_.hidden_steps,
                           steps,
                           depth,
                           i,
                           0};
        Fill(
            step, units, p_.down_steps,
            [&](int u, uint32_t to, uint32_t full) {
              cuda::LoadBox(
                  to, &p_.down,
                  make_int4(0, (first_unit + u) * kUnitRows, depth, expert),
                  full);
            },
            [&] {
              return ScaleOf(p_.down_scales, expert,
                             (first_unit + unit) * kUnitRows, depth + unit_step,
                             p_.hidden_steps);
            });
      }
    }
    Say({StepKind::kFinish, false, false, 0, 0, 0, 0});
  }

  // fp8: the scale of a row's block of the depth.
  static __device__ __forceinline__ const float* ScaleOf(const ExpertScales& s,
                                                         int expert, int row,
                                                         int step, int steps) {
    if (s.block_rows == 1 || step >= steps) return nullptr;
    return s.data + expert * s.expert_stride + row / kFp8Block * s.row_stride +
           step;
  }

  Turn stage_;
};

// A warp that loads x, then writes tiles of hidden, then loads hidden.
template <class S>
class TokenWarp : private Block<S> {
 public:
  __device__ __forceinline__ TokenWarp(const Params& p, uint32_t shared)
      : Block<S>(p, shared), turn_(warp_ - 4) {}

  __device__ __forceinline__ void Run() {
    LoadX();
    cuda::SyncThreads(kChoiceBarrier, kThreads);
    uint32_t parity = 0;
    while (true) {
      cuda::Wait(TileFull(turn_), parity);
      parity ^= 1;
      const auto what = cuda::LoadShared<int2>(TileAt(turn_));
      if (what.x == kTileEnd) return;
      if (what.x == kTileRange) {
        cuda::Arrive(TileEmpty(turn_));
        LoadHidden();
      } else {
        StoreTile(what.x, what.y);
      }
    }
  }

 private:
  using Block<S>::XFull;
  using Block<S>::TileFull;
  using Block<S>::TileEmpty;
  using Block<S>::HiddenFull;
  using Block<S>::HiddenEmpty;
  using Block<S>::TileAt;
  using Block<S>::ChoiceOf;
  using Block<S>::HiddenAt;
  using Block<S>::HiddenScalesAt;
  using Block<S>::CountAt;
  using Block<S>::p_;
  using Block<S>::shared_;
  using Block<S>::lane_;
  using Block<S>::warp_;
  using T = typename S::T;
  static constexpr bool kFp8 = S::kFp8;
  static constexpr int kTokens = S::kTokens;

  // Where 16 bytes of a token lie, `byte` bytes into its row.
  static __device__ __forceinline__ uint32_t Swizzled(int token, int byte) {
    const int chunk = byte % 128 / 16 ^ token % 8;
    return byte / 128 * S::kTokenBlockBytes + token * 128 + chunk * 16;
  }

  __device__ __forceinline__ void LoadX() const {
    constexpr int kStride = kTokenWarps * 32;
    const int thread = static_cast<int>(threadIdx.x) - 128;
    const int per_token = p_.x_steps * 8;
    for (int i = thread; i < p_.tokens * per_token; i += kStride) {
      const int token = i / per_token;
      const int byte = (i - token * per_token) * 16;
      cuda::CopyOrZero16(
          shared_ + p_.layout.x + Swizzled(token, byte),
          static_cast<const char*>(p_.x) + token * p_.x_row_bytes + byte, true);
    }
    if constexpr (kFp8) {
      for (int i = thread; i < p_.tokens * p_.x_steps; i += kStride) {
        const int token = i / p_.x_steps;
        const int step = i - token * p_.x_steps;
        cuda::CopyOrZero4(
            shared_ + p_.layout.x_scales + (step * kTokens + token) * 4,
            p_.x_scales + i, true);
      }
    }
    cuda::ArriveAfterCopies(XFull());
  }

  // Writes a tile of hidden to memory, the rows of tokens that chose the
  // expert, and says so.
  __device__ __forceinline__ void StoreTile(int chosen, int column) const {
    using Out = std::conditional_t<kFp8, float, T>;
    constexpr int kPerPiece = 16 / sizeof(Out);
    constexpr int kPieces = kTileColumns / kPerPiece;  // of a token
    constexpr int kPerRound = 32 / kPieces;
    const Choice choice = ChoiceOf(chosen);
    const int piece = lane_ % kPieces;
#pragma unroll
    for (int first = 0; first < kTokens; first += kPerRound) {
      const int token = first + lane_ / kPieces;
      if (token >= kTokens || !choice.Has(token)) continue;
      const uint32_t from =
          TileAt(turn_) + 16 + (token * kTileColumns + piece * kPerPiece) * 4;
      uint4 v = cuda::LoadShared<uint4>(from);
      if constexpr (!kFp8) {
        const auto a = cuda::LoadShared<float4>(from);
        const auto b = cuda::LoadShared<float4>(from + 16);
        v = {cuda::Pack<T>(a.x, a.y), cuda::Pack<T>(a.z, a.w),
             cuda::Pack<T>(b.x, b.y), cuda::Pack<T>(b.z, b.w)};
      }
      *reinterpret_cast<uint4*>(static_cast<Out*>(p_.hidden) +
                                int64_t{choice.PairOf(token)} *
                                    p_.intermediate +
                                column + piece * kPerPiece) = v;
    }
    cuda::Arrive(TileEmpty(turn_));
    __syncwarp();
    if (lane_ == 0) {
      asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(
                       this->ReadyTiles(chosen))
                   : "memory");
    }
  }

  // Hidden of every kTeams-th expert to the buffers, in one range.
  __device__ __forceinline__ void LoadHidden() {
    const int count = cuda::LoadShared<int>(CountAt());
    for (; next_ < (range_ + 1) * count; next_ += S::kTeams) {
      const int chosen = next_ - range_ * count;
      if (lane_ == 0) this->WaitForHidden(chosen);
      __syncwarp();
      const Use<S> use(next_);
      bool is_free = false;
      LoadPairs(ChoiceOf(chosen), use, &is_free);
      WaitForBuffer(use, &is_free);
      cuda::FenceAsyncProxy();
      cuda::Arrive(HiddenFull(use.buffer));
      // No member waits for a phase that is two ahead of another one's.
      if constexpr (S::kTeamWarps > 1) {
        cuda::SyncThreads(kTeamBarrier + turn_ / S::kTeamWarps,
                          S::kTeamWarps * 32);
      }
    }
    ++range_;
  }

  // Until the buffer's use before this one, which another team began, is over.
  __device__ __forceinline__ void WaitForBuffer(const Use<S>& use,
                                                bool* is_free) const {
    if (*is_free) return;
    *is_free = true;
    if (next_ < S::kHiddenBuffers) return;
    cuda::Wait(HiddenFull(use.buffer), use.parity ^ 1);
    cuda::Wait(HiddenEmpty(use.buffer), use.parity ^ 1);
  }

  // Loads go ahead of the wait for the buffer.
  __device__ __forceinline__ void LoadPairs(const Choice& choice,
                                            const Use<S>& use, bool* is_free) {
    constexpr int kRounds = 4;
    const uint32_t to = shared_ + HiddenAt(use.buffer);
    int pair = choice.first_pair;
    for (uint32_t tokens = choice.tokens; tokens != 0;
         tokens &= tokens - 1, ++pair) {
      if (pair % S::kTeamWarps != member_) continue;
      const int token = __ffs(tokens) - 1;
      if constexpr (kFp8) {
        const float* const row = static_cast<const float*>(p_.hidden) +
                                 int64_t{pair} * p_.intermediate;
        for (int first = 0; first < p_.intermediate; first += kRounds * 256) {
          float v[kRounds][8];
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            LoadEight(row, first + r * 256 + lane_ * 8, v[r]);
          }
          WaitForBuffer(use, is_free);
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            StoreEight(first + r * 256 + lane_ * 8, token, v[r], use.buffer);
          }
        }
      } else {
        const char* const row = static_cast<const char*>(p_.hidden) +
                                int64_t{pair} * p_.hidden_steps * 128;
        const int bytes = p_.hidden_steps * 128;
        for (int first = 0; first < bytes; first += kRounds * 512) {
          uint4 v[kRounds];
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            const int byte = first + r * 512 + lane_ * 16;
            if (byte < bytes) {
              v[r] = __ldcg(reinterpret_cast<const uint4*>(row + byte));
            }
          }
          WaitForBuffer(use, is_free);
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            const int byte = first + r * 512 + lane_ * 16;
            if (byte < bytes) {
              cuda::StoreShared(to + Swizzled(token, byte), v[r]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void LoadEight(const float* row, int column,
                                            float (&v)[8]) const {
    float4 a = {}, b = {};
    if (column < p_.intermediate) {
      a = __ldcg(reinterpret_cast<const float4*>(row + column));
      b = __ldcg(reinterpret_cast<const float4*>(row + column) + 1);
    }
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  }
  // Quantises them: 16 lanes have a group.
  __device__ __forceinline__ void StoreEight(int column, int token,
                                             const float (&v)[8],
                                             int buffer) const {
    const Fp8Scale scale =
        Fp8ScaleOf(cuda::LanesMax<16>(cuda::MaxMagnitude(v)));
    if (column >= p_.intermediate) return;
    cuda::StoreShared(shared_ + HiddenAt(buffer) +
                          Swizzled(token, column / 16 * 16) + column % 16,
                      cuda::ToFp8x8(v, scale.inverse));
    if (lane_ % 16 == 0) {
      cuda::StoreShared(shared_ + HiddenScalesAt(buffer) +
                            (column / kFp8GroupSize * kTokens + token) * 4,
                        scale.scale);
    }
  }

  const int turn_;                            // among the warps
  const int member_ = turn_ % S::kTeamWarps;  // of the team
  int next_ = turn_ / S::kTeamWarps;          // expert, counted over all ranges
  int range_ = 0;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_few

#endif  // TENON_OPS_MOE_MOE_FEW_LOADER_CUDA_CUH_
