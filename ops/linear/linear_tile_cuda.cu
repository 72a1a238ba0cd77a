#include "ops/core/core_cuda.cuh"
#include "ops/core/gemm_tile_cuda.cuh"
#include "ops/linear/linear_backend.h"

namespace tenon {
namespace {

using cuda::CeilDiv;
using cuda::GemmTile;
using cuda::GemmTileShape;

// Few tokens: narrow tiles, so that there are many, with deep pipelines.
using SmallShape = GemmTileShape<16, 32, 1, 2, 8>;
using MediumShape = GemmTileShape<64, 64, 2, 2, 4>;
using LargeShape = GemmTileShape<128, 128, 2, 4, 3>;

// Tiles run in groups of this many rows of tiles, column by column, so that
// those under way at one time share most of their x and weight in L2.
constexpr int64_t kGroupRows = 8;

struct TilePosition {
  int64_t row, col;
};

__device__ __forceinline__ TilePosition PlaceTile(int64_t tile,
                                                  int64_t tile_rows,
                                                  int64_t tile_cols) {
  const int64_t per_group = kGroupRows * tile_cols;
  const int64_t first = tile / per_group * kGroupRows;
  const int64_t rows = min(tile_rows - first, kGroupRows);
  const int64_t within = tile % per_group;
  return {first + within % rows, within / rows};
}

template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(GemmTile<T, Shape, kAligned>::kThreads)
    TileKernel(LinearParams p, bool out_aligned) {
  using Tile = GemmTile<T, Shape, kAligned>;
  extern __shared__ __align__(128) char shared[];
  cuda::WaitForPreviousKernels();
  const int64_t tokens = p.x.shape[0];
  const int64_t out_features = p.weight.shape[0];
  const TilePosition at =
      PlaceTile(blockIdx.x, CeilDiv(tokens, int64_t{Shape::kM}),
                CeilDiv(out_features, int64_t{Shape::kN}));
  const int64_t first_row = at.row * Shape::kM;
  const int64_t first_col = at.col * Shape::kN;
  const T* const weight[] = {p.weight.As<const T>() +
                             first_col * p.weight.stride[0]};
  const T* const bias = p.bias.present() ? p.bias.As<const T>() : nullptr;
  Tile::Run(
      shared,
      [&](int m) -> const T* {
        const int64_t row = first_row + m;
        return row < tokens ? p.x.As<const T>() + row * p.x.stride[0] : nullptr;
      },
      weight, p.weight.stride[0], out_features - first_col,
      static_cast<int>(p.x.shape[1]),
      [&](int m, int n, const float(&c)[1][Tile::kCols]) {
        const int64_t row = first_row + m;
        const int64_t col = first_col + n;
        if (row >= tokens || col >= out_features) return;
        float values[Tile::kCols];
#pragma unroll
        for (int i = 0; i < Tile::kCols; ++i) {
          values[i] = c[0][i];
          if (bias != nullptr && col + i < out_features) {
            values[i] += cuda::ToFloat(bias[col + i]);
          }
        }
        const int64_t offset = row * p.out.stride[0];
        if (p.out.dtype == DType::kFloat32) {
          cuda::StoreColumns(p.out.As<float>() + offset, col, out_features,
                             values, out_aligned);
        } else {
          cuda::StoreColumns(p.out.As<T>() + offset, col, out_features, values,
                             out_aligned);
        }
      });
}

template <class T, class Shape, bool kAligned>
Status LaunchTile(const LinearParams& p, Stream stream) {
  using Tile = GemmTile<T, Shape, kAligned>;
  const int64_t tiles = CeilDiv(p.x.shape[0], int64_t{Shape::kM}) *
                        CeilDiv(p.weight.shape[0], int64_t{Shape::kN});
  return cuda::LaunchDependent(
      "Linear", stream, dim3(static_cast<unsigned>(tiles)),
      dim3(Tile::kThreads), Tile::kSharedBytes, TileKernel<T, Shape, kAligned>,
      p, cuda::RowsAreAligned(p.out, 16));
}

template <class T>
Status LaunchTile(const LinearParams& p, LinearKernel kernel, bool rows_aligned,
                  Stream stream) {
  if (!rows_aligned) return LaunchTile<T, MediumShape, false>(p, stream);
  switch (kernel) {
    case LinearKernel::kSmallTile:
      return LaunchTile<T, SmallShape, true>(p, stream);
    case LinearKernel::kMediumTile:
      return LaunchTile<T, MediumShape, true>(p, stream);
    default:
      return LaunchTile<T, LargeShape, true>(p, stream);
  }
}

}  // namespace

Status LinearTile(const LinearParams& p, LinearKernel kernel, bool rows_aligned,
                  Stream stream) {
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return LaunchTile<decltype(zero)>(p, kernel, rows_aligned, stream);
  });
}

}  // namespace tenon
