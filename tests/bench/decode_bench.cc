// Whole steps of Qwen3-30B-A3B with random weights: decode at several batch
// sizes and contexts, and prefill. Flags beside those of every benchmark:
//
//   --layers N          of the model's 48; default: all on CUDA, 4 on the CPU
//   --batch N[,N]       decode batch sizes; default 1,8,32,64 and in fp8 128
//                       (CPU: 1); 0: no decode steps
//   --context N[,N]     tokens in the cache of each sequence; 1024
//   --max-context N     of the session, whose graphs are for it; default: that
//                       of each run, and no more
//   --prefill N[,N]     tokens of the prefills; 512,2048,8192 (CPU: 512); 0:
//                       none
//   --routing R         uniform: unrelated tokens; repeated: the same ones in
//                       every sequence, which so choose the same experts; both
//   --graphs on|off|both       CUDA graphs; on
//   --steps pipelined|waited|both  EnqueueStep and WaitStep, each row going on
//                       with the token that was drawn for it, or Step with
//                       tokens from the host; pipelined
//   --profile on|off    CUDA: also every kind of op of a step on its own; off
//
// --dtype bf16,fp8 runs both; fp8 is attention projections and experts in
// float8_e4m3 with blocks of 128 x 128, all else in bfloat16, as
// Qwen3-30B-A3B-FP8 is published. Every step is waited for on the host's clock,
// so that all of its gaps count. Bytes are those of the experts that the tokens
// of the last step chose.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "tests/bench/bench.h"
#include "tests/bench/decode_profile.h"

namespace tenon {
namespace {

struct Flags {
  std::string layers, batch, context = "1024", max_context, prefill,
                             routing = "uniform", graphs = "on",
                             steps = "pipelined", profile = "off";
};

std::vector<int32_t> ParseList(const std::string& text) {
  std::vector<int32_t> values;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    values.push_back(std::atoi(text.substr(at, end - at).c_str()));
    at = end + 1;
  }
  return values;
}

// The values of a flag that is `both` or one of two.
std::vector<bool> ParseChoice(const std::string& text, const char* yes) {
  if (text == "both") return {true, false};
  return {text == yes};
}

ModelConfig Qwen3Moe30B(int32_t layers, bool fp8) {
  ModelConfig config;
  if (fp8) {
    config.fp8_scaling = Fp8Scaling::kBlocks;
    config.fp8_scale_suffix = "_scale_inv";
  }
  config.architecture = Architecture::kQwen3Moe;
  config.hidden_size = 2048;
  config.num_layers = layers;
  config.num_heads = 32;
  config.num_kv_heads = 4;
  config.head_dim = 128;
  config.intermediate_size = 6144;
  config.moe_intermediate_size = 768;
  config.num_experts = 128;
  config.num_experts_per_tok = 8;
  config.norm_topk_prob = true;
  config.decoder_sparse_step = 1;
  config.vocab_size = 151936;
  config.rms_norm_eps = 1e-6f;
  config.rope_theta = 1e6;
  config.max_position_embeddings = 40960;
  config.tie_word_embeddings = false;
  return config;
}

// Bytes that a step must read: all dense weights, `experts` experts in all
// layers together, and the KV cache of `cached` tokens. Elements of fp8
// matrices are a byte and a share of a scale; all else has the model's dtype.
double StepBytes(const ModelConfig& c, DType dtype, double experts,
                 double cached) {
  const double hidden = static_cast<double>(c.hidden_size);
  const double q = static_cast<double>(c.num_heads) * c.head_dim;
  const double kv = static_cast<double>(c.num_kv_heads) * c.head_dim;
  const double attention = hidden * (q + 2 * kv) + q * hidden;
  const double router = hidden * c.num_experts;
  const double expert = 3.0 * hidden * c.moe_intermediate_size;
  const double element = static_cast<double>(DTypeSize(dtype));
  const double matrix_element =
      c.fp8_scaling == Fp8Scaling::kNone ? element : 1.0 + 4.0 / (128 * 128);
  return element * hidden * c.vocab_size +
         c.num_layers * (element * router + matrix_element * attention) +
         matrix_element * expert * experts +
         element * 2.0 * kv * cached * c.num_layers;
}

double TokenFlops(const ModelConfig& c, int32_t context, bool lm_head) {
  const double hidden = static_cast<double>(c.hidden_size);
  const double q = static_cast<double>(c.num_heads) * c.head_dim;
  const double kv = static_cast<double>(c.num_kv_heads) * c.head_dim;
  const double layer =
      hidden * (q + 2 * kv) + q * hidden + hidden * c.num_experts +
      3.0 * hidden * c.moe_intermediate_size * c.num_experts_per_tok +
      2.0 * q * context;
  return 2.0 * (layer * c.num_layers + (lm_head ? hidden * c.vocab_size : 0.0));
}

// What one measurement is of.
struct DecodeCase {
  int32_t batch = 0;
  int32_t context = 0;
  bool repeated = false;
  bool graphs = true;
  bool pipelined = true;

