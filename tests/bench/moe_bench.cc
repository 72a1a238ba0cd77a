// The MoE layer and its stages, for three routings. An expert's weights are
// counted once where any token chose it; which were chosen comes from the
// router's own output. Beside the common flags:
//   --routing TEXT          only routings whose name contains TEXT
//   --scales block|channel  fp8 experts: a scale per 128 x 128 block (default)
//                           or per output row

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

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

constexpr int64_t kScaleBlock = 128;

// How the weights of one layer are held. In fp8 x is bfloat16.
struct Format {
  DType dtype = DType::kBFloat16;
  bool per_channel = false;  // of fp8

  bool fp8() const { return dtype == DType::kFloat8E4M3; }
  DType x_dtype() const { return fp8() ? DType::kBFloat16 : dtype; }

  // Of one expert's matrix.
  int64_t num_scales(int64_t rows, int64_t cols) const {
    if (!fp8()) return 0;
    if (per_channel) return rows;
    return scale_rows(rows) * scale_cols(cols);
  }
  int64_t scale_rows(int64_t rows) const {
    return per_channel ? rows : (rows + kScaleBlock - 1) / kScaleBlock;
  }
  int64_t scale_cols(int64_t cols) const {
    return per_channel ? 1 : (cols + kScaleBlock - 1) / kScaleBlock;
  }
};

// One matrix per expert. fp8 elements fill the range up to 448.
ExpertMatrices RandomMatrices(bench::Tensors* tensors, const Format& format,
                              int64_t num_experts, int64_t rows, int64_t cols) {
  constexpr float kStddev = 0.02f;
  constexpr float kFp8Stddev = 100.0f;
  ExpertMatrices m = MakeExpertMatrices(
      tensors->Random(format.dtype, {num_experts, rows, cols},
                      format.fp8() ? kFp8Stddev : kStddev));
  if (!format.fp8()) return m;
  const int64_t count = format.num_scales(rows, cols);
  std::vector<float> scales(static_cast<size_t>(num_experts * count));
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = kStddev / kFp8Stddev * (0.75f + 0.5f / 64 * (i % 64));
  }
  m.scales.data = tensors->CopyOf(scales);
  m.scales.expert_stride = count;
  m.scales.row_stride = format.scale_cols(cols);
  m.scales.block_rows = format.per_channel ? 1 : kScaleBlock;
  m.scales.block_cols = format.per_channel ? 0 : kScaleBlock;
  return m;
}

// The weights of one layer.
struct Experts {
  Experts(bench::Tensors* tensors, const testing::ModelShape& s,
          const Format& format)
      : gate(RandomMatrices(tensors, format, s.num_experts, s.intermediate,
                            s.hidden)),
        up(RandomMatrices(tensors, format, s.num_experts, s.intermediate,
                          s.hidden)),
        down(RandomMatrices(tensors, format, s.num_experts, s.hidden,
                            s.intermediate)) {}
  ExpertMatrices gate, up, down;
};

// Scales included.
double ExpertBytes(const testing::ModelShape& s, const Format& format) {
  return 3.0 * static_cast<double>(s.hidden * s.intermediate) *
             static_cast<double>(DTypeSize(format.dtype)) +
         4.0 * static_cast<double>(
                   2 * format.num_scales(s.intermediate, s.hidden) +
                   format.num_scales(s.hidden, s.intermediate));
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

// One set of inputs of the layer.
struct LayerCall {
  MoeRouterParams router;
  MoeParams moe;
  size_t distinct = 0;  // experts hit
};

LayerCall MakeLayerCall(bench::Bench& b, bench::Tensors* tensors,
                        const testing::ModelShape& shape, int64_t tokens,
                        Routing routing, int seed, const Format& format,
                        const Experts& experts) {
  LayerCall call;
  call.router = MakeRouter(tensors, shape, tokens, routing, seed);
  bench::CheckOk(MoeRouter(call.router, b.stream()));
  bench::CheckOk(Synchronize(b.device(), b.stream()));
  const std::vector<int32_t> ids = bench::ReadInt32(call.router.topk_ids);
  call.distinct = std::set(ids.begin(), ids.end()).size();
  MoeParams& p = call.moe;
  p.x = tensors->Random(format.x_dtype(), {tokens, shape.hidden});
  p.out = tensors->Zeros(format.x_dtype(), {tokens, shape.hidden});
  p.topk_weights = call.router.topk_weights;
  p.topk_ids = call.router.topk_ids;
  p.gate = experts.gate;
  p.up = experts.up;
  p.down = experts.down;
  p.workspace_size = MoeWorkspaceBytes(p);
  return call;
}

// The layer from the router's choice to the output, and from its logits.
void RunLayer(bench::Bench& b, bench::Case what,
              const testing::ModelShape& shape, Routing routing,
              const Format& format, const std::vector<Experts>& layers) {
  if (!b.Wants("moe") && !b.Wants("moe_layer")) return;
  const double rows = static_cast<double>(what.tokens);
  const double expert_bytes = ExpertBytes(shape, format);
  bench::Tensors tensors(b.device());
  std::vector<LayerCall> calls;
  size_t sets = 1;
  for (size_t i = 0; i < sets; ++i) {
    calls.push_back(MakeLayerCall(b, &tensors, shape, what.tokens, routing,
                                  static_cast<int>(i), format,
                                  layers[i % layers.size()]));
    if (i == 0) sets = b.NumSets(calls[0].distinct * expert_bytes);
    what.experts += static_cast<double>(calls[i].distinct);
  }
  what.experts /= static_cast<double>(sets);  // the mean
  void* workspace = tensors.Bytes(calls[0].moe.workspace_size);
  for (LayerCall& call : calls) call.moe.workspace = workspace;
  const double row_bytes =
      2.0 * static_cast<double>(shape.hidden * DTypeSize(format.x_dtype()));
  what.bytes =
      what.experts * expert_bytes + rows * (row_bytes + 8.0 * shape.top_k);
  what.flops = 6.0 * rows * shape.top_k *
               static_cast<double>(shape.hidden * shape.intermediate);
  what.note = bench::RoutingName(routing);
  if (format.fp8() && format.per_channel) what.note += ", per-channel scales";
  what.op = "moe";
  b.Run(what, static_cast<int>(sets),
        [&](int i) { return Moe(calls[i].moe, b.stream()); });
  what.op = "moe_layer";
  what.bytes += 4.0 * rows * shape.num_experts;
  b.Run(what, static_cast<int>(sets), [&](int i) {
    TENON_RETURN_IF_ERROR(MoeRouter(calls[i].router, b.stream()));
    return Moe(calls[i].moe, b.stream());
  });
}

void RunShape(bench::Bench& b, const testing::ModelShape& shape,
              const Format& format, const std::string& routing_filter) {
  // Enough layers that the experts of one token are cold in the next round; on
  // the CPU two, which differ in the experts that are hit.
  const int num_layers =
      b.cuda() ? b.NumSets(ExpertBytes(shape, format) * shape.top_k) : 2;
  bench::Tensors tensors(b.device());
  std::vector<Experts> layers;
  if (b.Wants("moe") || b.Wants("moe_layer")) {
    for (int i = 0; i < num_layers; ++i)
      layers.emplace_back(&tensors, shape, format);
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
      what.dtype = format.dtype;
      RunStages(b, what, shape, routing);
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
  for (DType dtype : b.DTypes({DType::kBFloat16})) {
    for (const auto& shape : b.Shapes()) {
      tenon::RunShape(b, shape, {dtype, scales == "channel"}, routing);
    }
  }
  return b.Finish();
}
