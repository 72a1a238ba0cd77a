#ifndef TENON_OPS_MOE_MOE_HOPPER_WIDE_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_WIDE_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_hopper_multiplier_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// The warpgroups that multiply, for many tokens. Each of the two has 64 tokens,
// as the 64-row operand of wgmma, times 128 rows of gate and of up (or twice
// 128 rows of down). A lane has two tokens, so scales are few, and a warp has
// whole rows of results, so it waits for no other to write them.

namespace tenon::moe_hopper {

#if TENON_SM90A

template <class S>
class WideMultiplier : private MultiplierBase<S> {
 public:
  __device__ __forceinline__ WideMultiplier(const Params& p, uint32_t shared)
      : MultiplierBase<S>(p, shared),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4) {}

  __device__ __forceinline__ void Multiply() {
    Stage<kStages> stage;
    Tile tile;
    while (NextTile(&tile)) {
      if (group_ == 1 && tile.count > 0 && IsStaggered()) {
        cuda::SyncThreads(kStartBarrier, 256);
      }
      if (group_ * 64 < tile.count) {
        MultiplyTile(tile, &stage);
      } else {
        SkipTile(&stage);
      }
      EndTile();
    }
  }

 private:
  using T = typename S::T;
  using MultiplierBase<S>::Full;
  using MultiplierBase<S>::Weights;
  using MultiplierBase<S>::Tokens;
  using MultiplierBase<S>::Scales;
  using MultiplierBase<S>::Out;
  using MultiplierBase<S>::NextTile;
  using MultiplierBase<S>::EndTile;
  using MultiplierBase<S>::SkipTile;
  using MultiplierBase<S>::SlotOf;
  using MultiplierBase<S>::Release;
  using MultiplierBase<S>::WeightScale;
  using MultiplierBase<S>::p_;
  using MultiplierBase<S>::lane_;
  using MultiplierBase<S>::group_;
  static constexpr int kStages = S::kStages;
  static constexpr int kCols = 128;  // rows of weights in one product
  static constexpr int kOutStride = 144;

  // acc[q][4 * j + {0, 1, 2, 3}]: token TokenOf(0) and (the last two)
  // TokenOf(1), columns 8 * j + lane % 4 * 2 + {0, 1}.
  using Accumulators = float[2][kCols / 2];

  // Of the tile.
  __device__ __forceinline__ int TokenOf(int half) const {
    return FirstToken() + half * 8 + lane_ / 4;
  }
  // The first of the warp's 16.
  __device__ __forceinline__ int FirstToken() const {
    return group_ * 64 + warp_ * 16;
  }