  std::string Note() const {
    return StrCat("context ", context, repeated ? ", repeated" : "",
                  pipelined ? "" : ", waited", graphs ? "" : ", no graphs");
  }
};

class DecodeBench {
 public:
  // `dtype` is float8_e4m3 for a model as published in fp8.
  DecodeBench(bench::Bench* bench, int32_t layers, int32_t max_context,
              DType dtype)
      : bench_(bench),
        max_context_(max_context),
        dtype_(dtype),
        config_(Qwen3Moe30B(layers, dtype == DType::kFloat8E4M3)) {
    const DType rest = dtype == DType::kFloat8E4M3 ? DType::kBFloat16 : dtype;
    std::fprintf(stderr, "making %d layers of random weights in %s\n",
                 config_.num_layers, DTypeName(dtype));
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Random(config_, rest, bench->device(), 7);
    bench::CheckOk(model.status());
    model_ = *std::move(model);
    std::fprintf(stderr, "%.2f GB of weights\n",
                 static_cast<double>(model_->weights.bytes) * 1e-9);
    shape_ = StrCat("qwen3-30b-a3b/", config_.num_layers, "L");
  }

  void Prefill(int32_t tokens) {
    SessionOptions options;
    options.max_sequences = 1;
    options.max_tokens = options.max_context = tokens;
    const std::unique_ptr<Session> session = MakeSession(options);
    if (session == nullptr) return;
    std::vector<double> seconds;
    for (int repeat = 0; repeat < 4; ++repeat) {
      const SequenceId sequence = NewSequence(session.get());
      const std::vector<int32_t> prompt = RandomTokens(tokens);
      const double begin = bench::Seconds();
      FillContext(session.get(), sequence, prompt, true);
      if (repeat > 0) seconds.push_back(bench::Seconds() - begin);
      bench::CheckOk(session->ReleaseSequence(sequence));
    }
    const double median = bench::Median(seconds);
    const double all = 1.0 * config_.num_experts * config_.num_layers;
    bench_->Add({"prefill", shape_, tokens, dtype_,
                 StepBytes(config_, model_->weights.dtype, all, 0),
                 tokens * TokenFlops(config_, tokens / 2, false), ""},
                median * 1e6);
    std::fprintf(stderr, "prefill %d: %.0f tokens/s\n", tokens,
                 tokens / median);
  }

