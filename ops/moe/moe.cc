#include "ops/moe/moe.h"

#include <algorithm>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_kernel_choice.h"
#include "ops/moe/moe_prepare.h"
#include "ops/moe/moe_tile_rows.h"
#include "ops/quantize/fp8_scale.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Moe";
constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxTopK = 32;
constexpr int64_t kMaxDim = int64_t{1} << 30;

Status CheckSameScaling(const char* field, const ExpertMatrices& m,
                        const ExpertMatrices& gate) {
  if (m.scales.block_rows == gate.scales.block_rows || !IsFp8(m)) {
    return Status();
  }
  return InvalidArgumentError(kOp, ": ", field, ".scales has block_rows ",
                              m.scales.block_rows, ", expected gate's ",
                              gate.scales.block_rows);
}

Status ValidateRows(const MoeParams& p) {
  const int64_t top_k = p.topk_ids.shape[1];
  const int64_t hidden = p.x.shape[1];
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "rows", p.rows,
                                    {p.x.shape[0], top_k, hidden},
                                    DTypes({p.x.dtype}), p.x.device));
  if (p.rows.stride[0] != top_k * hidden || p.rows.stride[1] != hidden) {
    return InvalidArgumentError(kOp, ": rows have gaps");
  }
  if (reinterpret_cast<uintptr_t>(p.rows.data) % 16 != 0) {
    return InvalidArgumentError(kOp, ": rows are not aligned to 16 bytes");
  }
  if (p.out.present() || p.residual.present()) {
    return InvalidArgumentError(kOp, ": out or residual is given beside rows");
  }
  return Status();
}

}  // namespace

Status ValidateMoeShapes(const MoeParams& p) {
  const Device device = p.x.device;
  const DType dtype = ExpertDType(p.gate, p.x);
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t tokens = p.x.shape[0];
  const int64_t hidden = p.x.shape[1];
  const int64_t intermediate = p.gate.rows;
  const int64_t num_experts = p.gate.num_experts;
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "hidden (columns of x)", hidden, 1, kMaxDim));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "intermediate (rows of gate)", intermediate, 1, kMaxDim));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_experts of gate", num_experts, 1, kMaxExperts));
  TENON_RETURN_IF_ERROR(CheckExpertMatrices(
      kOp, "gate", p.gate, num_experts, intermediate, hidden, dtype, device));
  TENON_RETURN_IF_ERROR(CheckExpertMatrices(
      kOp, "up", p.up, num_experts, intermediate, hidden, dtype, device));
  TENON_RETURN_IF_ERROR(CheckExpertMatrices(
      kOp, "down", p.down, num_experts, hidden, intermediate, dtype, device));
  TENON_RETURN_IF_ERROR(CheckSameScaling("up", p.up, p.gate));
  TENON_RETURN_IF_ERROR(CheckSameScaling("down", p.down, p.gate));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "topk_ids", p.topk_ids,
                                    {tokens, kAnySize}, DTypes({DType::kInt32}),
                                    device));
  const int64_t top_k = p.topk_ids.shape[1];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "top_k (columns of topk_ids)", top_k, 1, kMaxTopK));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "topk_weights", p.topk_weights,
                                    {tokens, top_k}, DTypes({DType::kFloat32}),
                                    device));
  const DTypeSet same = DTypes({p.x.dtype});
  if (p.rows.present()) return ValidateRows(p);
  TENON_RETURN_IF_ERROR(
      CheckOutput(kOp, "out", p.out, {tokens, hidden}, same, device));
  if (!p.residual.present()) return Status();
  return CheckTensor(kOp, "residual", p.residual, {tokens, hidden}, same,
                     device);
}

