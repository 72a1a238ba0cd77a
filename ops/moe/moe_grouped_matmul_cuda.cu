#include <algorithm>
#include <limits>

#include "ops/core/gemm_tile_cuda.cuh"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_gemm_cuda.cuh"
#include "ops/moe/moe_grouped_matmul_backend.h"
#include "ops/moe/moe_tile_rows.h"
#include "ops/quantize/quantize_cuda.cuh"

namespace tenon {
namespace {

using cuda::CeilDiv;
using cuda::GemmTile;
using cuda::GemmTileShape;
using cuda::Vec;

constexpr int kMaxExperts = 1024;
constexpr int kScheduleThreads = 1024;

// ---------------------------------------------------------------------------
// Schedule
// ---------------------------------------------------------------------------

// Block 0 writes the tiles, `tile_rows` rows each. All blocks set `out` to zero
// where slots were skipped: which ones is known only from the others, and the
// rows of those are written later.
template <class T, int kVec>
__global__ void __launch_bounds__(kScheduleThreads)
    ScheduleKernel(TensorView expert_offsets, int tile_rows, int32_t* tiles,
                   int64_t num_tiles, TensorView out) {
  __shared__ int first_tile[kMaxExperts + 1];
  const int num_experts = static_cast<int>(expert_offsets.shape[0]) - 1;
  const int32_t* offsets = expert_offsets.As<const int32_t>();

  if (offsets[num_experts] < out.shape[0]) {
    const int64_t per_row = out.shape[1] / kVec;
    const int64_t count = out.shape[0] * per_row;
    for (int64_t i = blockIdx.x * int64_t{kScheduleThreads} + threadIdx.x;
         i < count; i += gridDim.x * int64_t{kScheduleThreads}) {
      auto* row = reinterpret_cast<Vec<T, kVec>*>(out.As<T>() +
                                                  i / per_row * out.stride[0]);
      Vec<T, kVec> zero;
#pragma unroll
      for (int j = 0; j < kVec; ++j) zero.v[j] = cuda::FromFloat<T>(0.0f);
      row[i % per_row] = zero;
    }
  }
  if (blockIdx.x != 0) return;

  // Inclusive sum of the experts' tiles, doubling the distance. Offsets that
  // are out of range make wrong tiles, of which FindTile leaves out the rows
  // that do not exist.
  const int e = threadIdx.x;
  int sum = 0;
  if (e < num_experts) {
    const int64_t slots = int64_t{offsets[e + 1]} - offsets[e];
    const int64_t limit = out.shape[0];
    sum = static_cast<int>(CeilDiv(slots < 0       ? 0
                                   : slots > limit ? limit
                                                   : slots,
                                   tile_rows));
  }
  first_tile[e + 1] = sum;
  if (e == 0) first_tile[0] = 0;
  __syncthreads();
  for (int distance = 1; distance < num_experts; distance *= 2) {
    const int before = e >= distance ? first_tile[e + 1 - distance] : 0;
    __syncthreads();
    sum += before;
    first_tile[e + 1] = sum;
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < num_tiles; i += kScheduleThreads) {
    int32_t* tile = tiles + 3 * i;
    if (i >= first_tile[num_experts]) {
      tile[0] = -1;
      tile[1] = tile[2] = 0;
      continue;
    }
    int expert = 0;  // the last one whose first tile is not after i
    for (int end = num_experts; end - expert > 1;) {
      const int middle = (expert + end) / 2;
      if (first_tile[middle] <= i) {
        expert = middle;
      } else {
        end = middle;
      }
    }
    const int index = static_cast<int>(i) - first_tile[expert];
    tile[0] = expert;
    tile[1] = index;
    tile[2] = offsets[expert] + index * tile_rows;
  }
}

template <class T>
Status LaunchSchedule(const MoeGroupedMatmulParams& p, int32_t tile_rows,
                      int32_t* tiles, int64_t num_tiles, Stream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = cuda::RowsAreWholeChunks(p.out);
  const int64_t vecs = NumElements(p.out) / (wide ? kWide : 1);
  constexpr int64_t kPerBlock = 8 * kScheduleThreads;
  const int64_t blocks = std::min<int64_t>(CeilDiv(vecs, kPerBlock), 1024);
  auto* const kernel = wide ? ScheduleKernel<T, kWide> : ScheduleKernel<T, 1>;
  return cuda::Launch("MoeGroupedMatmul", stream,
                      dim3(static_cast<unsigned>(blocks)),
                      dim3(kScheduleThreads), 0, kernel, p.expert_offsets,
                      tile_rows, tiles, num_tiles, p.out);
}

// ---------------------------------------------------------------------------
// Matrix product
// ---------------------------------------------------------------------------

// Blocks run through the column tiles of a row tile first, so that the rows of
// an expert that several tiles share its weights are in the L2 cache together.
template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(GemmTile<T, Shape, kAligned>::kThreads)
    GroupedGemmKernel(const MoeGroupedGemm g, bool out_aligned) {
  using Tile = GemmTile<T, Shape, kAligned>;
  extern __shared__ __align__(128) char shared[];
  __shared__ MoeTile<Shape::kM> tile;
  const ExpertMatrices& w = g.weights;
  const int col_tiles = static_cast<int>(CeilDiv(w.rows, int64_t{Shape::kN}));
  FindTile(g.source, blockIdx.x / col_tiles, &tile);
  if (tile.expert < 0) return cuda::WaitForPreviousKernels();

  const int64_t col = blockIdx.x % col_tiles * int64_t{Shape::kN};
  const T* const b[1] = {static_cast<const T*>(w.data) +
                         tile.expert * w.expert_stride + col * w.row_stride};
  const T* const bias =
      g.bias.present() ? g.bias.As<const T>() + tile.expert * g.bias.stride[0]
                       : nullptr;
  Tile::Run(
      shared,
      [&](int m) -> const T* {
        const int slot = tile.slots[m];
        return slot < 0
                   ? nullptr
                   : g.x.As<const T>() + slot / g.slots_per_row * g.x.stride[0];
      },
      b, {w.row_stride}, w.rows - col, static_cast<int>(w.cols),
      [&](int m, int n, const float(&c)[1][Tile::kCols]) {
        const int slot = tile.slots[m];
        if (slot < 0) return;
        const float weight = g.routing.data != nullptr ? g.routing[slot] : 1.0f;
        float v[Tile::kCols];
#pragma unroll
        for (int i = 0; i < Tile::kCols; ++i) {
          v[i] = c[0][i];
          if (bias != nullptr && col + n + i < w.rows) {
            v[i] += cuda::ToFloat(bias[col + n + i]);
          }
          v[i] *= weight;
        }
        cuda::StoreColumns(g.out.As<T>() + slot * g.out.stride[0], col + n,
                           w.rows, v, out_aligned);
      },
      [] { cuda::WaitForPreviousKernels(); });
}

template <class T, class Shape, bool kAligned>
Status LaunchShape(const char* op, const MoeGroupedGemm& g, Stream stream) {
  using Tile = GemmTile<T, Shape, kAligned>;
  dim3 grid;
  TENON_RETURN_IF_ERROR(
      MoeGrid(op, g.source.num_tiles, g.weights.rows, Shape::kN, &grid));
  const bool out_aligned = cuda::RowsAreAligned(g.out, 16);
  auto* const kernel = GroupedGemmKernel<T, Shape, kAligned>;
  const dim3 block(Tile::kThreads);
  return g.dependent
             ? cuda::LaunchDependent(op, stream, grid, block,
                                     Tile::kSharedBytes, kernel, g, out_aligned)
             : cuda::Launch(op, stream, grid, block, Tile::kSharedBytes, kernel,
                            g, out_aligned);
}

// The rows of a shape are those of MoeTileRows. Few rows: small blocks with
// many stages, to keep weights on their way from memory.
Status LaunchFloat(const char* op, const MoeGroupedGemm& g, int32_t tile_rows,
                   bool aligned, Stream stream) {
  using Low = GemmTileShape<16, 64, 1, 4, 4>;
  using Tall = GemmTileShape<64, 64, 2, 2, 3>;
  if (!aligned) return LaunchShape<float, Tall, false>(op, g, stream);
  return tile_rows == 16 ? LaunchShape<float, Low, true>(op, g, stream)
                         : LaunchShape<float, Tall, true>(op, g, stream);
}

template <class T>
Status LaunchHalf(const char* op, const MoeGroupedGemm& g, int32_t tile_rows,
                  bool aligned, Stream stream) {
  using Any = GemmTileShape<64, 64, 2, 2, 2>;
  using Low = GemmTileShape<16, 64, 1, 4, 6>;
  using Tall = GemmTileShape<64, 128, 2, 4, 4>;
  using Taller = GemmTileShape<128, 128, 2, 4, 3>;
  if (!aligned) return LaunchShape<T, Any, false>(op, g, stream);
  if (tile_rows == 16) return LaunchShape<T, Low, true>(op, g, stream);
  return tile_rows == 64 ? LaunchShape<T, Tall, true>(op, g, stream)
                         : LaunchShape<T, Taller, true>(op, g, stream);
}

template <class T>
Status Compute(const MoeGroupedMatmulParams& p,
               const MoeGroupedMatmulScratch& scratch, Stream stream) {
  const int64_t num_slots = p.sorted_slots.shape[0];
  const int64_t num_experts = p.weights.num_experts;
  TensorView x = p.x;
  if (IsFp8(p.weights)) {
    x = MakeTensor(scratch.x_fp8, DType::kFloat8E4M3, p.x.device,
                   {p.x.shape[0], p.x.shape[1]});
    const cuda::Fp8Groups groups = {x.As<uint8_t>(), x.stride[0],
                                    scratch.x_scales, NumFp8Groups(x.shape[1]),
                                    1};
    TENON_RETURN_IF_ERROR(
        cuda::LaunchQuantizeFp8Groups("MoeGroupedMatmul", p.x, groups, stream));
  }
  const bool aligned =
      MoeMatricesAreAligned(p.weights) && cuda::RowsAreWholeChunks(x);
  const int32_t tile_rows =
      MoeTileRows(x.dtype, aligned, num_slots, num_experts);

  MoeGroupedGemm gemm;
  gemm.source.tiles = scratch.tiles;
  gemm.source.expert_offsets = p.expert_offsets.As<const int32_t>();
  gemm.source.sorted_slots = p.sorted_slots.As<const int32_t>();
  gemm.source.num_slots = static_cast<int32_t>(num_slots);
  gemm.source.num_tiles =
      MoeMaxTiles(num_slots, static_cast<int32_t>(num_experts), tile_rows);
  gemm.x = x;
  gemm.x_scales = scratch.x_scales;
  gemm.slots_per_row = p.slots_per_row;
  gemm.weights = p.weights;
  gemm.bias = p.bias;
  if (p.routing_weights.present()) {
    gemm.routing = {p.routing_weights.As<const float>(), 1, 1};
  }
  gemm.out = p.out;
  TENON_RETURN_IF_ERROR(LaunchSchedule<T>(p, tile_rows, scratch.tiles,
                                          gemm.source.num_tiles, stream));
  return LaunchMoeGroupedGemm("MoeGroupedMatmul", gemm, tile_rows, aligned,
                              stream);
}

}  // namespace

bool MoeMatricesAreAligned(const ExpertMatrices& m) {
  const int64_t per_chunk = 16 / static_cast<int64_t>(DTypeSize(m.dtype));
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         m.cols % per_chunk == 0 && m.row_stride % per_chunk == 0 &&
         (m.num_experts == 1 || m.expert_stride % per_chunk == 0);
}

Status MoeGrid(const char* op, int64_t num_tiles, int64_t cols, int tile_cols,
               dim3* grid) {
  const int64_t blocks = num_tiles * CeilDiv(cols, int64_t{tile_cols});
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return InvalidArgumentError(op, ": the weights have ", cols,
                                " rows, too many for ", num_tiles,
                                " tiles of slots in one launch");
  }
  *grid = dim3(static_cast<unsigned>(blocks));
  return Status();
}

Status LaunchMoeGroupedGemm(const char* op, const MoeGroupedGemm& gemm,
                            int32_t tile_rows, bool aligned, Stream stream) {
  switch (gemm.x.dtype) {
    case DType::kFloat32:
      return LaunchFloat(op, gemm, tile_rows, aligned, stream);
    case DType::kFloat16:
      return LaunchHalf<__half>(op, gemm, tile_rows, aligned, stream);
    case DType::kFloat8E4M3:
      return LaunchMoeFp8GroupedGemm(op, gemm, tile_rows, aligned, stream);
    default:
      return LaunchHalf<__nv_bfloat16>(op, gemm, tile_rows, aligned, stream);
  }
}

Status MoeGroupedMatmulCuda(const MoeGroupedMatmulParams& p,
                            const MoeGroupedMatmulScratch& scratch,
                            Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return Compute<decltype(zero)>(p, scratch, stream);
  });
}

}  // namespace tenon
