#include <string>

#include "tests/fuzz/op_case.h"

// Every op: its fields, and how to make a valid call of it.

namespace tenon::fuzz {
namespace {

constexpr DLDataType kFloat32{TENON_DL_FLOAT, 32, 1};
constexpr DLDataType kInt32{TENON_DL_INT, 32, 1};
constexpr DLDataType kInt64{TENON_DL_INT, 64, 1};
constexpr DLDataType kUInt8{TENON_DL_UINT, 8, 1};
constexpr DLDataType kFloat8{TENON_DL_FLOAT8_E4M3FN, 8, 1};

DLDataType FloatType(Input& in) {
  return in.Pick<DLDataType>(
      {kFloat32, {TENON_DL_FLOAT, 16, 1}, {TENON_DL_BFLOAT, 16, 1}});
}

DLDataType IndexType(Input& in) { return in.OneIn(2) ? kInt32 : kInt64; }

int64_t NumTokens(Input& in) { return in.Pick<int64_t>({0, 1, 2, 3, 5}); }

uint32_t Flags(Input& in) {
  return in.OneIn(2) ? TENON_FLAG_BATCH_INVARIANT : 0;
}

template <class Args>
Args Zeroed() {
  Args args = {};
  args.struct_size = sizeof(args);
  return args;
}

// Functions of one signature for all ops.
template <class Args, auto Function>
int32_t Run(tenon_context context, const void* args, void* stream,
            tenon_error* error) {
  return Function(context, static_cast<const Args*>(args), stream, error);
}
template <class Args, auto Function>
int32_t Query(tenon_context context, const void* args, uint64_t* bytes,
              tenon_error* error) {
  return Function(context, static_cast<const Args*>(args), bytes, error);
}

void BuildEmbedding(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_embedding_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 20);
  const int64_t vocab = in.Between(1, 9);
  args.ids = c.AddInts(IndexType(in), {tokens}, 0, vocab - 1);
  args.table = c.Add(dtype, {vocab, hidden});
  args.out = c.Add(dtype, {tokens, hidden});
  c.SetArgs(args);
}

void BuildRmsNorm(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_rms_norm_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 40);
  args.rounding = static_cast<int32_t>(in.Below(2));
  args.x = c.Add(dtype, {tokens, hidden});
  if (in.OneIn(2)) args.residual = c.Add(dtype, {tokens, hidden});
  args.weight = c.Add(in.OneIn(2) ? kFloat32 : dtype, {hidden});
  args.out = in.OneIn(3) ? args.x : c.Add(dtype, {tokens, hidden});
  args.epsilon = 1e-6f;
  c.SetArgs(args);
}

void BuildLinear(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_linear_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t in_features = in.Between(1, 24);
  const int64_t out_features = in.Between(1, 20);
  args.flags = Flags(in);
  args.x = c.Add(dtype, {tokens, in_features});
  const bool fp8 = in.OneIn(3);
  args.weight = c.Add(fp8 ? kFloat8 : dtype, {out_features, in_features});
  if (fp8) {
    args.weight_scales =
        in.OneIn(2) ? c.Add(kFloat32, {1, 1}) : c.Add(kFloat32, {out_features});
  }
  if (in.OneIn(2)) args.bias = c.Add(dtype, {out_features});
  args.out = c.Add(in.OneIn(3) ? kFloat32 : dtype, {tokens, out_features});
  c.SetArgs(args);
}

void BuildQuantizeFp8(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_quantize_fp8_args>();
  const int64_t rows = NumTokens(in);
  const int64_t cols = in.Between(1, 150);
  args.block_rows = in.OneIn(2) ? 1 : 128;
  args.block_cols = args.block_rows == 1 && in.OneIn(2) ? 0 : 128;
  args.x = c.Add(FloatType(in), {rows, cols});
  args.out = c.Add(kFloat8, {rows, cols});
  const int64_t of_rows = args.block_rows == 1 ? rows : (rows + 127) / 128;
  args.scales = args.block_cols == 0
                    ? c.Add(kFloat32, {rows})
                    : c.Add(kFloat32, {of_rows, (cols + 127) / 128});
  c.SetArgs(args);
}

