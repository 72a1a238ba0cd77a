#include "ops/moe/moe_sum_reduce.h"

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/moe/moe_sum_reduce_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "MoeSumReduce";
constexpr int64_t kMaxSize = int64_t{1} << 30;  // int indices with room to step

Status Validate(const MoeSumReduceParams& p) {
  const Device device = p.x.device;
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "x", p.x, {kAnySize, kAnySize, kAnySize}, kFloatDTypes, device));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "top_k (x.shape[1])", p.x.shape[1], 1, kMaxSize));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "hidden (x.shape[2])", p.x.shape[2], 1, kMaxSize));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out,
                                    {p.x.shape[0], p.x.shape[2]},
                                    DTypes({p.x.dtype}), device));
  if (MemoryOverlaps(p.out, p.x)) {
    return InvalidArgumentError(kOp, ": out overlaps x");
  }
  return Status();
}

}  // namespace

Status MoeSumReduce(const MoeSumReduceParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.x.shape[0] == 0) return Status();
  switch (params.x.device.type) {
    case DeviceType::kCpu:
      return MoeSumReduceCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return MoeSumReduceCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.x.device);
}

}  // namespace tenon
