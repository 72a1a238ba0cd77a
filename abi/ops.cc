#include "abi/op_call.h"
#include "ops/attention/attention.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/linear.h"
#include "ops/qk_norm/qk_norm.h"
#include "ops/quantize/quantize.h"
#include "ops/rms_norm/rms_norm.h"

namespace tenon::abi {
namespace {

static_assert(TENON_ROUNDING_FLOAT32_MULTIPLY ==
                  static_cast<int>(NormRounding::kFloat32Multiply) &&
              TENON_ROUNDING_CAST_THEN_MULTIPLY ==
                  static_cast<int>(NormRounding::kCastThenMultiply));

// A scale of caches: only float8 ones must have it.
float CacheScale(float scale, const TensorView& cache) {
  return cache.dtype == DType::kFloat8E4M3 ? scale : ZeroMeansOne(scale);
}

Status ReadEmbedding(const tenon_embedding_args& args, OpCall* call,
                     EmbeddingParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  return call->ReadTensors({{"ids", args.ids, &p->ids},
                            {"table", args.table, &p->table},
                            {"out", args.out, &p->out}});
}

Status ReadRmsNorm(const tenon_rms_norm_args& args, OpCall* call,
                   RmsNormParams* p) {
  p->epsilon = args.epsilon;
  p->rounding = static_cast<NormRounding>(args.rounding);
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  return call->ReadTensors({{"x", args.x, &p->x},
                            Optional("residual", args.residual, &p->residual),
                            {"weight", args.weight, &p->weight},
                            {"out", args.out, &p->out}});
}

Status ReadLinear(const tenon_linear_args& args, OpCall* call,
                  LinearParams* p) {
  TENON_RETURN_IF_ERROR(
      CheckFlags("flags", args.flags, TENON_FLAG_BATCH_INVARIANT));
  p->batch_invariant = (args.flags & TENON_FLAG_BATCH_INVARIANT) != 0;
  p->cublas_lt = call->cublas_lt();
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  TENON_RETURN_IF_ERROR(call->ReadTensors(
      {{"x", args.x, &p->x},
       {"weight", args.weight, &p->weight},
       Optional("bias", args.bias, &p->bias),
       Optional("weight_scales", args.weight_scales, &p->weight_scales),
       {"out", args.out, &p->out}}));
  return CheckScalesGiven("weight_scales", args.weight_scales, p->weight);
}

Status ReadQuantizeFp8(const tenon_quantize_fp8_args& args, OpCall* call,
                       QuantizeFp8Params* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  p->block_rows = args.block_rows;
  p->block_cols = args.block_cols;
  return call->ReadTensors({{"x", args.x, &p->x},
                            {"out", args.out, &p->out},
                            {"scales", args.scales, &p->scales}});
}

Status ReadQkNorm(const tenon_qk_norm_args& args, OpCall* call,
                  QkNormParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  if (args.qkv == nullptr && args.q == nullptr) {
    return InvalidArgumentError("qkv and q are null, expected one of them");
  }
  TENON_RETURN_IF_ERROR(call->ReadTensors({
      Optional("qkv", args.qkv, &p->qkv),
      Optional("q", args.q, &p->q),
      Optional("k", args.k, &p->k),
      Optional("v", args.v, &p->v),
      {"q_weight", args.q_weight, &p->q_weight},
      {"k_weight", args.k_weight, &p->k_weight},
      Optional("cos_sin", args.cos_sin, &p->rotary.cos_sin),
      Optional("positions", args.positions, &p->rotary.positions),
      Optional("k_cache", args.k_cache, &p->cache.k_cache),
      Optional("v_cache", args.v_cache, &p->cache.v_cache),
      Optional("slot_mapping", args.slot_mapping, &p->cache.slot_mapping),
  }));
  p->q_offset = args.q_offset;
  p->k_offset = args.k_offset;
  p->v_offset = args.v_offset;
  p->num_q_heads = args.num_q_heads;
  p->num_kv_heads = args.num_kv_heads;
  p->head_dim = args.head_dim;
  p->epsilon = args.epsilon;
  p->rounding = static_cast<NormRounding>(args.rounding);
  p->rotary.rotary_dim = args.rotary_dim;
  p->cache.k_scale = CacheScale(args.k_scale, p->cache.k_cache);
  p->cache.v_scale = CacheScale(args.v_scale, p->cache.k_cache);
  return Status();
}

Status ReadAttention(const tenon_attention_args& args, OpCall* call,
                     AttentionParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  TENON_RETURN_IF_ERROR(
      CheckFlags("flags", args.flags, TENON_FLAG_BATCH_INVARIANT));
  TENON_RETURN_IF_ERROR(
      call->ReadTensors({{"q", args.q, &p->q},
                         {"k_cache", args.k_cache, &p->k_cache},
                         {"v_cache", args.v_cache, &p->v_cache},
                         {"block_table", args.block_table, &p->block_table},
                         {"query_start", args.query_start, &p->query_start},
                         {"kv_len", args.kv_len, &p->kv_len},
                         {"out", args.out, &p->out}}));
  p->scale = args.scale;
  p->k_scale = CacheScale(args.k_scale, p->k_cache);
  p->v_scale = CacheScale(args.v_scale, p->k_cache);
  p->max_kv_len = args.max_kv_len;
  p->max_query_len = args.max_query_len;
  p->batch_invariant = (args.flags & TENON_FLAG_BATCH_INVARIANT) != 0;
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  return Status();
}

}  // namespace
}  // namespace tenon::abi

using tenon::abi::QueryWorkspace;
using tenon::abi::RunOp;

int32_t tenon_embedding(tenon_context context, const tenon_embedding_args* args,
                        void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadEmbedding, tenon::Embedding);
}

int32_t tenon_rms_norm(tenon_context context, const tenon_rms_norm_args* args,
                       void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error, tenon::abi::ReadRmsNorm,
               tenon::RmsNorm);
}

int32_t tenon_linear_workspace_size(tenon_context context,
                                    const tenon_linear_args* args,
                                    uint64_t* bytes, tenon_error* error) {
  return QueryWorkspace(__func__, context, args, bytes, error,
                        tenon::abi::ReadLinear, tenon::ValidateLinearShapes,
                        tenon::LinearWorkspaceBytes);
}

int32_t tenon_linear(tenon_context context, const tenon_linear_args* args,
                     void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error, tenon::abi::ReadLinear,
               tenon::Linear);
}

int32_t tenon_quantize_fp8(tenon_context context,
                           const tenon_quantize_fp8_args* args, void* stream,
                           tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadQuantizeFp8, tenon::QuantizeFp8);
}

int32_t tenon_qk_norm(tenon_context context, const tenon_qk_norm_args* args,
                      void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error, tenon::abi::ReadQkNorm,
               tenon::QkNorm);
}

int32_t tenon_attention_workspace_size(tenon_context context,
                                       const tenon_attention_args* args,
                                       uint64_t* bytes, tenon_error* error) {
  return QueryWorkspace(
      __func__, context, args, bytes, error, tenon::abi::ReadAttention,
      tenon::ValidateAttentionShapes, tenon::AttentionWorkspaceBytes);
}

int32_t tenon_attention(tenon_context context, const tenon_attention_args* args,
                        void* stream, tenon_error* error) {
  return RunOp(__func__, context, args, stream, error,
               tenon::abi::ReadAttention, tenon::Attention);
}
