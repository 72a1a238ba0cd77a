#include "tests/bench/moe_inputs.h"

#include <algorithm>
#include <set>

namespace tenon::bench {
namespace {

constexpr int64_t kScaleBlock = 128;

// Of one expert's matrix in fp8.
struct ScaleGrid {
  ScaleGrid(const MoeFormat& format, int64_t rows, int64_t cols)
      : rows(format.per_channel ? rows
                                : (rows + kScaleBlock - 1) / kScaleBlock),
        cols(format.per_channel ? 1 : (cols + kScaleBlock - 1) / kScaleBlock) {}
  int64_t count() const { return rows * cols; }
  int64_t rows, cols;
};

// One matrix per expert. fp8 elements fill the range up to 448.
ExpertMatrices RandomMatrices(Tensors* tensors, const MoeFormat& format,
                              int64_t num_experts, int64_t rows, int64_t cols) {
  constexpr float kStddev = 0.02f;
  constexpr float kFp8Stddev = 100.0f;
  ExpertMatrices m = MakeExpertMatrices(
      tensors->Random(format.dtype, {num_experts, rows, cols},
                      format.fp8() ? kFp8Stddev : kStddev));
  if (!format.fp8()) return m;
  const ScaleGrid grid(format, rows, cols);
  std::vector<float> scales(static_cast<size_t>(num_experts * grid.count()));
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = kStddev / kFp8Stddev * (0.75f + 0.5f / 64 * (i % 64));
  }
  m.scales.data = tensors->CopyOf(scales);
  m.scales.expert_stride = grid.count();
  m.scales.row_stride = grid.cols;
  m.scales.block_rows = format.per_channel ? 1 : kScaleBlock;
  m.scales.block_cols = format.per_channel ? 0 : kScaleBlock;
  return m;
}

// Returns how many distinct experts the tokens of the set hit.
size_t AddSet(const Bench& bench, Tensors* tensors,
              const testing::ModelShape& shape, int64_t tokens, Routing routing,
              const MoeFormat& format, const MoeWeights& weights,
              MoeCalls* calls) {
  const int seed = calls->num_sets();
  MoeCalls::Set& set = calls->sets.emplace_back();
  set.router = MakeMoeRouter(tensors, shape, tokens, routing, seed);
  CheckOk(MoeRouter(set.router, bench.stream()));
  CheckOk(Synchronize(bench.device(), bench.stream()));
  MoeParams& p = set.moe;
  p.x = tensors->Random(format.x_dtype(), {tokens, shape.hidden});
  p.out = tensors->Zeros(format.x_dtype(), {tokens, shape.hidden});
  p.topk_weights = set.router.topk_weights;
  p.topk_ids = set.router.topk_ids;
  p.gate = weights.gate;
  p.up = weights.up;
  p.down = weights.down;
  const std::vector<int32_t> ids = ReadInt32(set.router.topk_ids);
  return std::set(ids.begin(), ids.end()).size();
}

}  // namespace

MoeWeights MakeMoeWeights(Tensors* tensors, const testing::ModelShape& s,
                          const MoeFormat& format) {
  const auto matrices = [&](int64_t rows, int64_t cols) {
    return RandomMatrices(tensors, format, s.num_experts, rows, cols);
  };
  return {matrices(s.intermediate, s.hidden),
          matrices(s.intermediate, s.hidden),
          matrices(s.hidden, s.intermediate)};
}

double MoeExpertBytes(const testing::ModelShape& s, const MoeFormat& format) {
  const int64_t elements = 3 * s.hidden * s.intermediate;
  int64_t scales = 0;
  if (format.fp8()) {
    scales = 2 * ScaleGrid(format, s.intermediate, s.hidden).count() +
             ScaleGrid(format, s.hidden, s.intermediate).count();
  }
  return static_cast<double>(elements) *
             static_cast<double>(DTypeSize(format.dtype)) +
         4.0 * static_cast<double>(scales);
}

MoeRouterParams MakeMoeRouter(Tensors* tensors,
                              const testing::ModelShape& shape, int64_t tokens,
                              Routing routing, int seed) {
  MoeRouterParams p;
  p.logits = tensors->Of(RouterLogits(tokens, shape.num_experts, routing, seed),
                         {tokens, shape.num_experts});
  p.topk_weights = tensors->Zeros(DType::kFloat32, {tokens, shape.top_k});
  p.topk_ids = tensors->Zeros(DType::kInt32, {tokens, shape.top_k});
  p.top_k = shape.top_k;
  p.renormalize = true;
  return p;
}

MoeCalls MakeMoeCalls(const Bench& bench, Tensors* tensors,
                      const testing::ModelShape& shape, int64_t tokens,
                      Routing routing, const MoeFormat& format,
                      const std::vector<MoeWeights>& layers) {
  MoeCalls calls;
  int num_sets = 1;
  for (int i = 0; i < num_sets; ++i) {
    const double distinct =
        static_cast<double>(AddSet(bench, tensors, shape, tokens, routing,
                                   format, layers[i % layers.size()], &calls));
    calls.experts += distinct;
    if (i == 0) {
      num_sets = bench.NumSets(distinct * MoeExpertBytes(shape, format));
    }
  }
  calls.experts /= num_sets;
  MoeParams p = calls.sets[0].moe;
  const size_t without_router = MoeWorkspaceBytes(p);
  p.router = &calls.sets[0].router;
  const size_t bytes = std::max(without_router, MoeWorkspaceBytes(p));
  void* workspace = tensors->Bytes(bytes);
  for (MoeCalls::Set& set : calls.sets) {
    set.moe.workspace = workspace;
    set.moe.workspace_size = bytes;
  }
  return calls;
}

void CountMoe(const testing::ModelShape& shape, const MoeFormat& format,
              double experts, Case* what) {
  const double rows = static_cast<double>(what->tokens);
  const double row_bytes =
      2.0 * static_cast<double>(shape.hidden * DTypeSize(format.x_dtype()));
  what->shape = shape.name;
  what->dtype = format.dtype;
  what->experts = experts;
  what->bytes = experts * MoeExpertBytes(shape, format) +
                rows * (row_bytes + 8.0 * shape.top_k);
  what->flops = 6.0 * rows * shape.top_k *
                static_cast<double>(shape.hidden * shape.intermediate);
}

}  // namespace tenon::bench
