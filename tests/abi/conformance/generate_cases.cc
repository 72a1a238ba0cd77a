#include <memory>
#include <string>

#include "abi/tenon.h"
#include "engine/session.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/sampling.h"
#include "tests/abi/conformance/vector_file.h"

namespace tenon::conformance {
namespace {

// Instruction sets sum in other orders, and the model's activations are
// bfloat16: probabilities differ by up to about 0.01. Prompts and seeds are
// such that no draw comes this near to another token.
constexpr double kMinMargin = 0.02;

// A text begins with byte 0.
std::vector<int32_t> EncodeBytes(const std::string& text) {
  std::vector<int32_t> tokens = {0};
  for (unsigned char byte : text) tokens.push_back(byte);
  return tokens;
}

SamplingParams EngineParams(const tenon_sampling_params& params) {
  SamplingParams sampling;
  sampling.temperature = params.temperature;
  sampling.top_k = params.top_k;
  sampling.top_p = params.top_p;
  sampling.min_p = params.min_p;
  sampling.seed = params.seed;
  return sampling;
}

// The engine's tokens, each of which float64 draws from the same logits as well
// and with a margin.
std::vector<int32_t> GenerateTokens(std::shared_ptr<const Model> model,
                                    std::vector<int32_t> context,
                                    tenon_sampling_params params,
                                    size_t count) {
  SessionOptions options;
  options.max_sequences = 1;
  options.num_threads = 1;
  std::vector<float> logits(static_cast<size_t>(model->config.vocab_size));
  StatusOr<std::unique_ptr<Session>> session = Session::Create(model, options);
  Require(session.ok(), "no session");
  StatusOr<SequenceId> sequence = (*session)->CreateSequence();
  Require(sequence.ok(), "no sequence");
  StepRow row;
  row.sequence = *sequence;
  row.tokens = context.data();
  row.num_tokens = static_cast<int32_t>(context.size());
  row.sampling = EngineParams(params);
  row.logits_mode = LogitsMode::kLast;
  row.logits = logits.data();
  std::vector<int32_t> tokens;
  std::vector<StepRowResult> results;
  params.position = context.size();
  while (tokens.size() < count) {
    const Status status = (*session)->Step({row}, &results);
    Require(status.ok(), status.message());
    const ReferenceDraw draw =
        DrawToken({logits.begin(), logits.end()}, params);
    Require(results[0].token == draw.token, "generate: not float64's token");
    Require(draw.margin > kMinMargin, "generate: a close draw");
    tokens.push_back(results[0].token);
    row.tokens = &tokens.back();
    row.num_tokens = 1;
    ++params.position;
  }
  return tokens;
}

std::string Generate(const std::string& variant,
                     const std::shared_ptr<const Model>& model,
                     const std::string& prompt,
                     const tenon_sampling_params& params, size_t count) {
  const std::vector<int32_t> context = EncodeBytes(prompt);
  const std::vector<int32_t> tokens =
      GenerateTokens(model, context, params, count);
  Case c("generate", variant);
  c.Comment(prompt + "|" + std::string(tokens.begin(), tokens.end()));
  c.Arg("temperature", params.temperature);
  c.Arg("top_k", params.top_k);
  c.Arg("top_p", params.top_p);
  c.Arg("seed", static_cast<int64_t>(params.seed));
  const Layout elements_alone = {0, 0, 0};
  c.In("prompt",
       HostTensor(DType::kInt32, {static_cast<int64_t>(context.size())},
                  {context.begin(), context.end()}, elements_alone));
  c.Out("tokens",
        HostTensor(DType::kInt32, {static_cast<int64_t>(count)}, {},
                   elements_alone),
        {tokens.begin(), tokens.end()}, 0);
  return c.Text();
}

}  // namespace

std::string GenerateCases(const std::string& model_directory) {
  StatusOr<std::shared_ptr<const Model>> model =
      Model::Load(model_directory, Device());
  Require(model.ok(), model.status().message());
  tenon_sampling_params greedy = {};
  tenon_sampling_params seeded = {};
  seeded.temperature = 0.7f;
  seeded.top_k = 20;
  seeded.top_p = 1.0f;
  seeded.seed = 123;
  return Generate("greedy", *model, "\"My dear", greedy, 32) +
         Generate("seeded", *model, "She was", seeded, 24);
}

}  // namespace tenon::conformance
