#include "ops/linear/linear.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/linear/linear_backend.h"
#include "ops/quantize/fp8_scale.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Linear";

Status ValidateMemory(const LinearParams& p) {
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"out", p.out},
                                      {{"x", p.x},
                                       {"weight", p.weight},
                                       {"bias", p.bias},
                                       {"weight_scales", p.weight_scales}}));
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
                         {"out", p.out}});
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
  return CheckOutput(kOp, "out", p.out, {tokens, out_features},
                     same | DTypes({DType::kFloat32}), device);
}

size_t LinearWorkspaceBytes(const LinearParams& params) {
  // Sizes are asked for before there is memory; any address will do here.
  alignas(16) char memory[16];
  LinearParams p = params;
  for (TensorView* view :
       {&p.x, &p.weight, &p.bias, &p.out, &p.weight_scales}) {
    view->data = memory;
  }
  if (!ValidateLinearShapes(p).ok() || p.x.shape[0] == 0) return 0;
  if (p.x.device.type == DeviceType::kCpu) return LinearCpuWorkspaceBytes(p);
  if (p.weight.dtype == DType::kFloat8E4M3) return LinearFp8WorkspaceBytes(p);
  // For any alignment of the data: whether GEMV takes the call depends on that.
  return p.cublas_lt != nullptr && !p.batch_invariant ? kCublasLtWorkspaceBytes
                                                      : 0;
}

Status Linear(const LinearParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateLinearShapes(params));
  if (params.x.shape[0] == 0) return Status();
  TENON_RETURN_IF_ERROR(ValidateMemory(params));
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return LinearCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return LinearCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
