#include "ops/linear/linear.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/linear/linear_backend.h"
#include "ops/quantize/fp8_scale.h"
#include "ops/rms_norm/rms_norm.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Linear";
constexpr int64_t kMaxTerms = 32;

// residual may be out, and nothing between that and being apart from it.
Status ValidateResidualMemory(const LinearParams& p) {
  if (!p.residual.present()) return Status();
  if (p.residual.data == p.out.data) {
    if (p.out.shape[0] == 1 || p.out.stride[0] == p.residual.stride[0]) {
      return Status();
    }
    return InvalidArgumentError(kOp, ": out is residual with another stride");
  }
  return CheckSeparate(kOp, {"out", p.out}, {{"residual", p.residual}});
}

Status ValidateMemory(const LinearParams& p) {
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"out", p.out},
                                      {{"x", p.x},
                                       {"weight", p.weight},
                                       {"bias", p.bias},
                                       {"weight_scales", p.weight_scales},
                                       {"norm.weight", p.norm.weight},
                                       {"terms.rows", p.terms.rows},
                                       {"terms.ids", p.terms.ids}}));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"terms.sum", p.terms.sum},
                                      {{"x", p.x},
                                       {"weight", p.weight},
                                       {"bias", p.bias},
                                       {"weight_scales", p.weight_scales},
                                       {"norm.weight", p.norm.weight},
                                       {"norm.out", p.norm.out},
                                       {"terms.rows", p.terms.rows},
                                       {"terms.ids", p.terms.ids},
                                       {"residual", p.residual},
                                       {"out", p.out}}));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"norm.out", p.norm.out},
                                      {{"x", p.x},
                                       {"weight", p.weight},
                                       {"bias", p.bias},
                                       {"weight_scales", p.weight_scales},
                                       {"norm.weight", p.norm.weight},
                                       {"terms.rows", p.terms.rows},
                                       {"terms.ids", p.terms.ids},
                                       {"residual", p.residual},
                                       {"out", p.out}}));
  TENON_RETURN_IF_ERROR(ValidateResidualMemory(p));
  if (p.cublas_lt != nullptr && p.cublas_lt->device() != p.x.device) {
    return InvalidArgumentError(
        kOp, ": cublas_lt is of cuda:", p.cublas_lt->device().index,
        ", expected ", DeviceTypeName(p.x.device.type), ":", p.x.device.index);
  }
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        LinearWorkspaceBytes(p), p.x.device,
                        {{"x", p.x},
                         {"weight", p.weight},
                         {"bias", p.bias},
                         {"weight_scales", p.weight_scales},
                         {"norm.weight", p.norm.weight},
                         {"norm.out", p.norm.out},
                         {"terms.rows", p.terms.rows},
                         {"terms.ids", p.terms.ids},
                         {"terms.sum", p.terms.sum},
                         {"residual", p.residual},
                         {"out", p.out}});
}

Status ValidateNorm(const LinearParams& p) {
  if (!p.norm.present()) {
    if (!p.norm.out.present()) return Status();
    return InvalidArgumentError(kOp, ": norm.out is given without norm.weight");
  }
  const DTypeSet same = DTypes({p.x.dtype});
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "norm.weight", p.norm.weight, {p.x.shape[1]},
                  same | DTypes({DType::kFloat32}), p.x.device));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "norm.out", p.norm.out,
                                    {p.x.shape[0], p.x.shape[1]}, same,
                                    p.x.device));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "norm.epsilon", p.norm.epsilon,
                                    std::numeric_limits<float>::min(), 1.0));
  return CheckRange(kOp, "norm.rounding", static_cast<int>(p.norm.rounding), 0,
                    1);
}

Status ValidateTerms(const LinearParams& p) {
  const LinearTerms& t = p.terms;
  if (!t.present()) return Status();
  if (!p.norm.present()) {
    return InvalidArgumentError(kOp, ": terms are given without norm");
  }
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  const DTypeSet same = DTypes({p.x.dtype});
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "terms.ids", t.ids, {tokens, kAnySize},
                                    DTypes({DType::kInt32}), p.x.device));
  const int64_t count = t.ids.shape[1];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "terms (columns of terms.ids)", count, 1, kMaxTerms));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "terms.rows", t.rows,
                                    {tokens, count, in_features}, same,
                                    p.x.device));
  if (t.rows.stride[0] != count * in_features ||
      t.rows.stride[1] != in_features) {
    return InvalidArgumentError(kOp, ": terms.rows have gaps");
  }
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "terms.num_ids", t.num_ids, 0,
                                   std::numeric_limits<int32_t>::max()));
  return CheckOutput(kOp, "terms.sum", t.sum, {tokens, in_features}, same,
                     p.x.device);
}

