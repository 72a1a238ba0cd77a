#ifndef TENON_OPS_CORE_GEMM_TILE_CUDA_CUH_
#define TENON_OPS_CORE_GEMM_TILE_CUDA_CUH_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/core/core_cuda.cuh"
#include "ops/core/mma_cuda.cuh"

// One output tile of C = A * B^T on one thread block, for sm_80 and later:
// mma.sync for float16 and bfloat16, FFMA (no TF32) for float32, fed by a
// cp.async pipeline through swizzled shared memory. Kernels of linear and MoE
// are built from it.
//
//   using Tile = cuda::GemmTile<T, cuda::GemmTileShape<64, 64, 2, 2, 4>, true>;
//   __global__ void __launch_bounds__(Tile::kThreads) Kernel(...) {
//     extern __shared__ __align__(128) char shared[];
//     const T* const b[] = {weight + col0 * weight_stride};
//     Tile::Run(
//         shared,
//         [&](int m) { return row0 + m < rows ? x + ... : nullptr; },
//         b, weight_stride, cols - col0, depth,
//         [&](int m, int n, const float (&c)[1][Tile::kCols]) {
//           // c[0][i] belongs to row row0 + m, column col0 + n + i.
//         });
//   }
//   cuda::Launch(op, stream, grid, dim3(Tile::kThreads), Tile::kSharedBytes,
//                Kernel, ...);
//
// A is given by rows, so gathering them costs nothing; B by the first of its
// rows, which are b_stride apart. With kNumB == 2 the tile multiplies A by two
// matrices at once and hands the epilogue both results of an element (gate and
// up projection).
//
// fp8 (T is __nv_fp8_e4m3) has RunScaled instead, with scales of A's rows and
// of B for every 128 of the depth.
//
// Numerics: products and sums in float32. A sum runs over k in ascending order
// in one accumulator (an mma adds 16 products at once), so an element's bits
// depend on its row of A, its row of B and depth alone: not on the tile's
// shape, the element's place in it, or kAligned.

namespace tenon::cuda {

// kM rows of A by kN rows of each of kNumB matrices, on kWarpsM x kWarpsN
// warps. A warp's part must be a multiple of 16 rows and 16, 32 or 64 columns.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_,
          int kNumB_ = 1>
struct GemmTileShape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_;
  static constexpr int kNumB = kNumB_;
};

namespace gemm_internal {

__device__ __forceinline__ void Store16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ float4 LoadFloat4(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

}  // namespace gemm_internal

// T is float, __half, __nv_bfloat16 or __nv_fp8_e4m3. kAligned: all rows are
// whole chunks, as RowsAreWholeChunks tells; otherwise they are read element by
// element (slowly).
template <class T, class Shape, bool kAligned>
class GemmTile {
 public:
  static constexpr int kM = Shape::kM;
  static constexpr int kN = Shape::kN;
  static constexpr int kNumB = Shape::kNumB;
  static constexpr int kThreads = 32 * Shape::kWarpsM * Shape::kWarpsN;
  // Consecutive columns of C that one epilogue call gets.
  static constexpr int kCols = kN / Shape::kWarpsN / 4;
  // Dynamic shared memory, aligned to 128 bytes.
  static constexpr int kSharedBytes = Shape::kStages * (kM + kNumB * kN) * 128;

  // a_row(m) -> const T*, for 0 <= m < kM: row m of the tile, null for a row of
  // zeros. b[i]: the tile's first row of matrix i; rows from b_rows on are
  // taken as zeros. epilogue(m, n, const float (&c)[kNumB][kCols]) is called by
  // all threads for all of the tile, so it has to skip rows and columns that do
  // not exist. depth >= 0.
  //
  // before_a() is called once, when the first loads of B are under way and A
  // has not been touched: the place to wait for the kernel that writes A.
  //
  // All threads of the block take part. To run another tile in the same shared
  // memory, call __syncthreads() first.
  template <class ARow, class Epilogue, class BeforeA>
  static __device__ __forceinline__ void Run(char* shared, const ARow& a_row,
                                             const T* const (&b)[kNumB],
                                             const int64_t (&b_stride)[kNumB],
                                             int64_t b_rows, int depth,
                                             const Epilogue& epilogue,
                                             const BeforeA& before_a) {
    static_assert(!kFp8, "fp8 has scales");
    Accumulators acc = {};
    const Reader reader(SharedAddress(shared));
    ForEachStep(shared, a_row, b, b_stride, b_rows, depth, before_a,
                [&](int, int stage) { reader.MultiplyAdd(stage, acc); });
    reader.Finish(acc, epilogue);
  }

