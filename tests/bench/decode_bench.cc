// Whole steps of Qwen3-30B-A3B with random weights: decode at several batch
// sizes and contexts, and prefill. Flags beside those of every benchmark:
//
//   --layers N          of the model's 48; default: all on CUDA, 4 on the CPU
//   --batch N[,N]       decode batch sizes; default 1,8,32,64 and in fp8 128
//                       (CPU: 1); 0: no decode steps
//   --context N[,N]     tokens in the cache of each sequence; 1024,8192
//                       (CPU: 1024)
//   --max-context N     of the session, whose graphs are for it; default: that
//                       of each run, and no more
//   --prefill N[,N]     tokens of the prefills; 512,2048,8192 (CPU: 512); 0:
//                       none
//   --routing R         uniform: unrelated tokens; repeated: the same ones in
//                       every sequence, which so choose the same experts; both
//   --kv-cache model|fp8|both  elements of cached K and V; model: the model's
//   --batch-invariant on|off|both  off
//   --graphs on|off|both       CUDA graphs; on
//   --steps pipelined|waited|both  EnqueueStep and WaitStep, each row going on
//                       with the token that was drawn for it, or Step with
//                       tokens from the host; pipelined
//   --profile on|off    CUDA: also every kind of op of a step on its own; off
//   --fuse on|off|both  of the profiled steps: whether norms and sums of few
//                       tokens are part of the ops next to them; on. Off: also
//                       a step whose norm of Q and K is one of frameworks:
//                       split, norm, concatenate
//
// --dtype bf16,fp8 runs both; fp8 is attention projections and experts in
// float8_e4m3 with blocks of 128 x 128, all else in bfloat16, as
// Qwen3-30B-A3B-FP8 is published. Every step is waited for on the host's clock,
// so that all of its gaps count. Bytes are those of the experts that the tokens
// of the last step chose: column `experts`.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "tests/bench/bench.h"
#include "tests/bench/decode_profile.h"
#include "tests/testing/bench_model.h"

