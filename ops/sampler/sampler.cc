#include "ops/sampler/sampler.h"

#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/sampler/sampler_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Sampler";
constexpr int64_t kMaxRows = int64_t{1} << 20;

Status ValidateMemory(const SamplerParams& p) {
  const Device device = p.logits.device;
  const int64_t rows = p.logits.shape[0];
  if (p.params == nullptr) {
    return InvalidArgumentError(kOp, ": params is null");
  }
  if (reinterpret_cast<uintptr_t>(p.params) % alignof(SamplingParams) != 0) {
    return InvalidArgumentError(kOp, ": params is not aligned to ",
                                alignof(SamplingParams), " bytes");
  }
  const TensorView all_params =
      MakeTensor(p.params, DType::kUInt8, device,
                 {rows * static_cast<int64_t>(sizeof(SamplingParams))});
  const NamedView logits = {"logits", p.logits};
  const NamedView params = {"params", all_params};
  const NamedView tokens = {"tokens", p.tokens};
  const NamedView logprobs = {"logprobs", p.logprobs};
  const NamedView statuses = {"statuses", p.statuses};
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, tokens, {logits, params}));
  TENON_RETURN_IF_ERROR(CheckSeparate(kOp, logprobs, {logits, params, tokens}));
  TENON_RETURN_IF_ERROR(
      CheckSeparate(kOp, statuses, {logits, params, tokens, logprobs}));
  return CheckWorkspace(kOp, p.workspace, p.workspace_size,
                        SamplerWorkspaceBytes(p), device,
                        {logits, params, tokens, logprobs, statuses});
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
  TENON_RETURN_IF_ERROR(CheckRange(
      kName, "filter_order", static_cast<int>(params.filter_order), 0, 1));
  TENON_RETURN_IF_ERROR(CheckRange(kName, "reserved0", params.reserved0, 0, 0));
  for (uint32_t word : params.reserved) {
    TENON_RETURN_IF_ERROR(CheckRange(kName, "reserved", word, 0, 0));
  }
  return Status();
}

Status ValidateSamplerShapes(const SamplerParams& p) {
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
  return CheckOutput(kOp, "statuses", p.statuses, {rows},
                     DTypes({DType::kInt32}), device);
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
  TENON_RETURN_IF_ERROR(ValidateSamplerShapes(params));
  if (params.logits.shape[0] == 0) return Status();
  TENON_RETURN_IF_ERROR(ValidateMemory(params));
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
