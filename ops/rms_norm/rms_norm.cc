#include "ops/rms_norm/rms_norm.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/rms_norm/rms_norm_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "RmsNorm";

Status Validate(const RmsNormParams& p) {
  const Device device = p.x.device;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t tokens = p.x.shape[0];
  const int64_t hidden = p.x.shape[1];
  const DTypeSet same = DTypes({p.x.dtype});
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "hidden (columns of x)", hidden, 1, int64_t{1} << 30));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "weight", p.weight, {hidden},
                                    same | DTypes({DType::kFloat32}), device));
  TENON_RETURN_IF_ERROR(
      CheckOutput(kOp, "out", p.out, {tokens, hidden}, same, device));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "epsilon", p.epsilon,
                                    std::numeric_limits<float>::min(), 1.0));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "rounding", static_cast<int>(p.rounding), 0, 1));
  if (p.out.data != p.x.data && MemoryOverlaps(p.out, p.x)) {
    return InvalidArgumentError(kOp, ": out overlaps x without being x");
  }
  if (p.out.data == p.x.data && tokens > 1 &&
      p.out.stride[0] != p.x.stride[0]) {
    return InvalidArgumentError(kOp, ": out is x with another row stride");
  }
  if (MemoryOverlaps(p.out, p.weight)) {
    return InvalidArgumentError(kOp, ": out overlaps weight");
  }
  if (!p.residual.present()) return Status();
  TENON_RETURN_IF_ERROR(
      CheckOutput(kOp, "residual", p.residual, {tokens, hidden}, same, device));
  if (MemoryOverlaps(p.residual, p.x) || MemoryOverlaps(p.residual, p.out) ||
      MemoryOverlaps(p.residual, p.weight)) {
    return InvalidArgumentError(kOp, ": residual overlaps x, weight or out");
  }
  return Status();
}

}  // namespace

Status RmsNorm(const RmsNormParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.x.shape[0] == 0) return Status();
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return RmsNormCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return RmsNormCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