  // The same of fp8, whose products of 128 of the depth, block k, are summed on
  // their own and multiplied by a_scale(m, k) * b_scale(i, k), i the matrix.
  // The sum of blocks is in ascending order.
  template <class ARow, class AScale, class BScale, class Epilogue,
            class BeforeA>
  static __device__ __forceinline__ void RunScaled(
      char* shared, const ARow& a_row, const T* const (&b)[kNumB],
      const int64_t (&b_stride)[kNumB], int64_t b_rows, int depth,
      const AScale& a_scale, const BScale& b_scale, const Epilogue& epilogue,
      const BeforeA& before_a) {
    static_assert(kFp8, "others have no scales");
    Accumulators acc = {};
    const Reader reader(SharedAddress(shared));
    ForEachStep(shared, a_row, b, b_stride, b_rows, depth, before_a,
                [&](int step, int stage) {
                  float scale_a[kTilesM][2];
                  float scale_b[kNumB];
                  reader.LoadScales(step, a_scale, b_scale, scale_a, scale_b);
                  Accumulators sums = {};
                  reader.MultiplyAdd(stage, sums);
                  AddScaled(sums, scale_a, scale_b, acc);
                });
    reader.Finish(acc, epilogue);
  }

  // Run with one stride for all matrices, and nothing to wait for.
  template <class ARow, class Epilogue>
  static __device__ __forceinline__ void Run(char* shared, const ARow& a_row,
                                             const T* const (&b)[kNumB],
                                             int64_t b_stride, int64_t b_rows,
                                             int depth,
                                             const Epilogue& epilogue) {
    int64_t b_strides[kNumB];
#pragma unroll
    for (int i = 0; i < kNumB; ++i) b_strides[i] = b_stride;
    Run(shared, a_row, b, b_strides, b_rows, depth, epilogue, [] {});
  }