namespace {

bool IsSameMatrix(const TensorView& a, const TensorView& b) {
  return a.data == b.data && a.dtype == b.dtype && a.device == b.device &&
         a.rank == b.rank && std::equal(a.shape, a.shape + 2, b.shape) &&
         (a.shape[0] <= 1 || a.stride[0] == b.stride[0]);
}

// What a call reads besides x and the router's choice.
struct Inputs {
  TensorView gate, up, down;
  TensorView gate_scales, up_scales, down_scales;
  TensorView logits, correction_bias, padding;
};

Inputs InputsOf(const MoeParams& p) {
  Inputs in = {ViewOf(p.gate),       ViewOf(p.up),       ViewOf(p.down),
               ScalesViewOf(p.gate), ScalesViewOf(p.up), ScalesViewOf(p.down),
               TensorView(),         TensorView(),       TensorView()};
  if (p.router != nullptr) {
    in.logits = p.router->logits;
    in.correction_bias = p.router->correction_bias;
    in.padding = p.router->padding;
  }
  return in;
}

Status CheckApartFromInputs(const NamedView& written, const Inputs& in) {
  return CheckSeparate(kOp, written,
                       {{"gate", in.gate},
                        {"up", in.up},
                        {"down", in.down},
                        {"gate.scales", in.gate_scales},
                        {"up.scales", in.up_scales},
                        {"down.scales", in.down_scales},
                        {"router.logits", in.logits},
                        {"router.correction_bias", in.correction_bias},
                        {"router.padding", in.padding}});
}

Status ValidateRouter(const MoeParams& p, const Inputs& in) {
  const MoeRouterParams& r = *p.router;
  TENON_RETURN_IF_ERROR(ValidateMoeRouter(r));
  if (!IsSameMatrix(r.topk_weights, p.topk_weights)) {
    return InvalidArgumentError(kOp,
                                ": router.topk_weights is not topk_weights");
  }
  if (!IsSameMatrix(r.topk_ids, p.topk_ids)) {
    return InvalidArgumentError(kOp, ": router.topk_ids is not topk_ids");
  }
  const int64_t num_experts = r.logits.shape[1] + r.num_fused_shared_experts;
  if (num_experts != p.gate.num_experts) {
    return InvalidArgumentError(
        kOp, ": router chooses among ", r.logits.shape[1], " experts and ",
        r.num_fused_shared_experts, " shared ones, expected ",
        p.gate.num_experts, " as in gate");
  }
  for (const NamedView& written : {NamedView{"topk_weights", p.topk_weights},
                                   NamedView{"topk_ids", p.topk_ids}}) {
    TENON_RETURN_IF_ERROR(CheckSeparate(kOp, written, {{"x", p.x}}));
    TENON_RETURN_IF_ERROR(CheckApartFromInputs(written, in));
  }
  return Status();
}

// `out` may be `other`, and nothing between that and being apart from it.
Status CheckSameOrSeparate(const TensorView& out, const NamedView& other) {
  if (out.data != other.view.data && MemoryOverlaps(out, other.view)) {
    return InvalidArgumentError(kOp, ": out overlaps ", other.name,
                                " without being ", other.name);
  }
  if (out.data == other.view.data && out.shape[0] > 1 &&
      out.stride[0] != other.view.stride[0]) {
    return InvalidArgumentError(kOp, ": out is ", other.name,
                                " with another row stride");
  }
  return Status();
}

Status Validate(const MoeParams& p) {
  TENON_RETURN_IF_ERROR(ValidateMoeShapes(p));
  if (p.kernels != nullptr) {
    TENON_RETURN_IF_ERROR(CheckMoeKernelTable("Moe: kernels", *p.kernels));
  }
  const Inputs in = InputsOf(p);
  if (p.router != nullptr) TENON_RETURN_IF_ERROR(ValidateRouter(p, in));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"rows", p.rows},
                                      {{"x", p.x},
                                       {"topk_weights", p.topk_weights},
                                       {"topk_ids", p.topk_ids}}));
  TENON_RETURN_IF_ERROR(CheckApartFromInputs({"rows", p.rows}, in));
  TENON_RETURN_IF_ERROR(CheckSameOrSeparate(p.out, {"x", p.x}));
  TENON_RETURN_IF_ERROR(CheckSameOrSeparate(p.out, {"residual", p.residual}));
  TENON_RETURN_IF_ERROR(CheckSeparate(
      kOp, {"out", p.out},
      {{"topk_weights", p.topk_weights}, {"topk_ids", p.topk_ids}}));
  TENON_RETURN_IF_ERROR(CheckApartFromInputs({"out", p.out}, in));
  const size_t bytes = LayOutScratch(p).bytes;
  TENON_RETURN_IF_ERROR(CheckWorkspace(kOp, p.workspace, p.workspace_size,
                                       bytes, p.x.device,
                                       {{"x", p.x},
                                        {"topk_weights", p.topk_weights},
                                        {"topk_ids", p.topk_ids},
                                        {"residual", p.residual},
                                        {"rows", p.rows},
                                        {"out", p.out}}));
  const TensorView workspace = MakeTensor(
      p.workspace, DType::kUInt8, p.x.device, {static_cast<int64_t>(bytes)});
  return CheckApartFromInputs({"workspace", workspace}, in);
}

int64_t ChunkTokens(Device device) {
  return device.type == DeviceType::kCpu ? kMoeCpuChunkTokens : kMoeChunkTokens;
}

MoeAlignParams AlignParams(const MoeParams& chunk, const MoeScratch& scratch) {
  const Device device = chunk.x.device;
  const int64_t num_slots = NumElements(chunk.topk_ids);
  MoeAlignParams p;
  p.topk_ids = chunk.topk_ids;
  p.num_experts = static_cast<int32_t>(chunk.gate.num_experts);
  p.expert_offsets = MakeTensor(scratch.expert_offsets, DType::kInt32, device,
                                {chunk.gate.num_experts + 1});
  p.sorted_slots =
      MakeTensor(scratch.sorted_slots, DType::kInt32, device, {num_slots});
  p.workspace = scratch.align;
  p.workspace_size = scratch.align_bytes;
  return p;
}

