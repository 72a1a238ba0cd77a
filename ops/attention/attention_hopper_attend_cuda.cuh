#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_ATTEND_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_ATTEND_CUDA_CUH_

#include "ops/attention/attention_hopper_decode_cuda.cuh"

// The warps that attend. Each takes 16 keys of every stage, on its own: scores,
// weights and output stay in registers until a part ends, when the warps merge.
//
// Weights are 2^(score - base), and every base is a whole number, so changing
// it is exact. A part's result does not depend on what its row attended to
// before, and sums over warps and over parts in order have the same bits
// wherever they are made.

namespace tenon::cuda::hopper_decode {

#if TENON_SM90A

// 2^x of a whole number x <= 0, exactly; 0 where that is no normal number.
__device__ __forceinline__ float PowerOf2(float x) {
  return x < -126.0f ? 0.0f : __int_as_float((static_cast<int>(x) + 127) << 23);
}

// The sum of the values of a pair made by Pack<T>.
template <class T>
__device__ __forceinline__ float PairSum(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 v;
    memcpy(&v, &pair, sizeof(v));
    const float2 f = __half22float2(v);
    return f.x + f.y;
  } else {
    return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
  }
}

// Four float8 e4m3 values as two pairs of T, which is exact. The conversions
// read halves of a register, so that no shift is needed.
template <class T>
__device__ __forceinline__ void WidenFourFloat8(uint32_t word, uint32_t* low,
                                                uint32_t* high) {
  asm("{\n"
      ".reg .b16 pairs<2>;\n"
      "mov.b32 {pairs0, pairs1}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, pairs0;\n"
      "cvt.rn.f16x2.e4m3x2 %1, pairs1;\n"
      "}\n"
      : "=r"(*low), "=r"(*high)
      : "r"(word));
  if constexpr (!std::is_same_v<T, __half>) {
#pragma unroll
    for (uint32_t* pair : {low, high}) {
      __half2 v;
      memcpy(&v, pair, sizeof(v));
      const float2 f = __half22float2(v);
      *pair = Pack<T>(f.x, f.y);
    }
  }
}

// Where 16-byte chunk `chunk` of key `key` lies in a tile of K or V.
template <class S>
__device__ __forceinline__ uint32_t ChunkOffset(int key, int chunk) {
  return static_cast<uint32_t>(chunk / 8 * S::kBoxBytes + key * 128 +
                               (chunk % 8 ^ key % 8) * 16);
}

// A lane has rows lane / 4 and lane / 4 + 8.
template <class S>
class Attend {
 public:
  static constexpr int kN = S::kDim / 8;  // tiles of 8 columns
  using T = typename S::T;
  using Weight = typename S::Weight;

  // `shared` is what lies behind the stages, with the queries loaded.
  __device__ Attend(const Args& a, const Tile& tile, unsigned char* shared)
      : a_(a),
        tile_(tile),
        softmax_(reinterpret_cast<float2*>(shared + S::kSoftmaxAt) +
                 Team() * kWarps * 8),
        queries_(SharedAddress(shared)) {
    if constexpr (kKeepQueries) {
#pragma unroll
      for (int step = 0; step < S::kDim / 16; ++step) {
        LoadQuery(step, kept_[step]);
      }
    }
  }

