// The matrix products of a layer and the LM head. On CUDA by cuBLASLt, by the
// built-in kernels, and by those with results that no batch size changes.
// --dtype fp8: weights with a scale per 128 x 128 block, x and out bfloat16.

#include <set>
#include <utility>

#include "ops/linear/linear.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

// out [tokens, rows] = x [tokens, cols] * weight [rows, cols]^T
struct Product {
  const char* name;
  int64_t rows;
  int64_t cols;
  DType out_dtype;
};

// Those of a model whose x has this dtype; the published fp8 models have fp8
// weights in qkv and o alone.
std::vector<Product> Products(const testing::ModelShape& shape, DType dtype,
                              bool fp8) {
  const int64_t q_width = int64_t{shape.num_heads} * shape.head_dim;
  std::vector<Product> products = {
      {"qkv", shape.qkv_width(), shape.hidden, dtype},
      {"o", shape.hidden, q_width, dtype}};
  if (fp8) return products;
  products.push_back(
      {"router", shape.num_experts, shape.hidden, DType::kFloat32});
  products.push_back({"lm_head", shape.vocab, shape.hidden, DType::kFloat32});
  return products;
}

double Size(DType dtype) { return static_cast<double>(DTypeSize(dtype)); }

// Times one product in every mode of the device.
void RunModes(bench::Bench& b, bench::Case what, const Product& product,
              std::vector<LinearParams> params) {
  const auto run = [&](const char* op, CublasLt* lt, bool batch_invariant) {
    bench::Tensors workspace(b.device());
    for (LinearParams& p : params) {
      p.cublas_lt = lt;
      p.batch_invariant = batch_invariant;
      p.workspace_size = LinearWorkspaceBytes(p);
    }
    void* memory = workspace.Bytes(params[0].workspace_size);
    for (LinearParams& p : params) p.workspace = memory;
    what.op = op;
    b.Run(what, static_cast<int>(params.size()),
          [&](int i) { return Linear(params[i], b.stream()); });
  };
  what.note = StrCat(product.rows, " x ", product.cols);
  if (!b.cuda()) return run("linear", nullptr, false);
  if (b.cublas_lt() != nullptr) run("linear cublaslt", b.cublas_lt(), false);
  run("linear built-in", nullptr, false);
  run("linear batch-invariant", nullptr, true);
}

// One scale per block of an fp8 weight.
TensorView RandomScales(bench::Tensors& tensors, const Product& product) {
  constexpr int64_t kBlock = 128;
  return tensors.Random(DType::kFloat32,
                        {(product.rows + kBlock - 1) / kBlock,
                         (product.cols + kBlock - 1) / kBlock});
}

void RunProduct(bench::Bench& b, const testing::ModelShape& shape,
                const Product& product, DType weight_dtype,
                const std::vector<int64_t>& token_counts) {
  const bool fp8 = weight_dtype == DType::kFloat8E4M3;
  const DType dtype = fp8 ? DType::kBFloat16 : weight_dtype;
  const double weight_bytes = Size(weight_dtype) * product.rows * product.cols;
  bench::Tensors weights(b.device());
  std::vector<TensorView> weight(b.NumSets(weight_bytes));
  std::vector<TensorView> scales(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    weight[i] = weights.Random(weight_dtype, {product.rows, product.cols},
                               fp8 ? 20.0f : 0.02f);
    if (fp8) scales[i] = RandomScales(weights, product);
  }
  for (int64_t tokens : token_counts) {
    bench::Case what;
    what.shape = StrCat(shape.name, " ", product.name);
    what.tokens = tokens;
    what.dtype = weight_dtype;
    what.bytes = weight_bytes + Size(dtype) * tokens * product.cols +
                 Size(product.out_dtype) * tokens * product.rows;
    what.flops = 2.0 * tokens * product.rows * product.cols;
    bench::Tensors tensors(b.device());
    std::vector<LinearParams> params(b.NumSets(what.bytes));
    for (size_t i = 0; i < params.size(); ++i) {
      LinearParams& p = params[i];
      p.x = tensors.Random(dtype, {tokens, product.cols});
      p.weight = weight[i];
      p.weight_scales = scales[i];
      p.out = tensors.Zeros(product.out_dtype, {tokens, product.rows});
      p.weights_are_constant = true;
    }
    RunModes(b, what, product, std::move(params));
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Options options;
  options.limit = true;
  options.fp8 = true;
  tenon::bench::Bench b(argc, argv, "linear_bench", options);
  const std::vector<int64_t> tokens =
      b.Tokens({1, 8, 32, 64, 256, 1024, 4096}, {1, 8, 32, 64});
  for (DType dtype : b.DTypes({DType::kBFloat16})) {
    const bool fp8 = dtype == DType::kFloat8E4M3;
    std::set<std::pair<int64_t, int64_t>> done;  // models share some sizes
    for (const auto& shape : b.Shapes()) {
      for (const tenon::Product& product :
           tenon::Products(shape, fp8 ? DType::kBFloat16 : dtype, fp8)) {
        if (!done.emplace(product.rows, product.cols).second) continue;
        tenon::RunProduct(b, shape, product, dtype, tokens);
      }
    }
  }
  return b.Finish();
}
