#include "ops/sampler/speculative.h"

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/sampler/speculative_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Speculative";
constexpr int64_t kMaxSequences = int64_t{1} << 20;
constexpr int64_t kMaxDrafts = 64;

Status ValidateTarget(const SpeculativeParams& p) {
  const Device device = p.draft_tokens.device;
  const int64_t sequences = p.draft_tokens.shape[0];
  const int64_t drafts = p.draft_tokens.shape[1];
  if (p.target_tokens.present() == p.target_probabilities.present()) {
    return InvalidArgumentError(
        kOp, ": ", p.target_tokens.present() ? "both" : "none",
        " of target_tokens and target_probabilities is given, expected one");
  }
  if (p.target_tokens.present()) {
    if (p.draft_probabilities.present()) {
      return InvalidArgumentError(
          kOp, ": draft_probabilities is given with target_tokens");
    }
    return CheckTensor(kOp, "target_tokens", p.target_tokens,
                       {sequences, drafts + 1}, DTypes({DType::kInt32}),
                       device);
  }
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "target_probabilities", p.target_probabilities,
      {sequences * (drafts + 1), kAnySize}, DTypes({DType::kFloat32}), device));
  const int64_t vocab = p.target_probabilities.shape[1];
  TENON_RETURN_IF_ERROR(CheckRange(
      kOp, "vocab (columns of target_probabilities)", vocab, 1, kMaxVocab));
  if (!p.draft_probabilities.present()) return Status();
  return CheckTensor(kOp, "draft_probabilities", p.draft_probabilities,
                     {sequences * drafts, vocab}, DTypes({DType::kFloat32}),
                     device);
}

Status ValidateShapes(const SpeculativeParams& p) {
  const Device device = p.draft_tokens.device;
  const DTypeSet ints = DTypes({DType::kInt32});
  TENON_RETURN_IF_ERROR(CheckTensor(kOp, "draft_tokens", p.draft_tokens,
                                    {kAnySize, kAnySize}, ints, device));
  const int64_t sequences = p.draft_tokens.shape[0];
  const int64_t drafts = p.draft_tokens.shape[1];
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "sequences (rows of draft_tokens)",
                                   sequences, 0, kMaxSequences));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "drafts (columns of draft_tokens)",
                                   drafts, 1, kMaxDrafts));
  if (p.num_drafts.present()) {
    TENON_RETURN_IF_ERROR(CheckTensor(kOp, "num_drafts", p.num_drafts,
                                      {sequences}, ints, device));
  }
  TENON_RETURN_IF_ERROR(ValidateTarget(p));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "tokens", p.tokens,
                                    {sequences, drafts + 1}, ints, device));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "num_accepted", p.num_accepted,
                                    {sequences}, ints, device));
  return CheckOutput(kOp, "statuses", p.statuses, {sequences}, ints, device);
}

Status ValidateMemory(const SpeculativeParams& p) {
  TensorView params;
  if (p.target_probabilities.present()) {
    if (p.params == nullptr) {
      return InvalidArgumentError(kOp, ": params is null");
    }
    if (reinterpret_cast<uintptr_t>(p.params) % alignof(SamplingParams) != 0) {
      return InvalidArgumentError(kOp, ": params is not aligned to ",
                                  alignof(SamplingParams), " bytes");
    }
    params = MakeTensor(p.params, DType::kUInt8, p.draft_tokens.device,
                        {p.draft_tokens.shape[0] *
                         static_cast<int64_t>(sizeof(SamplingParams))});
  }
  const NamedView outputs[] = {{"tokens", p.tokens},
                               {"num_accepted", p.num_accepted},
                               {"statuses", p.statuses}};
  for (const NamedView& output : outputs) {
    TENON_RETURN_IF_ERROR(
        CheckSeparate(kOp, output,
                      {{"draft_tokens", p.draft_tokens},
                       {"num_drafts", p.num_drafts},
                       {"target_tokens", p.target_tokens},
                       {"target_probabilities", p.target_probabilities},
                       {"draft_probabilities", p.draft_probabilities},
                       {"params", params}}));
    for (const NamedView& other : outputs) {
      if (&other == &output) break;
      TENON_RETURN_IF_ERROR(CheckSeparate(kOp, output, {other}));
    }
  }
  return Status();
}

}  // namespace

Status Speculative(const SpeculativeParams& params, Stream stream) {
  TENON_RETURN_IF_ERROR(ValidateShapes(params));
  if (params.draft_tokens.shape[0] == 0) return Status();
  TENON_RETURN_IF_ERROR(ValidateMemory(params));
  switch (params.draft_tokens.device.type) {
    case DeviceType::kCpu:
      return SpeculativeCpu(params, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return SpeculativeCuda(params, stream);
      break;
  }
  return NoBackendError(kOp, params.draft_tokens.device);
}

}  // namespace tenon