  // Starts a part.
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max_[r] = -INFINITY;
      sum_[r] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] = 0.0f;
    }
  }

  // Adds this warp's keys of the stage at `stage`, whose first is `key`.
  __device__ __forceinline__ void AddStage(int32_t key, uint32_t stage) {
    const int first = Warp() * 16;  // of the stage
    key += first;
    if (key >= tile_.length) return;
    const uint32_t v_tile = stage + S::kTileBytes;
    if (key + 16 > tile_.length) {
      ClearRows(v_tile, first + tile_.length - key, first + 16);
    }
    float scores[2][4];
    Score(stage, first, scores);
    if (key + 16 > tile_.length - tile_.num_queries + 1) Mask(key, scores);
    uint32_t weights[4];
    Weigh(scores, weights);
    AddValues(v_tile, first, weights);
  }

  // Ends a part: merges the warps, in order. store_out(row, column, pair of
  // columns) gets sums of weighted values, store_softmax(row, block of the
  // cluster, {base, sum of weights}) the rest, for every row and block. `room`
  // is shared memory of a stage that all warps are done with when they come.
  template <class StoreOut, class StoreSoftmax>
  __device__ __forceinline__ void Finish(unsigned char* room,
                                         const StoreOut& store_out,
                                         const StoreSoftmax& store_softmax) {
    const int rows = tile_.num_queries * a_.group;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += __shfl_xor_sync(~0u, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(~0u, sum_[r], 2);
      const int first_row = r * 8;
      if (first_row >= rows) continue;
      SyncThreads(1 + Team(), kAttendThreads);  // the room is free
      SaveRows(r, reinterpret_cast<float2*>(room));
      FenceAsyncProxy();  // TMA writes there next
      SyncThreads(1 + Team(), kAttendThreads);
      MergeRows(reinterpret_cast<const float2*>(room), first_row,
                min(8, rows - first_row), store_out, store_softmax);
    }
  }

 private:
  static constexpr bool kKeepQueries = S::kDim <= 128;

  __device__ __forceinline__ static int Team() {
    return threadIdx.x / kAttendThreads;
  }
  __device__ __forceinline__ static int Warp() {  // of the team
    return threadIdx.x % kAttendThreads / 32;
  }

  // Zeros for the values of keys [begin, end) of a stage, which do not exist: a
  // weight of 0 would not make NaN vanish.
  __device__ __forceinline__ static void ClearRows(uint32_t v_tile, int begin,
                                                   int end) {
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) {
      for (int i = begin * 8 + threadIdx.x % 32; i < end * 8; i += 32) {
        StoreShared(v_tile + box * S::kBoxBytes + i * 16,
                    make_uint4(0, 0, 0, 0));
      }
    }
    FenceAsyncProxy();  // TMA writes there next
    __syncwarp();
  }

  // scores = q * k^T for 16 keys of a stage, as the sum of two chains.
  __device__ __forceinline__ void Score(uint32_t k_tile, int first_key,
                                        float (&scores)[2][4]) const {
    const int lane = threadIdx.x % 32;
    float chains[2][2][4] = {};
#pragma unroll
    for (int block = 0; block < S::kDim / 64; ++block) {
      uint4 k[2];  // of float8
      if constexpr (S::kFloat8) {
        // Lane c of four has elements 16c to 16c + 15, four of them a step:
        // the queries are read in the same order.
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          k[n] = LoadShared<uint4>(k_tile +
                                   ChunkOffset<S>(first_key + n * 8 + lane / 4,
                                                  block * 4 + lane % 4));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = block * 4 + i;
        uint32_t b[4];
        if constexpr (S::kFloat8) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint32_t words[4] = {k[n].x, k[n].y, k[n].z, k[n].w};
            WidenFourFloat8<T>(words[i], &b[2 * n], &b[2 * n + 1]);
          }
        } else {
          LoadMatrices(
              b, k_tile + ChunkOffset<S>(first_key + lane % 8 + lane / 16 * 8,
                                         step * 2 + lane / 8 % 2));
        }
        uint32_t q[4];
        GetQuery(step, q);
        Mma<T>(chains[i % 2][0], q, b[0], b[1]);
        Mma<T>(chains[i % 2][1], q, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = chains[0][n][i] + chains[1][n][i];
      }
    }
  }

  __device__ __forceinline__ void GetQuery(int step, uint32_t (&q)[4]) const {
    if constexpr (kKeepQueries) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = kept_[step][i];
    } else {
      LoadQuery(step, q);
    }
  }
  // Step `step` of 16 elements of the rows, in the order of Score.
  __device__ __forceinline__ void LoadQuery(int step, uint32_t (&q)[4]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (S::kFloat8) {
      const int chunk = step / 4 * 8 + lane % 4 * 2 + step % 4 / 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint2 v = LoadShared<uint2>(
            queries_ + TileOffset<S::kDim>(lane / 4 + 8 * r, chunk) +
            step % 2 * 8);
        q[r] = v.x;
        q[2 + r] = v.y;
      }
    } else {
      LoadMatrices(
          q, queries_ + TileOffset<S::kDim>(lane % 16, step * 2 + lane / 16));
    }
  }

  // -infinity for keys that a row does not attend to.
  __device__ __forceinline__ void Mask(int32_t key,
                                       float (&scores)[2][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t query = (r * 8 + lane / 4) / a_.group;
      const int32_t end = tile_.length - max(0, tile_.num_queries - 1 - query);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (key + n * 8 + lane % 4 * 2 + i >= end) {
            scores[n][2 * r + i] = -INFINITY;
          }
        }
      }
    }
  }

  // Turns scores into weights and brings the sums before to their base.
  __device__ __forceinline__ void Weigh(const float (&scores)[2][4],
                                        uint32_t (&weights)[4]) {
    float rescale[2];
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]),
                        fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      max = fmaxf(max_[r], ceilf(max * a_.scale));
      const float base = max == -INFINITY ? 0.0f : max;
      rescale[r] = PowerOf2(max_[r] - base);
      changed |= max_[r] != max;
      max_[r] = max;
      float sum = sum_[r] * rescale[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t pair =
            Pack<Weight>(Exp2(fmaf(scores[n][2 * r], a_.scale, -base)),
                         Exp2(fmaf(scores[n][2 * r + 1], a_.scale, -base)));
        weights[2 * n + r] = pair;
        sum += PairSum<Weight>(pair);  // the weights that count are rounded
      }
      sum_[r] = sum;
    }
    if (!__any_sync(~0u, changed)) return;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= rescale[i / 2];
    }
  }

  // out += weights * v for 16 keys of a stage.
  __device__ __forceinline__ void AddValues(uint32_t v_tile, int first_key,
                                            const uint32_t (&weights)[4]) {
    constexpr int kChunks = S::kBoxes * 8;  // of 16 bytes
    constexpr int kPerChunk = kN / kChunks;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t b[4];
      LoadMatricesTransposed(
          b, v_tile + ChunkOffset<S>(first_key + lane % 16, chunk + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        AddChunk(weights, b[2 * i], b[2 * i + 1], (chunk + i) * kPerChunk);
      }
    }
  }

  // The columns of one chunk, which begin at tile n.
  __device__ __forceinline__ void AddChunk(const uint32_t (&weights)[4],
                                           uint32_t low, uint32_t high, int n) {
    if constexpr (S::kFloat8) {
      // A 16-bit element is two columns of a key. Even columns make one tile of
      // the output, odd ones the next.
      uint32_t lows[2];
      uint32_t highs[2];
      WidenFourFloat8<Weight>(__byte_perm(low, 0, 0x3120), &lows[0], &lows[1]);
      WidenFourFloat8<Weight>(__byte_perm(high, 0, 0x3120), &highs[0],
                              &highs[1]);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        Mma<Weight>(out_[n + odd], weights, lows[odd], highs[odd]);
      }
    } else {
      Mma<Weight>(out_[n], weights, low, high);
    }
  }

  // Saves this warp's rows r * 8 to r * 8 + 7, as pairs of columns in the
  // order of PairColumn: [warp, pair, lane].
  __device__ __forceinline__ void SaveRows(int r, float2* room) const {
    const int lane = threadIdx.x % 32;
    const int warp = Warp();
    float2* const to = room + warp * kN * 32 + lane;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const float x[4] = {out_[n][2 * r], out_[n][2 * r + 1],
                          out_[n + 1][2 * r], out_[n + 1][2 * r + 1]};
      to[n * 32] =
          S::kFloat8 ? make_float2(x[0], x[2]) : make_float2(x[0], x[1]);
      to[(n + 1) * 32] =
          S::kFloat8 ? make_float2(x[1], x[3]) : make_float2(x[2], x[3]);
    }
    if (lane % 4 == 0) {
      softmax_[warp * 8 + lane / 4] = make_float2(max_[r], sum_[r]);
    }
  }
  __device__ __forceinline__ static int PairColumn(int pair, int lane) {
    return S::kFloat8 ? pair / 2 * 16 + lane % 4 * 4 + pair % 2 * 2
                      : pair * 8 + lane % 4 * 2;
  }

  template <class StoreOut, class StoreSoftmax>
  __device__ __forceinline__ void MergeRows(
      const float2* room, int first_row, int rows, const StoreOut& store_out,
      const StoreSoftmax& store_softmax) const {
    const int lane = threadIdx.x % 32;
    const int warp = Warp();
    const int row = lane / 4;
    if (row < rows) {
      float factors[kWarps];
      (void)MergeSoftmax(row, factors);
#pragma unroll
      for (int i = 0; i < kN / kWarps; ++i) {
        const int pair = i * kWarps + warp;
        float2 v = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 of_warp = room[(w * kN + pair) * 32 + lane];
          v.x = fmaf(of_warp.x, factors[w], v.x);
          v.y = fmaf(of_warp.y, factors[w], v.y);
        }
        store_out(first_row + row, PairColumn(pair, lane), v);
      }
    }
    // A thread for each row and block.
    static_assert(8 * kParts <= kAttendThreads, "in one go");
    const int of_row = threadIdx.x % 8;
    const int block = threadIdx.x % kAttendThreads / 8;
    if (of_row < rows && block < gridDim.x) {
      float factors[kWarps];
      store_softmax(first_row + of_row, block, MergeSoftmax(of_row, factors));
    }
  }

  // The base and the sum of weights of all warps, and what brings a warp's sums
  // to that base.
  __device__ __forceinline__ float2
  MergeSoftmax(int row, float (&factors)[kWarps]) const {
    float2 of_warp[kWarps];
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      of_warp[w] = softmax_[w * 8 + row];
      max = fmaxf(max, of_warp[w].x);
    }
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factors[w] = PowerOf2(of_warp[w].x - max);
      sum = fmaf(of_warp[w].y, factors[w], sum);
    }
    return make_float2(max, sum);
  }

  const Args& a_;
  const Tile& tile_;
  float2* const softmax_;
  const uint32_t queries_;
  uint32_t kept_[kKeepQueries ? S::kDim / 16 : 1][4];
  // Of this warp's keys of the part so far; sum_ of this lane's columns until
  // Finish().
  float max_[2];
  float sum_[2];
  float out_[kN][4];
};

#endif  // TENON_SM90A

}  // namespace tenon::cuda::hopper_decode

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_ATTEND_CUDA_CUH_
