// Decode of a batch of equally long sequences; prefill of one prompt, of a
// chunk of one, and of several; over a cache whose pages lie in random order.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "ops/attention/attention.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

// `sequences` sequences of `context` cached tokens; the last `queries` of each
// are attended from.
struct Workload {
  int64_t sequences;
  int64_t queries;
  int64_t context;
  int64_t page_size;
};

AttentionParams MakeParams(bench::Tensors* tensors,
                           const testing::ModelShape& shape, DType dtype,
                           const Workload& load) {
  const DType cache_dtype = dtype;  // queries beside fp8 are bfloat16
  if (dtype == DType::kFloat8E4M3) dtype = DType::kBFloat16;
  const int64_t pages = (load.context + load.page_size - 1) / load.page_size;
  const int64_t tokens = load.sequences * load.queries;
  std::vector<int32_t> table(static_cast<size_t>(load.sequences * pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(1));
  std::vector<int32_t> starts;
  for (int64_t s = 0; s <= load.sequences; ++s) {
    starts.push_back(static_cast<int32_t>(s * load.queries));
  }
  const std::vector<int32_t> lengths(static_cast<size_t>(load.sequences),
                                     static_cast<int32_t>(load.context));
  AttentionParams p;
  p.q = tensors->Random(dtype, {tokens, shape.num_heads, shape.head_dim});
  p.out = tensors->Zeros(dtype, {tokens, shape.num_heads, shape.head_dim});
  for (TensorView* cache : {&p.k_cache, &p.v_cache}) {
    *cache =
        tensors->Random(cache_dtype, {load.sequences * pages, load.page_size,
                                      shape.num_kv_heads, shape.head_dim});
  }
  p.block_table = tensors->Of(table, {load.sequences, pages});
  p.query_start = tensors->Of(starts, {load.sequences + 1});
  p.kv_len = tensors->Of(lengths, {load.sequences});
  p.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  p.max_kv_len = static_cast<int32_t>(load.context);
  p.max_query_len = static_cast<int32_t>(load.queries);
  // As in a step: the kernel ahead, here another call, writes none of it.
  p.early_reads = true;
  return p;
}

void RunCase(bench::Bench& b, const testing::ModelShape& shape, DType dtype,
             const Workload& load, bool batch_invariant) {
  const double tokens = static_cast<double>(load.sequences * load.queries);
  const double q_width = static_cast<double>(shape.num_heads) * shape.head_dim;
  const double kv_width =
      static_cast<double>(shape.num_kv_heads) * shape.head_dim;
  bench::Case what;
  what.op = load.queries == 1 ? "attention decode" : "attention prefill";
  if (batch_invariant) what.op += " b-inv";
  what.shape = shape.name;
  what.tokens = load.sequences * load.queries;
  what.dtype = dtype;
  const double q_element = dtype == DType::kFloat32 ? 4.0 : 2.0;
  what.bytes = 2.0 * (q_element * tokens * q_width +
                      static_cast<double>(DTypeSize(dtype)) * kv_width *
                          load.sequences * load.context);
  // Query i of n sees context - n + i + 1 positions.
  const double visible = load.context - 0.5 * (load.queries - 1);
  what.flops = 4.0 * tokens * q_width * visible;
  what.note = StrCat("context ", load.context, ", page ", load.page_size);

  bench::Tensors tensors(b.device());
  std::vector<AttentionParams> params(b.NumSets(what.bytes));
  void* workspace = nullptr;
  for (AttentionParams& p : params) {
    p = MakeParams(&tensors, shape, dtype, load);
    p.batch_invariant = batch_invariant;
    p.workspace_size = AttentionWorkspaceBytes(p);
    if (workspace == nullptr) workspace = tensors.Bytes(p.workspace_size);
    p.workspace = workspace;
  }
  b.Run(what, static_cast<int>(params.size()),
        [&](int i) { return Attention(params[i], b.stream()); });
}

// --tokens, where given, replaces the batch sizes of decode.
void RunDecode(bench::Bench& b, const testing::ModelShape& shape, DType dtype) {
  const std::vector<int64_t> contexts =
      b.cuda() ? std::vector<int64_t>{1024, 4096, 8192, 32768}
               : std::vector<int64_t>{1024, 4096};
  for (int64_t page_size : {16, 64}) {
    for (int64_t context : contexts) {
      for (int64_t batch : b.Tokens({1, 8, 32, 64}, {1, 8})) {
        RunCase(b, shape, dtype, {batch, 1, context, page_size}, false);
      }
    }
  }
}

void RunPrefill(bench::Bench& b, const testing::ModelShape& shape,
                DType dtype) {
  std::vector<Workload> loads;
  for (int64_t page_size : {16, 64}) {
    for (int64_t tokens : {512, 2048}) {
      loads.push_back({1, tokens, tokens, page_size});
    }
    if (!b.cuda()) break;  // the rest takes too long
    loads.push_back({1, 8192, 8192, page_size});
    loads.push_back({1, 512, 8192, page_size});
    loads.push_back({4, 2048, 2048, page_size});
  }
  for (const Workload& load : loads) {
    RunCase(b, shape, dtype, load, false);
    // The CPU has no other mode.
    if (b.cuda() && load.page_size == 16) RunCase(b, shape, dtype, load, true);
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Options options;
  options.limit = true;
  options.fp8 = true;  // caches
  tenon::bench::Bench b(argc, argv, "attention_bench", options);
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : b.DTypes({DType::kBFloat16, DType::kFloat8E4M3})) {
      tenon::RunDecode(b, shape, dtype);
      tenon::RunPrefill(b, shape, dtype);
    }
  }
  return b.Finish();
}