 private:
  // Calls multiply(step, stage) for all steps of depth, in order.
  template <class ARow, class BeforeA, class Multiply>
  static __device__ __forceinline__ void ForEachStep(
      char* shared, const ARow& a_row, const T* const (&b)[kNumB],
      const int64_t (&b_stride)[kNumB], int64_t b_rows, int depth,
      const BeforeA& before_a, const Multiply& multiply) {
    const Loader loader(SharedAddress(shared), a_row, b, b_stride, b_rows,
                        depth);
    const int num_steps = CeilDiv(depth, kDepth);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < num_steps) loader.LoadB(s, s);
    }
    before_a();
    // The first group has all of B's stages so far.
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < num_steps) loader.LoadA(s, s);
      CommitCopies();
    }
    int stage = 0;
    int load_stage = kStages - 1;
    for (int step = 0; step < num_steps; ++step) {
      WaitForCopies<kStages - 2>();
      // Also: every warp is done reading the stage that is loaded next.
      __syncthreads();
      if (step + kStages - 1 < num_steps) {
        loader.LoadA(step + kStages - 1, load_stage);
        loader.LoadB(step + kStages - 1, load_stage);
      }
      CommitCopies();
      multiply(step, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
  }

  static constexpr int kStages = Shape::kStages;
  // A stage holds a row of 128 bytes for every row of A, then of each B. A row
  // is 8 chunks of 16 bytes, stored at chunk ^ Swizzle(row) so that the 8
  // chunks that are read together lie in different banks.
  static constexpr int kRowBytes = 128;
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kDepth = kRowBytes / sizeof(T);
  static constexpr bool kFp8 = std::is_same_v<T, __nv_fp8_e4m3>;
  static_assert(!kFp8 || kDepth == 128, "a step has one scale of a row");
  static constexpr int kStageBytes = (kM + kNumB * kN) * kRowBytes;
  static constexpr int kWarpM = kM / Shape::kWarpsM;
  static constexpr int kWarpN = kN / Shape::kWarpsN;
  static constexpr int kTilesM = kWarpM / 16;  // mma tiles of a warp
  static constexpr int kTilesN = kWarpN / 8;
  static constexpr int kLoadRows = kThreads / 8;  // rows loaded at once
  static_assert(kWarpM % 16 == 0 && kM % kWarpM == 0, "whole mma tiles");
  static_assert(kWarpN == 16 || kWarpN == 32 || kWarpN == 64,
                "columns of a warp");
  static_assert(kM % kLoadRows == 0 || kM < kLoadRows, "whole load rounds");
  static_assert(kN % kLoadRows == 0 || kN < kLoadRows, "whole load rounds");
  static_assert(kStages >= 2, "a stage to read and one to load");

  // acc[i][m][n][..] of an mma tile: rows g and g + 8 for lane / 4 == g, two
  // columns each.
  using Accumulators = float[kNumB][kTilesM][kTilesN][4];

  // Fused, so that other shapes have the same bits.
  static __device__ __forceinline__ void AddScaled(
      const Accumulators& sums, const float (&scale_a)[kTilesM][2],
      const float (&scale_b)[kNumB], Accumulators& acc) {
#pragma unroll
    for (int q = 0; q < kNumB; ++q) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            acc[q][i][j][c] =
                fmaf(sums[q][i][j][c], scale_a[i][c / 2] * scale_b[q],
                     acc[q][i][j][c]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ int SwizzleA(int row) { return row & 7; }
  // Column c of mma tile n is row (c / 2) * kCols + 2 * n + c % 2 of a warp's
  // part of B, which gives a lane kCols consecutive columns of C. The rows of
  // one mma tile get the 8 values in turn.
  static __device__ __forceinline__ int SwizzleB(int row) {
    return (row / kCols & 3) * 2 + (row & 1);
  }

  // Copies tiles from global memory. A thread always loads the same chunk of
  // the same rows.
  class Loader {
   public:
    template <class ARow>
    __device__ __forceinline__ Loader(uint32_t shared, const ARow& a_row,
                                      const T* const (&b)[kNumB],
                                      const int64_t (&b_stride)[kNumB],
                                      int64_t b_rows, int depth)
        : depth_(depth), chunk_(threadIdx.x % 8) {
      const int row = threadIdx.x / 8;
      a_to_ = shared + row * kRowBytes + (chunk_ ^ SwizzleA(row)) * 16;
      b_to_ = shared + (kM + row) * kRowBytes;
#pragma unroll
      for (int i = 0; i < kRoundsA; ++i) {
        const int m = row + i * kLoadRows;
        a_[i] = m < kM ? a_row(m) : nullptr;
      }
#pragma unroll
      for (int q = 0; q < kNumB; ++q) {
#pragma unroll
        for (int i = 0; i < kRoundsB; ++i) {
          const int n = row + i * kLoadRows;
          b_[q][i] = n < kN && n < b_rows ? b[q] + n * b_stride[q] : nullptr;
        }
      }
    }

    // Depth step `step` into stage `stage`.
    __device__ __forceinline__ void LoadA(int step, int stage) const {
      const int k = step * kDepth + chunk_ * kPerChunk;
      const uint32_t to = a_to_ + stage * kStageBytes;
#pragma unroll
      for (int i = 0; i < kRoundsA; ++i) {
        if (kM < kLoadRows && threadIdx.x / 8 >= kM) continue;
        // kLoadRows is a multiple of 8 or all of kM: the swizzle stays.
        LoadChunk(to + i * kLoadRows * kRowBytes, a_[i], k);
      }
    }
    __device__ __forceinline__ void LoadB(int step, int stage) const {
      const int k = step * kDepth + chunk_ * kPerChunk;
      const uint32_t to_stage = b_to_ + stage * kStageBytes;
#pragma unroll
      for (int i = 0; i < kRoundsB; ++i) {
        const int n = threadIdx.x / 8 + i * kLoadRows;
        if (kN < kLoadRows && n >= kN) continue;
        const uint32_t to =
            to_stage + i * kLoadRows * kRowBytes + (chunk_ ^ SwizzleB(n)) * 16;
#pragma unroll
        for (int q = 0; q < kNumB; ++q) {
          LoadChunk(to + q * kN * kRowBytes, b_[q][i], k);
        }
      }
    }

   private:
    static constexpr int kRoundsA = CeilDiv(kM, kLoadRows);
    static constexpr int kRoundsB = CeilDiv(kN, kLoadRows);

    __device__ __forceinline__ void LoadChunk(uint32_t to, const T* row,
                                              int k) const {
      if constexpr (kAligned) {
        CopyOrZero16(to, row + k, row != nullptr && k < depth_);
      } else {
        Vec<T, kPerChunk> v;
        memset(&v, 0, sizeof(v));
#pragma unroll
        for (int i = 0; i < kPerChunk; ++i) {
          if (row != nullptr && k + i < depth_) v.v[i] = row[k + i];
        }
        uint4 bits;
        memcpy(&bits, &v, sizeof(bits));
        gemm_internal::Store16(to, bits);
      }
    }

    const T* a_[kRoundsA];
    const T* b_[kNumB][kRoundsB];
    uint32_t a_to_;
    uint32_t b_to_;
    int depth_;
    int chunk_;
  };

  // Multiplies tiles out of shared memory.
  class Reader {
   public:
    __device__ __forceinline__ explicit Reader(uint32_t shared) {
      const int warp = threadIdx.x / 32;
      const int lane = threadIdx.x % 32;
      m_ = warp / Shape::kWarpsN * kWarpM + lane / 4;
      n_ = warp % Shape::kWarpsN * kWarpN + lane % 4 * kCols;
      int a_row = m_, a_chunk = 0, b_row = n_, b_chunk = 0;
      if constexpr (!kFloat) {
        // The lane's part in LoadMatrices. A: rows 0-7, 8-15 of the first 8
        // elements, then of the next 8.
        a_row = warp / Shape::kWarpsN * kWarpM + lane % 16;
        a_chunk = lane / 16;
        // B: the two chunks of one mma tile, then of the next.
        b_row = warp % Shape::kWarpsN * kWarpN + lane % 8 / 2 * kCols +
                lane / 16 * 2 + lane % 2;
        b_chunk = lane / 8 % 2;
      }
      a_ = shared + a_row * kRowBytes + (a_chunk ^ SwizzleA(a_row)) * 16;
      b_ = shared + (kM + b_row) * kRowBytes + (b_chunk ^ SwizzleB(b_row)) * 16;
    }

    __device__ __forceinline__ void MultiplyAdd(int stage,
                                                Accumulators& acc) const {
      const uint32_t a = a_ + stage * kStageBytes;
      const uint32_t b = b_ + stage * kStageBytes;
      if constexpr (kFloat) {
        MultiplyAddFloat(a, b, acc);
      } else if constexpr (kFp8) {
        MultiplyAddFp8(a, b, acc);
      } else {
        MultiplyAddMma(a, b, acc);
      }
    }

    template <class Epilogue>
    __device__ __forceinline__ void Finish(const Accumulators& acc,
                                           const Epilogue& epilogue) const {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float c[kNumB][kCols];
#pragma unroll
          for (int q = 0; q < kNumB; ++q) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
              c[q][2 * j] = acc[q][i][j][2 * half];
              c[q][2 * j + 1] = acc[q][i][j][2 * half + 1];
            }
          }
          epilogue(m_ + 16 * i + 8 * half, n_, c);
        }
      }
    }

    // The lane's rows of A and all matrices.
    template <class AScale, class BScale>
    __device__ __forceinline__ void LoadScales(int step, const AScale& a_scale,
                                               const BScale& b_scale,
                                               float (&scale_a)[kTilesM][2],
                                               float (&scale_b)[kNumB]) const {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scale_a[i][half] = a_scale(m_ + 16 * i + 8 * half, step);
        }
      }
