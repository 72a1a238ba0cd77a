#include "ops/linear/linear_kernel.h"

#include "ops/core/workspace.h"
#include "ops/linear/linear_backend.h"
#include "ops/quantize/fp8_scale.h"

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

// See kLinearFp8... in the header.
bool CublasLtReadsScales(const TensorView& scales) {
  return scales.rank == 2 &&
         reinterpret_cast<uintptr_t>(scales.data) % 16 == 0 &&
         scales.stride[0] == (scales.shape[1] + 3) / 4 * 4;
}

constexpr int64_t kManyTiles = 132;

}  // namespace

const char* LinearKernelName(LinearKernel kernel) {
  switch (kernel) {
    case LinearKernel::kStream:
      return "stream";
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
    if (p.can_stream) return LinearKernel::kStream;
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

LinearKernel SelectLinearFp8Kernel(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  const int64_t out_features = p.weight.shape[0];
  if (!RowsAreAligned(p.weight)) return LinearKernel::kMediumTile;
  if (tokens <= kLinearFp8GemvTokens) return LinearKernel::kGemv;
  if (p.cublas_lt != nullptr && !p.batch_invariant &&
      CublasLtReadsScales(p.weight_scales) && RowsAreApart(p.weight) &&
      RowsAreAligned(p.out) && out_features % 16 == 0) {
    return LinearKernel::kCublasLt;
  }
  if (tokens <= 64) return LinearKernel::kSmallTile;
  // Large tiles where there are enough to keep a large GPU busy.
  const int64_t large = (tokens + 127) / 128 * ((out_features + 127) / 128);
  return large >= kManyTiles ? LinearKernel::kLargeTile
                             : LinearKernel::kMediumTile;
}

LinearCudaWorkspace CutLinearCudaWorkspace(const LinearParams& p,
                                           size_t* size) {
  WorkspaceCutter cutter(p.workspace);
  LinearCudaWorkspace workspace;
  if (p.residual.present()) {
    workspace.product = cutter.TakeBytes(
        static_cast<size_t>(NumElements(p.out)) * DTypeSize(p.out.dtype));
  }
  workspace.rest = cutter.TakeBytes(0);
  if (size != nullptr) *size = cutter.size();
  return workspace;
}

LinearFp8Workspace CutLinearFp8Workspace(const LinearParams& p, size_t* size) {
  WorkspaceCutter cutter(p.workspace);
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  LinearFp8Workspace workspace;
  workspace.q_stride = (in_features + 15) / 16 * 16;
  const int64_t rows = (tokens + 7) / 8 * 8;  // see linear_fp8::PackedX
  workspace.q = cutter.Take<uint8_t>(rows * workspace.q_stride);
  workspace.scales = cutter.Take<float>(rows * NumFp8Groups(in_features));
  if (p.cublas_lt != nullptr && !p.batch_invariant) {
    workspace.cublas_lt = cutter.TakeBytes(kCublasLtWorkspaceBytes);
  }
  if (size != nullptr) *size = cutter.size();
  return workspace;
}

size_t LinearCudaWorkspaceBytes(const LinearParams& params) {
  LinearParams p = params;
  p.workspace = nullptr;
  size_t product = 0;
  CutLinearCudaWorkspace(p, &product);
  // For any alignment of the data: which kernel takes the call depends on that.
  size_t rest = 0;
  if (p.weight.dtype == DType::kFloat8E4M3) {
    CutLinearFp8Workspace(p, &rest);
  } else if (p.cublas_lt != nullptr && !p.batch_invariant) {
    rest = kCublasLtWorkspaceBytes;
  }
  return product + rest;
}

}  // namespace tenon
