#include "ops/moe/moe.h"

#include <limits>

#include "abi/op_call.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_grouped_matmul.h"
#include "ops/moe/moe_router.h"
#include "ops/moe/moe_sum_reduce.h"
#include "ops/moe/moe_swiglu.h"

namespace tenon::abi {
namespace {

static_assert(TENON_SCORING_SOFTMAX == static_cast<int>(MoeScoring::kSoftmax) &&
              TENON_SCORING_SIGMOID == static_cast<int>(MoeScoring::kSigmoid));
static_assert(TENON_GROUP_SCORE_MAX == static_cast<int>(MoeGroupScore::kMax) &&
              TENON_GROUP_SCORE_TOP2_SUM ==
                  static_cast<int>(MoeGroupScore::kTop2Sum));
static_assert(TENON_SWIGLU_BLOCKED ==
                  static_cast<int>(SwiGluLayout::kBlocked) &&
              TENON_SWIGLU_INTERLEAVED ==
                  static_cast<int>(SwiGluLayout::kInterleaved));

// Experts' matrices as a tensor [num_experts, rows, cols], and their scales,
// where present, as one of [num_experts, blocks of rows, blocks of cols] or
// [num_experts, rows].
Status ToExpertMatrices(const char* name, const TensorView& view,
                        const char* scales_name, const TensorView& scales,
                        ExpertMatrices* matrices) {
  if (view.rank != 3) {
    return InvalidArgumentError(name, ".ndim is ", view.rank, ", expected 3");
  }
  if (view.shape[2] > 1 && view.stride[2] != 1) {
    return InvalidArgumentError(name, ".strides[2] is ", view.stride[2],
                                ", expected 1");
  }
  *matrices = MakeExpertMatrices(view);
  if (!scales.present()) return Status();
  const int64_t num_experts = view.shape[0], rows = view.shape[1];
  const DTypeSet float32 = DTypes({DType::kFloat32});
  const auto blocks = [](int64_t n) {
    return n / kFp8Block + (n % kFp8Block != 0);
  };
  if (scales.rank == 2) {
    TENON_RETURN_IF_ERROR(CheckTensor(
        "", scales_name, scales, {num_experts, rows}, float32, view.device));
  } else {
    TENON_RETURN_IF_ERROR(
        CheckTensor("Moe", scales_name, scales,
                    {num_experts, blocks(rows), blocks(view.shape[2])}, float32,
                    view.device));
  }
  matrices->scales = MakeExpertScales(scales);
  return Status();
}

Status ReadMoeRouter(const tenon_moe_router_args& args, OpCall* call,
                     MoeRouterParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  if (args.renormalize != 0 && args.renormalize != 1) {
    return InvalidArgumentError("renormalize is ", args.renormalize,
                                ", expected 0 or 1");
  }
  p->top_k = args.top_k;
  p->scoring = static_cast<MoeScoring>(args.scoring);
  p->renormalize = args.renormalize != 0;
  p->routed_scaling_factor = ZeroMeansOne(args.routed_scaling_factor);
  p->num_expert_groups = ZeroMeansOne(args.num_expert_groups);
  p->num_selected_groups = ZeroMeansOne(args.num_selected_groups);
  p->group_score = static_cast<MoeGroupScore>(args.group_score);
  p->num_fused_shared_experts = args.num_fused_shared_experts;
  return call->ReadTensors(
      {{"logits", args.logits, &p->logits},
       Optional("correction_bias", args.correction_bias, &p->correction_bias),
       {"topk_weights", args.topk_weights, &p->topk_weights},
       {"topk_ids", args.topk_ids, &p->topk_ids}});
}

Status ReadMoeAlign(const tenon_moe_align_args& args, OpCall* call,
                    MoeAlignParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  p->num_experts = args.num_experts;
  p->tile_rows = args.tile_rows;
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  return call->ReadTensors(
      {{"topk_ids", args.topk_ids, &p->topk_ids},
       {"expert_offsets", args.expert_offsets, &p->expert_offsets},
       {"sorted_slots", args.sorted_slots, &p->sorted_slots},
       Optional("tiles", args.tiles, &p->tiles)});
}

Status ReadMoeGroupedMatmul(const tenon_moe_grouped_matmul_args& args,
                            OpCall* call, MoeGroupedMatmulParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  TENON_RETURN_IF_ERROR(
      CheckFlags("flags", args.flags, TENON_FLAG_BATCH_INVARIANT));
  TensorView weights, scales;
  TENON_RETURN_IF_ERROR(call->ReadTensors(
      {{"x", args.x, &p->x},
       {"weights", args.weights, &weights},
       Optional("weight_scales", args.weight_scales, &scales),
       {"expert_offsets", args.expert_offsets, &p->expert_offsets},
       {"sorted_slots", args.sorted_slots, &p->sorted_slots},
       Optional("bias", args.bias, &p->bias),
       Optional("routing_weights", args.routing_weights, &p->routing_weights),
       {"out", args.out, &p->out}}));
  p->slots_per_row = args.slots_per_row;
  p->batch_invariant = (args.flags & TENON_FLAG_BATCH_INVARIANT) != 0;
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  TENON_RETURN_IF_ERROR(
      CheckScalesGiven("weight_scales", args.weight_scales, weights));
  return ToExpertMatrices("weights", weights, "weight_scales", scales,
                          &p->weights);
}

Status ReadMoeSwiGlu(const tenon_moe_swiglu_args& args, OpCall* call,
                     MoeSwiGluParams* p) {
  p->layout = static_cast<SwiGluLayout>(args.layout);
  p->limit = args.limit;
  p->alpha = args.alpha;
  return call->ReadTensors({{"x", args.x, &p->x}, {"out", args.out, &p->out}});
}

Status ReadMoeSumReduce(const tenon_moe_sum_reduce_args& args, OpCall* call,
                        MoeSumReduceParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  return call->ReadTensors({{"x", args.x, &p->x}, {"out", args.out, &p->out}});
}

// With room for what `router` points to.
struct MoeCallParams : MoeParams {
  MoeRouterParams router_params;
};

Status ReadMoe(const tenon_moe_args& args, OpCall* call, MoeCallParams* p) {
  TENON_RETURN_IF_ERROR(
      CheckFlags("flags", args.flags, TENON_FLAG_BATCH_INVARIANT));
  TensorView experts[3], scales[3];
  TENON_RETURN_IF_ERROR(
      call->ReadTensors({{"x", args.x, &p->x},
                         {"gate", args.gate, &experts[0]},
                         {"up", args.up, &experts[1]},
                         {"down", args.down, &experts[2]},
                         Optional("gate_scales", args.gate_scales, &scales[0]),
                         Optional("up_scales", args.up_scales, &scales[1]),
                         Optional("down_scales", args.down_scales, &scales[2]),
                         {"topk_weights", args.topk_weights, &p->topk_weights},
                         {"topk_ids", args.topk_ids, &p->topk_ids},
                         {"out", args.out, &p->out}}));
  p->batch_invariant = (args.flags & TENON_FLAG_BATCH_INVARIANT) != 0;
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  p->kernels = call->moe_kernels();
  TENON_RETURN_IF_ERROR(
      CheckScalesGiven("gate_scales", args.gate_scales, experts[0]));
  TENON_RETURN_IF_ERROR(
      CheckScalesGiven("up_scales", args.up_scales, experts[1]));
  TENON_RETURN_IF_ERROR(
      CheckScalesGiven("down_scales", args.down_scales, experts[2]));
  TENON_RETURN_IF_ERROR(
      ToExpertMatrices("gate", experts[0], "gate_scales", scales[0], &p->gate));
  TENON_RETURN_IF_ERROR(
      ToExpertMatrices("up", experts[1], "up_scales", scales[1], &p->up));
  TENON_RETURN_IF_ERROR(
      ToExpertMatrices("down", experts[2], "down_scales", scales[2], &p->down));
  if (args.router == nullptr) return Status();
  tenon_moe_router_args router;
  TENON_RETURN_IF_ERROR(ReadStruct("router", args.router, &router));
  p->router = &p->router_params;
  return ReadMoeRouter(router, call, &p->router_params);
}

Status RunMoe(const MoeCallParams& p, Stream stream) { return Moe(p, stream); }
Status ValidateMoe(const MoeCallParams& p) { return ValidateMoeShapes(p); }
size_t MoeBytes(const MoeCallParams& p) { return MoeWorkspaceBytes(p); }

}  // namespace
}  // namespace tenon::abi