namespace tenon {
namespace {

struct Flags {
  std::string layers, batch, context, max_context, prefill;
  std::string routing = "uniform", kv_cache = "model", batch_invariant = "off",
              graphs = "on", steps = "pipelined", profile = "off", fuse = "on";
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

// The values of a flag that is `yes`, `no` or `both`.
std::vector<bool> ParseChoice(const std::string& text, const char* yes,
                              const char* no) {
  if (text == "both") return {true, false};
  if (text == yes || text == no) return {text == yes};
  std::fprintf(stderr, "%s: not %s, %s or both\n", text.c_str(), yes, no);
  std::exit(2);
}

ModelConfig BenchModel(int32_t layers, bool fp8) {
  ModelConfig config = testing::Qwen3Moe30B(layers);
  if (fp8) {
    config.fp8_scaling = Fp8Scaling::kBlocks;
    config.fp8_scale_suffix = "_scale_inv";
  }
  return config;
}

// Bytes that a step must read: all dense weights, `experts` experts in all
// layers together, and the KV cache of `cached` tokens. Elements of fp8
// matrices are a byte and a share of a scale; the cache has `kv_dtype`, all
// else the model's dtype.
double StepBytes(const ModelConfig& c, DType dtype, DType kv_dtype,
                 double experts, double cached) {
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
         static_cast<double>(DTypeSize(kv_dtype)) * 2.0 * kv * cached *
             c.num_layers;
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
  bool fp8_cache = false;
  bool batch_invariant = false;
  bool graphs = true;
  bool pipelined = true;

  std::string Note() const {
    return StrCat("context ", context, repeated ? ", repeated" : "",
                  fp8_cache ? ", fp8 cache" : "",
                  batch_invariant ? ", batch-invariant" : "",
                  graphs ? "" : ", no graphs", pipelined ? "" : ", waited");
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
        config_(BenchModel(layers, dtype == DType::kFloat8E4M3)) {
    const DType rest = dtype == DType::kFloat8E4M3 ? DType::kBFloat16 : dtype;
    std::fprintf(stderr, "making %d layers of random weights in %s\n",
                 config_.num_layers, DTypeName(dtype));
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Random(config_, rest, bench->device(), 7);
    bench::CheckOk(model.status());
    model_ = *std::move(model);
    SpreadEmbedding();
    std::fprintf(stderr, "%.2f GB of weights\n",
                 static_cast<double>(model_->weights.bytes) * 1e-9);
    shape_ = StrCat("qwen3-30b-a3b/", config_.num_layers, "L");
  }

  void Prefill(int32_t tokens) {
    SessionOptions options;
    options.max_sequences = 1;
    options.max_tokens = options.max_context = tokens;
    options.count_experts = true;
    const std::unique_ptr<Session> session = MakeSession(options);
    if (session == nullptr) return;
    std::vector<double> seconds;
    StepStats stats;
    for (int repeat = 0; repeat < 4; ++repeat) {
      const SequenceId sequence = NewSequence(session.get());
      const std::vector<int32_t> prompt = RandomTokens(tokens);
      const double begin = bench::Seconds();
      FillContext(session.get(), sequence, prompt, true, &stats);
      if (repeat > 0) seconds.push_back(bench::Seconds() - begin);
      bench::CheckOk(session->ReleaseSequence(sequence));
    }
    const DType dtype = model_->weights.dtype;
    bench_->Add({"prefill", shape_, tokens, dtype_,
                 StepBytes(config_, dtype, dtype, SumOfExperts(stats), 0),
                 tokens * TokenFlops(config_, tokens / 2, false), "",
                 MeanOfExperts(stats)},
                bench::Median(seconds) * 1e6);
  }

  void Decode(const DecodeCase& what) {
    SessionOptions options;
    options.max_sequences = what.batch;
    options.max_tokens = std::max(what.batch, std::min(what.context, 8192));
    const int32_t context = what.context + kSteps + kMaxStepsInFlight;
    options.max_context = std::max(context, max_context_);
    options.num_pages = int64_t{what.batch} * (context / options.page_size + 1);
    options.count_experts = true;
    if (what.fp8_cache) options.kv_cache_dtype = DType::kFloat8E4M3;
    options.batch_invariant = what.batch_invariant;
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
                  what.repeated ? same : RandomTokens(what.context), false,
                  nullptr);
      row.num_tokens = 1;
      // Unrelated tokens of nearly even logits, or the same of each row.
      row.sampling.seed = what.repeated ? 1 : Random();
    }
    StepStats stats;
    const double median = what.pipelined
                              ? TimePipelined(session.get(), &rows, &stats)
                              : TimeWaited(session.get(), what, &rows, &stats);
    const double cached =
        static_cast<double>(what.batch) * (what.context + kSteps / 2);
    const DType dtype = model_->weights.dtype;
    bench_->Add(
        {"decode", shape_, what.batch, dtype_,
         StepBytes(config_, dtype, what.fp8_cache ? DType::kFloat8E4M3 : dtype,
                   SumOfExperts(stats), cached),
         what.batch * TokenFlops(config_, what.context, true), what.Note(),
         MeanOfExperts(stats)},
        median * 1e6);
    std::fprintf(stderr,
                 "decode batch %d, %s: session of %lld graphs (%.1f MB) "
                 "created in %.2f s\n",
                 what.batch, what.Note().c_str(),
                 static_cast<long long>(session->num_graphs()),
                 static_cast<double>(session->graph_bytes()) * 1e-6,
                 seconds_to_create);
  }

  // A row for each kind of op, the sum of them, and the step that they make up.
  void Profile(int32_t batch, int32_t context, bool fuse) {
    std::vector<bench::OpProfile> ops =
        bench::ProfileDecode(*model_, bench_->stream(), batch, context, fuse);
    const double step = ops.back().microseconds;
    bench::OpProfile sum = {"sum", 0, 0.0};
    for (const bench::OpProfile& op : ops) {
      if (&op == &ops.back()) break;
      sum.launches += op.launches;
      sum.microseconds += op.microseconds;
    }
    ops.insert(ops.end() - 1, sum);
    if (!fuse) {
      ops.push_back(
          bench::ProfileSplitQkNorm(*model_, bench_->stream(), batch, context));
    }
    for (const bench::OpProfile& op : ops) {
      char note[160];
      std::snprintf(note, sizeof(note),
                    "context %d%s, %lld launches, a layer %.2f and %.2f us, "
                    "%.1f %% of the step",
                    context, fuse ? "" : ", not fused",
                    static_cast<long long>(op.launches),
                    static_cast<double>(op.launches) / config_.num_layers,
                    op.microseconds / config_.num_layers,
                    100.0 * op.microseconds / step);
      bench::Case what = {"decode/" + op.name, shape_, batch, dtype_};
      what.note = note;
      what.launches = op.launches;
      bench_->Add(what, op.microseconds);
    }
  }

