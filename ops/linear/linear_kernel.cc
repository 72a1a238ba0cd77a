#include "ops/linear/linear_kernel.h"

namespace tenon {
namespace {

// Whether rows of `matrix` can be read 16 bytes at a time.
bool RowsAreAligned(const TensorView& matrix) {
  const int64_t per_chunk = 16 / static_cast<int64_t>(DTypeSize(matrix.dtype));
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.shape[1] % per_chunk == 0 &&
         (matrix.shape[0] == 1 || matrix.stride[0] % per_chunk == 0);
}

bool RowsAreApart(const TensorView& matrix) {
  return matrix.shape[0] == 1 || matrix.stride[0] >= matrix.shape[1];
}

}  // namespace

const char* LinearKernelName(LinearKernel kernel) {
  switch (kernel) {
    case LinearKernel::kGemv:
      return "gemv";
    case LinearKernel::kSmallTile:
      return "small tile";
    case LinearKernel::kMediumTile:
      return "medium tile";
    case LinearKernel::kLargeTile:
      return "large tile";
    case LinearKernel::kCublasLt:
      break;
  }
  return "cuBLASLt";
}

LinearProblem MakeLinearProblem(const LinearParams& p) {
  LinearProblem problem;
  problem.tokens = p.x.shape[0];
  problem.rows_aligned = RowsAreAligned(p.x) && RowsAreAligned(p.weight);
  problem.rows_apart = RowsAreApart(p.x) && RowsAreApart(p.weight);
  problem.out_aligned = RowsAreAligned(p.out);
  problem.has_bias = p.bias.present();
  problem.has_cublas_lt = p.cublas_lt != nullptr;
  problem.batch_invariant = p.batch_invariant;
  return problem;
}

LinearKernel SelectLinearKernel(const LinearProblem& p) {
  if (!p.batch_invariant) {
    if (p.tokens <= kLinearGemvTokens && p.rows_aligned) {
      return LinearKernel::kGemv;
    }
    // Where rows are not aligned, those of out too, cuBLASLt rounds the sum
    // before it adds a bias (seen with version 13.0): one rounding too many.
    const bool rounds_once = !p.has_bias || (p.rows_aligned && p.out_aligned);
    if (p.has_cublas_lt && p.rows_apart && rounds_once) {
      return LinearKernel::kCublasLt;
    }
  }
  // Element-wise loads, which unaligned rows need, hide their latency best
  // where many threads share the work.
  if (!p.rows_aligned) return LinearKernel::kMediumTile;
  if (p.tokens <= 16) return LinearKernel::kSmallTile;
  if (p.tokens <= 64) return LinearKernel::kMediumTile;
  return LinearKernel::kLargeTile;
}

}  // namespace tenon
