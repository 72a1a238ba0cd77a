// The MoE layer and its stages, for three routings. An expert's weights are
// counted once where any token chose it; which were chosen comes from the
// router's own output.

#include <algorithm>
#include <cstdio>
#include <set>

#include "ops/moe/moe.h"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_router.h"
#include "tests/bench/bench.h"
#include "tests/bench/router_logits.h"

namespace tenon {
namespace {

using bench::Routing;

MoeRouterParams MakeRouter(bench::Tensors* tensors,
                           const testing::ModelShape& shape, int64_t tokens,
                           Routing routing, int seed) {
  MoeRouterParams p;
  p.logits =
      tensors->Of(bench::RouterLogits(tokens, shape.num_experts, routing, seed),
                  {tokens, shape.num_experts});
  p.topk_weights = tensors->Zeros(DType::kFloat32, {tokens, shape.top_k});
  p.topk_ids = tensors->Zeros(DType::kInt32, {tokens, shape.top_k});
  p.top_k = shape.top_k;
  p.renormalize = true;
  return p;
}

MoeAlignParams MakeAlign(bench::Tensors* tensors,
                         const testing::ModelShape& shape,
                         const TensorView& topk_ids) {
  const int64_t slots = NumElements(topk_ids);
  MoeAlignParams p;
  p.topk_ids = topk_ids;
  p.num_experts = shape.num_experts;
  p.expert_offsets = tensors->Zeros(DType::kInt32, {shape.num_experts + 1});
  p.sorted_slots = tensors->Zeros(DType::kInt32, {slots});
  p.tile_rows = 16;
  p.tiles = tensors->Zeros(DType::kInt32,
                           {MoeMaxTiles(slots, p.num_experts, p.tile_rows), 3});
  p.workspace_size = MoeAlignWorkspaceBytes(p);
  p.workspace = tensors->Bytes(p.workspace_size);
  return p;
}

// The weights of one layer.
struct Experts {
  Experts(bench::Tensors* tensors, const testing::ModelShape& s, DType dtype) {
    const TensorView w13 = tensors->Random(
        dtype, {s.num_experts, 2 * s.intermediate, s.hidden}, 0.02f);
    gate = MakeExpertMatrices(w13, 0, s.intermediate);
    up = MakeExpertMatrices(w13, s.intermediate, s.intermediate);
    down = MakeExpertMatrices(tensors->Random(
        dtype, {s.num_experts, s.hidden, s.intermediate}, 0.02f));
  }
  ExpertMatrices gate, up, down;
};

double ExpertBytes(const testing::ModelShape& shape, DType dtype) {
  return 3.0 * static_cast<double>(shape.hidden * shape.intermediate) *
         static_cast<double>(DTypeSize(dtype));
}

// Router and align on their own: no weights, so many sets of inputs.
void RunStages(bench::Bench& b, bench::Case what,
               const testing::ModelShape& shape, Routing routing) {
  const double slots = static_cast<double>(what.tokens * shape.top_k);
  const double logits = static_cast<double>(what.tokens * shape.num_experts);
  bench::Tensors tensors(b.device());
  const int sets = std::min(16, b.NumSets(4.0 * logits));
  const TensorView bias =
      tensors.Random(DType::kFloat32, {shape.num_experts}, 0.1f);
  std::vector<MoeRouterParams> softmax, sigmoid;
  std::vector<MoeAlignParams> align;
  for (int i = 0; i < sets; ++i) {
    softmax.push_back(MakeRouter(&tensors, shape, what.tokens, routing, i));
    sigmoid.push_back(softmax.back());
    sigmoid.back().scoring = MoeScoring::kSigmoid;
    sigmoid.back().correction_bias = bias;
    sigmoid.back().routed_scaling_factor = 2.5f;
    align.push_back(MakeAlign(&tensors, shape, softmax.back().topk_ids));
    bench::CheckOk(MoeRouter(softmax.back(), b.stream()));
  }
  what.dtype = DType::kInt32;
  what.note = bench::RoutingName(routing);
  what.op = "moe_align";
  what.bytes = 4.0 * (2.0 * slots + shape.num_experts);
  b.Run(what, sets, [&](int i) { return MoeAlign(align[i], b.stream()); });
  if (routing != Routing::kUniform) return;  // the router does the same work
  what.dtype = DType::kFloat32;
  what.bytes = 4.0 * (logits + 2.0 * slots);
  what.op = "moe_router softmax";
  b.Run(what, sets, [&](int i) { return MoeRouter(softmax[i], b.stream()); });
  what.op = "moe_router sigmoid";
  b.Run(what, sets, [&](int i) { return MoeRouter(sigmoid[i], b.stream()); });
}

// The fused layer, from the router's choice and, on CUDA, from its logits.
void RunLayer(bench::Bench& b, bench::Case what,
              const testing::ModelShape& shape, Routing routing,
              const std::vector<Experts>& layers) {
  const double rows = static_cast<double>(what.tokens);
  const double expert_bytes = ExpertBytes(shape, what.dtype);
  bench::Tensors tensors(b.device());
  std::vector<MoeRouterParams> routers(b.NumSets(expert_bytes * shape.top_k));
  std::vector<MoeParams> params(routers.size());
  void* workspace = nullptr;
  double distinct = 0.0;  // mean of the sets
  for (size_t i = 0; i < params.size(); ++i) {
    MoeRouterParams& r = routers[i];
    r = MakeRouter(&tensors, shape, what.tokens, routing, static_cast<int>(i));
    bench::CheckOk(MoeRouter(r, b.stream()));
    bench::CheckOk(Synchronize(b.device(), b.stream()));
    const std::vector<int32_t> ids = bench::ReadInt32(r.topk_ids);
    distinct += static_cast<double>(std::set(ids.begin(), ids.end()).size()) /
                static_cast<double>(params.size());
    const Experts& experts = layers[i % layers.size()];
    MoeParams& p = params[i];
    p.x = tensors.Random(what.dtype, {what.tokens, shape.hidden});
    p.out = tensors.Zeros(what.dtype, {what.tokens, shape.hidden});
    p.topk_weights = r.topk_weights;
    p.topk_ids = r.topk_ids;
    p.gate = experts.gate;
    p.up = experts.up;
    p.down = experts.down;
    p.workspace_size = MoeWorkspaceBytes(p);
    if (workspace == nullptr) workspace = tensors.Bytes(p.workspace_size);
    p.workspace = workspace;
  }
  const double row_bytes =
      2.0 * static_cast<double>(shape.hidden * DTypeSize(what.dtype));
  what.bytes = distinct * expert_bytes + rows * (row_bytes + 8.0 * shape.top_k);
  what.flops = 6.0 * rows * shape.top_k *
               static_cast<double>(shape.hidden * shape.intermediate);
  char experts[32];
  std::snprintf(experts, sizeof(experts), ", %.1f experts", distinct);
  what.note = bench::RoutingName(routing) + std::string(experts);
  const int sets = static_cast<int>(params.size());
  what.op = "moe";
  b.Run(what, sets, [&](int i) { return Moe(params[i], b.stream()); });
  if (!b.cuda()) return;  // nothing that the sum of the two does not tell
  what.op = "moe_router+moe";
  what.bytes += 4.0 * rows * shape.num_experts;
  b.Run(what, sets, [&](int i) {
    TENON_RETURN_IF_ERROR(MoeRouter(routers[i], b.stream()));
    return Moe(params[i], b.stream());
  });
}

void RunShape(bench::Bench& b, const testing::ModelShape& shape, DType dtype) {
  // Enough layers that the experts of one token are cold in the next round; on
  // the CPU two, which differ in the experts that are hit.
  const int num_layers =
      b.cuda() ? b.NumSets(ExpertBytes(shape, dtype) * shape.top_k) : 2;
  bench::Tensors tensors(b.device());
  std::vector<Experts> layers;
  for (int i = 0; i < num_layers; ++i)
    layers.emplace_back(&tensors, shape, dtype);
  for (Routing routing :
       {Routing::kUniform, Routing::kSkewed, Routing::kAllToOne}) {
    for (int64_t tokens : b.Tokens({1, 8, 32, 64, 128, 256, 1024, 4096, 16384},
                                   {1, 8, 64, 512})) {
      bench::Case what;
      what.shape = shape.name;
      what.tokens = tokens;
      what.dtype = dtype;
      RunStages(b, what, shape, routing);
      RunLayer(b, what, shape, routing, layers);
    }
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "moe_bench");
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : b.DTypes({DType::kBFloat16})) {
      tenon::RunShape(b, shape, dtype);
    }
  }
  return b.Finish();
}
