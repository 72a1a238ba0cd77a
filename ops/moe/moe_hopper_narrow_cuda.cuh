#ifndef TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_
#define TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_

#include <cstdint>

#include "ops/moe/moe_hopper_loader_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// The warpgroups that multiply, for few tokens. Weights are the 64-row operand
// of wgmma and tokens the narrow one ("swap-AB"): 8 or 32 tokens are computed,
// not 64. A warpgroup has two blocks of weights: the same rows of gate and up,
// whose products meet in one thread, or 128 rows of down.

namespace tenon::moe_hopper {

#if TENON_SM90A

template <class S>
class NarrowMultiplier : private Ring<S> {
 public:
  __device__ __forceinline__ NarrowMultiplier(const Params& p, uint32_t shared)
      : Ring<S>(shared), p_(p), lane_(threadIdx.x % 32) {}

  // By all threads, ahead of a barrier.
  __device__ __forceinline__ void ClearMaxima() const {
    for (int i = threadIdx.x; i < 3 * kTokens; i += S::kThreads) {
      cuda::StoreShared(Maxima() + i * 4, 0);
    }
  }

  __device__ __forceinline__ void Multiply() {
    const int group = static_cast<int>(threadIdx.x) / 128 - 1;
    TileFinder<S::kExpertsPerLane> finder(p_, kTokens, S::kTileRows);
    Stage<kStages> stage;
    Tile tile;
    int turn = 0;  // of the tile, among three
    for (int i = blockIdx.x; finder.Find(i, &tile); i += gridDim.x) {
      MultiplyTile(tile, group, turn, &stage);
      turn = turn == 2 ? 0 : turn + 1;
    }
  }

 private:
  using T = typename S::T;
  using Ring<S>::Full;
  using Ring<S>::Empty;
  using Ring<S>::Weights;
  using Ring<S>::Tokens;
  using Ring<S>::Scales;
  using Ring<S>::Out;
  using Ring<S>::Slots;
  using Ring<S>::Maxima;
  static constexpr int kStages = S::kStages;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kN = S::kTokens;

