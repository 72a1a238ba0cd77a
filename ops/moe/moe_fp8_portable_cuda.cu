#include "ops/core/gemm_tile_cuda.cuh"
#include "ops/moe/moe_gemm_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// The expert matrix products of fp8 for every GPU from sm_80 on: fp8 becomes
// float16, exactly, for mma.sync. Hopper has faster kernels for most shapes.

namespace tenon {
namespace {

using cuda::CeilDiv;
using cuda::GemmTile;
using cuda::GemmTileShape;

// The scales of one expert's matrix, for a tile of columns of the product that
// start at `col`, all in one row of blocks.
struct TileScales {
  __device__ TileScales(const ExpertMatrices& m, int expert, int64_t col)
      : data_(m.scales.data + expert * m.scales.expert_stride),
        row_stride_(m.scales.row_stride),
        of_rows_(m.scales.block_rows == 1) {
    data_ += (of_rows_ ? col : col / kFp8Block) * row_stride_;
  }

  __device__ float Block(int k) const { return of_rows_ ? 1.0f : data_[k]; }
  // Of column col + n, which exists.
  __device__ float Column(int n) const {
    return of_rows_ ? data_[n * row_stride_] : 1.0f;
  }

 private:
  const float* data_;
  int64_t row_stride_;
  bool of_rows_;
};

// ---------------------------------------------------------------------------
// hidden[slot] = silu(x[token] * gate^T) * (x[token] * up^T), quantised
// ---------------------------------------------------------------------------

// The tile's part of hidden in shared memory, where a row is one group.
constexpr int kGroupStride = kFp8GroupSize + 4;  // fewer bank conflicts

// A warp to a row: quantises kFp8GroupSize columns from `col` on.
template <int kRows>
__device__ __forceinline__ void QuantizeTile(const MoeFp8GateUp& g,
                                             const MoeTile<kRows>& tile,
                                             const float* values, int64_t col) {
  const int64_t cols = g.gate.rows;
  const int lane = threadIdx.x % 32;
  for (int m = threadIdx.x / 32; m < kRows; m += blockDim.x / 32) {
    const int64_t slot = tile.slots[m];
    if (slot < 0) continue;  // all lanes
    const float4 v =
        *reinterpret_cast<const float4*>(values + m * kGroupStride + 4 * lane);
    const float row[4] = {v.x, v.y, v.z, v.w};
    const Fp8Scale scale = Fp8ScaleOf(cuda::WarpMax(cuda::MaxMagnitude(row)));
    const uint32_t q =
        cuda::ToFp8x4(row[0] * scale.inverse, row[1] * scale.inverse,
                      row[2] * scale.inverse, row[3] * scale.inverse);
    const int64_t first = col + 4 * lane;
    uint8_t* const to = static_cast<uint8_t*>(g.hidden) + slot * cols + first;
    if (cols % 4 == 0) {
      if (first < cols) *reinterpret_cast<uint32_t*>(to) = q;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < cols) to[i] = static_cast<uint8_t>(q >> 8 * i);
      }
    }
    if (lane == 0) {
      g.hidden_scales[slot * NumFp8Groups(cols) + col / kFp8GroupSize] =
          scale.scale;
    }
  }
}