void BuildQkNorm(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_qk_norm_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t q_heads = in.Between(1, 2);
  const int64_t kv_heads = in.Between(1, 2);
  const int64_t dim = in.OneIn(4) ? 128 : 64;
  const bool has_cache = in.OneIn(2);
  args.rounding = static_cast<int32_t>(in.Below(2));
  args.epsilon = 1e-6f;
  if (in.OneIn(2)) {
    const int64_t gap = in.Below(3);
    args.num_q_heads = static_cast<int32_t>(q_heads);
    args.num_kv_heads = static_cast<int32_t>(kv_heads);
    args.head_dim = static_cast<int32_t>(dim);
    args.q_offset = gap;
    args.k_offset = args.q_offset + q_heads * dim + gap;
    args.v_offset = args.k_offset + kv_heads * dim;
    args.qkv = c.Add(dtype, {tokens, args.v_offset + kv_heads * dim + gap});
  } else {
    args.q = c.Add(dtype, {tokens, q_heads, dim});
    args.k = c.Add(dtype, {tokens, kv_heads, dim});
    if (has_cache) args.v = c.Add(dtype, {tokens, kv_heads, dim});
  }
  args.q_weight = c.Add(in.OneIn(2) ? kFloat32 : dtype, {dim});
  args.k_weight = c.Add(in.OneIn(2) ? kFloat32 : dtype, {dim});
  if (in.OneIn(2)) {
    const int64_t rotary = in.Pick<int64_t>({dim, dim / 2, 2, 6});
    const int64_t positions = in.Between(1, 5);
    args.rotary_dim = static_cast<int32_t>(rotary);
    args.cos_sin = c.Add(kFloat32, {positions, rotary});
    args.positions = c.AddInts(IndexType(in), {tokens}, 0, positions - 1);
  }
  if (has_cache) {
    const bool is_float8 = in.OneIn(3);
    const int64_t page_size = in.Between(1, 3);
    const std::vector<int64_t> shape = {3, page_size, kv_heads, dim};
    args.k_cache = c.Add(is_float8 ? kFloat8 : dtype, shape);
    args.v_cache = c.Add(is_float8 ? kFloat8 : dtype, shape);
    args.slot_mapping = c.AddInts(kInt64, {tokens}, -1, 3 * page_size);
    args.k_scale = is_float8 ? 0.5f : static_cast<float>(in.Below(2));
    args.v_scale = is_float8 ? 2.0f : static_cast<float>(in.Below(2));
  }
  c.SetArgs(args);
}

void BuildAttention(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_attention_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t kv_heads = in.Between(1, 2);
  const int64_t heads = kv_heads * in.Between(1, 3);
  const int64_t dim = in.OneIn(4) ? 128 : 64;
  const int64_t num_seqs = in.Between(0, 3);
  const int64_t num_pages = in.Between(1, 4);
  const int64_t page_size = in.Between(1, 3);
  const int64_t max_pages = in.Between(1, 3);
  const int64_t query_len = in.Between(0, 2);
  const int64_t tokens = num_seqs * query_len + (in.OneIn(4) ? 1 : 0);
  const bool is_float8 = in.OneIn(3);
  const std::vector<int64_t> cache = {num_pages, page_size, kv_heads, dim};
  args.flags = Flags(in);
  args.q = c.Add(dtype, {tokens, heads, dim});
  args.k_cache = c.Add(is_float8 ? kFloat8 : dtype, cache);
  args.v_cache = c.Add(is_float8 ? kFloat8 : dtype, cache);
  args.block_table = c.AddInts(kInt32, {num_seqs, max_pages}, 0, num_pages - 1);
  args.query_start = c.AddInts(kInt32, {num_seqs + 1}, 0, 0);
  for (int64_t i = 0; i <= num_seqs; ++i) {
    c.SetInt(args.query_start, i, i * query_len);
  }
  args.kv_len = c.AddInts(kInt32, {num_seqs}, query_len, max_pages * page_size);
  args.out = in.OneIn(3) ? args.q : c.Add(dtype, {tokens, heads, dim});
  args.scale = 0.125f;
  args.k_scale = is_float8 ? 0.5f : static_cast<float>(in.Below(2));
  args.v_scale = is_float8 ? 2.0f : static_cast<float>(in.Below(2));
  if (in.OneIn(2)) args.max_query_len = static_cast<int32_t>(query_len);
  if (in.OneIn(2)) {
    args.max_kv_len = static_cast<int32_t>(max_pages * page_size);
  }
  c.SetArgs(args);
}

