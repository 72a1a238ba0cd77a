#include "ops/core/core_cuda.cuh"
#include "ops/linear/linear_backend.h"

namespace tenon {

Status LinearCuda(const LinearParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  if (p.weight.dtype == DType::kFloat8E4M3) return LinearFp8Cuda(p, stream);
  LinearProblem problem = MakeLinearProblem(p);
  LinearKernel kernel = SelectLinearKernel(problem);
  if (kernel == LinearKernel::kCublasLt) {
    bool done = false;
    TENON_RETURN_IF_ERROR(LinearCublasLt(p, nullptr, stream, &done));
    if (done) return Status();
    problem.has_cublas_lt = false;
    kernel = SelectLinearKernel(problem);
  }
  if (kernel == LinearKernel::kGemv) return LinearGemv(p, stream);
  return LinearTile(p, kernel, problem.rows_aligned, stream);
}

}  // namespace tenon
