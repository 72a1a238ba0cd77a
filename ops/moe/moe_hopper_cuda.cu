#include <algorithm>

#include "ops/moe/moe_gemm_cuda.cuh"
#include "ops/moe/moe_hopper_cuda.cuh"
#include "ops/moe/moe_hopper_kernel_cuda.cuh"

namespace tenon {
namespace {

using moe_hopper::Params;
using moe_hopper::Projection;
using moe_hopper::ProjectionKernel;
using moe_hopper::Shape;

constexpr char kOp[] = "Moe";

Status MakeWeightMap(const ExpertMatrices& m, CUtensorMap* map) {
  return cuda::MakeTensorMap(kOp, m.dtype, m.data, m.num_experts,
                             m.expert_stride, m.rows, m.row_stride, m.cols, 64,
                             map);
}

// What both projections have in common; `weights` is gate or down.
Params CommonParams(const MoeParams& p, const MoeScratch& scratch,
                    const ExpertMatrices& weights, int tile_rows) {
  Params k = {};
  k.expert_offsets = scratch.expert_offsets;
  k.sorted_slots = scratch.sorted_slots;
  k.num_experts = static_cast<int32_t>(weights.num_experts);
  k.top_k = static_cast<int32_t>(p.topk_ids.shape[1]);
  k.depth_bytes = static_cast<int32_t>(
      weights.cols * static_cast<int64_t>(DTypeSize(weights.dtype)));
  k.depth_steps = cuda::CeilDiv(k.depth_bytes, 128);
  k.rows = static_cast<int32_t>(weights.rows);
  k.row_tiles =
      static_cast<int32_t>(cuda::CeilDiv(weights.rows, int64_t{tile_rows}));
  return k;
}

template <class S>
Status LaunchShape(const MoeParams& p, const Params& k, Stream stream) {
  int num_cores = 0;
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(&num_cores, cudaDevAttrMultiProcessorCount,
                             p.x.device.index),
      kOp));
  // No more tiles than this: each expert ends in one that is not full.
  const int64_t slots = NumElements(p.topk_ids);
  const int64_t tiles =
      MoeMaxTiles(slots, k.num_experts, S::kTokens * S::kBlocks) * k.row_tiles;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(tiles, num_cores / S::kBlocks) * S::kBlocks);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {S::kBlocks, 1, 1};
  cudaLaunchConfig_t config = cuda::LaunchConfig(
      stream, dim3(blocks), dim3(S::kThreads), S::kSharedBytes);
  config.attrs = attributes;
  config.numAttrs = S::kPaired ? 2 : 1;
  return cuda::LaunchWithConfig(kOp, config, ProjectionKernel<S>, k);
}

// A tile of 8 tokens has one warpgroup, so that there are twice as many tiles.
template <class T, Projection kProjection, class F>
Status WithShape(int32_t token_tile, const F& f) {
  switch (token_tile) {
    case 8:
      // A tile of gate and up has whole blocks of the scales of hidden.
      if constexpr (std::is_same_v<T, __nv_fp8_e4m3> &&
                    kProjection == Projection::kGateUp) {
        return f(Shape<T, kProjection, 8, 2>());
      } else {
        return f(Shape<T, kProjection, 8, 1>());
      }
    case 32:
      return f(Shape<T, kProjection, 32, 2>());
    case kMoePairTokenTile:
      return f(Shape < T, kProjection,
               std::is_same_v<T, __nv_fp8_e4m3> ? 128 : kMoePairTokenTile, 2,
               true > ());
    default:
      return f(Shape<T, kProjection, 128, 2>());
  }
}

template <Projection kProjection, class F>
Status WithTypeAndShape(const MoeParams& p, int32_t token_tile, const F& f) {
  switch (p.gate.dtype) {
    case DType::kFloat8E4M3:
      return WithShape<__nv_fp8_e4m3, kProjection>(token_tile, f);
    case DType::kFloat16:
      return WithShape<__half, kProjection>(token_tile, f);
    default:
      return WithShape<__nv_bfloat16, kProjection>(token_tile, f);
  }
}

}  // namespace