void BuildMoeRouter(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_router_args>();
  const int64_t tokens = NumTokens(in);
  const int64_t experts = 2 * in.Between(2, 20);
  const int64_t top_k = in.Between(1, 2);
  const int64_t shared = in.Between(0, 2);
  args.top_k = static_cast<int32_t>(top_k);
  args.num_fused_shared_experts = static_cast<int32_t>(shared);
  args.logits = c.Add(FloatType(in), {tokens, experts});
  if (in.OneIn(2)) args.correction_bias = c.Add(kFloat32, {experts});
  args.topk_weights = c.Add(kFloat32, {tokens, top_k + shared});
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k + shared}, 0, 0);
  args.scoring = static_cast<int32_t>(in.Below(2));
  args.renormalize = static_cast<int32_t>(in.Below(2));
  args.routed_scaling_factor = in.Pick<float>({0.0f, 1.0f, 2.5f});
  if (in.OneIn(2)) {
    args.num_expert_groups = 2;
    args.num_selected_groups = static_cast<int32_t>(in.Between(1, 2));
  }
  args.group_score = static_cast<int32_t>(in.Below(2));
  c.SetArgs(args);
}

void BuildMoeAlign(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_align_args>();
  const int64_t tokens = NumTokens(in);
  const int64_t top_k = in.Between(1, 3);
  const int64_t experts = in.Between(1, 9);
  args.num_experts = static_cast<int32_t>(experts);
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k}, -1, experts);
  args.expert_offsets = c.AddInts(kInt32, {experts + 1}, 0, 0);
  args.sorted_slots = c.AddInts(kInt32, {tokens * top_k}, 0, 0);
  if (in.OneIn(2)) {
    args.tile_rows = static_cast<int32_t>(in.Between(1, 3));
    const int64_t tiles =
        tenon_moe_max_tiles(tokens * top_k, args.num_experts, args.tile_rows);
    args.tiles = c.AddInts(kInt32, {tiles + in.Between(0, 2), 3}, 0, 0);
  }
  c.SetArgs(args);
}

void BuildMoeGroupedMatmul(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_grouped_matmul_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t slots_per_row = in.Between(1, 3);
  const int64_t x_rows = NumTokens(in);
  const int64_t slots = x_rows * slots_per_row;
  const int64_t experts = in.Between(1, 4);
  const int64_t rows = in.Between(1, 20);
  const int64_t cols = in.Between(1, 20);
  args.flags = Flags(in);
  args.x = c.Add(dtype, {x_rows, cols});
  const bool fp8 = in.OneIn(3);
  args.weights = c.Add(fp8 ? kFloat8 : dtype, {experts, rows, cols});
  if (fp8) {
    args.weight_scales = in.OneIn(2) ? c.Add(kFloat32, {experts, rows})
                                     : c.Add(kFloat32, {experts, 1, 1});
  }
  args.expert_offsets = c.AddInts(kInt32, {experts + 1}, 0, 0);
  int64_t used = 0;  // slots in their order, some skipped
  for (int64_t e = 0; e < experts; ++e) {
    used += in.Between(0, slots - used);
    c.SetInt(args.expert_offsets, e + 1, used);
  }
  args.sorted_slots = c.AddInts(kInt32, {slots}, -1, -1);
  for (int64_t i = 0; i < used; ++i) c.SetInt(args.sorted_slots, i, i);
  if (in.OneIn(2)) args.bias = c.Add(dtype, {experts, rows});
  if (in.OneIn(2)) args.routing_weights = c.Add(kFloat32, {slots});
  args.out = c.Add(dtype, {slots, rows});
  args.slots_per_row = static_cast<int32_t>(slots_per_row);
  c.SetArgs(args);
}