  void Decode(const DecodeCase& what) {
    SessionOptions options;
    options.max_sequences = what.batch;
    options.max_tokens = std::max(what.batch, std::min(what.context, 8192));
    const int32_t context = what.context + kSteps + kMaxStepsInFlight;
    options.max_context = std::max(context, max_context_);
    options.num_pages = int64_t{what.batch} * (context / options.page_size + 1);
    options.count_experts = true;
    options.cuda_graphs = what.graphs;
    const double begin = bench::Seconds();
    const std::unique_ptr<Session> session = MakeSession(options);
    if (session == nullptr) return;
    const double seconds_to_create = bench::Seconds() - begin;
    std::vector<StepRow> rows(what.batch);
    const std::vector<int32_t> same = RandomTokens(what.context);
    for (StepRow& row : rows) {
      row.sequence = NewSequence(session.get());
      FillContext(session.get(), row.sequence,
                  what.repeated ? same : RandomTokens(what.context), false);
      row.num_tokens = 1;
      // Unrelated tokens of nearly even logits, or the same of each row.
      row.sampling.seed = what.repeated ? 1 : Random();
    }
    StepStats stats;
    const double median = what.pipelined
                              ? TimePipelined(session.get(), &rows, &stats)
                              : TimeWaited(session.get(), what, &rows, &stats);
    double experts = 0.0;
    for (int32_t count : stats.distinct_experts) experts += count;
    const double cached =
        static_cast<double>(what.batch) * (what.context + kSteps / 2);
    bench_->Add({"decode", shape_, what.batch, dtype_,
                 StepBytes(config_, model_->weights.dtype, experts, cached),
                 what.batch * TokenFlops(config_, what.context, true),
                 StrCat(what.Note(), ", ",
                        static_cast<int64_t>(what.batch / median), " tokens/s"),
                 experts / std::max<size_t>(stats.distinct_experts.size(), 1)},
                median * 1e6);
    std::fprintf(stderr,
                 "decode batch %d, %s: %.1f tokens/s; session of %lld graphs "
                 "(%.1f MB) created in %.2f s\n",
                 what.batch, what.Note().c_str(), what.batch / median,
                 static_cast<long long>(session->num_graphs()),
                 static_cast<double>(session->graph_bytes()) * 1e-6,
                 seconds_to_create);
  }

  // A row for each kind of op, the sum of them, and the step that they make up.
  void Profile(int32_t batch, int32_t context) {
    std::vector<bench::OpProfile> ops =
        bench::ProfileDecode(*model_, bench_->stream(), batch, context);
    const double step = ops.back().microseconds;
    bench::OpProfile sum = {"sum", 0, 0.0};
    for (const bench::OpProfile& op : ops) {
      if (&op == &ops.back()) break;
      sum.launches += op.launches;
      sum.microseconds += op.microseconds;
    }
    ops.insert(ops.end() - 1, sum);
    for (const bench::OpProfile& op : ops) {
      char note[160];
      std::snprintf(note, sizeof(note),
                    "context %d, %lld launches, a layer %.2f and %.2f us, "
                    "%.1f %% of the step",
                    context, static_cast<long long>(op.launches),
                    static_cast<double>(op.launches) / config_.num_layers,
                    op.microseconds / config_.num_layers,
                    100.0 * op.microseconds / step);
      bench_->Add({"decode/" + op.name, shape_, batch, dtype_, 0.0, 0.0, note},
                  op.microseconds);
    }
  }

 private:
  static constexpr int kSteps = 40;
  static constexpr int kWarmUp = 4;

  // Null where there is not that much memory.
  std::unique_ptr<Session> MakeSession(SessionOptions options) {
    options.num_threads = bench_->num_threads();
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    if (session.status().code() == StatusCode::kResourceExhausted) {
      std::fprintf(stderr, "left out: %s\n", session.status().message());
      return nullptr;
    }
    bench::CheckOk(session.status());
    return *std::move(session);
  }

  // Seconds from one step's results to the next one's.
  double TimePipelined(Session* session, std::vector<StepRow>* rows,
                       StepStats* stats) {
    std::vector<double> seconds;
    const std::vector<int32_t> first = RandomTokens(1);
    for (StepRow& row : *rows) row.tokens = first.data();
    bench::CheckOk(session->EnqueueStep(*rows));
    for (StepRow& row : *rows) {
      row.tokens = nullptr;
      row.continues = true;
    }
    double begin = bench::Seconds();
    for (int step = 0; step < kSteps; ++step) {
      bench::CheckOk(session->EnqueueStep(*rows));
      bench::CheckOk(session->WaitStep(&results_, stats));
      const double end = bench::Seconds();
      if (step >= kWarmUp) seconds.push_back(end - begin);
      begin = end;
    }
    bench::CheckOk(session->WaitStep(&results_, stats));
    return bench::Median(seconds);
  }

