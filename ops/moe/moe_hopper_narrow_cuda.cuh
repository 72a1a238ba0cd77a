#ifndef TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_hopper_multiplier_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// The warpgroups that multiply with weights as the 64-row operand of wgmma and
// tokens as the narrow one ("swap-AB"): 8 or 32 tokens are computed, not 64;
// or, in pairs of blocks, as many as there are. A warpgroup has two blocks of
// weights: the same rows of gate and up, whose products meet in one thread, or
// 128 rows of down.

namespace tenon::moe_hopper {

#if TENON_SM90A

template <class S>
class NarrowMultiplier : private MultiplierBase<S> {
 public:
  __device__ __forceinline__ NarrowMultiplier(const Params& p, uint32_t shared)
      : MultiplierBase<S>(p, shared) {}

  // By all threads, ahead of a barrier.
  __device__ __forceinline__ void ClearMaxima() const {
    for (int i = threadIdx.x; i < 3 * kTokens; i += S::kThreads) {
      cuda::StoreShared(Maxima() + i * 4, 0);
    }
  }

  __device__ __forceinline__ void Multiply() {
    Stage<kStages> stage;
    Tile tile;
    int turn = 0;  // of the tile, among three
    while (NextTile(&tile)) {
      if (S::kPaired && tile.count == 0) {
        SkipTile(&stage);
      } else {
        MultiplyTile(tile, turn, &stage);
      }
      EndTile();
      turn = turn == 2 ? 0 : turn + 1;
    }
  }

 private:
  using T = typename S::T;
  using MultiplierBase<S>::Full;
  using MultiplierBase<S>::Weights;
  using MultiplierBase<S>::Tokens;
  using MultiplierBase<S>::Scales;
  using MultiplierBase<S>::Out;
  using MultiplierBase<S>::Maxima;
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
  static constexpr int kTokens = S::kTokens;
  static constexpr int kOutTokens = S::kOutTokens;

  // acc[q][4 * j + {0, 1, 2, 3}]: of block q row LaneRow() and (the last two)
  // that + 8, tokens 8 * j + lane % 4 * 2 + {0, 1}.
  using Accumulators = float[2][kTokens / 2];

  // One tile, by one warpgroup.
  __device__ __forceinline__ void MultiplyTile(const Tile& tile, int turn,
                                               Stage<kStages>* stage) {
    Accumulators acc;
    if constexpr (S::kFp8) {
      AddScaledProducts(tile, stage, acc);
    } else if constexpr (S::kPaired) {
      AddProductsOf<8, kTokens>(tile.count, stage, acc);
    } else {
      AddProducts<kTokens>(stage, acc);
    }
    if constexpr (S::kGateUp) {
      FinishGateUp(tile, turn, acc);
    } else {
      FinishDown(tile, acc);
    }
  }

  // AddProducts of the fewest columns that suffice, from kLeast to kMost.
  template <int kLeast, int kMost>
  __device__ __forceinline__ void AddProductsOf(int count,
                                                Stage<kStages>* stage,
                                                Accumulators& acc) const {
    if constexpr (kLeast == kMost) {
      AddProducts<kLeast>(stage, acc);
    } else {
      constexpr int kMiddle = (kLeast + kMost) / 16 * 8;
      if (count > kMiddle) {
        AddProductsOf<kMiddle + 8, kMost>(count, stage, acc);
      } else {
        AddProductsOf<kLeast, kMiddle>(count, stage, acc);
      }
    }
  }