void BuildMoeSwiGlu(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_swiglu_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t columns = in.Between(1, 20);
  args.layout = static_cast<int32_t>(in.Below(2));
  args.x = c.Add(dtype, {tokens, 2 * columns});
  args.out = c.Add(dtype, {tokens, columns});
  if (in.OneIn(2)) {
    args.limit = 7.0f;
    args.alpha = 1.702f;
  }
  c.SetArgs(args);
}

void BuildMoeSumReduce(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_sum_reduce_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 20);
  args.x = c.Add(dtype, {tokens, in.Between(1, 4), hidden});
  args.out = c.Add(dtype, {tokens, hidden});
  c.SetArgs(args);
}

void BuildMoe(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_moe_args>();
  const DLDataType dtype = FloatType(in);
  const int64_t tokens = NumTokens(in);
  const int64_t hidden = in.Between(1, 20);
  const int64_t inner = in.Between(1, 12);
  const int64_t experts = in.Between(1, 4);
  const int64_t top_k = in.Between(1, 3);
  args.flags = Flags(in);
  args.x = c.Add(dtype, {tokens, hidden});
  args.topk_weights = c.Add(kFloat32, {tokens, top_k});
  args.topk_ids = c.AddInts(kInt32, {tokens, top_k}, -1, experts);
  const bool fp8 = in.OneIn(3);
  const DLDataType weights = fp8 ? kFloat8 : dtype;
  args.gate = c.Add(weights, {experts, inner, hidden});
  args.up = c.Add(weights, {experts, inner, hidden});
  args.down = c.Add(weights, {experts, hidden, inner});
  if (fp8) {
    const bool rows = in.OneIn(2);
    const auto scales = [&](int64_t count) {
      return rows ? c.Add(kFloat32, {experts, count})
                  : c.Add(kFloat32, {experts, 1, 1});
    };
    args.gate_scales = scales(inner);
    args.up_scales = scales(inner);
    args.down_scales = scales(hidden);
  }
  args.out = in.OneIn(3) ? args.x : c.Add(dtype, {tokens, hidden});
  c.SetArgs(args);
}

tenon_sampling_params SamplingParams(Input& in) {
  tenon_sampling_params params = {};
  params.temperature = in.Pick<float>({0.0f, 0.7f, 1.0f, 100.0f});
  params.top_k = static_cast<int32_t>(in.Pick<int64_t>({0, -1, 1, 5, 1000}));
  params.top_p = in.Pick<float>({0.0f, 0.5f, 0.95f, 1.0f});
  params.min_p = in.Pick<float>({0.0f, 0.1f, 1.0f});
  params.filter_order = static_cast<int32_t>(in.Below(3));
  params.seed = in.Below(256);
  params.position = in.Below(256);
  params.typical_p = in.Pick<float>({0.0f, 0.5f, 1.0f});
  params.top_n_sigma = in.Pick<float>({0.0f, 0.5f, 2.0f});
  params.xtc_probability = in.Pick<float>({0.0f, 0.5f, 1.0f});
  params.xtc_threshold = in.Pick<float>({0.0f, 0.1f, 1.0f});
  params.mirostat_tau = in.Pick<float>({0.0f, 0.0f, 3.0f});
  params.mirostat_eta = in.Pick<float>({0.0f, 0.1f});
  params.repetition_penalty = in.Pick<float>({0.0f, 1.3f});
  params.frequency_penalty = in.Pick<float>({0.0f, -0.5f});
  params.flags = static_cast<uint32_t>(in.Below(4));
  params.num_top_logprobs = static_cast<int32_t>(in.Below(4));
  return params;
}

