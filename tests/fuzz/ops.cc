#include "tests/fuzz/op_build.h"

// Every op: its fields, and how to make a valid call of it.

namespace tenon::fuzz {
namespace {

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

}  // namespace

const std::vector<Op>& Ops() {
  static const std::vector<Op> ops = {
      Embedding(), RmsNorm(),  Linear(),           QkNorm(),    Attention(),
      MoeRouter(), MoeAlign(), MoeGroupedMatmul(), MoeSwiGlu(), MoeSumReduce(),
      Moe(),       Sampler(),  QuantizeFp8()};
  return ops;
}

}  // namespace tenon::fuzz
