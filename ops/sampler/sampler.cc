#include "ops/sampler/sampler.h"

#include <initializer_list>
#include <limits>

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/sampler/sampler_backend.h"

namespace tenon {
namespace {

constexpr char kOp[] = "Sampler";
constexpr int64_t kMaxRows = int64_t{1} << 20;

// A tensor that the call may not have, and what it may not share memory with.
Status CheckOptional(const char* field, const TensorView& view,
                     std::initializer_list<int64_t> shape, DType dtype,
                     Device device, bool is_output) {
  if (!view.present()) return Status();
  return is_output
             ? CheckOutput(kOp, field, view, shape, DTypes({dtype}), device)
             : CheckTensor(kOp, field, view, shape, DTypes({dtype}), device);
}

Status CheckPointer(const char* field, const void* data, size_t alignment) {
  if (data == nullptr)
    return InvalidArgumentError(kOp, ": ", field, " is null");
  if (reinterpret_cast<uintptr_t>(data) % alignment == 0) return Status();
  return InvalidArgumentError(kOp, ": ", field, " is not aligned to ",
                              alignment, " bytes");
}

TensorView BytesAt(const void* data, int64_t bytes, Device device) {
  return MakeTensor(data, DType::kUInt8, device, {bytes});
}

Status ValidateMemory(const SamplerParams& p) {
  const Device device = p.logits.device;
  const int64_t rows = p.logits.shape[0];
  TENON_RETURN_IF_ERROR(
      CheckPointer("params", p.params, alignof(SamplingParams)));
  const TensorView params = BytesAt(
      p.params, rows * static_cast<int64_t>(sizeof(SamplingParams)), device);
  TensorView edits;
  if (p.edits != nullptr) {
    TENON_RETURN_IF_ERROR(CheckPointer("edits", p.edits, alignof(LogitEdit)));
    edits = BytesAt(
        p.edits, p.num_edits * static_cast<int64_t>(sizeof(LogitEdit)), device);
  }
  const NamedView inputs[] = {
      {"logits", p.logits},
      {"params", params},
      {"edits", edits},
      {"edit_offsets", p.edit_offsets},
      {"bitmask", p.bitmask},
      {"random_bits", p.random_bits},
      {"mirostat_places", p.mirostat_places},
  };
  const NamedView outputs[] = {
      {"mirostat_mu", p.mirostat_mu},
      {"tokens", p.tokens},
      {"logprobs", p.logprobs},
      {"statuses", p.statuses},
      {"raw_logprobs", p.raw_logprobs},
      {"processed_logprobs", p.processed_logprobs},
      {"top_tokens", p.top_tokens},
      {"top_logprobs", p.top_logprobs},
      {"probabilities", p.probabilities},
  };
  const TensorView workspace =
      BytesAt(p.workspace, static_cast<int64_t>(p.workspace_size), device);
  TENON_RETURN_IF_ERROR(CheckWorkspace(kOp, p.workspace, p.workspace_size,
                                       SamplerWorkspaceBytes(p), device, {}));
  const NamedView scratch = {"workspace", workspace};
  for (const NamedView& input : inputs) {
    for (const NamedView& output : outputs) {
      TENON_RETURN_IF_ERROR(CheckSeparate(kOp, output, {input}));
    }
    TENON_RETURN_IF_ERROR(CheckSeparate(kOp, scratch, {input}));
  }
  for (const NamedView& output : outputs) {
    for (const NamedView& other : outputs) {
      if (&other == &output) break;
      TENON_RETURN_IF_ERROR(CheckSeparate(kOp, output, {other}));
    }
    TENON_RETURN_IF_ERROR(CheckSeparate(kOp, scratch, {output}));
  }
  return Status();
}

Status ValidateInputShapes(const SamplerParams& p) {
  const Device device = p.logits.device;
  const int64_t rows = p.logits.shape[0];
  if ((p.edits != nullptr) != p.edit_offsets.present()) {
    return InvalidArgumentError(
        kOp, ": ", p.edits != nullptr ? "edits" : "edit_offsets",
        " is given without ", p.edits != nullptr ? "edit_offsets" : "edits");
  }
  TENON_RETURN_IF_ERROR(CheckOptional("edit_offsets", p.edit_offsets,
                                      {rows + 1}, DType::kInt32, device,
                                      false));
  if (p.edits != nullptr) {
    TENON_RETURN_IF_ERROR(CheckRange(kOp, "num_edits", p.num_edits, 0,
                                     std::numeric_limits<int32_t>::max()));
  }
  TENON_RETURN_IF_ERROR(CheckOptional("bitmask", p.bitmask, {rows, kAnySize},
                                      DType::kInt32, device, false));
  if (p.bitmask.present()) {
    // A narrower one would leave the last tokens without a mask.
    TENON_RETURN_IF_ERROR(CheckRange(kOp, "words of bitmask",
                                     p.bitmask.shape[1], (p.vocab() + 31) / 32,
                                     std::numeric_limits<int64_t>::max()));
  }
  TENON_RETURN_IF_ERROR(CheckOptional("random_bits", p.random_bits, {rows},
                                      DType::kInt64, device, false));
  const bool has_places = p.mirostat_places.present();
  if (has_places && !p.mirostat_mu.present()) {
    return InvalidArgumentError(
        kOp, ": mirostat_places is given without mirostat_mu");
  }
  TENON_RETURN_IF_ERROR(CheckOptional("mirostat_places", p.mirostat_places,
                                      {rows, 2}, DType::kInt32, device, false));
  return CheckOptional("mirostat_mu", p.mirostat_mu,
                       {has_places ? kAnySize : rows}, DType::kFloat32, device,
                       true);
}

Status ValidateOutputShapes(const SamplerParams& p) {
  const Device device = p.logits.device;
  const int64_t rows = p.logits.shape[0];
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "tokens", p.tokens, {rows},
                                    DTypes({DType::kInt32}), device));
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "statuses", p.statuses, {rows},
                                    DTypes({DType::kInt32}), device));
  constexpr DType kFloat = DType::kFloat32;
  TENON_RETURN_IF_ERROR(
      CheckOptional("logprobs", p.logprobs, {rows}, kFloat, device, true));
  TENON_RETURN_IF_ERROR(CheckOptional("raw_logprobs", p.raw_logprobs, {rows},
                                      kFloat, device, true));
  TENON_RETURN_IF_ERROR(CheckOptional("processed_logprobs",
                                      p.processed_logprobs, {rows}, kFloat,
                                      device, true));
  TENON_RETURN_IF_ERROR(CheckOptional("probabilities", p.probabilities,
                                      {rows, p.vocab()}, kFloat, device, true));
  if (p.top_tokens.present() != p.top_logprobs.present()) {
    return InvalidArgumentError(
        kOp, ": ", p.top_tokens.present() ? "top_tokens" : "top_logprobs",
        " is given without ",
        p.top_tokens.present() ? "top_logprobs" : "top_tokens");
  }
  if (!p.top_tokens.present()) return Status();
  TENON_RETURN_IF_ERROR(CheckOutput(kOp, "top_tokens", p.top_tokens,
                                    {rows, kAnySize}, DTypes({DType::kInt32}),
                                    device));
  const int64_t top = p.top_tokens.shape[1];
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "columns of top_tokens", top, 1, kMaxTopLogprobs));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "top_logprobs_kind",
                                   static_cast<int64_t>(p.top_logprobs_kind), 0,
                                   2));
  return CheckOutput(kOp, "top_logprobs", p.top_logprobs, {rows, top},
                     DTypes({kFloat}), device);
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
      kName, "filter_order", static_cast<int>(params.filter_order), 0, 2));
  TENON_RETURN_IF_ERROR(CheckRange(kName, "reserved0", params.reserved0, 0, 0));
  constexpr double kMax = std::numeric_limits<float>::max();
  const struct {
    const char* name;
    float value;
    double low;
    double high;
  } reals[] = {
      {"typical_p", params.typical_p, 0.0, 1.0},
      {"top_n_sigma", params.top_n_sigma, 0.0, kMax},
      {"xtc_probability", params.xtc_probability, 0.0, 1.0},
      {"xtc_threshold", params.xtc_threshold, 0.0, 1.0},
      {"mirostat_tau", params.mirostat_tau, 0.0, kMax},
      {"mirostat_eta", params.mirostat_eta, 0.0, kMax},
      {"mirostat_mu", params.mirostat_mu, -kMax, kMax},
      {"repetition_penalty", params.repetition_penalty, 0.0, kMax},
      {"frequency_penalty", params.frequency_penalty, -kMax, kMax},
      {"presence_penalty", params.presence_penalty, -kMax, kMax},
      {"dry_multiplier", params.dry_multiplier, 0.0, kMax},
      {"dry_base", params.dry_base, 0.0, kMax},
  };
  for (const auto& real : reals) {
    TENON_RETURN_IF_ERROR(
        CheckFinite(kName, real.name, real.value, real.low, real.high));
  }
  if (params.dry_base > 0.0f && params.dry_base < 1.0f) {
    return InvalidArgumentError(kName, ": dry_base is ", params.dry_base,
                                ", expected 0 or at least 1");
  }
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  TENON_RETURN_IF_ERROR(CheckRange(kName, "dry_allowed_length",
                                   params.dry_allowed_length, 0, kMaxInt));
  TENON_RETURN_IF_ERROR(
      CheckRange(kName, "dry_range", params.dry_range, 0, kMaxInt));
  TENON_RETURN_IF_ERROR(
      CheckRange(kName, "flags", params.flags, 0,
                 kUseBitmask | kOnlyAllowed | kSetMirostatMu));
  TENON_RETURN_IF_ERROR(CheckRange(
      kName, "num_top_logprobs", params.num_top_logprobs, 0, kMaxTopLogprobs));
  for (uint32_t word : params.reserved) {
    TENON_RETURN_IF_ERROR(CheckRange(kName, "reserved", word, 0, 0));
  }
  return Status();
}

