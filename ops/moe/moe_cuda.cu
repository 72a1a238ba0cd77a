#include <utility>

#include "ops/core/gemm_tile_cuda.cuh"
#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_gemm_cuda.cuh"
#include "ops/moe/moe_hopper_cuda.cuh"
#include "ops/moe/moe_kernel_choice.h"
#include "ops/moe/moe_tile_rows.h"
#include "ops/quantize/quantize_cuda.cuh"

// Launches on Hopper: what goes before (MoePrepareCuda), gate and up projection
// with SwiGLU, down projection with the routing weight, sum. Elsewhere: router,
// align unless there are few slots, then the same three. They overlap
// (LaunchDependent): each has its blocks set up, and the down projection its
// first weights under way, while the one before it ends.

namespace tenon {
namespace {

using cuda::CeilDiv;
using cuda::GemmTile;
using cuda::GemmTileShape;
using cuda::Vec;

constexpr char kOp[] = "Moe";

// ---------------------------------------------------------------------------
// hidden[slot] = silu(x[token] * gate^T) * (x[token] * up^T)
// ---------------------------------------------------------------------------

struct GateUp {
  MoeTileSource source;
  TensorView x;
  int32_t top_k;
  ExpertMatrices gate;
  ExpertMatrices up;
  void* hidden;
};

template <class T, class Shape, bool kAligned>
__global__ void __launch_bounds__(GemmTile<T, Shape, kAligned>::kThreads)
    GateUpKernel(const GateUp g) {
  using Tile = GemmTile<T, Shape, kAligned>;
  extern __shared__ __align__(128) char shared[];
  __shared__ MoeTile<Shape::kM> tile;
  cuda::WaitForPreviousKernels();
  const int64_t cols = g.gate.rows;
  const int col_tiles = static_cast<int>(CeilDiv(cols, int64_t{Shape::kN}));
  FindTile(g.source, blockIdx.x / col_tiles, &tile);
  if (tile.expert < 0) return;

  const int64_t col = blockIdx.x % col_tiles * int64_t{Shape::kN};
  const T* const b[2] = {
      static_cast<const T*>(g.gate.data) + tile.expert * g.gate.expert_stride +
          col * g.gate.row_stride,
      static_cast<const T*>(g.up.data) + tile.expert * g.up.expert_stride +
          col * g.up.row_stride};
  const int64_t b_stride[2] = {g.gate.row_stride, g.up.row_stride};
  Tile::Run(
      shared,
      [&](int m) -> const T* {
        const int slot = tile.slots[m];
        return slot < 0 ? nullptr
                        : g.x.As<const T>() + slot / g.top_k * g.x.stride[0];
      },
      b, b_stride, cols - col, static_cast<int>(g.gate.cols),
      [&](int m, int n, const float(&c)[2][Tile::kCols]) {
        const int slot = tile.slots[m];
        if (slot < 0) return;
        float v[Tile::kCols];
#pragma unroll
        for (int i = 0; i < Tile::kCols; ++i) {
          v[i] = c[0][i] / (1.0f + expf(-c[0][i])) * c[1][i];
        }
        cuda::StoreColumns(static_cast<T*>(g.hidden) + slot * cols, col + n,
                           cols, v, kAligned);
      },
      [] {});
}

template <class T, class Shape, bool kAligned>
Status LaunchShape(const GateUp& g, Stream stream) {
  using Tile = GemmTile<T, Shape, kAligned>;
  dim3 grid;
  TENON_RETURN_IF_ERROR(
      MoeGrid(kOp, g.source.num_tiles, g.gate.rows, Shape::kN, &grid));
  return cuda::LaunchDependent(kOp, stream, grid, dim3(Tile::kThreads),
                               Tile::kSharedBytes,
                               GateUpKernel<T, Shape, kAligned>, g);
}

// The shapes of the grouped matrix product, with half the columns of two
// matrices each.
template <class T>
Status LaunchGateUp(const GateUp& g, int32_t tile_rows, bool aligned,
                    Stream stream) {
  if constexpr (sizeof(T) == 4) {
    using Low = GemmTileShape<16, 32, 1, 2, 4, 2>;
    using Tall = GemmTileShape<64, 32, 2, 2, 3, 2>;
    if (!aligned) return LaunchShape<T, Tall, false>(g, stream);
    return tile_rows == 16 ? LaunchShape<T, Low, true>(g, stream)
                           : LaunchShape<T, Tall, true>(g, stream);
  } else {
    using Any = GemmTileShape<64, 32, 2, 2, 2, 2>;
    using Low = GemmTileShape<16, 32, 1, 2, 6, 2>;
    using Tall = GemmTileShape<64, 64, 2, 4, 4, 2>;
    using Taller = GemmTileShape<128, 64, 2, 4, 3, 2>;
    if (!aligned) return LaunchShape<T, Any, false>(g, stream);
    if (tile_rows == 16) return LaunchShape<T, Low, true>(g, stream);
    return tile_rows == 64 ? LaunchShape<T, Tall, true>(g, stream)
                           : LaunchShape<T, Taller, true>(g, stream);
  }
}

// ---------------------------------------------------------------------------
// out[token] = sum of weighted[token * top_k + j] over the valid choices j,
// rounded; plus residual[token]
// ---------------------------------------------------------------------------

constexpr int kSumThreads = 128;

// kAtOnce: rows on their way at the same time.
template <class T, int kVec, int kAtOnce>
__global__ void __launch_bounds__(kSumThreads)
    SumKernel(TensorView ids, int num_experts, const T* weighted,
              TensorView residual, TensorView out) {
  using V = Vec<T, kVec>;
  const int64_t hidden = out.shape[1];
  const int64_t per_row = hidden / kVec;
  const int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  const int64_t token = i / per_row;
  const bool exists = token < out.shape[0];
  const int64_t col = i % per_row * kVec;
  const int top_k = exists ? static_cast<int>(ids.shape[1]) : 0;
  // All but the rows is older than the kernel before.
  const int32_t* token_ids = ids.As<const int32_t>() + token * ids.stride[0];
  uint32_t valid = 0;  // a bit for each choice; there are 32 at most
#pragma unroll 8
  for (int j = 0; j < top_k; ++j) {
    const uint32_t id = static_cast<uint32_t>(token_ids[j]);
    valid |= uint32_t{id < static_cast<uint32_t>(num_experts)} << j;
  }
  V to_add;
  if (exists && residual.present()) {
    to_add = *reinterpret_cast<const V*>(residual.As<const T>() +
                                         token * residual.stride[0] + col);
  }
  cuda::WaitForPreviousKernels();
  if (!exists) return;
  const T* row = weighted + token * top_k * hidden + col;
  float sums[kVec] = {};
  for (; valid != 0; valid >>= kAtOnce, row += kAtOnce * hidden) {
    V terms[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if ((valid >> j & 1) == 0) continue;
      terms[j] = *reinterpret_cast<const V*>(row + j * hidden);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if ((valid >> j & 1) == 0) continue;
#pragma unroll
      for (int c = 0; c < kVec; ++c) sums[c] += cuda::ToFloat(terms[j].v[c]);
    }
  }
  V sum;
#pragma unroll
  for (int c = 0; c < kVec; ++c) {
    sum.v[c] = cuda::FromFloat<T>(sums[c]);
    if (residual.present()) {
      sum.v[c] = cuda::FromFloat<T>(cuda::ToFloat(to_add.v[c]) +
                                    cuda::ToFloat(sum.v[c]));
    }
  }
  *reinterpret_cast<V*>(out.As<T>() + token * out.stride[0] + col) = sum;
}

template <class T>
Status LaunchSum(const MoeParams& p, const MoeScratch& scratch, Stream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide =
      cuda::RowsAreWholeChunks(p.out) &&
      (!p.residual.present() || cuda::RowsAreAligned(p.residual, 16));
  const int64_t threads = NumElements(p.out) / (wide ? kWide : 1);
  const int64_t blocks = CeilDiv(threads, int64_t{kSumThreads});
  // Few tokens: their trips to memory count. Many: threads that are resident.
  constexpr int64_t kFewTokens = 128;
  auto* const kernel = !wide                         ? SumKernel<T, 1, 4>
                       : p.out.shape[0] > kFewTokens ? SumKernel<T, kWide, 4>
                                                     : SumKernel<T, kWide, 8>;
  return cuda::LaunchDependent(
      kOp, stream, dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), 0,
      kernel, p.topk_ids, static_cast<int>(p.gate.num_experts),
      static_cast<const T*>(scratch.weighted), p.residual, p.out);
}

// ---------------------------------------------------------------------------

// Whether all that the matrix products read and write can be read 16 bytes at
// a time. Intermediate rows are contiguous, so widths suffice there.
bool IsAligned(const MoeParams& p) {
  return MoeMatricesAreAligned(p.gate) && MoeMatricesAreAligned(p.up) &&
         MoeMatricesAreAligned(p.down) &&
         (IsFp8(p.gate) || cuda::RowsAreWholeChunks(p.x));
}

// With fp8 experts. x is quantised already.
Status LaunchFp8GateUp(const MoeTileSource& source, const MoeParams& p,
                       const MoeScratch& scratch, int32_t tile_rows,
                       bool aligned, Stream stream) {
  MoeFp8GateUp g;
  g.source = source;
  g.x = scratch.x_fp8;
  g.x_scales = scratch.x_scales;
  g.top_k = static_cast<int32_t>(p.topk_ids.shape[1]);
  g.gate = p.gate;
  g.up = p.up;
  g.hidden = scratch.hidden;
  g.hidden_scales = scratch.hidden_scales;
  return LaunchMoeFp8GateUp(kOp, g, tile_rows, aligned, stream);
}

struct Gpu {
  int compute_capability = 0;
  int memory_bus_bits = 0;
};

Status QueryGpu(Device device, Gpu* gpu) {
  int major = 0, minor = 0;
  for (const auto& [attribute, value] :
       {std::pair(cudaDevAttrComputeCapabilityMajor, &major),
        std::pair(cudaDevAttrComputeCapabilityMinor, &minor),
        std::pair(cudaDevAttrGlobalMemoryBusWidth, &gpu->memory_bus_bits)}) {
    TENON_RETURN_IF_ERROR(cuda::ToStatus(
        cudaDeviceGetAttribute(value, attribute, device.index), kOp));
  }
  gpu->compute_capability = major * 10 + minor;
  return Status();
}

// The sizes of the kernels, from tables.
MoeKernelConfig ChooseKernels(const MoeParams& p, const Gpu& gpu) {
  MoeKernelQuery query;
  query.weights = p.gate.dtype;
  query.hidden = p.x.shape[1];
  query.intermediate = p.gate.rows;
  query.slots_per_expert = static_cast<double>(NumElements(p.topk_ids)) /
                           static_cast<double>(p.gate.num_experts);
  return ChooseMoeKernel(MoeGpuOf(gpu.compute_capability, gpu.memory_bus_bits),
                         p.kernels, query);
}

Status ComputeHopper(const MoeParams& p, const MoeScratch& scratch,
                     const MoeKernelConfig& config, Stream stream) {
  TENON_RETURN_IF_ERROR(MoePrepareCuda(p, scratch, stream));
  TENON_RETURN_IF_ERROR(
      LaunchMoeHopperGateUp(p, scratch, config.gate_up, stream));
  return LaunchMoeHopperDown(p, scratch, config.down, stream);
}

template <class T>
Status ComputePortable(const MoeParams& p, const MoeScratch& scratch,
                       const MoeKernelConfig& config, Stream stream) {
  if (p.router != nullptr) {
    TENON_RETURN_IF_ERROR(MoeRouter(*p.router, stream));
  }
  const Device device = p.x.device;
  const int64_t num_experts = p.gate.num_experts;
  const int32_t top_k = static_cast<int32_t>(p.topk_ids.shape[1]);
  const int64_t num_slots = p.x.shape[0] * top_k;
  const bool aligned = IsAligned(p);
  const int32_t tile_rows =
      aligned ? config.mma_tile_rows : kMoeUnalignedTileRows;
  if (IsFp8(p.gate)) {
    const cuda::Fp8Groups groups = {static_cast<uint8_t*>(scratch.x_fp8),
                                    p.x.shape[1], scratch.x_scales,
                                    NumFp8Groups(p.x.shape[1]), 1};
    TENON_RETURN_IF_ERROR(
        cuda::LaunchQuantizeFp8Groups(kOp, p.x, groups, stream));
  }

  MoeTileSource source;
  source.num_slots = static_cast<int32_t>(num_slots);
  if (num_slots <= kMoeMaxDirectSlots) {
    source.ids = p.topk_ids.As<const int32_t>();
    source.ids_stride = p.topk_ids.stride[0];
    source.top_k = top_k;
    source.num_experts = static_cast<int32_t>(num_experts);
    source.num_tiles = num_slots;
  } else {
    source.num_tiles =
        MoeMaxTiles(num_slots, static_cast<int32_t>(num_experts), tile_rows);
    TENON_RETURN_IF_ERROR(
        AlignChunk(p, scratch, tile_rows, source.num_tiles, stream));
    source.tiles = scratch.tiles;
    source.expert_offsets = scratch.expert_offsets;
    source.sorted_slots = scratch.sorted_slots;
  }

  if (IsFp8(p.gate)) {
    TENON_RETURN_IF_ERROR(
        LaunchFp8GateUp(source, p, scratch, tile_rows, aligned, stream));
  } else {
    const GateUp gate_up = {source, p.x, top_k, p.gate, p.up, scratch.hidden};
    TENON_RETURN_IF_ERROR(LaunchGateUp<T>(gate_up, tile_rows, aligned, stream));
  }

  MoeGroupedGemm down;
  down.source = source;
  down.x = MakeTensor(scratch.hidden, p.gate.dtype, device,
                      {num_slots, p.gate.rows});
  down.x_scales = scratch.hidden_scales;
  down.weights = p.down;
  down.routing = {p.topk_weights.As<const float>(), p.topk_weights.stride[0],
                  top_k};
  down.out = MakeTensor(scratch.weighted, p.x.dtype, device,
                        {num_slots, p.x.shape[1]});
  down.dependent = true;
  return LaunchMoeGroupedGemm(kOp, down, tile_rows, aligned, stream);
}

template <class T>
Status Compute(const MoeParams& p, const MoeScratch& scratch, Stream stream) {
  Gpu gpu;
  TENON_RETURN_IF_ERROR(QueryGpu(p.x.device, &gpu));
  const MoeKernelConfig config = ChooseKernels(p, gpu);
  TENON_RETURN_IF_ERROR(CanUseMoeHopper(p, gpu.compute_capability)
                            ? ComputeHopper(p, scratch, config, stream)
                            : ComputePortable<T>(p, scratch, config, stream));
  return p.rows.present() ? Status() : LaunchSum<T>(p, scratch, stream);
}

}  // namespace

Status MoeCuda(const MoeParams& p, const MoeScratch& scratch, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return Compute<decltype(zero)>(p, scratch, stream);
  });
}

}  // namespace tenon