bool CanUseMoeHopper(const MoeParams& p, int compute_capability) {
  if (compute_capability != 90 || p.x.dtype == DType::kFloat32) return false;
  for (const ExpertMatrices* m : {&p.gate, &p.up, &p.down}) {
    if (!MoeMatricesAreAligned(*m)) return false;
    // Limits of TMA: positive sizes below 2^32, strides below 2^40 bytes.
    if (m->expert_stride < 0 || m->expert_stride >= int64_t{1} << 39 ||
        m->row_stride >= int64_t{1} << 39) {
      return false;
    }
    // Bytes of a row are counted in 32 bits.
    if (m->cols >= int64_t{1} << 29) {
      return false;
    }
  }
  if (!IsFp8(p.gate)) {
    // Offsets within a chunk's x are 32 bits.
    constexpr int64_t kMaxRowElements =
        (int64_t{1} << 32) / kMoeChunkTokens / sizeof(__half) - 1;
    if (!cuda::RowsAreWholeChunks(p.x) || p.x.stride[0] > kMaxRowElements) {
      return false;
    }
  }
  return true;
}

Status LaunchMoeHopperGateUp(const MoeParams& p, const MoeScratch& scratch,
                             const MoeWgmmaTile& tile, Stream stream) {
  return WithTypeAndShape<Projection::kGateUp>(p, tile.token_tile, [&](auto s) {
    using S = decltype(s);
    Params k = CommonParams(p, scratch, p.gate, S::kTileRows);
    TENON_RETURN_IF_ERROR(MakeWeightMap(p.gate, &k.weights[0]));
    TENON_RETURN_IF_ERROR(MakeWeightMap(p.up, &k.weights[1]));
    k.weight_scales[0] = p.gate.scales;
    k.weight_scales[1] = p.up.scales;
    const int64_t element = static_cast<int64_t>(sizeof(typename S::T));
    k.x = IsFp8(p.gate) ? scratch.x_fp8 : p.x.data;
    k.x_row_bytes = static_cast<uint32_t>(
        (IsFp8(p.gate) ? p.gate.cols : p.x.stride[0]) * element);
    k.token_scales = scratch.x_scales;
    k.out = scratch.hidden;
    k.out_scales = scratch.hidden_scales;
    k.out_row_bytes = p.gate.rows * element;
    return LaunchShape<S>(p, k, stream);
  });
}

Status LaunchMoeHopperDown(const MoeParams& p, const MoeScratch& scratch,
                           const MoeWgmmaTile& tile, Stream stream) {
  return WithTypeAndShape<Projection::kDown>(p, tile.token_tile, [&](auto s) {
    using S = decltype(s);
    Params k = CommonParams(p, scratch, p.down, S::kTileRows);
    TENON_RETURN_IF_ERROR(MakeWeightMap(p.down, &k.weights[0]));
    k.weights[1] = k.weights[0];
    k.weight_scales[0] = k.weight_scales[1] = p.down.scales;
    const int64_t slots = NumElements(p.topk_ids);
    TENON_RETURN_IF_ERROR(
        cuda::MakeTensorMap(kOp, p.down.dtype, scratch.hidden, 1, 0, slots,
                            p.down.cols, p.down.cols, S::kTokenBox, &k.hidden));
    k.token_scales = scratch.hidden_scales;
    k.routing = {p.topk_weights.As<const float>(), p.topk_weights.stride[0],
                 k.top_k};
    k.out = scratch.weighted;
    k.out_row_bytes = p.down.rows * static_cast<int64_t>(DTypeSize(p.x.dtype));
    k.out_is_half = p.x.dtype == DType::kFloat16;
    return LaunchShape<S>(p, k, stream);
  });
}

}  // namespace tenon