template <class Shape, bool kAligned>
__global__ void __launch_bounds__(
    GemmTile<__nv_fp8_e4m3, Shape, kAligned>::kThreads)
    Fp8GateUpKernel(const MoeFp8GateUp g) {
  using T = __nv_fp8_e4m3;
  using Tile = GemmTile<T, Shape, kAligned>;
  static_assert(Shape::kN == kFp8GroupSize && Shape::kNumB == 2,
                "a tile has one group of hidden");
  static_assert(Tile::kSharedBytes >= Shape::kM * kGroupStride * 4,
                "hidden takes the place of the operands");
  extern __shared__ __align__(128) char shared[];
  __shared__ MoeTile<Shape::kM> tile;
  cuda::WaitForPreviousKernels();
  const int64_t cols = g.gate.rows;
  const int col_tiles = static_cast<int>(CeilDiv(cols, int64_t{Shape::kN}));
  FindTile(g.source, blockIdx.x / col_tiles, &tile);
  if (tile.expert < 0) return;

  const int64_t col = blockIdx.x % col_tiles * int64_t{Shape::kN};
  const int64_t depth = g.gate.cols;
  const int64_t groups = NumFp8Groups(depth);
  const T* const b[2] = {
      static_cast<const T*>(g.gate.data) + tile.expert * g.gate.expert_stride +
          col * g.gate.row_stride,
      static_cast<const T*>(g.up.data) + tile.expert * g.up.expert_stride +
          col * g.up.row_stride};
  const int64_t b_stride[2] = {g.gate.row_stride, g.up.row_stride};
  const TileScales gate_scales(g.gate, tile.expert, col);
  const TileScales up_scales(g.up, tile.expert, col);
  float* const values = reinterpret_cast<float*>(shared);
  bool operands_read = false;
  Tile::RunScaled(
      shared,
      [&](int m) -> const T* {
        const int slot = tile.slots[m];
        return slot < 0 ? nullptr
                        : static_cast<const T*>(g.x) + slot / g.top_k * depth;
      },
      b, b_stride, cols - col, static_cast<int>(depth),
      [&](int m, int k) {
        const int slot = tile.slots[m];
        return slot < 0 ? 0.0f : g.x_scales[slot / g.top_k * groups + k];
      },
      [&](int i, int k) {
        return i == 0 ? gate_scales.Block(k) : up_scales.Block(k);
      },
      [&](int m, int n, const float(&c)[2][Tile::kCols]) {
        if (!operands_read) __syncthreads();  // by all warps
        operands_read = true;
#pragma unroll
        for (int i = 0; i < Tile::kCols; ++i) {
          float v = 0.0f;
          if (col + n + i < cols) {
            const float gate = c[0][i] * gate_scales.Column(n + i);
            const float up = c[1][i] * up_scales.Column(n + i);
            v = gate / (1.0f + expf(-gate)) * up;
          }
          values[m * kGroupStride + n + i] = v;
        }
      },
      [] {});
  __syncthreads();
  QuantizeTile(g, tile, values, col);
}

template <class Shape, bool kAligned>
Status LaunchGateUpShape(const char* op, const MoeFp8GateUp& g, Stream stream) {
  using Tile = GemmTile<__nv_fp8_e4m3, Shape, kAligned>;
  dim3 grid;
  TENON_RETURN_IF_ERROR(
      MoeGrid(op, g.source.num_tiles, g.gate.rows, Shape::kN, &grid));
  return cuda::LaunchDependent(op, stream, grid, dim3(Tile::kThreads),
                               Tile::kSharedBytes,
                               Fp8GateUpKernel<Shape, kAligned>, g);
}

// ---------------------------------------------------------------------------
// out[slot] = (x * weights^T + bias) * routing
// ---------------------------------------------------------------------------

// Writes one row's columns n to n + kCols of the tile.
template <class T, int kCols>
__device__ __forceinline__ void FinishColumns(const MoeGroupedGemm& g,
                                              int expert, int slot, int64_t n,
                                              const float (&sums)[kCols],
                                              bool out_aligned) {
  const int64_t cols = g.weights.rows;
  const float weight = g.routing.data != nullptr ? g.routing[slot] : 1.0f;
  float v[kCols];
#pragma unroll
  for (int i = 0; i < kCols; ++i) {
    v[i] = sums[i];
    if (g.bias.present() && n + i < cols) {
      v[i] += cuda::ToFloat(
          g.bias.As<const T>()[expert * g.bias.stride[0] + n + i]);
    }
    v[i] *= weight;
  }
  cuda::StoreColumns(g.out.As<T>() + slot * g.out.stride[0], n, cols, v,
                     out_aligned);
}

