#ifndef TENON_OPS_MOE_MOE_FEW_KERNEL_CUDA_CUH_
#define TENON_OPS_MOE_MOE_FEW_KERNEL_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_few_block_cuda.cuh"
#include "ops/moe/moe_few_loader_cuda.cuh"
#include "ops/moe/moe_hopper_multiplier_cuda.cuh"

// The experts' layer for few tokens on Hopper in one launch: gate and up, down,
// and the sum. Bytes of weights are all that counts then, so memory has to be
// busy from the first microsecond to the last:
//
// - A block takes tiles of gate and up (16 columns of hidden of one expert) off
//   a common counter, then a range of columns of out, in which it does the down
//   projection of all experts. The warp that loads weights runs ahead as far as
//   the ring goes, so the first of down come in while hidden is not there yet.
// - All tokens of the call are columns of every product. That costs nothing,
//   x is loaded once, and no tile needs to gather.
// - As a block has all experts' shares of its columns of out, the sum is its
//   own.
//
// Who waits for whom: whatever a block waits for in other blocks is a tile with
// a lower number, taken by a block that runs. So it ends, even if not all
// blocks run at the same time.
//
// Products, scales and roundings are those of moe_hopper_kernel_cuda.cuh, in
// the same order: the same bits.

namespace tenon::moe_few {

#if TENON_SM90A

// The warpgroup that multiplies. Weights are the 64-row operand, of which as
// many rows are used as a stage has; tokens the narrow one.
template <class S>
class Multiplier : private Block<S> {
 public:
  __device__ __forceinline__ Multiplier(const Params& p, uint32_t shared)
      : Block<S>(p, shared) {}

  __device__ __forceinline__ void Multiply() {
    cuda::Wait(XFull(), 0);
    cuda::FenceAsyncProxy();  // x came by cp.async
    while (true) {
      cuda::Wait(Full(stage_.index), stage_.parity);
      const Step step = Step::From(HeaderAt(stage_.index));
      switch (step.kind) {
        case StepKind::kGateUp:
          AddProducts(step, p_.layout.x, p_.layout.x_scales,
                      kTileSteps * kBlockBytes);
          ReleaseStage();
          if (step.last) TellTile(step);
          break;
        case StepKind::kDown:
          MultiplyDown(step);
          break;
        case StepKind::kRange:
          ReleaseStage();
          BeginRange(step.at);
          break;
        case StepKind::kFinish:
          ReleaseStage();
          Sum();
          break;
        case StepKind::kEnd:
          TellAll({kTileEnd, 0});
          return;
      }
    }
  }

 private:
  using Block<S>::Full;
  using Block<S>::Empty;
  using Block<S>::XFull;
  using Block<S>::TileFull;
  using Block<S>::TileEmpty;
  using Block<S>::HiddenFull;
  using Block<S>::HiddenEmpty;
  using Block<S>::HeaderAt;
  using Block<S>::StageAt;
  using Block<S>::StageScalesAt;
  using Block<S>::TileAt;
  using Block<S>::ChoiceOf;
  using Block<S>::HiddenAt;
  using Block<S>::HiddenScalesAt;
  using Block<S>::ValueAt;
  using Block<S>::SlotAt;
  using Block<S>::p_;
  using Block<S>::shared_;
  using Block<S>::lane_;
  using Block<S>::warp_;
  using T = typename S::T;
  static constexpr bool kFp8 = S::kFp8;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kTokenBlockBytes = S::kTokenBlockBytes;
  static constexpr int kColumns = kTokens / 8;  // of tokens, of a lane

  __device__ __forceinline__ void ReleaseStage() {
    __syncwarp();
    if (lane_ == 0) cuda::Arrive(Empty(stage_.index));
    stage_.Next(p_.stages);
  }

  // -------------------------------------------------------------------------
  // Products
  // -------------------------------------------------------------------------

