#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_ATTENDER_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_ATTENDER_CUDA_CUH_

#include <cstdint>

#include "ops/attention/attention_hopper_prefill_loader_cuda.cuh"

// The warpgroups of the Hopper attention kernel that multiply.

namespace tenon::hopper_prefill {

#if TENON_SM90A

// A warpgroup attends with 64 rows to the tiles of keys, from the last, which
// needs a mask, to the first. Weights are the left operand of wgmma straight
// from registers. While the tensor cores add up the values of one tile, the
// softmax of the next is computed; and the two warpgroups take turns, so that
// one multiplies while the other is at its softmax.
//
// In a wgmma's result a lane holds columns lane % 4 * 2 + {0, 1} of every 8, of
// rows lane / 4 and lane / 4 + 8 of its warp's 16.
template <class S>
class Attender {
 public:
  __device__ __forceinline__ Attender(const Params& p,
                                      const SharedMemory<S>& shared)
      : p_(p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        group_(static_cast<int>(threadIdx.x) / 128 - 1),
        warp_row_(static_cast<int>(threadIdx.x) / 32 * 16 - 64),
        scale_(p.args.params.scale * p.args.params.k_scale * kLog2E) {}

  __device__ __forceinline__ void Attend() {
    if (S::kTakeTurns && group_ == 1) cuda::ArriveThreads(kTurnBarrier, 256);
    Tiles<S> tiles(p_);
    for (Tile tile; tiles.Next(tile);) AttendTile(tile);
  }

 private:
  using T = typename S::T;
  using Scores = float[S::kKeys / 2];
  using Weights = uint32_t[S::kKeys / 16][4];
  using Out = float[S::kDim / 2];
  static constexpr int kTurnBarrier = 1;  // and the next
  static constexpr int kGroupBarrier = 3;
  // Weights are up to 2 to the power of this.
  static constexpr float kMaxExponent = 6.0f;

  __device__ __forceinline__ void AttendTile(const Tile& tile) {
    const int count = tile.key_tiles;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      length_[r] = cuda::RowLength(p_.args, tile.rows, p_.group,
                                   warp_row_ + lane_ / 4 + 8 * r);
      base_[r] = -INFINITY;
      sum_[r] = 0.0f;
    }
    // Tiles from the first one that any of the group's rows sees the end of.
    const int first_row = group_ * 64;
    const int whole =
        first_row < tile.rows.rows
            ? cuda::RowLength(p_.args, tile.rows, p_.group, first_row) /
                  S::kKeys
            : count;
    Out out;
#pragma unroll
    for (int i = 0; i < S::kDim / 2; ++i) out[i] = 0.0f;
    cuda::Wait(shared_.QueriesFull(queries_.index), queries_.parity);
    cuda::FenceAsyncProxy();  // they came by cp.async
    if (count > 0) {
      Scores scores;
      Weights weights;
      float rescale[2];
      cuda::Wait(shared_.KeysFull(keys_.index), keys_.parity);
      cuda::FenceWgmma();
      StartScores(scores);
      cuda::CommitWgmma();
      cuda::WaitForWgmma<0>();
      ReleaseKeys();
      Mask((count - 1) * S::kKeys, scores);
      Weigh(scores, rescale);
      Round(scores, weights);
      int i = count - 2;
#pragma unroll 1
      for (; i >= whole; --i) Step<true>(i * S::kKeys, scores, weights, out);
#pragma unroll 1
      for (; i >= 0; --i) Step<false>(i * S::kKeys, scores, weights, out);
      cuda::Wait(shared_.ValuesFull(values_.index), values_.parity);
      cuda::FenceWgmma();
      StartValues(weights, out);
      cuda::CommitWgmma();
      cuda::WaitForWgmma<0>();
      ReleaseValues();
    }
    Store(tile, out);
    queries_.Next();
  }

  // Scores of one tile of keys and their weights, while the values of the one
  // before (which has the later keys) are added.
  template <bool kMask>
  __device__ __forceinline__ void Step(int first_key, Scores& scores,
                                       Weights& weights, Out& out) {
    cuda::Wait(shared_.KeysFull(keys_.index), keys_.parity);
    if (S::kTakeTurns) cuda::SyncThreads(kTurnBarrier + group_, 256);
    cuda::FenceWgmma();
    StartScores(scores);
    cuda::CommitWgmma();
    cuda::Wait(shared_.ValuesFull(values_.index), values_.parity);
    cuda::FenceWgmma();
    StartValues(weights, out);
    cuda::CommitWgmma();
    if (S::kTakeTurns) {
      cuda::ArriveThreads(kTurnBarrier + 1 - group_, 256);
    }
    cuda::WaitForWgmma<1>();
    ReleaseKeys();
    if (kMask) Mask(first_key, scores);
    float rescale[2];
    Weigh(scores, rescale);
    OrderBefore(sum_[0] + sum_[1]);
    cuda::WaitForWgmma<0>();
    ReleaseValues();
    Round(scores, weights);
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < S::kDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
    }
  }

  // scores = q * k^T.
  __device__ __forceinline__ void StartScores(Scores& scores) const {
    const uint64_t a = cuda::MatrixDescriptor(
        shared_.Queries(queries_.index) + group_ * 8 * S::kEightBytes,
        S::kEightBytes);
    const uint64_t b =
        cuda::MatrixDescriptor(shared_.Keys(keys_.index), S::kEightBytes);
#pragma unroll
    for (int c = 0; c < S::kDim / 16; ++c) {
      const int step = c / 4 * (S::kBlockBytes >> 4) + c % 4 * 2;
      cuda::Wgmma<T, S::kKeys>(scores, a + step, b + step, c > 0);
    }
  }

