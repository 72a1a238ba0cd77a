#define _POSIX_C_SOURCE 200112L /* posix_memalign */

#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Everything that a call needs but its own arguments. */
struct call {
  const tenon_library* library;
  tenon_context context;
  const struct test_case* test;
  tenon_error* error;
  void* workspace; /* freed after the call */
};

static int32_t allocate_workspace(struct call* call, uint64_t bytes,
                                  void** workspace) {
  if (bytes > 0 && posix_memalign(&call->workspace, 64, bytes) != 0) {
    snprintf(call->error->message, sizeof(call->error->message),
             "no memory for the workspace");
    return TENON_RESOURCE_EXHAUSTED;
  }
  *workspace = call->workspace;
  return TENON_OK;
}

/* One function for each op. Fields that a case does not have are 0 or NULL. */

static int32_t run_embedding(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_embedding_args args = {0};
  args.struct_size = sizeof(args);
  args.ids = case_tensor(test, "ids");
  args.table = case_tensor(test, "table");
  args.out = case_tensor(test, "out");
  return call->library->embedding(call->context, &args, NULL, call->error);
}

static int32_t run_rms_norm(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_rms_norm_args args = {0};
  args.struct_size = sizeof(args);
  args.rounding = (int32_t)case_integer(test, "rounding");
  args.x = case_tensor(test, "x");
  args.residual = case_tensor(test, "residual");
  args.weight = case_tensor(test, "weight");
  args.out = case_tensor(test, "out");
  args.epsilon = case_float(test, "epsilon");
  return call->library->rms_norm(call->context, &args, NULL, call->error);
}

static int32_t run_linear(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_linear_args args = {0};
  args.struct_size = sizeof(args);
  args.flags = (uint32_t)case_integer(test, "flags");
  args.x = case_tensor(test, "x");
  args.weight = case_tensor(test, "weight");
  args.bias = case_tensor(test, "bias");
  args.out = case_tensor(test, "out");
  args.weight_scales = case_tensor(test, "weight_scales");
  int32_t code = call->library->linear_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->linear(call->context, &args, NULL, call->error);
}

static int32_t run_quantize_fp8(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_quantize_fp8_args args = {0};
  args.struct_size = sizeof(args);
  args.block_rows = (int32_t)case_integer(test, "block_rows");
  args.block_cols = (int32_t)case_integer(test, "block_cols");
  args.x = case_tensor(test, "x");
  args.out = case_tensor(test, "out");
  args.scales = case_tensor(test, "scales");
  return call->library->quantize_fp8(call->context, &args, NULL, call->error);
}

static int32_t run_qk_norm(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_qk_norm_args args = {0};
  args.struct_size = sizeof(args);
  args.rounding = (int32_t)case_integer(test, "rounding");
  args.qkv = case_tensor(test, "qkv");
  args.q_offset = case_integer(test, "q_offset");
  args.k_offset = case_integer(test, "k_offset");
  args.v_offset = case_integer(test, "v_offset");
  args.num_q_heads = (int32_t)case_integer(test, "num_q_heads");
  args.num_kv_heads = (int32_t)case_integer(test, "num_kv_heads");
  args.head_dim = (int32_t)case_integer(test, "head_dim");
  args.epsilon = case_float(test, "epsilon");
  args.q = case_tensor(test, "q");
  args.k = case_tensor(test, "k");
  args.v = case_tensor(test, "v");
  args.q_weight = case_tensor(test, "q_weight");
  args.k_weight = case_tensor(test, "k_weight");
  args.cos_sin = case_tensor(test, "cos_sin");
  args.positions = case_tensor(test, "positions");
  args.k_cache = case_tensor(test, "k_cache");
  args.v_cache = case_tensor(test, "v_cache");
  args.slot_mapping = case_tensor(test, "slot_mapping");
  args.k_scale = case_float(test, "k_scale");
  args.v_scale = case_float(test, "v_scale");
  args.rotary_dim = (int32_t)case_integer(test, "rotary_dim");
  return call->library->qk_norm(call->context, &args, NULL, call->error);
}

static int32_t run_attention(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_attention_args args = {0};
  args.struct_size = sizeof(args);
  args.flags = (uint32_t)case_integer(test, "flags");
  args.q = case_tensor(test, "q");
  args.k_cache = case_tensor(test, "k_cache");
  args.v_cache = case_tensor(test, "v_cache");
  args.block_table = case_tensor(test, "block_table");
  args.query_start = case_tensor(test, "query_start");
  args.kv_len = case_tensor(test, "kv_len");
  args.out = case_tensor(test, "out");
  args.scale = case_float(test, "scale");
  args.k_scale = case_float(test, "k_scale");
  args.v_scale = case_float(test, "v_scale");
  args.max_kv_len = (int32_t)case_integer(test, "max_kv_len");
  args.max_query_len = (int32_t)case_integer(test, "max_query_len");
  int32_t code = call->library->attention_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->attention(call->context, &args, NULL, call->error);
}

static int32_t run_moe_router(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_router_args args = {0};
  args.struct_size = sizeof(args);
  args.top_k = (int32_t)case_integer(test, "top_k");
  args.logits = case_tensor(test, "logits");
  args.correction_bias = case_tensor(test, "correction_bias");
  args.topk_weights = case_tensor(test, "topk_weights");
  args.topk_ids = case_tensor(test, "topk_ids");
  args.scoring = (int32_t)case_integer(test, "scoring");
  args.renormalize = (int32_t)case_integer(test, "renormalize");
  args.routed_scaling_factor = case_float(test, "routed_scaling_factor");
  args.num_expert_groups = (int32_t)case_integer(test, "num_expert_groups");
  args.num_selected_groups = (int32_t)case_integer(test, "num_selected_groups");
  args.group_score = (int32_t)case_integer(test, "group_score");
  args.num_fused_shared_experts =
      (int32_t)case_integer(test, "num_fused_shared_experts");
  return call->library->moe_router(call->context, &args, NULL, call->error);
}