  // acc_[4 * j + {0, 1}]: of row lane / 4 of the warp's first group of 8 rows
  // of the stage, tokens 8 * j + lane % 4 * 2 + {0, 1}; acc_[4 * j + {2, 3}]:
  // of its second group.

  // Adds a stage. Tokens lie at `tokens` in shared memory, their scales at
  // `scales`, by step of the depth; groups of rows are group_bytes apart.
  __device__ __forceinline__ void AddProducts(const Step& step, int tokens,
                                              int scales, int group_bytes) {
    if (step.first) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc_[i] = 0.0f;
      LoadRowScales(step);
    }
    const Operand a(StageAt(stage_.index), group_bytes);
    const Operand b(shared_ + tokens + step.depth * kTokenBlockBytes, 1024);
    const int groups = step.kind == StepKind::kGateUp ? 4 : num_units_;
    // Of a warp without rows any will do.
    const int group = warp_ * 2 < groups ? warp_ * 2 : 0;
    const int per_group = group_bytes / kBlockBytes;
    const uint32_t weight_scales =
        StageScalesAt(stage_.index) + group * per_group * 4;
    const int next_group = group + 1 < groups ? per_group * 4 : 0;
    const uint32_t token_scales =
        shared_ + scales + (step.depth * kTokens + lane_ % 4 * 2) * 4;
    int done = 0;
    const auto add = [&](auto count) {
      AddSteps<decltype(count)::value>(a.From(done * kBlockBytes),
                                       b.From(done * kTokenBlockBytes),
                                       weight_scales + done * 4, next_group,
                                       token_scales + done * kTokens * 4);
      done += decltype(count)::value;
    };
    while (step.steps - done >= 4) add(Count<4>());
    if (step.steps - done >= 2) add(Count<2>());
    if (step.steps - done >= 1) add(Count<1>());
  }

  // A matrix descriptor, in halves: adding to the whole takes carries.
  struct Operand {
    uint32_t low, high;
    __device__ __forceinline__ Operand(uint32_t shared, int row_step) {
      const uint64_t whole = cuda::MatrixDescriptor(shared, row_step);
      low = static_cast<uint32_t>(whole);
      high = static_cast<uint32_t>(whole >> 32);
    }
    __device__ __forceinline__ Operand From(int bytes) const {
      Operand further = *this;
      further.low += bytes >> 4;
      return further;
    }
    __device__ __forceinline__ uint64_t At(int bytes) const {
      return uint64_t{high} << 32 | (low + (bytes >> 4));
    }
  };

  template <int kCount>
  struct Count {
    static constexpr int value = kCount;
  };

