// Whole steps of a Qwen3-MoE model with random weights: decode at several batch
// sizes, and prefill.
//
//   --layers N    of the model's 48; default: all on CUDA, 4 on the CPU
//   --batch N[,N] decode batch sizes; default 1,8,32 (CPU: 1)
//   --context N   tokens in the cache of each sequence when timing starts; 512
//   --graphs on|off|both  CUDA graphs of the decode steps; default: on
//   --profile     CUDA: also times each kind of op of a step on its own
//   --prefill N   tokens of the prefill that is timed; 512; 0: none
// and the flags of every benchmark (bench.h). --dtype bf16,fp8 runs both; fp8
// is attention projections and experts in float8_e4m3 with blocks of 128 x 128,
// all else in bfloat16, as Qwen3-30B-A3B-FP8 is published.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine/session.h"
#include "tests/bench/bench.h"
#include "tests/bench/decode_profile.h"

namespace tenon {
namespace {

struct Flags {
  int32_t layers = 0;
  std::vector<int32_t> batches;
  int32_t context = 512;
  int32_t prefill = 512;
  std::vector<bool> graphs = {true};
  bool profile = false;
};

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

// Bytes that a decode step must read: all dense weights, the experts that were
// hit (counted), and the KV cache. Elements of fp8 matrices are a byte and a
// share of a scale; all else has the model's dtype.
double StepBytes(const ModelConfig& c, DType dtype, const StepStats& stats,
                 int32_t rows, int32_t context) {
  const double hidden = static_cast<double>(c.hidden_size);
  const double q = static_cast<double>(c.num_heads) * c.head_dim;
  const double kv = static_cast<double>(c.num_kv_heads) * c.head_dim;
  const double attention = hidden * (q + 2 * kv) + q * hidden;
  const double router = hidden * c.num_experts;
  const double expert = 3.0 * hidden * c.moe_intermediate_size;
  const double element = static_cast<double>(DTypeSize(dtype));
  const double matrix_element =
      c.fp8_scaling == Fp8Scaling::kNone ? element : 1.0 + 4.0 / (128 * 128);
  double bytes = element * hidden * c.vocab_size;
  for (int32_t experts : stats.distinct_experts) {
    bytes += element * router + matrix_element * (attention + expert * experts);
  }
  return bytes + element * 2.0 * kv * context * rows * c.num_layers;
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

class DecodeBench {
 public:
  // `dtype` is float8_e4m3 for a model as published in fp8.
  DecodeBench(bench::Bench* bench, const Flags& flags, DType dtype)
      : bench_(bench),
        flags_(flags),
        dtype_(dtype),
        config_(Qwen3Moe30B(flags.layers, dtype == DType::kFloat8E4M3)) {
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

  void Prefill() {
    const int32_t tokens = flags_.prefill;
    if (tokens == 0) return;
    const std::unique_ptr<Session> session = MakeSession(1, tokens, false);
    std::vector<double> seconds;
    for (int repeat = 0; repeat < 4; ++repeat) {
      const SequenceId sequence = NewSequence(session.get());
      const std::vector<int32_t> prompt = RandomTokens(tokens);
      StepRow row;
      row.sequence = sequence;
      row.tokens = prompt.data();
      row.num_tokens = tokens;
      const double begin = bench::Seconds();
      bench::CheckOk(session->Step({row}, &results_));
      if (repeat > 0) seconds.push_back(bench::Seconds() - begin);
      bench::CheckOk(session->ReleaseSequence(sequence));
    }
    bench_->Add({"prefill", shape_, tokens, dtype_, 0.0,
                 tokens * TokenFlops(config_, tokens / 2, false)},
                bench::Median(seconds) * 1e6);
    std::fprintf(stderr, "prefill %d: %.1f tokens/s\n", tokens,
                 tokens / bench::Median(seconds));
  }

  void Decode(int32_t batch, bool graphs) {
    const std::unique_ptr<Session> session =
        MakeSession(batch, std::max(512, batch), graphs);
    std::vector<StepRow> rows(batch);
    for (StepRow& row : rows) {
      row.sequence = NewSequence(session.get());
      FillContext(session.get(), row.sequence);
      row.num_tokens = 1;
      row.sampling.temperature = 0.0f;
    }
    std::vector<double> seconds;
    StepStats stats;
    constexpr int kSteps = 44;
    for (int step = 0; step < kSteps; ++step) {
      // Random tokens, so that the routing is that of unrelated requests.
      const std::vector<int32_t> tokens = RandomTokens(batch);
      for (int32_t i = 0; i < batch; ++i) rows[i].tokens = &tokens[i];
      // Counting experts takes time, so it is done in a step that is not timed.
      const bool last = step + 1 == kSteps;
      const double begin = bench::Seconds();
      bench::CheckOk(session->Step(rows, &results_, last ? &stats : nullptr));
      if (step >= 4 && !last) seconds.push_back(bench::Seconds() - begin);
    }
    double experts = 0.0;
    for (int32_t count : stats.distinct_experts) experts += count;
    const double median = bench::Median(seconds);
    bench_->Add({"decode", shape_, batch, dtype_,
                 StepBytes(config_, model_->weights.dtype, stats, batch,
                           flags_.context),
                 batch * TokenFlops(config_, flags_.context, true)},
                median * 1e6);
    std::fprintf(stderr,
                 "decode batch %d, graphs %s: %.3f ms/step, %.1f tokens/s, "
                 "%.1f distinct experts a layer; %lld graphs of %.1f MB\n",
                 batch, graphs ? "on" : "off", median * 1e3, batch / median,
                 experts / std::max<size_t>(stats.distinct_experts.size(), 1),
                 static_cast<long long>(session->num_graphs()),
                 static_cast<double>(session->graph_bytes()) * 1e-6);
  }

  void Profile(int32_t batch) {
    const std::vector<bench::OpProfile> ops =
        bench::ProfileDecode(*model_, bench_->stream(), batch, flags_.context);
    const double step = ops.back().microseconds;
    std::fprintf(stderr,
                 "%s batch %d context %d   launches  a layer        us"
                 "  us a layer  %% of step\n",
                 DTypeName(dtype_), batch, flags_.context);
    double sum = 0.0;
    for (const bench::OpProfile& op : ops) {
      const bool is_step = &op == &ops.back();
      if (is_step) {
        std::fprintf(stderr, "  %-24s %10s %8s %10.1f %11s %9.1f\n", "sum", "",
                     "", sum, "", 100 * sum / step);
      }
      std::fprintf(stderr, "  %-24s %10lld %8.2f %10.1f %11.2f %9.1f\n",
                   op.name.c_str(), static_cast<long long>(op.launches),
                   static_cast<double>(op.launches) / config_.num_layers,
                   op.microseconds, op.microseconds / config_.num_layers,
                   100 * op.microseconds / step);
      sum += op.microseconds;
    }
  }

 private:
  std::unique_ptr<Session> MakeSession(int32_t sequences, int32_t tokens,
                                       bool graphs) {
    SessionOptions options;
    options.max_sequences = sequences;
    options.max_tokens = tokens;
    options.max_context = std::max(flags_.context + 64, flags_.prefill);
    options.count_experts = true;
    options.cuda_graphs = graphs;
    options.num_threads = bench_->num_threads();
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    bench::CheckOk(session.status());
    return *std::move(session);
  }

  SequenceId NewSequence(Session* session) {
    StatusOr<SequenceId> sequence = session->CreateSequence();
    bench::CheckOk(sequence.status());
    return *sequence;
  }

  void FillContext(Session* session, SequenceId sequence) {
    const std::vector<int32_t> prompt = RandomTokens(flags_.context);
    for (int32_t at = 0; at < flags_.context;) {
      StepRow row;
      row.sequence = sequence;
      row.tokens = &prompt[at];
      row.num_tokens = std::min(512, flags_.context - at);
      row.sample = false;
      bench::CheckOk(session->Step({row}, &results_));
      at += row.num_tokens;
    }
  }

  std::vector<int32_t> RandomTokens(int32_t count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      token = static_cast<int32_t>((state_ >> 33) % config_.vocab_size);
    }
    return tokens;
  }

  bench::Bench* bench_;
  Flags flags_;
  DType dtype_;
  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::string shape_;
  std::vector<StepRowResult> results_;
  uint64_t state_ = 1;
};

// Takes this program's own flags out of argv.
Flags TakeFlags(int* argc, char** argv) {
  Flags flags;
  int kept = 1;
  for (int i = 1; i < *argc; ++i) {
    const bool has_value = i + 1 < *argc;
    if (has_value && std::strcmp(argv[i], "--layers") == 0) {
      flags.layers = std::atoi(argv[++i]);
    } else if (has_value && std::strcmp(argv[i], "--context") == 0) {
      flags.context = std::atoi(argv[++i]);
    } else if (has_value && std::strcmp(argv[i], "--prefill") == 0) {
      flags.prefill = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--profile") == 0) {
      flags.profile = true;
    } else if (has_value && std::strcmp(argv[i], "--graphs") == 0) {
      const std::string value = argv[++i];
      flags.graphs = {value != "off"};
      if (value == "both") flags.graphs.push_back(false);
    } else if (has_value && std::strcmp(argv[i], "--batch") == 0) {
      for (char* item = std::strtok(argv[++i], ","); item != nullptr;
           item = std::strtok(nullptr, ",")) {
        flags.batches.push_back(std::atoi(item));
      }
    } else {
      argv[kept++] = argv[i];
    }
  }
  *argc = kept;
  return flags;
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  tenon::Flags flags = tenon::TakeFlags(&argc, argv);
  tenon::bench::Options options;
  options.fp8 = true;
  tenon::bench::Bench b(argc, argv, "decode_bench", options);
  const bool cuda = b.device().type == tenon::DeviceType::kCuda;
  if (flags.layers <= 0) flags.layers = cuda ? 48 : 4;
  if (flags.batches.empty()) {
    flags.batches =
        cuda ? std::vector<int32_t>{1, 8, 32} : std::vector<int32_t>{1};
  }
  for (const tenon::DType dtype : b.DTypes({tenon::DType::kBFloat16})) {
    tenon::DecodeBench bench(&b, flags, dtype);
    bench.Prefill();
    for (int32_t batch : flags.batches) {
      for (const bool graphs : flags.graphs) bench.Decode(batch, graphs);
      if (flags.profile && cuda) bench.Profile(batch);
    }
  }
  return b.Finish();
}
