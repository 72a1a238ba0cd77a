#include "ops/embedding/embedding.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/embedding/embedding_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Embedding";

Status Validate(const EmbeddingParams& p) {
  const Device device = p.out.device;
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "out", p.out, {kAnySize, kAnySize},
                                    kFloatDTypes, device));
  const int64_t tokens = p.out.shape[0];
  const int64_t hidden = p.out.shape[1];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "hidden (columns of out)", hidden, 1,
                                   std::numeric_limits<int32_t>::max()));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "ids", p.ids, {tokens},
                                    DTypes({DType::kInt32, DType::kInt64}),
                                    device));
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "table", p.table, {kAnySize, hidden},
                                    DTypes({p.out.dtype}), device));
  if (p.previous.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "previous", p.previous, {kAnySize},
                                      DTypes({DType::kInt32}), device));
    if (MemoryOverlaps(p.out, p.previous)) {
      return InvalidArgumentError(kOp, ": out overlaps previous");
    }
  }
  if (MemoryOverlaps(p.out, p.table)) {
    return InvalidArgumentError(kOp, ": out overlaps table");
  }
  if (MemoryOverlaps(p.out, p.ids)) {
    return InvalidArgumentError(kOp, ": out overlaps ids");
  }
  return Status();
}

}  // namespace

Status Embedding(const EmbeddingParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.out.shape[0] == 0) return Status();
  switch (params.out.device.type) {
    case DeviceType::kCpu:
      return EmbeddingCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return EmbeddingCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.out.device);
}

}  // namespace tenon
