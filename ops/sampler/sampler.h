#ifndef TENON_OPS_SAMPLER_SAMPLER_H_
#define TENON_OPS_SAMPLER_SAMPLER_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// In which order the filters see the distribution.
enum class FilterOrder : int32_t {
  // top-k, then top-p over what top-k kept (renormalised), then min-p: vLLM's
  // and Hugging Face's order.
  kSequential = 0,
  // Each filter on the original distribution; kept is what all three keep.
  kJoint = 1,
};

// Sampling parameters of one row. Its layout is also that of the C interface's
// tenon_sampling_params.
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy; otherwise logits are divided by it
  int32_t top_k = 0;         // keep the k best; 0, -1 or >= vocab: off
  float top_p = 1.0f;  // keep the smallest set of the best with at least this
                       // probability; >= 1: off, 0: the best alone
  float min_p = 0.0f;  // keep tokens with at least min_p times the best's
                       // probability; 0: off
  FilterOrder filter_order = FilterOrder::kSequential;
  uint32_t reserved0 = 0;
  uint64_t seed = 0;      // of the request
  uint64_t position = 0;  // of the token in its sequence; one draw for each
  uint32_t reserved[22] = {};
};

// What happened to a row; never a guess.
enum class SampleStatus : int32_t {
  kOk = 0,
  kNoSupport = 1,  // every logit is -inf: token -1
  kNonFinite = 2,  // some logit is NaN: token -1
};

// Draws one token per row. One uniform per row, by inversion of the kept
// distribution's cumulative sum in order of token id:
//   u = (top 53 bits of Philox4x32-10(key = seed, counter = (position low,
//        position high, stream 0, version 1)) + 0.5) * 2^-53
// (word 0 above word 1; rounded to float64, at most 1 - 2^-53), so a token
// depends on (logits, parameters, seed, position) alone: not on the batch, its
// order or neighbours. Ties everywhere go by (logit descending, id ascending),
// exactly k kept. +inf makes a row one-hot (lowest such id). A token with
// probability zero is never drawn.
//
// Shapes: logits [rows, vocab] float32, float16 or bfloat16, rows may be
// strided, never modified; params: `rows` SamplingParams in the memory of the
// device (host memory for the CPU); tokens [rows] int32; logprobs [rows]
// float32, optional: log-softmax of logits / temperature over the whole
// vocabulary, before the filters (temperature 0: as for 1; NaN without a token,
// 0 for +inf); statuses [rows] int32 (SampleStatus). vocab is 1 to 2^20, rows
// at most 2^20.
//
// Numerics: float32 exponentials, summed in float32 over 256 consecutive ids
// and in float64 over these, in fixed orders. top-p adds them up in fixed point
// (2^-43 of the best token's). Threads, launch shapes and strides do not change
// a bit. The CUDA and CPU backends, and instruction sets of the CPU, can differ
// where u or a filter falls within rounding of a boundary.
//
// The number of passes over the logits is bounded, whatever they are: one, and
// for filters a few more over the parts that can matter.
//
// Outputs overlap nothing. Does not allocate or synchronise; can be captured in
// a CUDA graph. Needs `workspace` of SamplerWorkspaceBytes(params). Zero rows
// is OK. Parameters are device data, so out-of-range ones (NaN, negative
// temperature, top_p or min_p outside [0, 1]) cannot be rejected here: check
// them with ValidateSamplingParams on the host.
struct SamplerParams {
  TensorView logits;
  const SamplingParams* params = nullptr;
  TensorView tokens;    // out
  TensorView logprobs;  // out, optional
  TensorView statuses;  // out
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

// InvalidArgument that names the parameter.
Status ValidateSamplingParams(const SamplingParams& params);

// What Sampler checks of everything but where memory lies and overlaps.
Status ValidateSamplerShapes(const SamplerParams& params);

size_t SamplerWorkspaceBytes(const SamplerParams& params);

Status Sampler(const SamplerParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_H_