Status ValidateSamplerShapes(const SamplerParams& p) {
  const Device device = p.logits.device;
  TENON_RETURN_IF_ERROR(CheckTensor(
      kOp, "logits", p.logits, {kAnySize, kAnySize}, kFloatDTypes, device));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "rows (of logits)", p.logits.shape[0], 0, kMaxRows));
  TENON_RETURN_IF_ERROR(
      CheckRange(kOp, "valid_vocab", p.valid_vocab, 0, p.logits.shape[1]));
  TENON_RETURN_IF_ERROR(CheckRange(
      kOp, p.valid_vocab != 0 ? "valid_vocab" : "vocab (columns of logits)",
      p.vocab(), 1, kMaxVocab));
  TENON_RETURN_IF_ERROR(CheckRange(kOp, "stream",
                                   static_cast<int64_t>(p.stream), 0,
                                   static_cast<int64_t>(RandomStream::kDraft)));
  TENON_RETURN_IF_ERROR(ValidateInputShapes(p));
  return ValidateOutputShapes(p);
}

size_t SamplerWorkspaceBytes(const SamplerParams& params) {
  const TensorView& logits = params.logits;
  if (logits.rank != 2 || logits.shape[0] <= 0 || params.vocab() <= 0) return 0;
  switch (logits.device.type) {
    case DeviceType::kCpu:
      return SamplerCpuWorkspaceBytes(params);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return SamplerCudaWorkspaceBytes(params);
      break;
  }
  return 0;
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