Status ValidateWeightScales(const LinearParams& p) {
  if (p.weight.dtype != DType::kFloat8E4M3) {
    if (!p.weight_scales.present()) return Status();
    return InvalidArgumentError(kOp, ": weight_scales is given for a ",
                                DTypeName(p.weight.dtype),
                                " weight, expected float8_e4m3");
  }
  const DTypeSet float32 = DTypes({DType::kFloat32});
  const int64_t rows = p.weight.shape[0];
  if (p.weight_scales.rank == 1) {
    return CheckTensor(kOp, "weight_scales", p.weight_scales, {rows}, float32,
                       p.x.device);
  }
  return CheckTensor(kOp, "weight_scales", p.weight_scales,
                     {NumFp8Groups(rows), NumFp8Groups(p.weight.shape[1])},
                     float32, p.x.device);
}

}  // namespace

Status ValidateLinearShapes(const LinearParams& p) {
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  const Device device = p.x.device;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  const DTypeSet same = DTypes({p.x.dtype});
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "tokens (rows of x)", tokens, 0, kMaxSize));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "in_features (columns of x)", in_features, 1, kMaxSize));
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "weight", p.weight, {kAnySize, in_features},
                  same | DTypes({DType::kFloat8E4M3}), device));
  const int64_t out_features = p.weight.shape[0];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "out_features (rows of weight)",
                                   out_features, 1, kMaxSize));
  TENON_RETURN_IF_ERROR(ValidateWeightScales(p));
  if (p.bias.present()) {
    TENON_RETURN_IF_ERROR(
        CheckTensor(kOp, "bias", p.bias, {out_features}, same, device));
  }
  TENON_RETURN_IF_ERROR(ValidateNorm(p));
  TENON_RETURN_IF_ERROR(ValidateTerms(p));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out, {tokens, out_features},
                                    same | DTypes({DType::kFloat32}), device));
  if (!p.residual.present()) return Status();
  return CheckTensor(kOp, "residual", p.residual, {tokens, out_features},
                     DTypes({p.out.dtype}), device);
}

Status NormalizeLinearInput(LinearParams* p, Stream stream) {
  if (!p->norm.present()) return Status();
  RmsNormParams norm;
  norm.x = p->x;
  norm.weight = p->norm.weight;
  norm.out = p->norm.out;
  norm.epsilon = p->norm.epsilon;
  norm.rounding = p->norm.rounding;
  p->x = p->norm.out;
  p->norm = LinearNorm();
  return RmsNorm(norm, stream);
}

size_t LinearWorkspaceBytes(const LinearParams& params) {
  // Sizes are asked for before there is memory; any address will do here.
  alignas(16) char memory[16];
  LinearParams p = params;
  for (TensorView* view :
       {&p.x, &p.weight, &p.bias, &p.out, &p.weight_scales, &p.norm.weight,
        &p.norm.out, &p.residual, &p.terms.rows, &p.terms.ids, &p.terms.sum}) {
    view->data = memory;
  }
  if (!ValidateLinearShapes(p).ok() || p.x.shape[0] == 0) return 0;
  if (p.x.device.type == DeviceType::kCpu) return LinearCpuWorkspaceBytes(p);
  return LinearCudaWorkspaceBytes(p);
}

Status Linear(const LinearParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateLinearShapes(params));
  if (params.x.shape[0] == 0) return Status();
  TENON_RETURN_IF_ERROR(ValidateMemory(params));
  switch (params.x.device.type) {
    case DeviceType::kCpu: {
      LinearParams p = params;
      AddLinearTermsCpu(&p, stream);
      TENON_RETURN_IF_ERROR(NormalizeLinearInput(&p, stream));
      return LinearCpu(p, stream);
    }
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return LinearCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
