#ifndef TENON_OPS_ATTENTION_ATTENTION_CUDA_MMA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_CUDA_MMA_CUH_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/core/core_cuda.cuh"
#include "ops/core/mma_cuda.cuh"

// Attention of one warp's 16 rows, each a (query, head), to tiles of keys in
// shared memory, on tensor cores.
//
// A tile holds rows of kDim 16-bit elements, in 16-byte chunks of which chunk c
// of row r sits at c ^ (r % 8): whatever is read together is in different
// banks. In an mma's result a lane holds columns lane % 4 * 2 + {0, 1} of rows
// lane / 4 and lane / 4 + 8.

namespace tenon::cuda {

// Two float8 e4m3 values as two of T, which is exact.
template <class T>
__device__ __forceinline__ uint32_t WidenFloat8(uint16_t pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  if constexpr (std::is_same_v<T, __half>) {
    return uint32_t{raw.x} | uint32_t{raw.y} << 16;
  } else {
    const float2 v = __half22float2(__half2(raw));
    return Pack<T>(v.x, v.y);
  }
}

template <int kDim>
__device__ __forceinline__ uint32_t TileOffset(int row, int chunk) {
  return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ (row % 8)) * 16));
}

// Fragments of the 16 rows of queries, kept in registers where these suffice.
template <int kDim>
class QueryRows {
 public:
  __device__ explicit QueryRows(uint32_t tile) : tile_(tile) {
    if constexpr (kKeep) {
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) Load(step, kept_[step]);
    }
  }
  // Elements [16 * step, 16 * step + 16) of all rows.
  __device__ __forceinline__ void Get(int step, uint32_t (&a)[4]) const {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept_[step][i];
    } else {
      Load(step, a);
    }
  }

 private:
  static constexpr bool kKeep = kDim <= 128;

  __device__ __forceinline__ void Load(int step, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % 32;
    LoadMatrices(a, tile_ + TileOffset<kDim>(lane % 16, step * 2 + lane / 16));
  }

  uint32_t tile_;
  uint32_t kept_[kKeep ? kDim / 16 : 1][4];
};

// The softmax of this lane's two rows over the keys seen so far. `sum` counts
// this lane's columns only until FinishSums().
template <int kDim>
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float out[kDim / 8][4] = {};

  __device__ __forceinline__ void FinishSums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
  }
};

// scores = q * k^T for kKeys keys.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void ScoreKeys(const QueryRows<kDim>& q,
                                          uint32_t k_tile,
                                          float (&scores)[kKeys / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    q.Get(step, a);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      LoadMatrices(
          b, k_tile + TileOffset<kDim>(n * 16 + row, step * 2 + lane / 8 % 2));
      Mma<T>(scores[2 * n], a, b[0], b[1]);
      Mma<T>(scores[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Turns scores into weights 2^(score * scale - max) and rescales what was
// summed before. `scale` is positive.
template <int kDim, int kKeys>
__device__ __forceinline__ void WeighKeys(float scale,
                                          float (&scores)[kKeys / 8][4],
                                          RowState<kDim>& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max = state.max[r];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      max = fmaxf(max, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    }
    max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
    max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
    // A row without keys so far has no maximum to subtract.
    const float base = max == -INFINITY ? 0.0f : max * scale;
    const float rescale = Exp2(state.max[r] * scale - base);
    state.max[r] = max;
    float sum = state.sum[r] * rescale;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[n][i] = Exp2(scores[n][i] * scale - base);
        sum += scores[n][i];
      }
    }
    state.sum[r] = sum;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      state.out[j][2 * r] *= rescale;
      state.out[j][2 * r + 1] *= rescale;
    }
  }
}

// out += weights * v.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void AddValues(const float (&weights)[kKeys / 8][4],
                                          uint32_t v_tile,
                                          RowState<kDim>& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    // An mma's result has the layout of the next one's operand.
    const uint32_t a[4] = {
        Pack<T>(weights[2 * n][0], weights[2 * n][1]),
        Pack<T>(weights[2 * n][2], weights[2 * n][3]),
        Pack<T>(weights[2 * n + 1][0], weights[2 * n + 1][1]),
        Pack<T>(weights[2 * n + 1][2], weights[2 * n + 1][3])};
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t b[4];
      LoadMatricesTransposed(
          b, v_tile + TileOffset<kDim>(n * 16 + lane % 16, j * 2 + lane / 16));
      Mma<T>(state.out[2 * j], a, b[0], b[1]);
      Mma<T>(state.out[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Attends to the kKeys keys of a tile, the first of which is first_key. This
// lane's row r attends to keys below length[r]; `mask` tells whether that cuts
// any row of the warp short of the tile's end. Rows of the tile past the last
// key must hold finite values.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void FoldTile(const QueryRows<kDim>& q,
                                         uint32_t k_tile, uint32_t v_tile,
                                         int32_t first_key,
                                         const int32_t (&length)[2], bool mask,
                                         float scale, RowState<kDim>& state) {
  float scores[kKeys / 8][4] = {};
  ScoreKeys<T, kDim, kKeys>(q, k_tile, scores);
  if (mask) {
    const int32_t column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + n * 8 + i % 2 >= length[i / 2]) {
          scores[n][i] = -INFINITY;
        }
      }
    }
  }
  WeighKeys<kDim, kKeys>(scale, scores, state);
  AddValues<T, kDim, kKeys>(scores, v_tile, state);
}

// Widens `rows` rows of kDim float8 values into a tile of T.
template <class T, int kDim>
__device__ __forceinline__ void WidenTile(const unsigned char* from, int rows,
                                          unsigned char* to, int thread,
                                          int num_threads) {
  constexpr int kPerRow = kDim / 16;
  for (int i = thread; i < rows * kPerRow; i += num_threads) {
    const uint4 in = reinterpret_cast<const uint4*>(from)[i];
    const uint32_t words[4] = {in.x, in.y, in.z, in.w};
    uint32_t wide[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      wide[j] =
          WidenFloat8<T>(static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
    }
    const int row = i / kPerRow;
    const int chunk = i % kPerRow * 2;
    *reinterpret_cast<uint4*>(to + TileOffset<kDim>(row, chunk)) =
        make_uint4(wide[0], wide[1], wide[2], wide[3]);
    *reinterpret_cast<uint4*>(to + TileOffset<kDim>(row, chunk + 1)) =
        make_uint4(wide[4], wide[5], wide[6], wide[7]);
  }
}

// Where chunk `chunk` of row `row` of a cache's element type lands: in a tile,
// or as it is, to be widened.
template <int kDim, int kElementBytes>
__device__ __forceinline__ uint32_t StageOffset(int row, int chunk) {
  if constexpr (kElementBytes == 1) {
    return static_cast<uint32_t>(row * kDim + chunk * 16);
  } else {
    return TileOffset<kDim>(row, chunk);
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_ATTENTION_ATTENTION_CUDA_MMA_CUH_
