// Embedding rows of random ids, out of a table much larger than any cache.

#include <random>

#include "ops/embedding/embedding.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

std::vector<int32_t> RandomIds(int64_t tokens, int64_t vocab, int seed) {
  std::mt19937 rng(seed);
  std::uniform_int_distribution<int32_t> uniform(
      0, static_cast<int32_t>(vocab - 1));
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& id : ids) id = uniform(rng);
  return ids;
}

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             const TensorView& table) {
  const double bytes =
      2.0 * tokens * shape.hidden * static_cast<double>(DTypeSize(table.dtype));
  bench::Tensors tensors(b.device());
  std::vector<EmbeddingParams> params(b.NumSets(bytes));
  int seed = 0;
  for (EmbeddingParams& p : params) {
    p.ids = tensors.Of(RandomIds(tokens, shape.vocab, ++seed), {tokens});
    p.table = table;
    p.out = tensors.Zeros(table.dtype, {tokens, shape.hidden});
  }
  b.Run({"embedding", shape.name, tokens, table.dtype, bytes},
        static_cast<int>(params.size()),
        [&](int i) { return Embedding(params[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "embedding_bench");
  for (const auto& shape : b.Shapes()) {
    for (DType dtype : b.DTypes({DType::kBFloat16})) {
      tenon::bench::Tensors tensors(b.device());
      const tenon::TensorView table =
          tensors.Random(dtype, {shape.vocab, shape.hidden});
      for (int64_t tokens : b.Tokens({1, 8, 64, 1024, 8192}, {1, 8, 64, 512})) {
        tenon::RunCase(b, shape, tokens, table);
      }
    }
  }
  return b.Finish();
}
