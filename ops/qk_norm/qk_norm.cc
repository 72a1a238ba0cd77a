#include "ops/qk_norm/qk_norm.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/qk_norm/qk_norm_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "QkNorm";
constexpr int64_t kMaxHeads = 1 << 16;

Status CheckNotGiven(const NamedView& tensor, const char* because) {
  if (!tensor.view.present()) return Status();
  return InvalidArgumentError(kOp, ": ", tensor.name, " is given, ", because);
}

Status CheckHeadDim(int64_t head_dim) {
  if (head_dim == 64 || head_dim == 128 || head_dim == 256) return Status();
  return InvalidArgumentError(kOp, ": head_dim is ", head_dim,
                              ", expected 64, 128 or 256");
}

// Requires num_heads heads from `offset` on to lie inside a row.
Status CheckOffset(const char* field, int64_t offset, int64_t num_heads,
                   const QkNormParams& p) {
  const int64_t last = p.qkv.shape[1] - num_heads * p.head_dim;
  if (offset >= 0 && offset <= last) return Status();
  return InvalidArgumentError(kOp, ": ", field, " is ", offset, ": ", num_heads,
                              " heads of ", p.head_dim,
                              " do not fit rows of qkv, which has ",
                              p.qkv.shape[1], " columns");
}

Status ValidatePacked(const QkNormParams& p) {
  for (const NamedView& tensor :
       {NamedView{"q", p.q}, NamedView{"k", p.k}, NamedView{"v", p.v}}) {
    TENON_RETURN_IF_ERROR(CheckNotGiven(tensor, "although qkv is"));
  }
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "qkv", p.qkv, {kAnySize, kAnySize},
                                    kFloatDTypes, p.qkv.device));
  TENON_RETURN_IF_ERROR(CheckHeadDim(p.head_dim));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_q_heads", p.num_q_heads, 1, kMaxHeads));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_kv_heads", p.num_kv_heads, 1, kMaxHeads));
  TENON_RETURN_IF_ERROR(CheckOffset("q_offset", p.q_offset, p.num_q_heads, p));
  TENON_RETURN_IF_ERROR(CheckOffset("k_offset", p.k_offset, p.num_kv_heads, p));
  if (!p.cache.k_cache.present()) return Status();
  return CheckOffset("v_offset", p.v_offset, p.num_kv_heads, p);
}

// Heads of qkv as a view [tokens, num_heads, head_dim].
TensorView PackedHeads(const QkNormParams& p, int64_t offset,
                       int64_t num_heads) {
  TensorView view = Columns(p.qkv, offset, num_heads);
  view.rank = 3;
  view.shape[2] = p.head_dim;
  view.stride[1] = p.head_dim;
  view.stride[2] = 1;
  return view;
}

QkNormParams ToStrided(const QkNormParams& p) {
  QkNormParams strided = p;
  strided.qkv = TensorView();
  strided.q = PackedHeads(p, p.q_offset, p.num_q_heads);
  strided.k = PackedHeads(p, p.k_offset, p.num_kv_heads);
  if (p.cache.k_cache.present()) {
    strided.v = PackedHeads(p, p.v_offset, p.num_kv_heads);
  }
  return strided;
}

// The strided form: what describes a packed row must not be set.
Status ValidateUnpacked(const QkNormParams& p) {
  const struct {
    const char* field;
    int64_t value;
  } fields[] = {
      {"q_offset", p.q_offset},         {"k_offset", p.k_offset},
      {"v_offset", p.v_offset},         {"num_q_heads", p.num_q_heads},
      {"num_kv_heads", p.num_kv_heads}, {"head_dim", p.head_dim}};
  for (const auto& [field, value] : fields) {
    if (value == 0) continue;
    return InvalidArgumentError(kOp, ": ", field, " is ", value,
                                ", expected 0 without qkv");
  }
  return Status();
}

// From here on `p` is in the strided form, and has v only where it is read.
Status ValidateHeads(const QkNormParams& p) {
  const Device device = p.q.device;
  TENON_RETURN_IF_ERROR(CheckOutput(
      kOp, "q", p.q, {kAnySize, kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t tokens = p.q.shape[0];
  const int64_t head_dim = p.q.shape[2];
  const DTypeSet same = DTypes({p.q.dtype});
  TENON_RETURN_IF_ERROR(CheckHeadDim(head_dim));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_q_heads", p.q.shape[1], 1, kMaxHeads));
  TENON_RETURN_IF_ERROR(
      CheckOutput(kOp, "k", p.k, {tokens, kAnySize, head_dim}, same, device));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "num_kv_heads", p.k.shape[1], 1, kMaxHeads));
  const DTypeSet weight_dtypes = same | DTypes({DType::kFloat32});
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "q_weight", p.q_weight, {head_dim},
                                    weight_dtypes, device));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "k_weight", p.k_weight, {head_dim},
                                    weight_dtypes, device));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "epsilon", p.epsilon,
                                    std::numeric_limits<float>::min(), 1.0));
  return CheckRange(kOp, "rounding", static_cast<int>(p.rounding), 0, 1);
}

