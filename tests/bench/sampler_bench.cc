// Sampling from the logits of the LM head: the common parameter sets, every
// feature at once, and rows that are made to defeat shortcuts. "limit" is
// reading the logits once.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "ops/sampler/sampler.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

constexpr int64_t kVocab = 151936;
constexpr int kEdits = 600;

struct Mode {
  const char* op;
  SamplingParams params;
  bool fast = false;   // SamplerParams::fast
  bool every = false;  // edits, a mask and all outputs, too
};

Mode Plain(const char* op) { return {op, SamplingParams()}; }

Mode TopKTopPMinP(const char* op) {
  Mode mode = Plain(op);
  mode.params.top_k = 50;
  mode.params.top_p = 0.9f;
  mode.params.min_p = 0.05f;
  return mode;
}

Mode Every() {
  Mode mode = TopKTopPMinP("sampler every feature");
  SamplingParams& p = mode.params;
  p.top_n_sigma = 4.0f;
  p.typical_p = 0.95f;
  p.xtc_probability = 0.5f;
  p.xtc_threshold = 0.1f;
  p.repetition_penalty = 1.1f;
  p.frequency_penalty = 0.1f;
  p.presence_penalty = 0.2f;
  p.num_top_logprobs = 20;
  p.flags = kUseBitmask;
  mode.every = true;
  return mode;
}

std::vector<Mode> Modes() {
  Mode greedy = Plain("sampler greedy");
  greedy.params.temperature = 0.0f;
  Mode top_p = Plain("sampler top-p");
  top_p.params.top_p = 0.9f;
  Mode min_p = Plain("sampler min-p");
  min_p.params.min_p = 0.05f;
  std::vector<Mode> modes = {greedy,
                             Plain("sampler plain"),
                             Plain("sampler plain fast"),
                             TopKTopPMinP("sampler k50 p0.9 m0.05"),
                             TopKTopPMinP("sampler k50 p0.9 m0.05 fast"),
                             top_p,
                             min_p,
                             Every()};
  modes[2].fast = true;
  modes[4].fast = true;
  return modes;
}

std::vector<SamplingParams> RowParams(const SamplingParams& params,
                                      int64_t rows) {
  std::vector<SamplingParams> all(static_cast<size_t>(rows), params);
  for (size_t i = 0; i < all.size(); ++i) all[i].seed = i + 1;
  return all;
}

// Tokens that a sequence has had, for its penalties, and a mask that forbids
// every eighth token.
void AddEvery(bench::Tensors& tensors, SamplerParams* p) {
  const int64_t rows = p->logits.shape[0];
  std::vector<LogitEdit> edits;
  std::vector<int32_t> offsets = {0};
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kEdits; ++i) {
      LogitEdit edit;
      edit.id = static_cast<int32_t>((i * 251 + row * 17) % kVocab);
      edit.state = 1 + static_cast<uint32_t>(i % 3);
      edits.push_back(edit);
    }
    std::sort(edits.end() - kEdits, edits.end(),
              [](const LogitEdit& a, const LogitEdit& b) {
                return DrawOrder(a.id, kVocab) < DrawOrder(b.id, kVocab);
              });
    offsets.push_back(static_cast<int32_t>(edits.size()));
  }
  const int64_t words = kVocab / 32;
  p->edits = tensors.CopyOf(edits);
  p->num_edits = static_cast<int64_t>(edits.size());
  p->edit_offsets = tensors.Of(offsets, {rows + 1});
  p->bitmask =
      tensors.Of(std::vector<int32_t>(static_cast<size_t>(rows * words),
                                      static_cast<int32_t>(0xf7f7f7f7u)),
                 {rows, words});
  p->raw_logprobs = tensors.Zeros(DType::kFloat32, {rows});
  p->processed_logprobs = tensors.Zeros(DType::kFloat32, {rows});
  p->top_tokens = tensors.Zeros(DType::kInt32, {rows, kMaxTopLogprobs});
  p->top_logprobs = tensors.Zeros(DType::kFloat32, {rows, kMaxTopLogprobs});
}