static int32_t run_moe_align(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_align_args args = {0};
  args.struct_size = sizeof(args);
  args.num_experts = (int32_t)case_integer(test, "num_experts");
  args.topk_ids = case_tensor(test, "topk_ids");
  args.expert_offsets = case_tensor(test, "expert_offsets");
  args.sorted_slots = case_tensor(test, "sorted_slots");
  args.tiles = case_tensor(test, "tiles");
  args.tile_rows = (int32_t)case_integer(test, "tile_rows");
  int32_t code = call->library->moe_align_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->moe_align(call->context, &args, NULL, call->error);
}

static int32_t run_moe_grouped_matmul(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_grouped_matmul_args args = {0};
  args.struct_size = sizeof(args);
  args.flags = (uint32_t)case_integer(test, "flags");
  args.x = case_tensor(test, "x");
  args.weights = case_tensor(test, "weights");
  args.expert_offsets = case_tensor(test, "expert_offsets");
  args.sorted_slots = case_tensor(test, "sorted_slots");
  args.bias = case_tensor(test, "bias");
  args.routing_weights = case_tensor(test, "routing_weights");
  args.out = case_tensor(test, "out");
  args.slots_per_row = (int32_t)case_integer(test, "slots_per_row");
  args.weight_scales = case_tensor(test, "weight_scales");
  int32_t code = call->library->moe_grouped_matmul_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->moe_grouped_matmul(call->context, &args, NULL,
                                           call->error);
}

static int32_t run_moe_swiglu(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_swiglu_args args = {0};
  args.struct_size = sizeof(args);
  args.layout = (int32_t)case_integer(test, "layout");
  args.x = case_tensor(test, "x");
  args.out = case_tensor(test, "out");
  args.limit = case_float(test, "limit");
  args.alpha = case_float(test, "alpha");
  return call->library->moe_swiglu(call->context, &args, NULL, call->error);
}

static int32_t run_moe_sum_reduce(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_sum_reduce_args args = {0};
  args.struct_size = sizeof(args);
  args.x = case_tensor(test, "x");
  args.out = case_tensor(test, "out");
  return call->library->moe_sum_reduce(call->context, &args, NULL, call->error);
}

static int32_t run_moe(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_moe_args args = {0};
  args.struct_size = sizeof(args);
  args.flags = (uint32_t)case_integer(test, "flags");
  args.x = case_tensor(test, "x");
  args.topk_weights = case_tensor(test, "topk_weights");
  args.topk_ids = case_tensor(test, "topk_ids");
  args.gate = case_tensor(test, "gate");
  args.up = case_tensor(test, "up");
  args.down = case_tensor(test, "down");
  args.out = case_tensor(test, "out");
  args.gate_scales = case_tensor(test, "gate_scales");
  args.up_scales = case_tensor(test, "up_scales");
  args.down_scales = case_tensor(test, "down_scales");
  tenon_moe_router_args router = {0};
  router.struct_size = sizeof(router);
  router.logits = case_tensor(test, "router.logits");
  if (router.logits != NULL) {
    router.top_k = (int32_t)case_integer(test, "router.top_k");
    router.renormalize = (int32_t)case_integer(test, "router.renormalize");
    router.topk_weights = args.topk_weights;
    router.topk_ids = args.topk_ids;
    args.router = &router;
  }
  int32_t code = call->library->moe_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->moe(call->context, &args, NULL, call->error);
}

static int32_t run_sampler(struct call* call) {
  const struct test_case* const test = call->test;
  tenon_sampler_args args = {0};
  args.struct_size = sizeof(args);
  args.logits = case_tensor(test, "logits");
  args.params = case_tensor(test, "params");
  args.tokens = case_tensor(test, "tokens");
  args.logprobs = case_tensor(test, "logprobs");
  args.statuses = case_tensor(test, "statuses");
  int32_t code = call->library->sampler_workspace_size(
      call->context, &args, &args.workspace_size, call->error);
  if (code == TENON_OK) {
    code = allocate_workspace(call, args.workspace_size, &args.workspace);
  }
  if (code != TENON_OK) return code;
  return call->library->sampler(call->context, &args, NULL, call->error);
}

static const struct {
  const char* name;
  int32_t (*run)(struct call*);
} kOps[] = {
    {"embedding", run_embedding},
    {"rms_norm", run_rms_norm},
    {"linear", run_linear},
    {"quantize_fp8", run_quantize_fp8},
    {"qk_norm", run_qk_norm},
    {"attention", run_attention},
    {"moe_router", run_moe_router},
    {"moe_align", run_moe_align},
    {"moe_grouped_matmul", run_moe_grouped_matmul},
    {"moe_swiglu", run_moe_swiglu},
    {"moe_sum_reduce", run_moe_sum_reduce},
    {"moe", run_moe},
    {"sampler", run_sampler},
};

int32_t run_op(const tenon_library* library, tenon_context context,
               const struct test_case* test, tenon_error* error) {
  struct call call = {library, context, test, error, NULL};
  for (size_t i = 0; i < sizeof(kOps) / sizeof(kOps[0]); ++i) {
    if (strcmp(test->op, kOps[i].name) == 0) {
      const int32_t code = kOps[i].run(&call);
      free(call.workspace);
      return code;
    }
  }
  snprintf(error->message, sizeof(error->message), "no op %s", test->op);
  return TENON_UNIMPLEMENTED;
}
