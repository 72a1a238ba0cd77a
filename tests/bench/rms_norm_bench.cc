// RMSNorm with the residual added, at the hidden sizes of the models.

#include "ops/rms_norm/rms_norm.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             DType dtype) {
  // x is read, the residual read and written, out written.
  const double bytes =
      4.0 * tokens * shape.hidden * static_cast<double>(DTypeSize(dtype));
  bench::Tensors tensors(b.device());
  std::vector<RmsNormParams> params(b.NumSets(bytes));
  for (RmsNormParams& p : params) {
    p.x = tensors.Random(dtype, {tokens, shape.hidden});
    p.residual = tensors.Random(dtype, {tokens, shape.hidden});
    p.out = tensors.Zeros(dtype, {tokens, shape.hidden});
    p.weight = tensors.Random(dtype, {shape.hidden});
    p.epsilon = 1e-6f;
  }
  b.Run({"rms_norm+residual", shape.name, tokens, dtype, bytes},
        static_cast<int>(params.size()),
        [&](int i) { return RmsNorm(params[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "rms_norm_bench");
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : b.DTypes({DType::kBFloat16, DType::kFloat32})) {
      for (int64_t tokens : b.Tokens({1, 8, 64, 1024, 8192}, {1, 8, 64, 512})) {
        tenon::RunCase(b, shape, tokens, dtype);
      }
    }
  }
  return b.Finish();
}
