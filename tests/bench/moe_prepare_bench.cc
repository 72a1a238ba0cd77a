// What a layer does on CUDA before its matrix products: routing, and the slots
// in the order of experts; with fp8 experts x is quantised beside it. One
// launch at decode sizes. The same by the separate ops for comparison.

#include <algorithm>
#include <cstdio>
#include <vector>

#include "ops/core/build_config.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_backend.h"
#include "ops/quantize/quantize.h"
#include "tests/bench/bench.h"
#include "tests/bench/moe_inputs.h"

namespace tenon {
namespace {

// A layer that has no weights: none are read.
MoeParams MakeLayer(bench::Tensors* tensors, const testing::ModelShape& shape,
                    DType dtype, const MoeRouterParams& router) {
  MoeParams p;
  p.x =
      tensors->Random(DType::kBFloat16, {router.logits.shape[0], shape.hidden});
  p.topk_weights = router.topk_weights;
  p.topk_ids = router.topk_ids;
  p.gate.dtype = dtype;
  p.gate.num_experts = shape.num_experts;
  p.gate.rows = 1;
  p.gate.cols = shape.hidden;
  p.router = &router;
  return p;
}

Status Separately(const MoeParams& p, const MoeScratch& scratch,
                  Stream stream) {
  TENON_RETURN_IF_ERROR(MoeRouter(*p.router, stream));
  TENON_RETURN_IF_ERROR(AlignChunk(p, scratch, 0, 0, stream));
  if (p.gate.dtype != DType::kFloat8E4M3) return Status();
  QuantizeFp8Params q;
  q.x = p.x;
  q.out = MakeTensor(scratch.x_fp8, DType::kFloat8E4M3, p.x.device,
                     {p.x.shape[0], p.x.shape[1]});
  q.scales = MakeTensor(scratch.x_scales, DType::kFloat32, p.x.device,
                        {p.x.shape[0], (p.x.shape[1] + 127) / 128});
  return QuantizeFp8(q, stream);
}

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             DType dtype) {
  const bool fp8 = dtype == DType::kFloat8E4M3;
  const double rows = static_cast<double>(tokens);
  bench::Case what;
  what.shape = shape.name;
  what.tokens = tokens;
  what.dtype = dtype;
  what.bytes = 4.0 * rows * (shape.num_experts + 3.0 * shape.top_k);
  if (fp8) what.bytes += (3.0 + 4.0 / 128) * rows * shape.hidden;
  bench::Tensors tensors(b.device());
  const int sets = std::min(16, b.NumSets(what.bytes));
  std::vector<MoeRouterParams> routers(sets);
  std::vector<MoeParams> layers(sets);
  std::vector<MoeScratch> scratch(sets);
  void* workspace = nullptr;
  for (int i = 0; i < sets; ++i) {
    routers[i] = bench::MakeMoeRouter(&tensors, shape, tokens,
                                      bench::Routing::kUniform, i);
    layers[i] = MakeLayer(&tensors, shape, dtype, routers[i]);
    if (i == 0) workspace = tensors.Bytes(LayOutScratch(layers[i]).bytes);
    layers[i].workspace = workspace;
    scratch[i] = LayOutScratch(layers[i]);
  }
  what.op = fp8 ? "prepare+quantize" : "prepare";
  b.Run(what, sets, [&](int i) {
    if constexpr (kCudaBuilt) {
      return MoePrepareCuda(layers[i], scratch[i], b.stream());
    } else {
      return Status();
    }
  });
  what.op = fp8 ? "router, align, quantize" : "router, align";
  b.Run(what, sets,
        [&](int i) { return Separately(layers[i], scratch[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "moe_prepare_bench");
  if (!b.cuda()) {
    std::printf("moe_prepare_bench: only CUDA has this\n");
    return 0;
  }
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
      for (int64_t tokens :
           b.Tokens({1, 8, 32, 64, 256, 1024, 4096, 16384}, {})) {
        tenon::RunCase(b, shape, tokens, dtype);
      }
    }
  }
  return b.Finish();
}