#pragma unroll
      for (int q = 0; q < kNumB; ++q) scale_b[q] = b_scale(q, step);
    }

   private:
    static constexpr bool kFloat = std::is_same_v<T, float>;

    // Rows are 128-byte aligned, so the chunk of a step is one xor away.
    static __device__ __forceinline__ void MultiplyAddMma(uint32_t a_from,
                                                          uint32_t b_from,
                                                          Accumulators& acc) {
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t a[kTilesM][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          LoadMatrices(a[i], (a_from ^ (k * 32)) + i * 16 * kRowBytes);
        }
#pragma unroll
        for (int q = 0; q < kNumB; ++q) {
#pragma unroll
          for (int j = 0; j < kTilesN; j += 2) {
            uint32_t b[4];
            LoadMatrices(b, (b_from ^ (k * 32)) + (q * kN + 2 * j) * kRowBytes);
#pragma unroll
            for (int i = 0; i < kTilesM; ++i) {
              Mma<T>(acc[q][i][j], a[i], b[0], b[1]);
              Mma<T>(acc[q][i][j + 1], a[i], b[2], b[3]);
            }
          }
        }
      }
    }

    // A lane's part of a chunk of 16 bytes is 4 bytes, which become two pairs
    // of halves. Any place among the products of an mma will do for them, as
    // long as A and B agree.
    static __device__ __forceinline__ void MultiplyAddFp8(uint32_t a_from,
                                                          uint32_t b_from,
                                                          Accumulators& acc) {
#pragma unroll
      for (int k = 0; k < kDepth / 32; ++k) {
        uint32_t a[kTilesM][4][2];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          uint32_t bytes[4];
          LoadMatrices(bytes, (a_from ^ (k * 32)) + i * 16 * kRowBytes);
#pragma unroll
          for (int r = 0; r < 4; ++r) Fp8x4ToHalf(bytes[r], a[i][r]);
        }
#pragma unroll
        for (int q = 0; q < kNumB; ++q) {
#pragma unroll
          for (int j = 0; j < kTilesN; j += 2) {
            uint32_t bytes[4];
            LoadMatrices(bytes,
                         (b_from ^ (k * 32)) + (q * kN + 2 * j) * kRowBytes);
#pragma unroll
            for (int r = 0; r < 4; ++r) {  // chunk r % 2 of mma tile j + r / 2
              uint32_t b[2];
              Fp8x4ToHalf(bytes[r], b);
#pragma unroll
              for (int i = 0; i < kTilesM; ++i) {
                const uint32_t(&low)[2] = a[i][r % 2 * 2];
                const uint32_t(&high)[2] = a[i][r % 2 * 2 + 1];
                Mma<__half>(acc[q][i][j + r / 2],
                            {low[0], high[0], low[1], high[1]}, b[0], b[1]);
              }
            }
          }
        }
      }
    }

    // The same elements for each lane as with mma.
    static __device__ __forceinline__ void MultiplyAddFloat(uint32_t a_from,
                                                            uint32_t b_from,
                                                            Accumulators& acc) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float4 a[2 * kTilesM];
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          a[i] = gemm_internal::LoadFloat4((a_from ^ (k * 16)) +
                                           i * 8 * kRowBytes);
        }
