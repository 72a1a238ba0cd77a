#include "ops/sampler/sampler.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "abi/op_call.h"
#include "ops/core/validate.h"
#include "ops/sampler/speculative.h"

namespace tenon::abi {
namespace {

// Arrays of tenon_sampling_params in device memory are read as SamplingParams.
static_assert(sizeof(tenon_sampling_params) == 128 &&
              sizeof(SamplingParams) == 128 &&
              alignof(SamplingParams) == alignof(tenon_sampling_params) &&
              std::is_standard_layout_v<SamplingParams> &&
              std::is_trivially_copyable_v<SamplingParams>);
#define TENON_SAME_FIELD(field)                               \
  static_assert(offsetof(SamplingParams, field) ==            \
                    offsetof(tenon_sampling_params, field) && \
                sizeof(SamplingParams::field) ==              \
                    sizeof(tenon_sampling_params::field))
TENON_SAME_FIELD(temperature);
TENON_SAME_FIELD(top_k);
TENON_SAME_FIELD(top_p);
TENON_SAME_FIELD(min_p);
TENON_SAME_FIELD(filter_order);
TENON_SAME_FIELD(reserved0);
TENON_SAME_FIELD(seed);
TENON_SAME_FIELD(position);
TENON_SAME_FIELD(typical_p);
TENON_SAME_FIELD(top_n_sigma);
TENON_SAME_FIELD(xtc_probability);
TENON_SAME_FIELD(xtc_threshold);
TENON_SAME_FIELD(mirostat_tau);
TENON_SAME_FIELD(mirostat_eta);
TENON_SAME_FIELD(repetition_penalty);
TENON_SAME_FIELD(frequency_penalty);
TENON_SAME_FIELD(presence_penalty);
TENON_SAME_FIELD(dry_multiplier);
TENON_SAME_FIELD(dry_base);
TENON_SAME_FIELD(dry_allowed_length);
TENON_SAME_FIELD(dry_range);
TENON_SAME_FIELD(flags);
TENON_SAME_FIELD(num_top_logprobs);
TENON_SAME_FIELD(mirostat_mu);
TENON_SAME_FIELD(reserved);
#undef TENON_SAME_FIELD

static_assert(sizeof(tenon_logit_edit) == sizeof(LogitEdit) &&
              offsetof(tenon_logit_edit, id) == offsetof(LogitEdit, id) &&
              offsetof(tenon_logit_edit, state) == offsetof(LogitEdit, state) &&
              offsetof(tenon_logit_edit, bias) == offsetof(LogitEdit, bias) &&
              offsetof(tenon_logit_edit, offset) ==
                  offsetof(LogitEdit, offset));
static_assert(TENON_EDIT_BAN == LogitEdit::kBan &&
              TENON_EDIT_ALLOW == LogitEdit::kAllow &&
              TENON_EDIT_IN_PROMPT == LogitEdit::kInPrompt);
static_assert(TENON_SAMPLING_USE_BITMASK == kUseBitmask &&
              TENON_SAMPLING_ONLY_ALLOWED == kOnlyAllowed &&
              TENON_SAMPLING_SET_MIROSTAT_MU == kSetMirostatMu &&
              TENON_MAX_TOP_LOGPROBS == kMaxTopLogprobs);
static_assert(TENON_LOGPROB_UNFILTERED ==
                  static_cast<int>(LogprobKind::kUnfiltered) &&
              TENON_LOGPROB_RAW == static_cast<int>(LogprobKind::kRaw) &&
              TENON_LOGPROB_PROCESSED ==
                  static_cast<int>(LogprobKind::kProcessed));
static_assert(TENON_STREAM_TARGET == static_cast<int>(RandomStream::kTarget) &&
              TENON_STREAM_DRAFT == static_cast<int>(RandomStream::kDraft));

static_assert(TENON_FILTER_SEQUENTIAL ==
                  static_cast<int>(FilterOrder::kSequential) &&
              TENON_FILTER_JOINT == static_cast<int>(FilterOrder::kJoint) &&
              TENON_FILTER_LLAMA_CPP ==
                  static_cast<int>(FilterOrder::kLlamaCpp));
static_assert(TENON_SAMPLE_OK == static_cast<int>(SampleStatus::kOk) &&
              TENON_SAMPLE_NO_SUPPORT ==
                  static_cast<int>(SampleStatus::kNoSupport) &&
              TENON_SAMPLE_NON_FINITE ==
                  static_cast<int>(SampleStatus::kNonFinite));

// An array of structs, given as a compact uint8 tensor [count, size of one];
// -1: any number of them.
Status ReadStructs(const char* name, const TensorView& view, int64_t count,
                   int64_t size, int64_t alignment, Device device) {
  if (count < 0 && view.rank == 2) count = view.shape[0];
  TENON_RETURN_IF_ERROR(CheckTensor("", name, view, {count, size},
                                    DTypes({DType::kUInt8}), device));
  if (view.stride[0] != size) {
    return InvalidArgumentError(name, ".strides[0] is ", view.stride[0],
                                ", expected ", size);
  }
  if (reinterpret_cast<uintptr_t>(view.data) % alignment != 0) {
    return InvalidArgumentError(name, " is not aligned to ", alignment,
                                " bytes");
  }
  return Status();
}

Status ReadSampler(const tenon_sampler_args& args, OpCall* call,
                   SamplerParams* p) {
  TENON_RETURN_IF_ERROR(CheckFlags("flags", args.flags, TENON_SAMPLER_FAST));
  TensorView params, edits;
  TENON_RETURN_IF_ERROR(call->ReadTensors(
      {{"logits", args.logits, &p->logits},
       {"params", args.params, &params},
       {"tokens", args.tokens, &p->tokens},
       Optional("logprobs", args.logprobs, &p->logprobs),
       {"statuses", args.statuses, &p->statuses},
       Optional("edits", args.edits, &edits),
       Optional("edit_offsets", args.edit_offsets, &p->edit_offsets),
       Optional("bitmask", args.bitmask, &p->bitmask),
       Optional("mirostat_mu", args.mirostat_mu, &p->mirostat_mu),
       Optional("random_bits", args.random_bits, &p->random_bits),
       Optional("raw_logprobs", args.raw_logprobs, &p->raw_logprobs),
       Optional("processed_logprobs", args.processed_logprobs,
                &p->processed_logprobs),
       Optional("top_tokens", args.top_tokens, &p->top_tokens),
       Optional("top_logprobs", args.top_logprobs, &p->top_logprobs),
       Optional("probabilities", args.probabilities, &p->probabilities)}));
  TENON_RETURN_IF_ERROR(ReadStructs("params", params, p->logits.shape[0],
                                    sizeof(SamplingParams),
                                    alignof(SamplingParams), p->logits.device));
  p->params = params.As<SamplingParams>();
  if ((args.edits != nullptr) != (args.edit_offsets != nullptr)) {
    return InvalidArgumentError(
        args.edits != nullptr ? "edit_offsets is null, but edits is given"
                              : "edits is null, but edit_offsets is given");
  }
  if (args.edits != nullptr) {
    TENON_RETURN_IF_ERROR(ReadStructs("edits", edits, -1, sizeof(LogitEdit),
                                      alignof(LogitEdit), p->logits.device));
    p->edits = edits.As<LogitEdit>();
    p->num_edits = edits.shape[0];
  }
  if (args.top_logprobs_kind < TENON_LOGPROB_UNFILTERED ||
      args.top_logprobs_kind > TENON_LOGPROB_PROCESSED) {
    return InvalidArgumentError("top_logprobs_kind is ", args.top_logprobs_kind,
                                ", expected 0 to 2");
  }
  if (args.random_stream != TENON_STREAM_TARGET &&
      args.random_stream != TENON_STREAM_DRAFT) {
    return InvalidArgumentError("random_stream is ", args.random_stream,
                                ", expected 0 or 1");
  }
  if (args.vocab_size < 0 || args.vocab_size > p->logits.shape[1]) {
    return InvalidArgumentError("vocab_size is ", args.vocab_size,
                                ", expected 0 to ", p->logits.shape[1],
                                ", the columns of logits");
  }
  p->valid_vocab = args.vocab_size;
  p->stream = static_cast<RandomStream>(args.random_stream);
  p->top_logprobs_kind = static_cast<LogprobKind>(args.top_logprobs_kind);
  p->fast = (args.flags & TENON_SAMPLER_FAST) != 0;
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
  return Status();
}

Status ReadSpeculative(const tenon_speculative_args& args, OpCall* call,
                       SpeculativeParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  TensorView params;
  TENON_RETURN_IF_ERROR(call->ReadTensors(
      {{"draft_tokens", args.draft_tokens, &p->draft_tokens},
       Optional("num_drafts", args.num_drafts, &p->num_drafts),
       Optional("target_tokens", args.target_tokens, &p->target_tokens),
       Optional("target_probabilities", args.target_probabilities,
                &p->target_probabilities),
       Optional("params", args.params, &params),
       Optional("draft_probabilities", args.draft_probabilities,
                &p->draft_probabilities),
       {"tokens", args.tokens, &p->tokens},
       {"num_accepted", args.num_accepted, &p->num_accepted},
       {"statuses", args.statuses, &p->statuses}}));
  if (args.params == nullptr) return Status();
  const int64_t sequences =
      p->draft_tokens.rank == 2 ? p->draft_tokens.shape[0] : -1;
  TENON_RETURN_IF_ERROR(
      ReadStructs("params", params, sequences, sizeof(SamplingParams),
                  alignof(SamplingParams), p->draft_tokens.device));
  p->params = params.As<SamplingParams>();
  return Status();
}

Status SortEdits(tenon_logit_edit* edits, int64_t count, int64_t vocab_size) {
  if (count < 0) {
    return InvalidArgumentError("count is ", count, ", expected >= 0");
  }
  if (vocab_size < 1 || vocab_size > (int64_t{1} << 20)) {
    return InvalidArgumentError("vocab_size is ", vocab_size,
                                ", expected 1 to ", int64_t{1} << 20);
  }
  if (count == 0) return Status();
  TENON_RETURN_IF_ERROR(CheckPresent("edits", edits));
  // Those outside the vocabulary last.
  const auto order = [vocab_size](const tenon_logit_edit& edit) {
    const bool inside = edit.id >= 0 && edit.id < vocab_size;
    return inside ? DrawOrder(edit.id, vocab_size)
                  : std::numeric_limits<int32_t>::max();
  };
  const auto before = [&](const tenon_logit_edit& a,
                          const tenon_logit_edit& b) {
    return std::make_pair(order(a), a.id) < std::make_pair(order(b), b.id);
  };
  std::sort(edits, edits + count, before);
  for (int64_t i = 1; i < count; ++i) {
    if (edits[i].id != edits[i - 1].id) continue;
    return InvalidArgumentError("edits has id ", edits[i].id, " twice");
  }
  return Status();
}

}  // namespace
}  // namespace tenon::abi

