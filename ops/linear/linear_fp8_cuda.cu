#include "ops/linear/linear_backend.h"
#include "ops/linear/linear_fp8_cuda.cuh"

namespace tenon {
namespace {

LinearParams RowsOf(const LinearParams& p, int64_t first, int64_t count) {
  LinearParams rows = p;
  rows.x = Rows(p.x, first, count);
  rows.out = Rows(p.out, first, count);
  return rows;
}

// cuBLASLt takes fp8 tokens in fours alone; the last ones go elsewhere.
Status SplitForCublasLt(const LinearParams& p, Stream stream) {
  const int64_t tokens = p.x.shape[0];
  const int64_t rest = tokens % 4;
  TENON_RETURN_IF_ERROR(LinearFp8Cuda(RowsOf(p, 0, tokens - rest), stream));
  return LinearFp8Cuda(RowsOf(p, tokens - rest, rest), stream);
}

}  // namespace

Status LinearFp8Cuda(const LinearParams& p, Stream stream) {
  const int64_t tokens = p.x.shape[0];
  const bool rows_aligned = cuda::RowsAreWholeChunks(p.weight);
  LinearKernel kernel = SelectLinearFp8Kernel(p);
  if (kernel == LinearKernel::kGemv && tokens <= kLinearFp8QuantizingTokens &&
      cuda::RowsAreAligned(p.x, 16)) {
    return LinearFp8QuantizingGemv(p, stream);
  }
  const bool use_cublas_lt = kernel == LinearKernel::kCublasLt;
  if (use_cublas_lt && tokens % 4 != 0) return SplitForCublasLt(p, stream);

  const LinearFp8Workspace workspace = CutLinearFp8Workspace(p, nullptr);
  linear_fp8::Args args;
  args.p = p;
  args.x.q = workspace.q;
  args.x.row_stride = workspace.q_stride;
  args.x.scales = workspace.scales;
  args.x.scale_row_stride = use_cublas_lt ? 1 : NumFp8Groups(p.x.shape[1]);
  args.x.scale_group_stride = use_cublas_lt ? tokens : 1;
  TENON_RETURN_IF_ERROR(
      cuda::LaunchQuantizeFp8Groups("Linear", p.x, args.x, stream));
  if (kernel == LinearKernel::kGemv) return LinearFp8Gemv(args, stream);
  if (use_cublas_lt) {
    LinearParams quantized = p;
    quantized.x = MakeMatrix(args.x.q, DType::kFloat8E4M3, p.x.device, tokens,
                             p.x.shape[1], args.x.row_stride);
    quantized.workspace = workspace.cublas_lt;
    bool done = false;
    TENON_RETURN_IF_ERROR(
        LinearCublasLt(quantized, workspace.scales, stream, &done));
    if (done) return Status();
    LinearParams built_in = p;
    built_in.cublas_lt = nullptr;
    kernel = SelectLinearFp8Kernel(built_in);
  }
  return LinearFp8Tile(args, kernel, rows_aligned, stream);
}

}  // namespace tenon