template <class Shape, bool kAligned>
__global__ void __launch_bounds__(
    GemmTile<__nv_fp8_e4m3, Shape, kAligned>::kThreads)
    Fp8GroupedGemmKernel(const MoeGroupedGemm g, bool out_aligned) {
  using T = __nv_fp8_e4m3;
  using Tile = GemmTile<T, Shape, kAligned>;
  static_assert(kFp8Block % Shape::kN == 0, "within one row of blocks");
  extern __shared__ __align__(128) char shared[];
  __shared__ MoeTile<Shape::kM> tile;
  const ExpertMatrices& w = g.weights;
  const int col_tiles = static_cast<int>(CeilDiv(w.rows, int64_t{Shape::kN}));
  FindTile(g.source, blockIdx.x / col_tiles, &tile);
  if (tile.expert < 0) return cuda::WaitForPreviousKernels();

  const int64_t col = blockIdx.x % col_tiles * int64_t{Shape::kN};
  const int64_t groups = NumFp8Groups(w.cols);
  const T* const b[1] = {static_cast<const T*>(w.data) +
                         tile.expert * w.expert_stride + col * w.row_stride};
  const TileScales scales(w, tile.expert, col);
  Tile::RunScaled(
      shared,
      [&](int m) -> const T* {
        const int slot = tile.slots[m];
        return slot < 0
                   ? nullptr
                   : g.x.As<const T>() + slot / g.slots_per_row * g.x.stride[0];
      },
      b, {w.row_stride}, w.rows - col, static_cast<int>(w.cols),
      [&](int m, int k) {
        const int slot = tile.slots[m];
        return slot < 0 ? 0.0f
                        : g.x_scales[slot / g.slots_per_row * groups + k];
      },
      [&](int, int k) { return scales.Block(k); },
      [&](int m, int n, const float(&c)[1][Tile::kCols]) {
        const int slot = tile.slots[m];
        if (slot < 0) return;
        float v[Tile::kCols];
#pragma unroll
        for (int i = 0; i < Tile::kCols; ++i) {
          v[i] = col + n + i < w.rows ? c[0][i] * scales.Column(n + i) : 0.0f;
        }
        switch (g.out.dtype) {
          case DType::kFloat32:
            return FinishColumns<float>(g, tile.expert, slot, col + n, v,
                                        out_aligned);
          case DType::kFloat16:
            return FinishColumns<__half>(g, tile.expert, slot, col + n, v,
                                         out_aligned);
          default:
            return FinishColumns<__nv_bfloat16>(g, tile.expert, slot, col + n,
                                                v, out_aligned);
        }
      },
      [] { cuda::WaitForPreviousKernels(); });
}

template <class Shape, bool kAligned>
Status LaunchGroupedShape(const char* op, const MoeGroupedGemm& g,
                          Stream stream) {
  using Tile = GemmTile<__nv_fp8_e4m3, Shape, kAligned>;
  dim3 grid;
  TENON_RETURN_IF_ERROR(
      MoeGrid(op, g.source.num_tiles, g.weights.rows, Shape::kN, &grid));
  const bool out_aligned = cuda::RowsAreAligned(g.out, 16);
  auto* const kernel = Fp8GroupedGemmKernel<Shape, kAligned>;
  const dim3 block(Tile::kThreads);
  return g.dependent
             ? cuda::LaunchDependent(op, stream, grid, block,
                                     Tile::kSharedBytes, kernel, g, out_aligned)
             : cuda::Launch(op, stream, grid, block, Tile::kSharedBytes, kernel,
                            g, out_aligned);
}

}  // namespace

// Stages as many as fit the 99 KiB of the smaller GPUs.
Status LaunchMoeFp8GateUp(const char* op, const MoeFp8GateUp& gate_up,
                          int32_t tile_rows, bool aligned, Stream stream) {
  using Low = GemmTileShape<16, 128, 1, 8, 2, 2>;
  using Tall = GemmTileShape<64, 128, 2, 4, 2, 2>;
  if (!aligned) return LaunchGateUpShape<Tall, false>(op, gate_up, stream);
  return tile_rows == 16 ? LaunchGateUpShape<Low, true>(op, gate_up, stream)
                         : LaunchGateUpShape<Tall, true>(op, gate_up, stream);
}

Status LaunchMoeFp8GroupedGemm(const char* op, const MoeGroupedGemm& gemm,
                               int32_t tile_rows, bool aligned, Stream stream) {
  using Low = GemmTileShape<16, 64, 1, 4, 6>;
  using Tall = GemmTileShape<64, 128, 2, 4, 4>;
  if (!aligned) return LaunchGroupedShape<Tall, false>(op, gemm, stream);
  return tile_rows == 16 ? LaunchGroupedShape<Low, true>(op, gemm, stream)
                         : LaunchGroupedShape<Tall, true>(op, gemm, stream);
}

}  // namespace tenon
