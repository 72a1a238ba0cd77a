#include "ops/sampler/sampler.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "abi/op_call.h"
#include "ops/core/validate.h"

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
#undef TENON_SAME_FIELD
static_assert(offsetof(SamplingParams, typical_p) ==
              offsetof(tenon_sampling_params, reserved));

static_assert(TENON_FILTER_SEQUENTIAL ==
                  static_cast<int>(FilterOrder::kSequential) &&
              TENON_FILTER_JOINT == static_cast<int>(FilterOrder::kJoint));
static_assert(TENON_SAMPLE_OK == static_cast<int>(SampleStatus::kOk) &&
              TENON_SAMPLE_NO_SUPPORT ==
                  static_cast<int>(SampleStatus::kNoSupport) &&
              TENON_SAMPLE_NON_FINITE ==
                  static_cast<int>(SampleStatus::kNonFinite));

Status ReadSampler(const tenon_sampler_args& args, OpCall* call,
                   SamplerParams* p) {
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  TensorView params;
  TENON_RETURN_IF_ERROR(
      call->ReadTensors({{"logits", args.logits, &p->logits},
                         {"params", args.params, &params},
                         {"tokens", args.tokens, &p->tokens},
                         Optional("logprobs", args.logprobs, &p->logprobs),
                         {"statuses", args.statuses, &p->statuses}}));
  constexpr int64_t kRowBytes = sizeof(SamplingParams);
  TENON_RETURN_IF_ERROR(CheckTensor("Sampler", "params", params,
                                    {p->logits.shape[0], kRowBytes},
                                    DTypes({DType::kUInt8}), p->logits.device));
  if (params.stride[0] != kRowBytes) {
    return InvalidArgumentError("params.strides[0] is ", params.stride[0],
                                ", expected ", kRowBytes);
  }
  p->params = params.As<SamplingParams>();
  p->workspace = args.workspace;
  p->workspace_size = args.workspace_size;
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
