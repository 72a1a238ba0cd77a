// Sampling from the logits of the LM head, for the common parameter sets and
// two kinds of rows: flat (thousands of likely tokens) and peaked (a few).

#include "ops/sampler/sampler.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

constexpr int64_t kVocab = 151936;

struct Mode {
  const char* op;
  SamplingParams params;
};

std::vector<Mode> Modes() {
  Mode greedy{"sampler greedy", {}};
  greedy.params.temperature = 0.0f;
  const Mode plain{"sampler plain", {}};
  Mode top_p{"sampler top-p", {}};
  top_p.params.top_p = 0.9f;
  Mode filtered{"sampler k50 p0.9 m0.05", {}};
  filtered.params.top_k = 50;
  filtered.params.top_p = 0.9f;
  filtered.params.min_p = 0.05f;
  return {greedy, plain, top_p, filtered};
}

std::vector<SamplingParams> RowParams(const SamplingParams& params,
                                      int64_t rows) {
  std::vector<SamplingParams> all(static_cast<size_t>(rows), params);
  for (size_t i = 0; i < all.size(); ++i) all[i].seed = i + 1;
  return all;
}

void RunCase(bench::Bench& b, const Mode& mode, const char* kind,
             const std::vector<TensorView>& logits) {
  const int64_t rows = logits[0].shape[0];
  const DType dtype = logits[0].dtype;
  bench::Tensors tensors(b.device());
  std::vector<SamplerParams> params(logits.size());
  void* workspace = nullptr;
  for (size_t i = 0; i < params.size(); ++i) {
    SamplerParams& p = params[i];
    p.logits = logits[i];
    p.params = tensors.CopyOf(RowParams(mode.params, rows));
    p.tokens = tensors.Zeros(DType::kInt32, {rows});
    p.logprobs = tensors.Zeros(DType::kFloat32, {rows});
    p.statuses = tensors.Zeros(DType::kInt32, {rows});
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

void RunRows(bench::Bench& b, DType dtype, int64_t rows, const char* kind,
             float stddev) {
  const double bytes = static_cast<double>(rows * kVocab) *
                       static_cast<double>(DTypeSize(dtype));
  bench::Tensors tensors(b.device());
  std::vector<TensorView> logits(b.NumSets(bytes));
  for (TensorView& l : logits) {
    l = tensors.Random(dtype, {rows, kVocab}, stddev);
  }
  for (const Mode& mode : Modes()) RunCase(b, mode, kind, logits);
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "sampler_bench");
  for (DType dtype : b.DTypes({DType::kFloat32, DType::kBFloat16})) {
    for (int64_t rows : b.Tokens({1, 8, 64, 256}, {1, 8, 64})) {
      tenon::RunRows(b, dtype, rows, "flat", 1.0f);
      tenon::RunRows(b, dtype, rows, "peaked", 4.0f);
    }
  }
  return b.Finish();
}
