#include "ops/moe/moe_swiglu.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_swiglu_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "MoeSwiGlu";
constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kMinFloat = std::numeric_limits<float>::min();

Status Validate(const MoeSwiGluParams& p) {
  const Device device = p.x.device;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t columns = p.x.shape[1];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "columns of x", columns, 2,
                                   std::numeric_limits<int32_t>::max()));
  if (columns % 2 != 0) {
    return InvalidArgumentError(kOp, ": x has ", columns,
                                " columns, expected an even number");
  }
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out,
                                    {p.x.shape[0], columns / 2},
                                    DTypes({p.x.dtype}), device));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "layout", static_cast<int>(p.layout), 0, 1));
  TENON_RETURN_IF_ERROR(CheckFinite(kOp, "limit", p.limit, 0.0, kMaxFloat));
  const bool limited = p.limit > 0.0f;
  TENON_RETURN_IF_ERROR(CheckFinite(
      kOp, limited ? "alpha (with a limit)" : "alpha (without a limit)",
      p.alpha, limited ? kMinFloat : 0.0, limited ? kMaxFloat : 0.0));
  if (MemoryOverlaps(p.out, p.x)) {
    return InvalidArgumentError(kOp, ": out overlaps x");
  }
  return Status();
}

}  // namespace

Status MoeSwiGlu(const MoeSwiGluParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.x.shape[0] == 0) return Status();
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return MoeSwiGluCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return MoeSwiGluCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