void RunCase(bench::Bench& b, const Mode& mode, const char* kind,
             const std::vector<TensorView>& logits) {
  if (!b.Wants(mode.op)) return;
  const int64_t rows = logits[0].shape[0];
  const DType dtype = logits[0].dtype;
  bench::Tensors tensors(b.device());
  std::vector<SamplerParams> params(logits.size());
  void* workspace = nullptr;
  for (size_t i = 0; i < params.size(); ++i) {
    SamplerParams& p = params[i];
    p.logits = logits[i];
    p.params = tensors.CopyOf(RowParams(mode.params, rows));
    p.fast = mode.fast;
    p.tokens = tensors.Zeros(DType::kInt32, {rows});
    p.logprobs = tensors.Zeros(DType::kFloat32, {rows});
    p.statuses = tensors.Zeros(DType::kInt32, {rows});
    if (mode.every) AddEvery(tensors, &p);
    p.workspace_size = SamplerWorkspaceBytes(p);
    if (workspace == nullptr) workspace = tensors.Bytes(p.workspace_size);
    p.workspace = workspace;
  }
  const double bytes = static_cast<double>(rows * kVocab) *
                       static_cast<double>(DTypeSize(dtype));
  b.Run({mode.op, StrCat(kVocab, " ", kind), rows, dtype, bytes},
        static_cast<int>(params.size()),
        [&](int i) { return Sampler(params[i], b.stream()); });
}

void RunModes(bench::Bench& b, const char* kind,
              const std::vector<TensorView>& logits) {
  for (const Mode& mode : Modes()) RunCase(b, mode, kind, logits);
}

double BytesOf(DType dtype, int64_t rows) {
  return static_cast<double>(rows * kVocab) *
         static_cast<double>(DTypeSize(dtype));
}

void RunNormal(bench::Bench& b, DType dtype, int64_t rows, const char* kind,
               float stddev) {
  bench::Tensors tensors(b.device());
  std::vector<TensorView> logits(b.NumSets(BytesOf(dtype, rows)));
  for (TensorView& l : logits) {
    l = tensors.Random(dtype, {rows, kVocab}, stddev);
  }
  RunModes(b, kind, logits);
}

// Rows of float32 that all are logit(id).
template <class Logit>
void RunRows(bench::Bench& b, int64_t rows, const char* kind, Logit logit) {
  bench::Tensors tensors(b.device());
  std::vector<float> all;
  for (int64_t id = 0; id < kVocab; ++id) all.push_back(logit(id));
  all.reserve(static_cast<size_t>(rows * kVocab));
  for (int64_t row = 1; row < rows; ++row) {
    all.insert(all.end(), all.begin(), all.begin() + kVocab);
  }
  std::vector<TensorView> logits(b.NumSets(BytesOf(DType::kFloat32, rows)));
  for (TensorView& l : logits) l = tensors.Of(all, {rows, kVocab});
  RunModes(b, kind, logits);
}

void RunAdversarial(bench::Bench& b, int64_t rows) {
  std::mt19937 random(1);
  std::normal_distribution<float> distribution;
  std::vector<float> normal(kVocab);
  for (float& x : normal) x = distribution(random);
  RunRows(b, rows, "sorted", [](int64_t id) {
    return -1.1f * std::log(static_cast<float>(id + 1));
  });
  RunRows(b, rows, "spike",
          [&](int64_t id) { return id == 1234 ? 30.0f : normal[id]; });
  RunRows(b, rows, "equal", [](int64_t) { return 1.25f; });
  RunRows(b, rows, "masked", [&](int64_t id) {
    return id * 7919 % 1000 == 5 ? normal[id]
                                 : -std::numeric_limits<float>::infinity();
  });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Options options;
  options.limit = true;
  tenon::bench::Bench b(argc, argv, "sampler_bench", options);
  for (DType dtype : b.DTypes({DType::kFloat32, DType::kBFloat16})) {
    for (int64_t rows : b.Tokens({1, 8, 64, 256}, {1, 8, 64})) {
      tenon::RunNormal(b, dtype, rows, "flat", 1.0f);
      tenon::RunNormal(b, dtype, rows, "peaked", 4.0f);
      if (dtype == DType::kFloat32 && rows != 8) {
        tenon::RunAdversarial(b, rows);
      }
    }
  }
  return b.Finish();
}