  // One tile, by one warpgroup.
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
      AddScaledProducts(tile, group, stage, acc);
    } else {
      AddProducts(group, stage, acc);
    }
    if constexpr (S::kGateUp) {
      FinishGateUp(tile, group, turn, acc);
    } else {
      FinishDown(tile, group, slot, weight, acc);
    }
  }

  // The thread is done with a stage; see Shape::kEmptyArrivals.
  __device__ __forceinline__ void Release(int stage) const {
    if (S::kFp8 || lane_ == 0) cuda::Arrive(Empty(stage));
  }

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
  __device__ __forceinline__ void AddScaledProducts(const Tile& tile, int group,
                                                    Stage<kStages>* stage,
                                                    float (&acc)[2][kN / 2]) {
    const float* scales[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const ExpertScales& s = p_.weight_scales[q];
      scales[q] = s.block_rows == 1 ? nullptr  // applied at the end
                                    : s.data + tile.expert * s.expert_stride +
                                          ScaleRow(tile, group, q) /
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
    ScaleRows(tile, group, acc);
  }

  // First row of weights of block q of a group.
  static __device__ __forceinline__ int BlockRow(const Tile& tile, int group,
                                                 int q) {
    return tile.row + (S::kGateUp ? group : group * 2 + q) * 64;
  }
  // The same, but one that exists: a tile may end after the last row.
  __device__ __forceinline__ int ScaleRow(const Tile& tile, int group,
                                          int q) const {
    return min(BlockRow(tile, group, q), p_.rows - 1);
  }
  // The first of the two rows of a block that a lane has; the other is that
  // + 8.
  __device__ __forceinline__ int LaneRow() const {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4;
  }

  // Weights with a scale for each row.
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

  // One of two buffers.
  __device__ __forceinline__ uint32_t OutBuffer(int group) const {
    return Out(group) + out_turn_ * (S::kOutBytes / 2);
  }
  static __device__ __forceinline__ void SyncGroup(int group) {
    cuda::SyncThreads(1 + group, 128);
  }

  // Writes 16-bit results of one block of 64 rows to row_of(token), which is
  // null where there is no such token. `columns`: how many of the 64 exist, a
  // multiple of 8. They are turned in shared memory, in two buffers by turns,
  // so that one barrier suffices.
  template <class RowOf>
  __device__ __forceinline__ void Store(int group,
                                        const uint32_t (&packed)[kN / 4],
                                        int columns, const RowOf& row_of) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int chunk = thread % 8;
    // Two matrices, of 8 tokens by 8 rows, for each 8 tokens.
    const int i = lane_ % 8;
    const int out_chunk = thread / 32 * 2 + lane_ / 8 % 2;
    const uint32_t out = OutBuffer(group);
    const uint32_t to = out + (lane_ / 16 * 8 + i) * 128 + (out_chunk ^ i) * 16;
    if constexpr (kN == 8) {
      cuda::StoreMatricesTransposed(to, packed);
    } else {
#pragma unroll
      for (int j = 0; j < kN / 8; j += 2) {
        const uint32_t* v = &packed[j * 2];
        cuda::StoreMatricesTransposed(to + j * 8 * 128,
                                      {v[0], v[1], v[2], v[3]});
      }
    }
    SyncGroup(group);
#pragma unroll
    for (int t = 0; t < kN; t += 16) {
      const int token = t + thread / 8;
      if (token >= kN) break;
      char* const row = row_of(token);
      if (row != nullptr && chunk * 8 < columns) {
        *reinterpret_cast<uint4*>(row + chunk * 16) = cuda::LoadShared<uint4>(
            out + token * 128 + (chunk ^ (token & 7)) * 16);
      }
    }
    out_turn_ ^= 1;
  }

  __device__ __forceinline__ void FinishGateUp(const Tile& tile, int group,
                                               int turn,
                                               float (&acc)[2][kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      acc[0][i] = SwiGlu(acc[0][i], acc[1][i]);
    }
    const int row = BlockRow(tile, group, 0);
    if constexpr (S::kFp8) {
      StoreQuantized(tile, group, row, turn, acc[0]);
    } else {
      uint32_t packed[kN / 4];
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) {
        packed[i] = cuda::Pack<T>(acc[0][2 * i], acc[0][2 * i + 1]);
      }
      Store(group, packed, p_.rows - row, [&](int token) -> char* {
        if (token >= tile.count) return nullptr;
        return static_cast<char*>(p_.out) +
               (tile.begin + token) * p_.out_row_bytes + row * sizeof(T);
      });
    }
  }

  __device__ __forceinline__ void FinishDown(const Tile& tile, int group,
                                             int slot, float weight,
                                             const float (&acc)[2][kN / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const uint32_t slots = Slots(group);
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
      Store(group, packed, p_.rows - row, [&](int token) -> char* {
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
  __device__ __forceinline__ uint32_t MaximaOf(int turn) const {
    return Maxima() + turn * kTokens * 4;
  }
  __device__ __forceinline__ void StoreQuantized(const Tile& tile, int group,
                                                 int row, int turn,
                                                 const float (&v)[kN / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const uint32_t maxima = MaximaOf(turn);
    if (group == 0 && thread < kTokens) {
      cuda::StoreShared(MaximaOf(turn == 2 ? 0 : turn + 1) + thread * 4, 0);
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
    StoreBytes(tile, group, row, maxima, v);
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
  __device__ __forceinline__ void StoreBytes(const Tile& tile, int group,
                                             int row, uint32_t maxima,
                                             const float (&v)[kN / 2]) {
    constexpr int kStride = 80;  // no bank conflicts
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int quarter = lane_ / 4 % 4;
    const uint32_t out = OutBuffer(group);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
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
    SyncGroup(group);
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

  const Params& p_;
  const int lane_;
  int out_turn_ = 0;
};

#endif  // TENON_SM90A

}  // namespace tenon::moe_hopper

#endif  // TENON_OPS_MOE_MOE_HOPPER_NARROW_CUDA_CUH_