  template <int kN>
  __device__ __forceinline__ void AddProducts(Stage<kStages>* stage,
                                              Accumulators& acc) const {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(Full(stage->index), stage->parity);
      if (S::kGateUp) cuda::FenceAsyncProxy();  // tokens came by cp.async
      const uint64_t a = cuda::MatrixDescriptor(Weights(stage->index) +
                                                group_ * 2 * S::kBlockBytes);
      const uint64_t b = cuda::MatrixDescriptor(Tokens(stage->index));
      cuda::FenceWgmma();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          cuda::Wgmma<T, kN>(reinterpret_cast<float(&)[kN / 2]>(acc[q]),
                             a + q * (S::kBlockBytes >> 4) + 2 * k, b + 2 * k,
                             step > 0 || k > 0);
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
  __device__ __forceinline__ void AddScaledProducts(const Tile& tile,
                                                    Stage<kStages>* stage,
                                                    Accumulators& acc) const {
    constexpr int kN = kTokens;
    const bool has_blocks = p_.weight_scales[0].block_rows > 1;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) acc[q][i] = 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < p_.depth_steps; ++step) {
      cuda::Wait(Full(stage->index), stage->parity);
      if (S::kGateUp) cuda::FenceAsyncProxy();  // tokens came by cp.async
      const uint64_t a = cuda::MatrixDescriptor(Weights(stage->index) +
                                                group_ * 2 * S::kBlockBytes);
      const uint64_t b = cuda::MatrixDescriptor(Tokens(stage->index));
      const uint32_t token_scales =
          Scales(stage->index) + lane_ % 4 * 2 * sizeof(float);
      float scale[2] = {1.0f, 1.0f};
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (!has_blocks) break;
        scale[q] =
            cuda::LoadShared<float>(WeightScale(stage->index, group_ * 2 + q));
      }
      float products[2][kN / 2];
      cuda::FenceWgmma();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          cuda::Wgmma<T, kN>(products[q], a + q * (S::kBlockBytes >> 4) + 2 * k,
                             b + 2 * k, k > 0);
        }
      }
      cuda::CommitWgmma();
      cuda::WaitForWgmma<0>();
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float2 s =
            cuda::LoadShared<float2>(token_scales + j * 8 * sizeof(float));
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float s0 = s.x * scale[q];
          const float s1 = s.y * scale[q];
          const float* const p = &products[q][4 * j];
          float* const sum = &acc[q][4 * j];
          sum[0] = fmaf(p[0], s0, sum[0]);
          sum[1] = fmaf(p[1], s1, sum[1]);
          sum[2] = fmaf(p[2], s0, sum[2]);
          sum[3] = fmaf(p[3], s1, sum[3]);
        }
      }
      Release(stage->index);
      stage->Next();
    }
    ScaleRows(tile, acc);
  }

  // First row of weights of block q.
  __device__ __forceinline__ int BlockRow(const Tile& tile, int q) const {
    return tile.row + (S::kGateUp ? group_ : group_ * 2 + q) * 64;
  }
  // The first of the two rows of a block that a lane has; the other is that
  // + 8.
  __device__ __forceinline__ int LaneRow() const {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4;
  }

  // Weights with a scale for each row.
  __device__ __forceinline__ void ScaleRows(const Tile& tile,
                                            Accumulators& acc) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const ExpertScales& s = p_.weight_scales[q];
      if (s.block_rows != 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = BlockRow(tile, q) + LaneRow() + half * 8;
        const float scale =
            row < p_.rows
                ? s.data[tile.expert * s.expert_stride + row * s.row_stride]
                : 0.0f;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          acc[q][4 * j + 2 * half] *= scale;
          acc[q][4 * j + 2 * half + 1] *= scale;
        }
      }
    }
  }

  // -------------------------------------------------------------------------
  // Results
  // -------------------------------------------------------------------------

  // One of two buffers, by turns, so that one barrier for each suffices.
  __device__ __forceinline__ uint32_t OutBuffer() const {
    return Out(group_) + out_turn_ * (S::kOutBytes / 2);
  }
  __device__ __forceinline__ void SyncGroup() const {
    cuda::SyncThreads(1 + group_, 128);
  }

  // Writes 16-bit results of one block of 64 rows, tokens [kFirst, kFirst +
  // kOutTokens) of the tile, to row_of(token), which is null where there is no
  // such token. pack(i) has the pair acc[..][2 * i]. `columns`: how many of the
  // 64 exist, a multiple of 8. They are turned in shared memory. All reads of
  // one kind come before what waits for them: latency is what counts here.
  template <int kFirst, class Pack, class RowOf>
  __device__ __forceinline__ void Store(int columns, const Pack& pack,
                                        const RowOf& row_of) {
    constexpr int kCount =
        kFirst + kOutTokens < kTokens ? kOutTokens : kTokens - kFirst;
    constexpr int kRows = cuda::CeilDiv(kCount, 16);  // of a thread
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int chunk = thread % 8;
    uint32_t packed[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) packed[i] = pack(kFirst / 4 + i);
    char* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int token = r * 16 + thread / 8;
      rows[r] = token < kCount && chunk * 8 < columns ? row_of(kFirst + token)
                                                      : nullptr;
    }
    // Two matrices, of 8 tokens by 8 rows, for each 8 tokens.
    const int i = lane_ % 8;
    const int out_chunk = thread / 32 * 2 + lane_ / 8 % 2;
    const uint32_t out = OutBuffer();
    const uint32_t to = out + (lane_ / 16 * 8 + i) * 128 + (out_chunk ^ i) * 16;
    if constexpr (kCount == 8) {
      cuda::StoreMatricesTransposed(to, packed);
    } else {
#pragma unroll
      for (int t = 0; t < kCount; t += 16) {
        const uint32_t* const v = &packed[t / 4];
        cuda::StoreMatricesTransposed(to + t * 128, {v[0], v[1], v[2], v[3]});
      }
    }
    SyncGroup();
    uint4 v[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rows[r] == nullptr) continue;
      const int token = r * 16 + thread / 8;
      v[r] = cuda::LoadShared<uint4>(out + token * 128 +
                                     (chunk ^ (token & 7)) * 16);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rows[r] == nullptr) continue;
      *reinterpret_cast<uint4*>(rows[r] + chunk * 16) = v[r];
    }
    out_turn_ ^= 1;
  }
  // The same of all tokens.
  template <int kFirst = 0, class Pack, class RowOf>
  __device__ __forceinline__ void StoreAll(int count, int columns,
                                           const Pack& pack,
                                           const RowOf& row_of) {
    if (kFirst > 0 && kFirst >= count) return;
    Store<kFirst>(columns, pack, row_of);
    if constexpr (kFirst + kOutTokens < kTokens) {
      StoreAll<kFirst + kOutTokens>(count, columns, pack, row_of);
    }
  }

  __device__ __forceinline__ void FinishGateUp(const Tile& tile, int turn,
                                               Accumulators& acc) {
    const int row = BlockRow(tile, 0);
    if constexpr (S::kFp8) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        acc[0][i] = SwiGlu(acc[0][i], acc[1][i]);
      }
      StoreQuantized(tile, row, turn, acc[0]);
    } else {
      char* const to = static_cast<char*>(p_.out) +
                       tile.begin * p_.out_row_bytes + row * sizeof(T);
      StoreAll(
          tile.count, p_.rows - row,
          [&](int i) {
            return cuda::Pack<T>(SwiGlu(acc[0][2 * i], acc[1][2 * i]),
                                 SwiGlu(acc[0][2 * i + 1], acc[1][2 * i + 1]));
          },
          [&](int token) -> char* {
            return token < tile.count ? to + token * p_.out_row_bytes : nullptr;
          });
    }
  }

  __device__ __forceinline__ void FinishDown(const Tile& tile,
                                             const Accumulators& acc) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int row = BlockRow(tile, q);
      char* const to = static_cast<char*>(p_.out) + row * 2;
      StoreAll(
          tile.count, p_.rows - row,
          [&](int i) {
            const auto w =
                this->template WeightOf<float2>(i / 2 * 8 + lane_ % 4 * 2);
            const float v0 = acc[q][2 * i] * w.x;
            const float v1 = acc[q][2 * i + 1] * w.y;
            if constexpr (S::kFp8) {
              return p_.out_is_half ? cuda::Pack<__half>(v0, v1)
                                    : cuda::Pack<__nv_bfloat16>(v0, v1);
            } else {
              return cuda::Pack<T>(v0, v1);
            }
          },
          [&](int token) -> char* {
            const int slot = SlotOf(token);
            return slot < 0 ? nullptr : to + slot * p_.out_row_bytes;
          });
    }
  }

  // -------------------------------------------------------------------------
  // fp8 results of gate and up: one scale for a token's rows of the tile
  // -------------------------------------------------------------------------

  // Of the tokens of a tile. Tiles take turns with three of them: the next one
  // is set to zero ahead of the barrier that all warpgroups meet at in every
  // tile, when its readers, two tiles before, are past the barrier before.
  __device__ __forceinline__ uint32_t MaximaOf(int turn) const {
    return Maxima() + turn * kTokens * 4;
  }
  __device__ __forceinline__ void StoreQuantized(
      const Tile& tile, int row, int turn, const float (&v)[kTokens / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const uint32_t maxima = MaximaOf(turn);
    if (group_ == 0 && thread < kTokens) {
      cuda::StoreShared(MaximaOf(turn == 2 ? 0 : turn + 1) + thread * 4, 0);
    }
    // Rows past the last are zeros.
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
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
    if (group_ == 0 && thread < tile.count) {
      const int64_t groups = NumFp8Groups(p_.rows);
      const float m = cuda::LoadShared<float>(maxima + thread * 4);
      p_.out_scales[(tile.begin + thread) * groups + tile.row / 128] =
          Fp8ScaleOf(m).scale;
    }
    StoreBytes(tile, row, maxima, v);
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
  __device__ __forceinline__ void StoreBytes(const Tile& tile, int row,
                                             uint32_t maxima,
                                             const float (&v)[kTokens / 2]) {
    constexpr int kStride = 80;  // no bank conflicts
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int quarter = lane_ / 4 % 4;
    const uint32_t out = OutBuffer();
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
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
      const int token = j * 8 + lane_ % 4 * 2 + quarter % 2;
      const int at = thread / 32 * 16 + quarter / 2 * 8 + lane_ / 16 * 4;
      cuda::StoreShared(out + token * kStride + at, four);
    }
    SyncGroup();
    const int token = thread / 4;
    const int at = thread % 4 * 16;
    if (token < tile.count && row + at < p_.rows) {
      char* const to = static_cast<char*>(p_.out) +
                       (tile.begin + token) * p_.out_row_bytes + row + at;
      *reinterpret_cast<uint4*>(to) =
          cuda::LoadShared<uint4>(out + token * kStride + at);
    }
    out_turn_ ^= 1;
  }

  int out_turn_ = 0;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_
