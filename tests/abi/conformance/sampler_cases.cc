#include <algorithm>
#include <cmath>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/sampling.h"
#include "tests/abi/conformance/vector_file.h"

namespace tenon::conformance {
namespace {

tenon_sampling_params Params(float temperature, int32_t top_k, float top_p,
                             float min_p, uint64_t seed) {
  tenon_sampling_params params = {};
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  params.seed = seed;
  params.position = seed % 1000;
  return params;
}

std::string Sampler(const std::string& variant, DType dtype,
                    const std::vector<double>& logits,
                    const std::vector<tenon_sampling_params>& params,
                    Layout layout) {
  const auto rows = static_cast<int64_t>(params.size());
  const int64_t vocab = static_cast<int64_t>(logits.size()) / rows;
  const HostTensor in(dtype, {rows, vocab}, logits, layout);
  std::vector<double> tokens;
  std::vector<double> logprobs;
  for (int64_t i = 0; i < rows; ++i) {
    const auto row = in.values().begin() + i * vocab;
    const ReferenceDraw draw = DrawToken({row, row + vocab}, params[i]);
    Require(draw.margin > 1e-3, "sampler: a close draw");
    tokens.push_back(static_cast<double>(draw.token));
    logprobs.push_back(draw.logprob);
  }
  Case c("sampler", variant);
  c.In("logits", in);
  c.In("params", HostTensor::OfStructs(params));
  c.Out("tokens", HostTensor(DType::kInt32, {rows}), tokens, 0);
  c.Out("logprobs", HostTensor(DType::kFloat32, {rows}), logprobs, 16);
  c.Out("statuses", HostTensor(DType::kInt32, {rows}),
        std::vector<double>(params.size(), TENON_SAMPLE_OK), 0);
  return c.Text();
}

// A row that has no token, one with a NaN, and a good one.
std::string SamplerStatuses() {
  std::vector<double> logits = Eighths(3 * 4, 94);
  std::fill(logits.begin(), logits.begin() + 4, -INFINITY);
  logits[6] = NAN;
  Case c("sampler", "float16_statuses");
  c.In("logits", HostTensor(DType::kFloat16, {3, 4}, logits));
  c.In("params", HostTensor::OfStructs(std::vector<tenon_sampling_params>(
                     3, Params(0, 0, 1, 0, 0))));
  const auto best = std::max_element(logits.begin() + 8, logits.end());
  c.Out("tokens", HostTensor(DType::kInt32, {3}),
        {-1, -1, static_cast<double>(best - logits.begin() - 8)}, 0);
  c.Out("statuses", HostTensor(DType::kInt32, {3}),
        {TENON_SAMPLE_NO_SUPPORT, TENON_SAMPLE_NON_FINITE, TENON_SAMPLE_OK}, 0);
  return c.Text();
}

std::string SamplerOfOtherParams() {
  Case c("sampler", "rejects_size_of_params");
  c.In("logits", HostTensor(DType::kFloat32, {1, 4}, Eighths(4, 1)));
  c.In("params", HostTensor(DType::kUInt8, {1, 64}, std::vector<double>(64)));
  c.In("tokens", HostTensor(DType::kInt32, {1}));
  c.In("statuses", HostTensor(DType::kInt32, {1}));
  c.Reject(TENON_INVALID_ARGUMENT, "params");
  return c.Text();
}

}  // namespace

std::string SamplerCases() {
  const int64_t vocab = 11;
  std::vector<double> ties = Eighths(3 * vocab, 91);
  ties[3] = ties[7] = 2.0;  // of row 0: greedy takes the lower id
  ties[2 * vocab + 4] = -INFINITY;
  tenon_sampling_params joint = Params(0.75f, 6, 0.8f, 0.125f, 99);
  joint.filter_order = TENON_FILTER_JOINT;
  return Sampler("float32_greedy_and_plain", DType::kFloat32, ties,
                 {Params(0, 0, 0, 0, 0), Params(1, 0, 1, 0, 7),
                  Params(0.5f, -1, 1, 0, 0xfedcba9876543210)},
                 {}) +
         Sampler("bfloat16_filters_strided", DType::kBFloat16,
                 Eighths(4 * vocab, 92),
                 {Params(1, 3, 1, 0, 11), Params(1.5f, 0, 0.7f, 0, 12),
                  Params(1, 0, 1, 0.25f, 13), Params(1, 5, 0.9f, 0.125f, 14)},
                 {5, 3}) +
         Sampler("float16_joint", DType::kFloat16, Eighths(vocab, 93), {joint},
                 {}) +
         SamplerStatuses() + SamplerOfOtherParams();
}

}  // namespace tenon::conformance