// `router` becomes the chunk's, if there is one.
MoeParams Chunk(const MoeParams& p, int64_t first, int64_t count,
                MoeRouterParams* router) {
  MoeParams chunk = p;
  chunk.x = Rows(p.x, first, count);
  chunk.topk_ids = Rows(p.topk_ids, first, count);
  chunk.topk_weights = Rows(p.topk_weights, first, count);
  if (p.out.present()) chunk.out = Rows(p.out, first, count);
  if (p.rows.present()) chunk.rows = Rows(p.rows, first, count);
  if (p.residual.present()) chunk.residual = Rows(p.residual, first, count);
  if (p.router != nullptr) {
    *router = *p.router;
    router->logits = Rows(p.router->logits, first, count);
    if (router->padding.present()) {
      router->padding = Rows(p.router->padding, first, count);
    }
    router->topk_weights = chunk.topk_weights;
    router->topk_ids = chunk.topk_ids;
    chunk.router = router;
  }
  return chunk;
}

}  // namespace

MoeScratch LayOutScratch(const MoeParams& p) {
  const bool cuda = p.x.device.type == DeviceType::kCuda;
  const int64_t tokens = std::min(p.x.shape[0], ChunkTokens(p.x.device));
  const int64_t num_experts = p.gate.num_experts;
  const int64_t slots = tokens * p.topk_ids.shape[1];
  const int64_t hidden = p.x.shape[1];
  const int64_t intermediate = p.gate.rows;
  const int64_t element = static_cast<int64_t>(DTypeSize(p.x.dtype));
  const bool fp8 = IsFp8(p.gate);

  WorkspaceCutter cutter(p.workspace);
  MoeScratch s;
  s.expert_offsets = cutter.Take<int32_t>(num_experts + 1);
  s.sorted_slots = cutter.Take<int32_t>(slots);
  s.align_bytes = MoeAlignWorkspaceBytes(slots, num_experts, p.x.device.type);
  if (cuda) {
    s.align_bytes =
        std::max(s.align_bytes, MoePrepareWorkspaceBytes(tokens, num_experts));
  }
  s.align = cutter.TakeBytes(s.align_bytes);
  if (cuda) {
    s.tiles = cutter.Take<int32_t>(
        3 *
        MoeMaxTiles(slots, static_cast<int32_t>(num_experts), kMoeMinTileRows));
    s.hidden = cutter.TakeBytes(slots * intermediate * (fp8 ? 1 : element));
  } else {
    s.active_experts = cutter.Take<int32_t>(num_experts);
    s.gathered = cutter.Take<float>(slots * hidden);
    s.hidden = cutter.Take<float>(slots * intermediate);
  }
  if (fp8) {
    s.hidden_scales = cutter.Take<float>(slots * NumFp8Groups(intermediate));
    if (cuda) {
      s.x_fp8 = cutter.TakeBytes(tokens * hidden);
      s.x_scales = cutter.Take<float>(tokens * NumFp8Groups(hidden));
    } else {
      s.gathered_scales = cutter.Take<float>(slots * NumFp8Groups(hidden));
    }
  }
  s.weighted = cutter.TakeBytes(slots * hidden * element);
  s.bytes = cutter.size();
  return s;
}

Status AlignChunk(const MoeParams& chunk, const MoeScratch& scratch,
                  int32_t tile_rows, int64_t num_tiles, Stream stream) {
  MoeAlignParams p = AlignParams(chunk, scratch);
  if (tile_rows > 0) {
    p.tile_rows = tile_rows;
    p.tiles = MakeTensor(scratch.tiles, DType::kInt32, chunk.x.device,
                         {num_tiles, 3});
  }
  return MoeAlign(p, stream);
}

size_t MoeWorkspaceBytes(const MoeParams& params) {
  return ValidateMoeShapes(params).ok() ? LayOutScratch(params).bytes : 0;
}

Status Moe(const MoeParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  const Device device = params.x.device;
  if (device.type == DeviceType::kCuda && !kCudaBuilt) {
    return NoBackendError(kOp, device);
  }
  MoeScratch scratch = LayOutScratch(params);
  const int64_t tokens = params.x.shape[0];
  const int64_t step = ChunkTokens(device);
  for (int64_t first = 0; first < tokens; first += step) {
    MoeRouterParams router;
    const MoeParams chunk =
        Chunk(params, first, std::min(step, tokens - first), &router);
    if (chunk.rows.present()) scratch.weighted = chunk.rows.data;
    if (device.type == DeviceType::kCpu) {
      TENON_RETURN_IF_ERROR(MoeCpu(chunk, scratch, stream));
    } else if constexpr (kCudaBuilt) {
      TENON_RETURN_IF_ERROR(MoeCuda(chunk, scratch, stream));
    }
  }
  return Status();
}

}  // namespace tenon