Status ValidateRotary(const QkNormParams& p) {
  const RotaryParams& rotary = p.rotary;
  if (!rotary.cos_sin.present()) {
    // Half an embedding is a mistake of the caller, not a wish for none.
    TENON_RETURN_IF_ERROR(
        CheckNotGiven({"positions", rotary.positions}, "without cos_sin"));
    if (rotary.rotary_dim == 0) return Status();
    return InvalidArgumentError(kOp, ": rotary_dim is ", rotary.rotary_dim,
                                " without cos_sin");
  }
  const Device device = p.q.device;
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "rotary_dim", rotary.rotary_dim, 2, p.q.shape[2]));
  if (rotary.rotary_dim % 2 != 0) {
    return InvalidArgumentError(kOp, ": rotary_dim is ", rotary.rotary_dim,
                                ", expected an even number");
  }
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "cos_sin", rotary.cos_sin,
                                    {kAnySize, rotary.rotary_dim},
                                    DTypes({DType::kFloat32}), device));
  return CheckTensor(kOp, "positions", rotary.positions, {p.q.shape[0]},
                     DTypes({DType::kInt32, DType::kInt64}), device);
}

Status ValidateScale(const char* field, float scale, DType cache_dtype) {
  if (cache_dtype == DType::kFloat8E4M3) {
    return CheckFinite(kOp, field, scale, std::numeric_limits<float>::min(),
                       std::numeric_limits<float>::max());
  }
  if (scale == 1.0f) return Status();
  return InvalidArgumentError(kOp, ": ", field, " is ", scale,
                              ", expected 1 for a cache of ",
                              DTypeName(cache_dtype));
}

Status ValidateCache(const QkNormParams& p) {
  const KvCacheWriteParams& cache = p.cache;
  const Device device = p.q.device;
  if (!cache.k_cache.present()) {
    TENON_RETURN_IF_ERROR(
        CheckNotGiven({"v_cache", cache.v_cache}, "without k_cache"));
    TENON_RETURN_IF_ERROR(
        CheckNotGiven({"slot_mapping", cache.slot_mapping}, "without k_cache"));
    TENON_RETURN_IF_ERROR(ValidateScale("k_scale", cache.k_scale, p.q.dtype));
    return ValidateScale("v_scale", cache.v_scale, p.q.dtype);
  }
  const int64_t tokens = p.q.shape[0];
  const int64_t num_kv_heads = p.k.shape[1];
  const int64_t head_dim = p.q.shape[2];
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "v", p.v,
                                    {tokens, num_kv_heads, head_dim},
                                    DTypes({p.q.dtype}), device));
  TENON_RETURN_IF_ERROR(
      CheckOutput(kOp, "k_cache", cache.k_cache,
                  {kAnySize, kAnySize, num_kv_heads, head_dim},
                  DTypes({p.q.dtype, DType::kFloat8E4M3}), device));
  TENON_RETURN_IF_ERROR(CheckOutput(
      kOp, "v_cache", cache.v_cache,
      {cache.k_cache.shape[0], cache.k_cache.shape[1], num_kv_heads, head_dim},
      DTypes({cache.k_cache.dtype}), device));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "slot_mapping", cache.slot_mapping,
                                    {tokens}, DTypes({DType::kInt64}), device));
  TENON_RETURN_IF_ERROR(
      ValidateScale("k_scale", cache.k_scale, cache.k_cache.dtype));
  return ValidateScale("v_scale", cache.v_scale, cache.k_cache.dtype);
}

// Every tensor that is written must be apart from every other one.
Status ValidateOverlaps(const QkNormParams& p) {
  const NamedView tensors[] = {
      {"q", p.q},
      {"k", p.k},
      {"k_cache", p.cache.k_cache},
      {"v_cache", p.cache.v_cache},
      {"v", p.v},
      {"q_weight", p.q_weight},
      {"k_weight", p.k_weight},
      {"cos_sin", p.rotary.cos_sin},
      {"positions", p.rotary.positions},
      {"slot_mapping", p.cache.slot_mapping},
  };
  constexpr int kNumWritten = 4;
  constexpr int kNumTensors = sizeof(tensors) / sizeof(tensors[0]);
  for (int i = 0; i < kNumWritten; ++i) {
    for (int j = i + 1; j < kNumTensors; ++j) {
      if (MemoryOverlaps(tensors[i].view, tensors[j].view)) {
        return InvalidArgumentError(kOp, ": ", tensors[j].name, " overlaps ",
                                    tensors[i].name);
      }
    }
  }
  return Status();
}

Status RunStrided(const QkNormParams& p, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateHeads(p));
  TENON_RETURN_IF_ERROR(ValidateRotary(p));
  TENON_RETURN_IF_ERROR(ValidateCache(p));
  TENON_RETURN_IF_ERROR(ValidateOverlaps(p));
  if (p.q.shape[0] == 0) return Status();
  switch (p.q.device.type) {
    case DeviceType::kCpu:
      return QkNormCpu(p, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return QkNormCuda(p, stream);
      break;
  }
  return NoBackendError(kOp, p.q.device);
}

}  // namespace

Status QkNorm(const QkNormParams& params, Stream stream) {
  if (params.qkv.present()) {
    TENON_RETURN_IF_ERROR(ValidatePacked(params));
    return RunStrided(ToStrided(params), stream);
  }
  TENON_RETURN_IF_ERROR(ValidateUnpacked(params));
  if (params.cache.k_cache.present() || !params.v.present()) {
    return RunStrided(params, stream);
  }
  QkNormParams without_v = params;
  without_v.v = TensorView();
  return RunStrided(without_v, stream);
}

}  // namespace tenon