void BuildSampler(Input& in, OpCase& c) {
  auto args = Zeroed<tenon_sampler_args>();
  const int64_t rows = in.Pick<int64_t>({0, 1, 2, 3});
  const int64_t vocab = in.Pick<int64_t>({1, 2, 13, 111, 1100});
  args.logits = c.Add(FloatType(in), {rows, vocab});
  const DLTensor* params =
      c.Add(kUInt8, {rows, sizeof(tenon_sampling_params)}, Layout::kCompact);
  for (int64_t i = 0; i < rows && !in.OneIn(8); ++i) {
    const tenon_sampling_params row = SamplingParams(in);
    std::memcpy(static_cast<uint8_t*>(params->data) + i * sizeof(row), &row,
                sizeof(row));
  }
  args.params = params;
  args.tokens = c.AddInts(kInt32, {rows}, 0, 0);
  if (in.OneIn(2)) args.logprobs = c.Add(kFloat32, {rows});
  args.statuses = c.AddInts(kInt32, {rows}, 0, 0);
  if (in.OneIn(2)) args.raw_logprobs = c.Add(kFloat32, {rows});
  if (in.OneIn(2)) args.processed_logprobs = c.Add(kFloat32, {rows});
  c.SetArgs(args);
}

#define FIELD(kind, name) \
  Field { FieldKind::kind, #name, offsetof(Args, name) }
// A tensor of which some parts are not used.
#define PARTLY(kind, name) \
  Field { FieldKind::kind, #name, offsetof(Args, name), false }

Op Embedding() {
  using Args = tenon_embedding_args;
  return {"tenon_embedding",
          nullptr,
          sizeof(Args),
          {FIELD(kReserved, reserved), FIELD(kIn, ids), FIELD(kIn, table),
           FIELD(kOut, out)},
          nullptr,
          nullptr,
          BuildEmbedding,
          Run<Args, tenon_embedding>,
          nullptr};
}

Op RmsNorm() {
  using Args = tenon_rms_norm_args;
  return {"tenon_rms_norm",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, rounding), FIELD(kIn, x),
           FIELD(kOptionalOut, residual), FIELD(kIn, weight), FIELD(kOut, out),
           FIELD(kFloat, epsilon), FIELD(kReserved, reserved)},
          "out",
          "x",
          BuildRmsNorm,
          Run<Args, tenon_rms_norm>,
          nullptr};
}

Op Linear() {
  using Args = tenon_linear_args;
  return {"tenon_linear",
          "tenon_linear_workspace_size",
          sizeof(Args),
          {FIELD(kFlags, flags), FIELD(kIn, x), FIELD(kIn, weight),
           FIELD(kOptionalIn, bias), FIELD(kOut, out),
           FIELD(kWorkspace, workspace), FIELD(kWorkspaceSize, workspace_size),
           FIELD(kOptionalIn, weight_scales)},
          nullptr,
          nullptr,
          BuildLinear,
          Run<Args, tenon_linear>,
          Query<Args, tenon_linear_workspace_size>};
}

Op QuantizeFp8() {
  using Args = tenon_quantize_fp8_args;
  return {"tenon_quantize_fp8",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, block_rows), FIELD(kInt32, block_cols),
           FIELD(kReserved, reserved), FIELD(kIn, x), FIELD(kOut, out),
           FIELD(kOut, scales)},
          nullptr,
          nullptr,
          BuildQuantizeFp8,
          Run<Args, tenon_quantize_fp8>,
          nullptr};
}

