// Activations to fp8, at the hidden sizes of the models.

#include "ops/quantize/quantize.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             DType dtype) {
  constexpr int64_t kGroup = 128;
  const int64_t groups = (shape.hidden + kGroup - 1) / kGroup;
  const double elements = static_cast<double>(tokens * shape.hidden);
  // Read, written in one byte each, and the scales.
  const double bytes = elements * static_cast<double>(DTypeSize(dtype) + 1) +
                       static_cast<double>(tokens * groups) * sizeof(float);
  bench::Tensors tensors(b.device());
  std::vector<QuantizeFp8Params> params(b.NumSets(bytes));
  for (QuantizeFp8Params& p : params) {
    p.x = tensors.Random(dtype, {tokens, shape.hidden});
    p.out = tensors.Zeros(DType::kFloat8E4M3, {tokens, shape.hidden});
    p.scales = tensors.Zeros(DType::kFloat32, {tokens, groups});
  }
  bench::Case what{"quantize_fp8", shape.name, tokens, dtype, bytes};
  what.copy_bytes = bytes;
  b.Run(what, static_cast<int>(params.size()),
        [&](int i) { return QuantizeFp8(params[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Options options;
  options.copy = true;
  tenon::bench::Bench b(argc, argv, "quantize_bench", options);
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : b.DTypes({DType::kBFloat16})) {
      for (int64_t tokens : b.Tokens({1, 8, 64, 1024, 8192}, {1, 8, 64, 512})) {
        tenon::RunCase(b, shape, tokens, dtype);
      }
    }
  }
  return b.Finish();
}