  __device__ __forceinline__ void MultiplyTile(const Tile& tile,
                                               Stage<kStages>* stage) {
    Accumulators acc;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) acc[q][i] = 0.0f;
    }
    if constexpr (S::kFp8) {
      AddScaledProducts(tile, stage, acc);
    } else {
      AddProducts(stage, acc);
    }
    if constexpr (S::kGateUp) {
      FinishGateUp(tile, acc);
    } else {
      FinishDown(tile, acc);
    }
  }

  __device__ __forceinline__ void WaitFor(const Stage<kStages>& stage) const {
    cuda::Wait(Full(stage.index), stage.parity);
    if (S::kGateUp) cuda::FenceAsyncProxy();  // tokens came by cp.async
  }
  // From the first kCols rows of weights of a stage to the others.
  static constexpr uint32_t kNextBlock = kCols * 128 >> 4;

  __device__ __forceinline__ void AddProducts(Stage<kStages>* stage,
                                              Accumulators& acc) const {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      WaitFor(*stage);
      const uint64_t tokens =
          cuda::MatrixDescriptor(Tokens(stage->index) + group_ * 64 * 128);
      const uint64_t weights = cuda::MatrixDescriptor(Weights(stage->index));
      cuda::FenceWgmma();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          cuda::Wgmma<T, kCols>(acc[q], tokens + 2 * k,
                                weights + q * kNextBlock + 2 * k, true);
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

  // The lower word of a descriptor, which is all that they differ in. It is the
  // same in all lanes, and the compiler knows: descriptors are made by
  // instructions of the warp, not of its lanes.
  static __device__ __forceinline__ uint32_t LowWord(uint32_t shared) {
    return __shfl_sync(
        ~0u, static_cast<uint32_t>(cuda::MatrixDescriptor(shared)), 0);
  }
  static __device__ __forceinline__ uint64_t Descriptor(uint32_t low) {
    constexpr uint32_t kHighWord = 0x40000040;
    return uint64_t{kHighWord} << 32 | low;
  }

  // fp8: each step is a block of the scales, which are read while the first
  // product is made. Between two products of a warpgroup there is time for the
  // scaling and hardly more before the tensor cores have nothing to do.
  __device__ __forceinline__ void AddScaledProducts(const Tile& tile,
                                                    Stage<kStages>* stage,
                                                    Accumulators& acc) const {
    const bool has_blocks = p_.weight_scales[0].block_rows > 1;
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      WaitFor(*stage);
      const uint32_t tokens = LowWord(Tokens(stage->index) + group_ * 64 * 128);
      const uint32_t weights = LowWord(Weights(stage->index));
      float scales[2][2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float products[kCols / 2];
        cuda::FenceWgmma();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          cuda::Wgmma<T, kCols>(products, Descriptor(tokens + 2 * k),
                                Descriptor(weights + q * kNextBlock + 2 * k),
                                k > 0);
        }
        cuda::CommitWgmma();
        if (q == 0) LoadScales(stage->index, has_blocks, scales);
        cuda::WaitForWgmma<0>();
        if (q == 1) Release(stage->index);
        AddScaled(products, scales[q], acc[q]);
      }
      stage->Next();
      if (step == 0 && group_ == 0 && IsStaggered()) {
        cuda::ArriveThreads(kStartBarrier, 256);
      }
    }
    ScaleRows(tile, acc);
  }

  // fp8: the second warpgroup begins a tile when the first one is done with its
  // first step. In step with each other both would wait for products, and scale
  // them, and write results, at the same time. With fewer steps than stages the
  // first one could be a tile ahead.
  static constexpr int kStartBarrier = 1;
  __device__ __forceinline__ bool IsStaggered() const {
    return S::kFp8 && p_.depth_steps >= kStages;
  }

  // Of both products, for the lane's two tokens.
  __device__ __forceinline__ void LoadScales(int stage, bool has_blocks,
                                             float (&scales)[2][2]) const {
    const float tokens[2] = {
        cuda::LoadShared<float>(Scales(stage) + TokenOf(0) * 4),
        cuda::LoadShared<float>(Scales(stage) + TokenOf(1) * 4)};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float stored = cuda::LoadShared<float>(WeightScale(stage, q));
      const float weights = has_blocks ? stored : 1.0f;
      scales[q][0] = tokens[0] * weights;
      scales[q][1] = tokens[1] * weights;
    }
  }

  static __device__ __forceinline__ void AddScaled(
      const float (&products)[kCols / 2], const float (&scales)[2],
      float (&sums)[kCols / 2]) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      sums[i] = fmaf(products[i], scales[i / 2 % 2], sums[i]);
    }
  }

  // First row of weights of product q.
  static __device__ __forceinline__ int FirstRow(const Tile& tile, int q) {
    return tile.row + (S::kGateUp ? 0 : q * kCols);
  }

  // Weights with a scale for each row.
  __device__ __forceinline__ void ScaleRows(const Tile& tile,
                                            Accumulators& acc) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const ExpertScales& s = p_.weight_scales[q];
      if (s.block_rows != 1) continue;
      const float* const scales = s.data + tile.expert * s.expert_stride;
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) {
        const int row = FirstRow(tile, q) + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        acc[q][i] *= row < p_.rows ? scales[row * s.row_stride] : 0.0f;
      }
    }
  }

  // -------------------------------------------------------------------------
  // Results
  // -------------------------------------------------------------------------

  // Room for 128 bytes of each of the warp's tokens.
  __device__ __forceinline__ uint32_t WarpOut() const {
    return Out(group_) + warp_ * (16 * kOutStride);
  }

  // Writes those, of which `bytes` exist (a multiple of 16), to row_of(token of
  // the warp), which is null where there is no such token. All lanes take part.
  template <class RowOf>
  __device__ __forceinline__ void WriteOut(int bytes,
                                           const RowOf& row_of) const {
    __syncwarp();
    const int at = lane_ % 8 * 16;
#pragma unroll
    for (int t = 0; t < 16; t += 4) {
      const int token = t + lane_ / 8;
      char* const row = row_of(token);
      if (row != nullptr && at < bytes) {
        *reinterpret_cast<uint4*>(row + at) =
            cuda::LoadShared<uint4>(WarpOut() + token * kOutStride + at);
      }
    }
    __syncwarp();
  }

  // The same of 64 columns, given as packed pairs: packed[2 * j + half] of
  // columns 8 * j + lane % 4 * 2.
  template <class RowOf>
  __device__ __forceinline__ void Write16Bit(const uint32_t (&packed)[16],
                                             int columns,
                                             const RowOf& row_of) const {
    // Matrices of 8 tokens by 8 columns: two by tokens, then two by columns.
    const uint32_t to = WarpOut() + (lane_ % 16) * kOutStride + lane_ / 16 * 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      cuda::StoreMatrices(to + j * 16, {packed[2 * j], packed[2 * j + 1],
                                        packed[2 * j + 2], packed[2 * j + 3]});
    }
    WriteOut(columns * 2, row_of);
  }

  __device__ __forceinline__ void FinishGateUp(const Tile& tile,
                                               Accumulators& acc) const {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      acc[0][i] = SwiGlu(acc[0][i], acc[1][i]);
    }
    const int count = tile.count - FirstToken();  // of the warp; may be below 0
    char* const first_row = static_cast<char*>(p_.out) +
                            (tile.begin + FirstToken()) * p_.out_row_bytes;
    if constexpr (S::kFp8) {
      WriteQuantized(tile, acc[0], count, first_row + tile.row);
    } else {
#pragma unroll
      for (int c = 0; c < kCols; c += 64) {
        uint32_t packed[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          packed[i] =
              cuda::Pack<T>(acc[0][c / 2 + 2 * i], acc[0][c / 2 + 2 * i + 1]);
        }
        char* const to = first_row + (tile.row + c) * sizeof(T);
        Write16Bit(packed, p_.rows - tile.row - c, [&](int token) -> char* {
          return token < count ? to + token * p_.out_row_bytes : nullptr;
        });
      }
    }
  }

  // A token's columns of the tile are a group with one scale.
  __device__ __forceinline__ void WriteQuantized(const Tile& tile,
                                                 const float (&v)[kCols / 2],
                                                 int count, char* to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = 0.0f;  // columns past the last are zeros
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        m = fmaxf(m, fmaxf(fabsf(v[4 * j + 2 * half]),
                           fabsf(v[4 * j + 2 * half + 1])));
      }
      const Fp8Scale scale = Fp8ScaleOf(cuda::LanesMax<4>(m));
      const int token = half * 8 + lane_ / 4;
      if (lane_ % 4 == 0 && token < count) {
        p_.out_scales[(tile.begin + FirstToken() + token) *
                          NumFp8Groups(p_.rows) +
                      tile.row / kFp8GroupSize] = scale.scale;
      }
      const uint32_t row = WarpOut() + token * kOutStride + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        cuda::StoreShared(
            row + j * 8,
            cuda::ToFp8x2(v[4 * j + 2 * half] * scale.inverse,
                          v[4 * j + 2 * half + 1] * scale.inverse));
      }
    }
    WriteOut(p_.rows - tile.row, [&](int token) -> char* {
      return token < count ? to + token * p_.out_row_bytes : nullptr;
    });
  }

  __device__ __forceinline__ void FinishDown(const Tile& tile,
                                             const Accumulators& acc) const {
    const float weights[2] = {this->template WeightOf<float>(TokenOf(0)),
                              this->template WeightOf<float>(TokenOf(1))};
    // A lane writes to the rows of four tokens of its warp.
    char* rows[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int slot = SlotOf(FirstToken() + r * 4 + lane_ / 8);
      rows[r] = slot < 0 ? nullptr
                         : static_cast<char*>(p_.out) +
                               slot * p_.out_row_bytes + tile.row * 2;
    }
#pragma unroll
    for (int c = 0; c < 2 * kCols; c += 64) {
      const float* const v = &acc[c / kCols][c % kCols / 2];
      uint32_t packed[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float v0 = v[2 * i] * weights[i % 2];
        const float v1 = v[2 * i + 1] * weights[i % 2];
        if constexpr (S::kFp8) {
          packed[i] = p_.out_is_half ? cuda::Pack<__half>(v0, v1)
                                     : cuda::Pack<__nv_bfloat16>(v0, v1);
        } else {
          packed[i] = cuda::Pack<T>(v0, v1);
        }
      }
      Write16Bit(packed, p_.rows - tile.row - c, [&](int token) -> char* {
        char* const row = rows[token / 4];
        return row == nullptr ? nullptr : row + c * 2;
      });
    }
  }

  const int warp_;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_WIDE_CUDA_CUH_