Op QkNorm() {
  using Args = tenon_qk_norm_args;
  return {"tenon_qk_norm",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, rounding),
           PARTLY(kOptionalOut, qkv),
           FIELD(kInt64, q_offset),
           FIELD(kInt64, k_offset),
           FIELD(kInt64, v_offset),
           FIELD(kInt32, num_q_heads),
           FIELD(kInt32, num_kv_heads),
           FIELD(kInt32, head_dim),
           FIELD(kFloat, epsilon),
           FIELD(kOptionalOut, q),
           FIELD(kOptionalOut, k),
           PARTLY(kOptionalIn, v),
           FIELD(kIn, q_weight),
           FIELD(kIn, k_weight),
           FIELD(kOptionalIn, cos_sin),
           FIELD(kOptionalIn, positions),
           FIELD(kOptionalOut, k_cache),
           FIELD(kOptionalOut, v_cache),
           FIELD(kOptionalIn, slot_mapping),
           FIELD(kFloat, k_scale),
           FIELD(kFloat, v_scale),
           FIELD(kInt32, rotary_dim),
           FIELD(kReserved, reserved)},
          nullptr,
          nullptr,
          BuildQkNorm,
          Run<Args, tenon_qk_norm>,
          nullptr};
}

Op Attention() {
  using Args = tenon_attention_args;
  return {"tenon_attention",
          "tenon_attention_workspace_size",
          sizeof(Args),
          {FIELD(kFlags, flags), FIELD(kIn, q), FIELD(kIn, k_cache),
           FIELD(kIn, v_cache), FIELD(kIn, block_table),
           FIELD(kIn, query_start), FIELD(kIn, kv_len), FIELD(kOut, out),
           FIELD(kFloat, scale), FIELD(kFloat, k_scale), FIELD(kFloat, v_scale),
           FIELD(kInt32, max_kv_len), FIELD(kInt32, max_query_len),
           FIELD(kReserved, reserved), FIELD(kWorkspace, workspace),
           FIELD(kWorkspaceSize, workspace_size)},
          "out",
          "q",
          BuildAttention,
          Run<Args, tenon_attention>,
          Query<Args, tenon_attention_workspace_size>};
}

Op MoeRouter() {
  using Args = tenon_moe_router_args;
  return {"tenon_moe_router",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, top_k), FIELD(kIn, logits),
           FIELD(kOptionalIn, correction_bias), FIELD(kOut, topk_weights),
           FIELD(kOut, topk_ids), FIELD(kInt32, scoring),
           FIELD(kInt32, renormalize), FIELD(kFloat, routed_scaling_factor),
           FIELD(kInt32, num_expert_groups), FIELD(kInt32, num_selected_groups),
           FIELD(kInt32, group_score), FIELD(kInt32, num_fused_shared_experts),
           FIELD(kReserved, reserved)},
          nullptr,
          nullptr,
          BuildMoeRouter,
          Run<Args, tenon_moe_router>,
          nullptr};
}

Op MoeAlign() {
  using Args = tenon_moe_align_args;
  return {"tenon_moe_align",
          "tenon_moe_align_workspace_size",
          sizeof(Args),
          {FIELD(kInt32, num_experts), FIELD(kIn, topk_ids),
           FIELD(kOut, expert_offsets), FIELD(kOut, sorted_slots),
           FIELD(kOptionalOut, tiles), FIELD(kInt32, tile_rows),
           FIELD(kReserved, reserved), FIELD(kWorkspace, workspace),
           FIELD(kWorkspaceSize, workspace_size)},
          nullptr,
          nullptr,
          BuildMoeAlign,
          Run<Args, tenon_moe_align>,
          Query<Args, tenon_moe_align_workspace_size>};
}