  template <int kSteps>
  __device__ __forceinline__ void AddSteps(const Operand& a, const Operand& b,
                                           uint32_t weight_scales,
                                           int next_group,
                                           uint32_t token_scales) {
    if constexpr (kFp8) {
      float products[kSteps][kTokens / 2];
      cuda::FenceWgmma();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          cuda::Wgmma<T, kTokens>(products[s], a.At(s * kBlockBytes + k * 32),
                                  b.At(s * kTokenBlockBytes + k * 32), k > 0);
        }
      }
      cuda::CommitWgmma();
      float2 weight[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        weight[s] = {1.0f, 1.0f};
        if (!scales_by_row_) {
          weight[s].x = cuda::LoadShared<float>(weight_scales + s * 4);
          weight[s].y =
              cuda::LoadShared<float>(weight_scales + next_group + s * 4);
        }
      }
      cuda::WaitForWgmma<0>();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const auto token = cuda::LoadShared<float2>(
              token_scales + (s * kTokens + j * 8) * 4);
          const float* const product = &products[s][4 * j];
          float* const sum = &acc_[4 * j];
          sum[0] = fmaf(product[0], token.x * weight[s].x, sum[0]);
          sum[1] = fmaf(product[1], token.y * weight[s].x, sum[1]);
          sum[2] = fmaf(product[2], token.x * weight[s].y, sum[2]);
          sum[3] = fmaf(product[3], token.y * weight[s].y, sum[3]);
        }
      }
    } else {
      cuda::FenceWgmma();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          cuda::Wgmma<T, kTokens>(acc_, a.At(s * kBlockBytes + k * 32),
                                  b.At(s * kTokenBlockBytes + k * 32), true);
        }
      }
      cuda::CommitWgmma();
      cuda::WaitForWgmma<0>();
    }
  }

  // Of weights with a scale for each row: those of the lane's two rows, for
  // later.
  __device__ __forceinline__ void LoadRowScales(const Step& step) {
    if constexpr (kFp8) {
      const bool gate_up = step.kind == StepKind::kGateUp;
      const ExpertScales& first = gate_up ? p_.gate_scales : p_.down_scales;
      const ExpertScales& second = gate_up ? p_.up_scales : p_.down_scales;
      scales_by_row_ = first.block_rows == 1;
      if (!scales_by_row_) return;
      const int expert = ChoiceOf(step.chosen).expert;
      // Gate and up have the same row, in two groups; down two rows.
      const int rows = gate_up ? p_.intermediate : p_.hidden_size;
      const int row = gate_up
                          ? step.at + warp_ * 8 + lane_ / 4
                          : first_unit_ * kUnitRows + warp_ * 16 + lane_ / 4;
      const int64_t at = min(row, rows - 1);
      const int64_t next = min(gate_up ? row : row + 8, rows - 1);
      row_scales_[0] =
          first.data[expert * first.expert_stride + at * first.row_stride];
      row_scales_[1] =
          second.data[expert * second.expert_stride + next * second.row_stride];
    }
  }
  __device__ __forceinline__ void ScaleRows() {
    if constexpr (kFp8) {
      if (!scales_by_row_) return;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc_[i] *= row_scales_[i / 2 % 2];
    }
  }

  // -------------------------------------------------------------------------
  // Gate and up: groups of 8 rows are of gate, up, gate, up. Results go to a
  // warp that writes them to memory.
  // -------------------------------------------------------------------------

  __device__ __forceinline__ void TellTile(const Step& step) {
    if (warp_ < 2) {
      ScaleRows();
      const uint32_t tile = TileAt(tile_.index);
      cuda::Wait(TileEmpty(tile_.index), tile_.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i) {
        const int token = i / 2 * 8 + lane_ % 4 * 2 + i % 2;
        const int at = i / 2 * 4 + i % 2;
        cuda::StoreShared(
            tile + 16 + (token * kTileColumns + warp_ * 8 + lane_ / 4) * 4,
            moe_hopper::SwiGlu(acc_[at], acc_[at + 2]));
      }
      if (threadIdx.x == 0) {
        cuda::StoreShared(tile, make_int2(step.chosen, step.at));
      }
      cuda::Arrive(TileFull(tile_.index));
    }
    tile_.Next(kTokenWarps);
  }
  // Tells all of those warps something else.
  __device__ __forceinline__ void TellAll(int2 what) {
    for (int i = 0; i < kTokenWarps; ++i) {
      if (warp_ < 2) {
        cuda::Wait(TileEmpty(tile_.index), tile_.parity ^ 1);
        if (threadIdx.x == 0) cuda::StoreShared(TileAt(tile_.index), what);
        cuda::Arrive(TileFull(tile_.index));
      }
      tile_.Next(kTokenWarps);
    }
  }

  // -------------------------------------------------------------------------
  // Down: a range of columns of out, expert by expert, and their sum
  // -------------------------------------------------------------------------

  __device__ __forceinline__ void BeginRange(int range) {
    TellAll({kTileRange, range});
    first_unit_ = p_.FirstUnit(range);
    num_units_ = p_.FirstUnit(range + 1) - first_unit_;
  }

  __device__ __forceinline__ void MultiplyDown(const Step& step) {
    const Use<S> use(use_);
    if (step.first) cuda::Wait(HiddenFull(use.buffer), use.parity);
    AddProducts(step, HiddenAt(use.buffer), HiddenScalesAt(use.buffer),
                p_.down_steps * kBlockBytes);
    if (step.last) {
      __syncwarp();
      if (lane_ == 0) cuda::Arrive(HiddenEmpty(use.buffer));
      ++use_;
    }
    ReleaseStage();
    if (step.last) KeepValues(step.chosen);
  }

  // Before routing weight and rounding.
  __device__ __forceinline__ void KeepValues(int chosen) {
    ScaleRows();
    const Choice choice = ChoiceOf(chosen);
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      const int token = i / 2 * 8 + lane_ % 4 * 2 + i % 2;
      if (!choice.Has(token)) continue;
      const int pair = choice.PairOf(token);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (warp_ * 2 + half >= num_units_) continue;
        cuda::StoreShared(ValueAt(pair, warp_ * 16 + half * 8 + lane_ / 4),
                          acc_[i / 2 * 4 + half * 2 + i % 2]);
      }
    }
  }

  template <class Out>
  __device__ __forceinline__ void SumAs() const {
    const int rows = num_units_ * kUnitRows;
    for (int i = threadIdx.x; i < p_.tokens * rows; i += 128) {
      const int token = i / rows;
      const int row = i - token * rows;
      const int64_t column = first_unit_ * kUnitRows + row;
      float to_add = 0.0f;
      if (p_.residual != nullptr) {
        to_add = cuda::ToFloat(static_cast<const Out*>(
            p_.residual)[token * p_.residual_stride + column]);
      }
      float sum = 0.0f;
#pragma unroll 8
      for (int j = 0; j < p_.top_k; ++j) {
        const auto slot = cuda::LoadShared<int2>(SlotAt(token * p_.top_k + j));
        if (slot.x < 0) continue;
        const float value = cuda::LoadShared<float>(ValueAt(slot.x, row));
        sum +=
            cuda::ToFloat(cuda::FromFloat<Out>(value * __int_as_float(slot.y)));
      }
      Out result = cuda::FromFloat<Out>(sum);
      if (p_.residual != nullptr) {
        result = cuda::FromFloat<Out>(to_add + cuda::ToFloat(result));
      }
      static_cast<Out*>(p_.out)[token * p_.out_stride + column] = result;
    }
  }
  __device__ __forceinline__ void Sum() const {
    cuda::SyncThreads(kMultiplyBarrier, 128);
    if constexpr (!kFp8) {
      SumAs<T>();
    } else if (p_.out_is_half) {
      SumAs<__half>();
    } else {
      SumAs<__nv_bfloat16>();
    }
    cuda::SyncThreads(kMultiplyBarrier, 128);  // before the next range's values
  }

  Turn stage_;
  Turn tile_;
  int use_ = 0;  // of hidden's buffers
  float acc_[kTokens / 2];
  float row_scales_[2];
  bool scales_by_row_ = false;
  int first_unit_ = 0;
  int num_units_ = 0;
};

#endif  // TENON_SM90A

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    FewKernel(const __grid_constant__ Params p) {
#if TENON_SM90A
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = cuda::SharedAddress(shared_memory);
  Block<S>(p, shared).SetUp();
  cuda::WaitForPreviousKernels();
  const int warp = threadIdx.x / 32;
  if (warp == kThreads / 32 - 1) {
    Loader<S>(p, shared).Load();
  } else if (warp >= 4) {
    TokenWarp<S>(p, shared).Run();
  } else {
    Block<S>(p, shared).FindChoices();
    Multiplier<S>(p, shared).Multiply();
  }
#endif
}

}  // namespace tenon::moe_few

#endif  // TENON_OPS_MOE_MOE_FEW_KERNEL_CUDA_CUH_