 private:
  static constexpr int kSteps = 40;
  static constexpr int kWarmUp = 4;

  // Makes the embedding large beside what the layers add to it. Else the tokens
  // of a prompt are soon little more than the mean that attention takes of all
  // of them, and choose the same few experts, which those of a text do not.
  void SpreadEmbedding() {
    const TensorView& table = model_->weights.embedding;
    bench::Tensors tensors(bench_->device());
    const TensorView spread =
        tensors.Random(table.dtype, {table.shape[0], table.shape[1]}, 10.0f);
    bench::CheckOk(CopyMemory(
        table.data, table.device, spread.data, spread.device,
        static_cast<size_t>(NumElements(table)) * DTypeSize(table.dtype),
        bench_->stream()));
    bench::CheckOk(Synchronize(bench_->device(), bench_->stream()));
  }

  // Of all layers, and of one.
  static double SumOfExperts(const StepStats& stats) {
    double sum = 0.0;
    for (int32_t count : stats.distinct_experts) sum += count;
    return sum;
  }
  static double MeanOfExperts(const StepStats& stats) {
    return SumOfExperts(stats) / static_cast<double>(std::max<size_t>(
                                     stats.distinct_experts.size(), 1));
  }

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
                   const std::vector<int32_t>& tokens, bool sample,
                   StepStats* stats) {
    const auto count = static_cast<int32_t>(tokens.size());
    for (int32_t at = 0; at < count;) {
      StepRow row;
      row.sequence = sequence;
      row.tokens = &tokens[at];
      row.num_tokens = std::min(session->options().max_tokens, count - at);
      row.sample = sample;
      bench::CheckOk(session->Step({row}, &results_, stats));
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

// Every combination of the flags' values.
std::vector<DecodeCase> DecodeCases(const Flags& flags, int32_t batch,
                                    int32_t context) {
  std::vector<DecodeCase> cases = {{batch, context}};
  const auto vary = [&](const std::vector<bool>& values,
                        bool DecodeCase::*field) {
    std::vector<DecodeCase> all;
    for (DecodeCase what : cases) {
      for (const bool value : values) {
        what.*field = value;
        all.push_back(what);
      }
    }
    cases = all;
  };
  vary(ParseChoice(flags.routing, "repeated", "uniform"),
       &DecodeCase::repeated);
  vary(ParseChoice(flags.kv_cache, "fp8", "model"), &DecodeCase::fp8_cache);
  vary(ParseChoice(flags.batch_invariant, "on", "off"),
       &DecodeCase::batch_invariant);
  vary(ParseChoice(flags.graphs, "on", "off"), &DecodeCase::graphs);
  vary(ParseChoice(flags.steps, "pipelined", "waited"), &DecodeCase::pipelined);
  return cases;
}

void RunDecode(const Flags& flags, bool cuda, DType dtype, DecodeBench* bench) {
  for (const int32_t context : ParseList(flags.context)) {
    for (const int32_t batch : Batches(flags, cuda, dtype)) {
      if (batch == 0) continue;
      for (const DecodeCase& what : DecodeCases(flags, batch, context)) {
        bench->Decode(what);
      }
      if (!cuda || flags.profile != "on") continue;
      for (const bool fuse : ParseChoice(flags.fuse, "on", "off")) {
        bench->Profile(batch, context, fuse);
      }
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
  options.tokens_per_s = true;
  options.flags = {{"--layers", &flags.layers},
                   {"--batch", &flags.batch},
                   {"--context", &flags.context},
                   {"--max-context", &flags.max_context},
                   {"--prefill", &flags.prefill},
                   {"--routing", &flags.routing},
                   {"--kv-cache", &flags.kv_cache},
                   {"--batch-invariant", &flags.batch_invariant},
                   {"--graphs", &flags.graphs},
                   {"--steps", &flags.steps},
                   {"--profile", &flags.profile},
                   {"--fuse", &flags.fuse}};
  tenon::bench::Bench b(argc, argv, "decode_bench", options);
  int32_t layers = std::atoi(flags.layers.c_str());
  if (layers <= 0) layers = b.cuda() ? 48 : 4;
  if (flags.context.empty()) flags.context = b.cuda() ? "1024,8192" : "1024";
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