#pragma unroll
        for (int q = 0; q < kNumB; ++q) {
#pragma unroll
          for (int j = 0; j < kCols; ++j) {
            // Odd rows differ from even ones in the swizzle's lowest bit.
            const float4 b = gemm_internal::LoadFloat4(
                (b_from ^ ((k ^ (j & 1)) * 16)) + (q * kN + j) * kRowBytes);
#pragma unroll
            for (int i = 0; i < 2 * kTilesM; ++i) {
              float& c = acc[q][i / 2][j / 2][i % 2 * 2 + j % 2];
              c = fmaf(a[i].x, b.x, c);
              c = fmaf(a[i].y, b.y, c);
              c = fmaf(a[i].z, b.z, c);
              c = fmaf(a[i].w, b.w, c);
            }
          }
        }
      }
    }

    uint32_t a_;
    uint32_t b_;
    int m_;  // the lane's first element of C
    int n_;
  };
};

// Rounds values to Out and stores those whose column exists: row[n + i] for
// n + i < cols. `aligned`: rows are aligned to 16 bytes.
template <class Out, int kCount>
__device__ __forceinline__ void StoreColumns(Out* row, int64_t n, int64_t cols,
                                             const float (&values)[kCount],
                                             bool aligned) {
  constexpr int kVec =
      kCount * sizeof(Out) > 16 ? 16 / static_cast<int>(sizeof(Out)) : kCount;
  if (aligned && n + kCount <= cols) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVec) {
      Vec<Out, kVec> v;
#pragma unroll
      for (int j = 0; j < kVec; ++j) v.v[j] = FromFloat<Out>(values[i + j]);
      *reinterpret_cast<Vec<Out, kVec>*>(row + n + i) = v;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (n + i < cols) row[n + i] = FromFloat<Out>(values[i]);
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_GEMM_TILE_CUDA_CUH_
