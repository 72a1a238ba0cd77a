// The MoE layer and its stages, for three routings. An expert's weights are
// counted once where any token chose it; which were chosen comes from the
// router's own output. Beside the common flags:
//   --routing TEXT          only routings whose name contains TEXT
//   --scales block|channel  fp8 experts: a scale per 128 x 128 block (default)
//                           or per output row

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "ops/moe/moe.h"
#include "ops/moe/moe_align.h"
#include "ops/moe/moe_router.h"
#include "tests/bench/bench.h"
#include "tests/bench/moe_inputs.h"
#include "tests/bench/router_logits.h"

namespace tenon {
namespace {

using bench::Routing;

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

// Router and align on their own: no weights, so many sets of inputs.
void RunStages(bench::Bench& b, bench::Case what,
               const testing::ModelShape& shape, Routing routing) {
  if (!b.Wants("moe_align") && !b.Wants("moe_router softmax") &&
      !b.Wants("moe_router sigmoid")) {
    return;
  }
  const double slots = static_cast<double>(what.tokens * shape.top_k);
  const double logits = static_cast<double>(what.tokens * shape.num_experts);
  bench::Tensors tensors(b.device());
  const int sets = std::min(16, b.NumSets(4.0 * logits));
  const TensorView bias =
      tensors.Random(DType::kFloat32, {shape.num_experts}, 0.1f);
  std::vector<MoeRouterParams> softmax, sigmoid;
  std::vector<MoeAlignParams> align;
  for (int i = 0; i < sets; ++i) {
    softmax.push_back(
        bench::MakeMoeRouter(&tensors, shape, what.tokens, routing, i));
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

// The layer from the router's choice to the output, and from its logits.
void RunLayer(bench::Bench& b, bench::Case what,
              const testing::ModelShape& shape, Routing routing,
              const bench::MoeFormat& format,
              const std::vector<bench::MoeWeights>& layers) {
  if (!b.Wants("moe") && !b.Wants("moe_layer")) return;
  bench::Tensors tensors(b.device());
  bench::MoeCalls calls = bench::MakeMoeCalls(b, &tensors, shape, what.tokens,
                                              routing, format, layers);
  bench::CountMoe(shape, format, calls.experts, &what);
  what.note = bench::RoutingName(routing);
  if (format.fp8() && format.per_channel) what.note += ", per-channel scales";
  what.op = "moe";
  b.Run(what, calls.num_sets(),
        [&](int i) { return Moe(calls.sets[i].moe, b.stream()); });
  what.op = "moe_layer";
  what.bytes += 4.0 * static_cast<double>(what.tokens * shape.num_experts);
  for (auto& set : calls.sets) set.moe.router = &set.router;
  b.Run(what, calls.num_sets(),
        [&](int i) { return Moe(calls.sets[i].moe, b.stream()); });
}

void RunShape(bench::Bench& b, const testing::ModelShape& shape,
              const bench::MoeFormat& format, bool with_stages,
              const std::string& routing_filter) {
  // Enough layers that the experts of one token are cold in the next round; on
  // the CPU two, which differ in the experts that are hit.
  const int num_layers =
      b.cuda() ? b.NumSets(bench::MoeExpertBytes(shape, format) * shape.top_k)
               : 2;
  bench::Tensors tensors(b.device());
  std::vector<bench::MoeWeights> layers;
  if (b.Wants("moe") || b.Wants("moe_layer")) {
    for (int i = 0; i < num_layers; ++i) {
      layers.push_back(bench::MakeMoeWeights(&tensors, shape, format));
    }
  }
  for (Routing routing :
       {Routing::kUniform, Routing::kSkewed, Routing::kAllToOne}) {
    const std::string name = bench::RoutingName(routing);
    if (name.find(routing_filter) == std::string::npos) continue;
    for (int64_t tokens : b.Tokens({1, 8, 32, 64, 128, 256, 1024, 4096, 16384},
                                   {1, 8, 64, 512})) {
      bench::Case what;
      what.shape = shape.name;
      what.tokens = tokens;
      if (with_stages) RunStages(b, what, shape, routing);
      RunLayer(b, what, shape, routing, format, layers);
    }
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  std::string routing;
  std::string scales = "block";
  tenon::bench::Options options;
  options.experts = true;
  options.limit = true;
  options.fp8 = true;
  options.flags = {{"--routing", &routing}, {"--scales", &scales}};
  tenon::bench::Bench b(argc, argv, "moe_bench", options);
  if (scales != "block" && scales != "channel") {
    std::fprintf(stderr, "--scales: neither block nor channel: %s\n",
                 scales.c_str());
    return 2;
  }
  const std::vector<DType> dtypes =
      b.cuda() ? b.DTypes({DType::kBFloat16, DType::kFloat8E4M3})
               : b.DTypes({DType::kBFloat16});
  for (DType dtype : dtypes) {
    for (const auto& shape : b.Shapes()) {
      // Router and align know nothing of the weights.
      tenon::RunShape(b, shape, {dtype, scales == "channel"},
                      dtype == dtypes[0], routing);
    }
  }
  return b.Finish();
}