using tenon::Status;

int32_t tenon_sampling_params_init(tenon_sampling_params* params, size_t size,
                                   tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&]() -> Status {
    TENON_RETURN_IF_ERROR(tenon::abi::CheckPresent("params", params));
    tenon_sampling_params defaults = {};
    defaults.temperature = 1.0f;
    defaults.top_p = 1.0f;
    std::memcpy(params, &defaults, std::min(size, sizeof(defaults)));
    return Status();
  });
}

int32_t tenon_sampling_params_validate(const tenon_sampling_params* params,
                                       tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&]() -> Status {
    TENON_RETURN_IF_ERROR(tenon::abi::CheckPresent("params", params));
    tenon::SamplingParams copy;
    std::memcpy(static_cast<void*>(&copy), params, sizeof(copy));
    return tenon::ValidateSamplingParams(copy);
  });
}

int32_t tenon_sampler_workspace_size(tenon_context context,
                                     const tenon_sampler_args* args,
                                     uint64_t* bytes, tenon_error* error) {
  return tenon::abi::QueryWorkspace(
      __func__, context, args, bytes, error, tenon::abi::ReadSampler,
      tenon::ValidateSamplerShapes, tenon::SamplerWorkspaceBytes);
}

int32_t tenon_sampler(tenon_context context, const tenon_sampler_args* args,
                      void* stream, tenon_error* error) {
  return tenon::abi::RunOp(__func__, context, args, stream, error,
                           tenon::abi::ReadSampler, tenon::Sampler);
}

int32_t tenon_logit_edits_sort(tenon_logit_edit* edits, int64_t count,
                               int64_t vocab_size, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::SortEdits(edits, count, vocab_size);
  });
}

int32_t tenon_speculative(tenon_context context,
                          const tenon_speculative_args* args, void* stream,
                          tenon_error* error) {
  return tenon::abi::RunOp(__func__, context, args, stream, error,
                           tenon::abi::ReadSpeculative, tenon::Speculative);
}
