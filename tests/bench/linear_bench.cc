// The matrix products of a layer and the LM head. On CUDA by cuBLASLt, by the
// built-in kernels, and by those with results that no batch size changes.

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

std::vector<Product> Products(const testing::ModelShape& shape, DType dtype) {
  const int64_t q_width = int64_t{shape.num_heads} * shape.head_dim;
  return {{"qkv", shape.qkv_width(), shape.hidden, dtype},
          {"o", shape.hidden, q_width, dtype},
          {"router", shape.num_experts, shape.hidden, DType::kFloat32},
          {"lm_head", shape.vocab, shape.hidden, DType::kFloat32}};
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

void RunProduct(bench::Bench& b, const testing::ModelShape& shape,
                const Product& product, DType dtype,
                const std::vector<int64_t>& token_counts) {
  const double weight_bytes = Size(dtype) * product.rows * product.cols;
  bench::Tensors weights(b.device());
  std::vector<TensorView> weight(b.NumSets(weight_bytes));
  for (TensorView& w : weight) {
    w = weights.Random(dtype, {product.rows, product.cols}, 0.02f);
  }
  for (int64_t tokens : token_counts) {
    bench::Case what;
    what.shape = StrCat(shape.name, " ", product.name);
    what.tokens = tokens;
    what.dtype = dtype;
    what.bytes = weight_bytes + Size(dtype) * tokens * product.cols +
                 Size(product.out_dtype) * tokens * product.rows;
    what.flops = 2.0 * tokens * product.rows * product.cols;
    bench::Tensors tensors(b.device());
    std::vector<LinearParams> params(b.NumSets(what.bytes));
    for (size_t i = 0; i < params.size(); ++i) {
      LinearParams& p = params[i];
      p.x = tensors.Random(dtype, {tokens, product.cols});
      p.weight = weight[i];
      p.out = tensors.Zeros(product.out_dtype, {tokens, product.rows});
    }
    RunModes(b, what, product, std::move(params));
  }
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "linear_bench");
  const std::vector<int64_t> tokens =
      b.Tokens({1, 8, 32, 64, 256, 1024, 4096}, {1, 8, 32, 64});
  for (DType dtype : b.DTypes({DType::kBFloat16})) {
    std::set<std::pair<int64_t, int64_t>> done;  // models share some sizes
    for (const auto& shape : b.Shapes()) {
      for (const tenon::Product& product : tenon::Products(shape, dtype)) {
        if (!done.emplace(product.rows, product.cols).second) continue;
        tenon::RunProduct(b, shape, product, dtype, tokens);
      }
    }
  }
  return b.Finish();
}