  // Seconds of Step.
  double TimeWaited(Session* session, const DecodeCase& what,
                    std::vector<StepRow>* rows, StepStats* stats) {
    std::vector<double> seconds;
    for (int step = 0; step < kSteps; ++step) {
      const std::vector<int32_t> tokens = RandomTokens(what.batch);
      for (int32_t i = 0; i < what.batch; ++i) {
        (*rows)[i].tokens = &tokens[what.repeated ? 0 : i];
      }
      const bool last = step + 1 == kSteps;
      const double begin = bench::Seconds();
      bench::CheckOk(session->Step(*rows, &results_, last ? stats : nullptr));
      if (step >= kWarmUp && !last) seconds.push_back(bench::Seconds() - begin);
    }
    return bench::Median(seconds);
  }

  SequenceId NewSequence(Session* session) {
    StatusOr<SequenceId> sequence = session->CreateSequence();
    bench::CheckOk(sequence.status());
    return *sequence;
  }

  void FillContext(Session* session, SequenceId sequence,
                   const std::vector<int32_t>& tokens, bool sample) {
    const auto count = static_cast<int32_t>(tokens.size());
    for (int32_t at = 0; at < count;) {
      StepRow row;
      row.sequence = sequence;
      row.tokens = &tokens[at];
      row.num_tokens = std::min(session->options().max_tokens, count - at);
      row.sample = sample;
      bench::CheckOk(session->Step({row}, &results_));
      at += row.num_tokens;
    }
  }

  uint32_t Random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }

  std::vector<int32_t> RandomTokens(int32_t count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) {
      token = static_cast<int32_t>(Random() % config_.vocab_size);
    }
    return tokens;
  }

  bench::Bench* bench_;
  int32_t max_context_;
  DType dtype_;
  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::string shape_;
  std::vector<StepRowResult> results_;
  uint64_t state_ = 1;
};

std::vector<int32_t> Batches(const Flags& flags, bool cuda, DType dtype) {
  if (!flags.batch.empty()) return ParseList(flags.batch);
  if (!cuda) return {1};
  if (dtype == DType::kFloat8E4M3) return {1, 8, 32, 64, 128};
  return {1, 8, 32, 64};
}

void RunDecode(const Flags& flags, bool cuda, DType dtype, DecodeBench* bench) {
  for (const int32_t context : ParseList(flags.context)) {
    for (const int32_t batch : Batches(flags, cuda, dtype)) {
      if (batch == 0) continue;
      for (const bool repeated : ParseChoice(flags.routing, "repeated")) {
        for (const bool graphs : ParseChoice(flags.graphs, "on")) {
          for (const bool pipelined : ParseChoice(flags.steps, "pipelined")) {
            bench->Decode({batch, context, repeated, graphs, pipelined});
          }
        }
      }
      if (cuda && flags.profile == "on") bench->Profile(batch, context);
    }
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  tenon::Flags flags;
  tenon::bench::Options options;
  options.fp8 = true;
  options.experts = true;
  options.limit = true;
  options.flags = {
      {"--layers", &flags.layers},   {"--batch", &flags.batch},
      {"--context", &flags.context}, {"--max-context", &flags.max_context},
      {"--prefill", &flags.prefill}, {"--routing", &flags.routing},
      {"--graphs", &flags.graphs},   {"--steps", &flags.steps},
      {"--profile", &flags.profile}};
  tenon::bench::Bench b(argc, argv, "decode_bench", options);
  int32_t layers = std::atoi(flags.layers.c_str());
  if (layers <= 0) layers = b.cuda() ? 48 : 4;
  if (flags.prefill.empty()) flags.prefill = b.cuda() ? "512,2048,8192" : "512";
  for (const tenon::DType dtype : b.DTypes({tenon::DType::kBFloat16})) {
    tenon::DecodeBench bench(&b, layers, std::atoi(flags.max_context.c_str()),
                             dtype);
    for (const int32_t tokens : tenon::ParseList(flags.prefill)) {
      if (tokens > 0) bench.Prefill(tokens);
    }
    tenon::RunDecode(flags, b.cuda(), dtype, &bench);
  }
  return b.Finish();
}
