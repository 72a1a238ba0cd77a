#include "ops/sampler/sampler.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/sampler/sampler_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Sampler";
constexpr int64_t kMaxRows = int64_t{1} << 20;

Status CheckSeparate(const char* name, const TensorView& out,
                     const char* other_name, const TensorView& other) {
  if (!out.present() || !other.present() || !MemoryOverlaps(out, other)) {
    return Status();
  }
  return InvalidArgumentError(kOp, ": ", name, " overlaps ", other_name);
}

Status Validate(const SamplerParams& p) {
  const Device device = p.logits.device;
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "logits", p.logits, {kAnySize, kAnySize}, kFloatDTypes, device));
  const int64_t rows = p.logits.shape[0];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "rows (of logits)", rows, 0, kMaxRows));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "vocab (columns of logits)",
                                   p.logits.shape[1], 1, kMaxVocab));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "tokens", p.tokens, {rows},
                                    DTypes({DType::kInt32}), device));
  if (p.logprobs.present()) {
    TENON_RETURN_IF_ERROR(CheckOutput(kOp, "logprobs", p.logprobs, {rows},
                                      DTypes({DType::kFloat32}), device));
  }
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "statuses", p.statuses, {rows},
                                    DTypes({DType::kInt32}), device));
  TENON_RETURN_IF_ERROR(CheckSeparate("tokens", p.tokens, "logits", p.logits));
  TENON_RETURN_IF_ERROR(
      CheckSeparate("logprobs", p.logprobs, "logits", p.logits));
  TENON_RETURN_IF_ERROR(
      CheckSeparate("statuses", p.statuses, "logits", p.logits));
  TENON_RETURN_IF_ERROR(
      CheckSeparate("logprobs", p.logprobs, "tokens", p.tokens));
  TENON_RETURN_IF_ERROR(
      CheckSeparate("statuses", p.statuses, "tokens", p.tokens));
  TENON_RETURN_IF_ERROR(
      CheckSeparate("statuses", p.statuses, "logprobs", p.logprobs));
  if (rows == 0) return Status();
  if (p.params == nullptr) {
    return InvalidArgumentError(kOp, ": params is null");
  }
  if (reinterpret_cast<uintptr_t>(p.params) % alignof(SamplingParams) != 0) {
    return InvalidArgumentError(kOp, ": params is not aligned to ",
                                alignof(SamplingParams), " bytes");
  }
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        SamplerWorkspaceBytes(p), device);
}

}  // namespace

Status ValidateSamplingParams(const SamplingParams& params) {
  constexpr char kName[] = "SamplingParams";
  TENON_RETURN_IF_ERROR(CheckFinite(kName, "temperature", params.temperature,
                                    0.0, std::numeric_limits<float>::max()));
  TENON_RETURN_IF_ERROR(CheckRange(kName, "top_k", params.top_k, -1,
                                   std::numeric_limits<int32_t>::max()));
  TENON_RETURN_IF_ERROR(CheckFinite(kName, "top_p", params.top_p, 0.0, 1.0));
  TENON_RETURN_IF_ERROR(CheckFinite(kName, "min_p", params.min_p, 0.0, 1.0));
  return CheckRange(kName, "filter_order",
                    static_cast<int>(params.filter_order), 0, 1);
}

size_t SamplerWorkspaceBytes(const SamplerParams& params) {
  const TensorView& logits = params.logits;
  if (logits.rank != 2 || logits.shape[0] <= 0 || logits.shape[1] <= 0) {
    return 0;
  }
  size_t of_sub_tile = sizeof(SubTile);
  if (logits.device.type == DeviceType::kCpu) of_sub_tile += sizeof(double);
  return static_cast<size_t>(logits.shape[0]) *
         static_cast<size_t>(NumSubTiles(logits.shape[1])) * of_sub_tile;
}

Status Sampler(const SamplerParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(Validate(params));
  if (params.logits.shape[0] == 0) return Status();
  switch (params.logits.device.type) {
    case DeviceType::kCpu:
      return SamplerCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return SamplerCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.logits.device);
}

}  // namespace tenon