using tenon::abi::QueryWorkspace;
using tenon::abi::RunOp;

int32_t tenon_moe_router(tenon_context context,
                         const tenon_moe_router_args* args, void* stream,
                         tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadMoeRouter, tenon::MoeRouter);
}

int64_t tenon_moe_max_tiles(int64_t num_slots, int32_t num_experts,
                            int32_t tile_rows) {
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  const bool in_range = num_slots >= 0 && num_slots <= kMaxSlots &&
                        num_experts >= 1 && num_experts <= 1024 &&
                        tile_rows >= 1;
  return in_range ? tenon::MoeMaxTiles(num_slots, num_experts, tile_rows) : 0;
}

int32_t tenon_moe_align_workspace_size(tenon_context context,
                                       const tenon_moe_align_args* args,
                                       uint64_t* bytes, tenon_error* error) {
  return QueryWorkspace(__func__, context, args, bytes, error,
                        tenon::abi::ReadMoeAlign, tenon::ValidateMoeAlignShapes,
                        tenon::MoeAlignWorkspaceBytes);
}

int32_t tenon_moe_align(tenon_context context, const tenon_moe_align_args* args,
                        void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error, tenon::abi::ReadMoeAlign,
               tenon::MoeAlign);
}

int32_t tenon_moe_grouped_matmul_workspace_size(
    tenon_context context, const tenon_moe_grouped_matmul_args* args,
    uint64_t* bytes, tenon_error* error) {
  return QueryWorkspace(__func__, context, args, bytes, error,
                        tenon::abi::ReadMoeGroupedMatmul,
                        tenon::ValidateMoeGroupedMatmulShapes,
                        tenon::MoeGroupedMatmulWorkspaceBytes);
}

int32_t tenon_moe_grouped_matmul(tenon_context context,
                                 const tenon_moe_grouped_matmul_args* args,
                                 void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadMoeGroupedMatmul, tenon::MoeGroupedMatmul);
}

int32_t tenon_moe_swiglu(tenon_context context,
                         const tenon_moe_swiglu_args* args, void* stream,
                         tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadMoeSwiGlu, tenon::MoeSwiGlu);
}

int32_t tenon_moe_sum_reduce(tenon_context context,
                             const tenon_moe_sum_reduce_args* args,
                             void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadMoeSumReduce, tenon::MoeSumReduce);
}

int32_t tenon_moe_workspace_size(tenon_context context,
                                 const tenon_moe_args* args, uint64_t* bytes,
                                 tenon_error* error) {
  return QueryWorkspace(__func__, context, args, bytes, error,
                        tenon::abi::ReadMoe, tenon::abi::ValidateMoe,
                        tenon::abi::MoeBytes);
}

int32_t tenon_moe(tenon_context context, const tenon_moe_args* args,
                  void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error, tenon::abi::ReadMoe,
               tenon::abi::RunMoe);
}