  // out += weights * v.
  __device__ __forceinline__ void StartValues(const Weights& weights,
                                              Out& out) const {
    const uint64_t b = cuda::MatrixDescriptor(shared_.Values(values_.index),
                                              S::kEightBytes, S::kBlockBytes);
#pragma unroll
    for (int c = 0; c < S::kKeys / 16; ++c) {
      cuda::WgmmaColumns<T, S::kDim>(out, weights[c],
                                     b + c * (2 * S::kEightBytes >> 4));
    }
  }

  __device__ __forceinline__ void ReleaseKeys() {
    if (lane_ == 0) cuda::Arrive(shared_.KeysEmpty(keys_.index));
    keys_.Next();
  }
  __device__ __forceinline__ void ReleaseValues() {
    if (lane_ == 0) cuda::Arrive(shared_.ValuesEmpty(values_.index));
    values_.Next();
  }

  __device__ __forceinline__ void Mask(int first_key, Scores& scores) const {
    const int column = first_key + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::kKeys / 2; ++i) {
      if (column + i / 4 * 8 + i % 2 >= length_[i / 2 % 2]) {
        scores[i] = -INFINITY;
      }
    }
  }

  // Turns scores into weights 2^(score * scale - base), and tells by how much
  // what was summed before is to be rescaled. The base is a largest score, of
  // now or before: it stays until one is ahead of it by more than kMaxExponent,
  // so that there is seldom anything to rescale.
  __device__ __forceinline__ void Weigh(Scores& scores, float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float odd = scores[4 + 2 * r];
      float max = -INFINITY;
#pragma unroll
      for (int j = 0; j < S::kKeys / 2; j += 8) {
        max = fmaxf(max, fmaxf(scores[j + 2 * r], scores[j + 2 * r + 1]));
        odd = fmaxf(odd, fmaxf(scores[j + 4 + 2 * r], scores[j + 5 + 2 * r]));
      }
      max = fmaxf(max, odd);
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      const float top = max * scale_;
      const float kept = top > base_[r] + kMaxExponent ? top : base_[r];
      // A row without keys so far has no base to subtract.
      const float base = kept == -INFINITY ? 0.0f : kept;
      rescale[r] = cuda::Exp2(base_[r] - base);
      base_[r] = kept;
      float sum = sum_[r] * rescale[r];
#pragma unroll
      for (int j = 2 * r; j < S::kKeys / 2; j += 4) {
        scores[j] = cuda::Exp2(scores[j] * scale_ - base);
        scores[j + 1] = cuda::Exp2(scores[j + 1] * scale_ - base);
        sum += scores[j] + scores[j + 1];
      }
      sum_[r] = sum;
    }
  }

  // A result has the layout of the next product's left operand.
  __device__ __forceinline__ void Round(const Scores& scores,
                                        Weights& weights) const {
#pragma unroll
    for (int i = 0; i < S::kKeys / 4; ++i) {
      weights[i / 4][i % 4] = cuda::Pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // Keeps the computation of `value`, which is not negative, ahead of what
  // follows: the compiler would move it past the wait for the tensor cores,
  // which it is to overlap with.
  __device__ __forceinline__ void OrderBefore(float value) const {
    asm volatile(
        "{\n"
        ".reg .pred negative;\n"
        "setp.lt.f32 negative, %1, 0f00000000;\n"
        "@negative st.shared.f32 [%0], %1;\n"
        "}\n" ::"r"(shared_.LastValues() + 8),
        "f"(value)
        : "memory");
  }

  // Stores the warp's 16 rows, through its rows of the queries' tile so that a
  // row leaves in 16-byte pieces.
  __device__ __forceinline__ void Store(const Tile& tile, const Out& out) {
    constexpr int kChunks = S::kDim / 8;
    const AttentionParams& a = p_.args.params;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      factor[r] = cuda::Normalize(1.0f, sum, a.v_scale);
    }
    // All warps are done with the queries.
    cuda::SyncThreads(kGroupBarrier + group_, 128);
    const uint32_t at = shared_.Queries(queries_.index);
#pragma unroll
    for (int j = 0; j < kChunks; j += 2) {
      // Rows 0 to 7 and 8 to 15 of chunk j, then of chunk j + 1.
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = cuda::Pack<T>(out[4 * j + 2 * i] * factor[i % 2],
                             out[4 * j + 2 * i + 1] * factor[i % 2]);
      }
      cuda::StoreMatrices(
          at + shared_.ChunkOffset(warp_row_ + lane_ % 16, j + lane_ / 16), v);
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane_; i < 16 * kChunks; i += 32) {
      const int row = warp_row_ + i / kChunks;
      if (row >= tile.rows.rows) break;
      const int64_t to =
          cuda::RowOffset(a.out, tile.rows, p_.group, tile.kv_head, row);
      *reinterpret_cast<uint4*>(a.out.As<T>() + to + i % kChunks * 8) =
          cuda::LoadShared<uint4>(at + shared_.ChunkOffset(row, i % kChunks));
    }
    // Every lane for what it has read itself.
    cuda::Arrive(shared_.QueriesEmpty(queries_.index));
  }

  const Params& p_;
  const SharedMemory<S> shared_;
  const int lane_;
  const int group_;
  const int warp_row_;  // of the tile
  const float scale_;
  Turn<S::kStages> keys_, values_;
  Turn<S::kQueryBuffers> queries_;
  // Of this lane's two rows: keys that it attends to; the base of its weights;
  // their sum in this lane's columns.
  int32_t length_[2];
  float base_[2];
  float sum_[2];
};

#endif  // TENON_SM90A

}  // namespace tenon::hopper_prefill

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_ATTENDER_CUDA_CUH_
