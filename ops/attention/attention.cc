#include "ops/attention/attention.h"

#include <limits>

#include "ops/attention/attention_backend.h"
#include "ops/core/build_config.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Attention";
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

Status ValidateHeads(const AttentionParams& p) {
  const int64_t heads = p.q.shape[1];
  const int64_t kv_heads = p.k_cache.shape[2];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_heads (dimension 1 of q)", heads, 1, 65535));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_kv_heads (dimension 2 of k_cache)",
                                   kv_heads, 1, heads));
  if (heads % kv_heads != 0) {
    return InvalidArgumentError(
        kOp, ": num_heads (dimension 1 of q) is ", heads,
        ", expected a multiple of num_kv_heads (dimension 2 of k_cache) ",
        kv_heads);
  }
  const int64_t head_dim = p.q.shape[2];
  if (head_dim != 64 && head_dim != 128 && head_dim != 256) {
    return InvalidArgumentError(kOp, ": head_dim (dimension 2 of q) is ",
                                head_dim, ", expected 64, 128 or 256");
  }
  return Status();
}

Status ValidateCaches(const AttentionParams& p) {
  const Device device = p.q.device;
  const int64_t head_dim = p.q.shape[2];
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "k_cache", p.k_cache, {kAnySize, kAnySize, kAnySize, head_dim},
      DTypes({p.q.dtype, DType::kFloat8E4M3}), device));
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "v_cache", p.v_cache,
      {p.k_cache.shape[0], p.k_cache.shape[1], p.k_cache.shape[2], head_dim},
      DTypes({p.k_cache.dtype}), device));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_pages (dimension 0 of k_cache)",
                                   p.k_cache.shape[0], 0, kMaxInt32));
  return CheckRange(kOp, "page_size (dimension 1 of k_cache)",
                    p.k_cache.shape[1], 1, 65536);
}

Status ValidateBatch(const AttentionParams& p) {
  const Device device = p.q.device;
  const DTypeSet int32 = DTypes({DType::kInt32});
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "block_table", p.block_table,
                                    {kAnySize, kAnySize}, int32, device));
  const int64_t num_seqs = p.block_table.shape[0];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_seqs (dimension 0 of block_table)",
                                   num_seqs, 0, kMaxInt32 / 64));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "query_start", p.query_start,
                                    {num_seqs + 1}, int32, device));
  return CheckTensor(kOp, "kv_len", p.kv_len, {num_seqs}, int32, device);
}

Status ValidateScalars(const AttentionParams& p) {
  constexpr double kMin = std::numeric_limits<float>::min();
  constexpr double kMax = std::numeric_limits<float>::max();
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "scale", p.scale, kMin, kMax));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "k_scale", p.k_scale, kMin, kMax));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "v_scale", p.v_scale, kMin, kMax));
  if (p.k_cache.dtype != DType::kFloat8E4M3 &&
      (p.k_scale != 1.0f || p.v_scale != 1.0f)) {
    return InvalidArgumentError(
        kOp, ": k_scale is ", p.k_scale, " and v_scale ", p.v_scale,
        ", expected 1 for caches of ", DTypeName(p.k_cache.dtype));
  }
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "max_kv_len", p.max_kv_len, 0, kMaxInt32));
  return CheckRange(kOp, "max_query_len", p.max_query_len, 0, kMaxInt32);
}

Status ValidateAliasing(const AttentionParams& p) {
  const bool in_place = p.out.data == p.q.data;
  if (!in_place && MemoryOverlaps(p.out, p.q)) {
    return InvalidArgumentError(kOp, ": out overlaps q without being q");
  }
  for (int i = 0; in_place && i < 2; ++i) {
    if (p.out.shape[i] > 1 && p.out.stride[i] != p.q.stride[i]) {
      return InvalidArgumentError(kOp, ": out is q with another stride, ",
                                  p.out.stride[i], ", in dimension ", i);
    }
  }
  return CheckSeparate(kOp, {"out", p.out},
                       {{"k_cache", p.k_cache},
                        {"v_cache", p.v_cache},
                        {"block_table", p.block_table},
                        {"query_start", p.query_start},
                        {"kv_len", p.kv_len}});
}

Status CheckScratch(const AttentionParams& p) {
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        PlannedWorkspaceBytes(p), p.q.device,
                        {{"q", p.q},
                         {"k_cache", p.k_cache},
                         {"v_cache", p.v_cache},
                         {"block_table", p.block_table},
                         {"query_start", p.query_start},
                         {"kv_len", p.kv_len},
                         {"out", p.out}});
}

}  // namespace

Status ValidateAttentionShapes(const AttentionParams& p) {
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "q", p.q, {kAnySize, kAnySize, kAnySize}, kFloatDTypes, p.q.device));
  const int64_t tokens = p.q.shape[0];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "tokens (dimension 0 of q)", tokens, 0, kMaxInt32 / 64));
  TENON_RETURN_IF_ERROR(ValidateCaches(p));
  TENON_RETURN_IF_ERROR(ValidateHeads(p));
  TENON_RETURN_IF_ERROR(ValidateBatch(p));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out,
                                    {tokens, p.q.shape[1], p.q.shape[2]},
                                    DTypes({p.q.dtype}), p.q.device));
  return ValidateScalars(p);
}

size_t AttentionWorkspaceBytes(const AttentionParams& params) {
  // Sizes are asked for before there is memory; any address will do here.
  alignas(16) char memory[16];
  AttentionParams p = params;
  for (TensorView* view : {&p.q, &p.k_cache, &p.v_cache, &p.block_table,
                           &p.query_start, &p.kv_len, &p.out}) {
    view->data = memory;
  }
  return ValidateAttentionShapes(p).ok() ? PlannedWorkspaceBytes(p) : 0;
}

Status Attention(const AttentionParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateAttentionShapes(params));
  TENON_RETURN_IF_ERROR(ValidateAliasing(params));
  if (params.q.shape[0] == 0) return Status();
  TENON_RETURN_IF_ERROR(CheckScratch(params));
  const AttentionPlan plan = PlanAttention(params);
  switch (params.q.device.type) {
    case DeviceType::kCpu:
      return AttentionCpu(params, plan, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return AttentionCuda(params, plan, stream);
      break;
  }
  return NoBackendError(kOp, params.q.device);
}

}  // namespace tenon