Op MoeGroupedMatmul() {
  using Args = tenon_moe_grouped_matmul_args;
  return {"tenon_moe_grouped_matmul",
          "tenon_moe_grouped_matmul_workspace_size",
          sizeof(Args),
          {FIELD(kFlags, flags), FIELD(kIn, x), FIELD(kIn, weights),
           FIELD(kIn, expert_offsets), FIELD(kIn, sorted_slots),
           FIELD(kOptionalIn, bias), FIELD(kOptionalIn, routing_weights),
           FIELD(kOut, out), FIELD(kInt32, slots_per_row),
           FIELD(kReserved, reserved), FIELD(kWorkspace, workspace),
           FIELD(kWorkspaceSize, workspace_size),
           FIELD(kOptionalIn, weight_scales)},
          nullptr,
          nullptr,
          BuildMoeGroupedMatmul,
          Run<Args, tenon_moe_grouped_matmul>,
          Query<Args, tenon_moe_grouped_matmul_workspace_size>};
}

Op MoeSwiGlu() {
  using Args = tenon_moe_swiglu_args;
  return {"tenon_moe_swiglu",
          nullptr,
          sizeof(Args),
          {FIELD(kInt32, layout), FIELD(kIn, x), FIELD(kOut, out),
           FIELD(kFloat, limit), FIELD(kFloat, alpha)},
          nullptr,
          nullptr,
          BuildMoeSwiGlu,
          Run<Args, tenon_moe_swiglu>,
          nullptr};
}

Op MoeSumReduce() {
  using Args = tenon_moe_sum_reduce_args;
  return {"tenon_moe_sum_reduce",
          nullptr,
          sizeof(Args),
          {FIELD(kReserved, reserved), FIELD(kIn, x), FIELD(kOut, out)},
          nullptr,
          nullptr,
          BuildMoeSumReduce,
          Run<Args, tenon_moe_sum_reduce>,
          nullptr};
}

Op Moe() {
  using Args = tenon_moe_args;
  return {
      "tenon_moe",
      "tenon_moe_workspace_size",
      sizeof(Args),
      {FIELD(kFlags, flags), FIELD(kIn, x), FIELD(kIn, topk_weights),
       FIELD(kIn, topk_ids), FIELD(kIn, gate), FIELD(kIn, up), FIELD(kIn, down),
       FIELD(kOut, out), FIELD(kWorkspace, workspace),
       FIELD(kWorkspaceSize, workspace_size), FIELD(kOptionalIn, gate_scales),
       FIELD(kOptionalIn, up_scales), FIELD(kOptionalIn, down_scales)},
      "out",
      "x",
      BuildMoe,
      Run<Args, tenon_moe>,
      Query<Args, tenon_moe_workspace_size>};
}

Op Sampler() {
  using Args = tenon_sampler_args;
  return {
      "tenon_sampler",
      "tenon_sampler_workspace_size",
      sizeof(Args),
      {FIELD(kFlags, flags), FIELD(kIn, logits), FIELD(kIn, params),
       FIELD(kOut, tokens), FIELD(kOptionalOut, logprobs),
       FIELD(kOut, statuses), FIELD(kWorkspace, workspace),
       FIELD(kWorkspaceSize, workspace_size), FIELD(kOptionalOut, raw_logprobs),
       FIELD(kOptionalOut, processed_logprobs)},
      nullptr,
      nullptr,
      BuildSampler,
      Run<Args, tenon_sampler>,
      Query<Args, tenon_sampler_workspace_size>};
}

#undef FIELD
#undef PARTLY

}  // namespace

const std::vector<Op>& Ops() {
  static const std::vector<Op> ops = {
      Embedding(), RmsNorm(),  Linear(),           QkNorm(),    Attention(),
      MoeRouter(), MoeAlign(), MoeGroupedMatmul(), MoeSwiGlu(), MoeSumReduce(),
      Moe(),       Sampler(),  QuantizeFp8()};
  return ops;
}

}  // namespace tenon::fuzz
