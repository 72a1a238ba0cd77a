#include "ops/quantize/quantize.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/quantize/quantize_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "QuantizeFp8";

Status ValidateBlocks(const QuantizeFp8Params& p) {
  if (p.block_rows != 1 && p.block_rows != 128) {
    return InvalidArgumentError(kOp, ": block_rows is ", p.block_rows,
                                ", expected 1 or 128");
  }
  if (p.block_cols != 0 && p.block_cols != 128) {
    return InvalidArgumentError(kOp, ": block_cols is ", p.block_cols,
                                ", expected 128, or 0 for all columns");
  }
  if (p.block_cols == 0 && p.block_rows != 1) {
    return InvalidArgumentError(kOp, ": block_rows is ", p.block_rows,
                                ", expected 1 where block_cols is 0");
  }
  return Status();
}

Status Validate(const QuantizeFp8Params& p) {
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  const Device device = p.x.device;
  TENON_RETURN_IF_ERROR(
      CheckTensor(kOp, "x", p.x, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t rows = p.x.shape[0];
  const int64_t cols = p.x.shape[1];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "rows of x", rows, 0, kMaxSize));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "columns of x", cols, 1, kMaxSize));
  TENON_RETURN_IF_ERROR(ValidateBlocks(p));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out, {rows, cols},
                                    DTypes({DType::kFloat8E4M3}), device));
  const Fp8Blocks blocks = Fp8BlocksOf(p);
  const DTypeSet float32 = DTypes({DType::kFloat32});
  TENON_RETURN_IF_ERROR(
      p.block_cols == 0
          ? CheckOutput(kOp, "scales", p.scales, {rows}, float32, device)
          : CheckOutput(kOp, "scales", p.scales,
                        {blocks.count_r, blocks.count_c}, float32, device));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, {"out", p.out}, {{"x", p.x}}));
  return CheckSeparate(kOp, {"scales", p.scales}, {{"x", p.x}, {"out", p.out}});
}

}  // namespace

Status QuantizeFp8(const QuantizeFp8Params& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.x.shape[0] == 0) return Status();
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return QuantizeFp8Cpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return QuantizeFp8Cuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
