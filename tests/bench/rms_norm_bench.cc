// RMSNorm with the residual added, at the hidden sizes of the models.

#include "ops/rms_norm/rms_norm.h"
#include "tests/bench/bench.h"
#include "tests/testing/shapes.h"

namespace tenon {
namespace {

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             DType dtype) {
  const int64_t count = tokens * shape.hidden;
  // x is read, the residual read and written, out written.
  const double bytes = 4.0 * static_cast<double>(count) * DTypeSize(dtype);
  const int sets = b.NumSets(bytes);
  std::vector<Buffer> buffers;
  std::vector<RmsNormParams> params;
  for (int i = 0; i < sets; ++i) {
    const auto tensor = [&](int64_t rows) {
      buffers.push_back(
          bench::RandomBuffer(b.device(), dtype, rows * shape.hidden, i + 1));
      return MakeTensor(buffers.back().data(), dtype, b.device(),
                        {rows, shape.hidden});
    };
    RmsNormParams p;
    p.x = tensor(tokens);
    p.residual = tensor(tokens);
    p.out = tensor(tokens);
    const TensorView weight = tensor(1);
    p.weight = MakeTensor(weight.data, dtype, b.device(), {shape.hidden});
    p.epsilon = 1e-6f;
    params.push_back(p);
  }
  b.Run({"rms_norm+residual", shape.name, tokens, dtype, bytes, 0.0}, sets,
        [&](int i) { return RmsNorm(params[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  tenon::bench::Bench b(argc, argv, "rms_norm_bench");
  for (const auto& shape : tenon::testing::kModelShapes) {
    for (int64_t tokens : {1, 8, 64, 1024, 8192}) {
      for (tenon::DType dtype :
           {tenon::DType::kBFloat16, tenon::DType::kFloat32}) {
        if (b.Selected(shape.name, tokens, dtype)) {
          tenon::RunCase(b, shape, tokens, dtype);
        }
      }
    }
  }
  return b.Finish();
}
