#include "ops/core/core_cuda.cuh"
#include "ops/linear/linear_backend.h"

namespace tenon {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    AddResidualKernel(TensorView product, TensorView residual, TensorView out) {
  cuda::WaitForPreviousKernels();
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  if (row >= out.shape[0]) return;
  const T* const from = product.As<const T>() + row * product.stride[0];
  const T* const to_add = residual.As<const T>() + row * residual.stride[0];
  T* const to = out.As<T>() + row * out.stride[0];
  for (int64_t col = blockIdx.y * blockDim.x + threadIdx.x; col < out.shape[1];
       col += int64_t{gridDim.y} * blockDim.x) {
    to[col] = cuda::FromFloat<T>(cuda::ToFloat(to_add[col]) +
                                 cuda::ToFloat(from[col]));
  }
}

// sum = x + the terms of a token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    AddTermsKernel(TensorView x, LinearTerms terms) {
  cuda::WaitForPreviousKernels();
  const int64_t row = blockIdx.x * int64_t{blockDim.y} + threadIdx.y;
  const int64_t cols = x.shape[1];
  if (row >= x.shape[0]) return;
  const int count = static_cast<int>(terms.ids.shape[1]);
  const auto* const ids =
      terms.ids.As<const int32_t>() + row * terms.ids.stride[0];
  for (int64_t col = blockIdx.y * blockDim.x + threadIdx.x; col < cols;
       col += int64_t{gridDim.y} * blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < count; ++j) {
      if (ids[j] < 0 || ids[j] >= terms.num_ids) continue;
      sum += cuda::ToFloat(
          terms.rows.As<const T>()[(row * count + j) * cols + col]);
    }
    terms.sum.As<T>()[row * terms.sum.stride[0] + col] = cuda::FromFloat<T>(
        cuda::ToFloat(x.As<const T>()[row * x.stride[0] + col]) +
        cuda::ToFloat(cuda::FromFloat<T>(sum)));
  }
}

Status AddTerms(LinearParams* p, Stream stream) {
  const LinearTerms terms = p->terms;
  const TensorView x = p->x;
  p->x = terms.sum;
  p->terms = LinearTerms();
  return cuda::WithFloatType(x.dtype, [&](auto zero) {
    return cuda::LaunchOverRows("Linear", stream, x.shape[0], x.shape[1],
                                kThreads, AddTermsKernel<decltype(zero)>, x,
                                terms);
  });
}

bool CanStream(const LinearParams& p) {
  if (p.weight.dtype == DType::kFloat8E4M3) {
    return LinearFp8Streams(p) || LinearFp8Clusters(p);
  }
  LinearProblem problem = MakeLinearProblem(p);
  problem.can_stream = LinearStreams(p);
  return SelectLinearKernel(problem) == LinearKernel::kStream;
}

Status MultiplyStreaming(const LinearParams& p, Stream stream) {
  if (p.weight.dtype != DType::kFloat8E4M3) return LinearStream(p, stream);
  return LinearFp8Streams(p) ? LinearFp8Stream(p, stream)
                             : LinearFp8Cluster(p, stream);
}

// Whether the kernel that takes the call adds a residual itself.
bool AddsResidual(const LinearParams& p) {
  return p.weight.dtype == DType::kFloat8E4M3 &&
         SelectLinearFp8Kernel(p) == LinearKernel::kGemv;
}

// No norm, and no residual but where AddsResidual.
Status Multiply(const LinearParams& p, Stream stream) {
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

}  // namespace

Status LinearCuda(const LinearParams& params, Stream stream) {
  const cuda::DeviceGuard guard(params.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  if (CanStream(params)) return MultiplyStreaming(params, stream);
  LinearParams p = params;
  if (p.terms.present()) {
    TENON_RETURN_IF_ERROR(AddTerms(&p, stream));
    if (CanStream(p)) return MultiplyStreaming(p, stream);
  }
  if (p.norm.present()) {
    // Then as without a norm, with the same bits.
    TENON_RETURN_IF_ERROR(NormalizeLinearInput(&p, stream));
    if (CanStream(p)) return MultiplyStreaming(p, stream);
  }
  const LinearCudaWorkspace workspace = CutLinearCudaWorkspace(p, nullptr);
  p.workspace = workspace.rest;
  if (!p.residual.present() || AddsResidual(p)) return Multiply(p, stream);

  p.residual = TensorView();
  p.out = MakeTensor(workspace.product, p.out.dtype, p.out.device,
                     {p.out.shape[0], p.out.shape[1]});
  TENON_RETURN_IF_ERROR(Multiply(p, stream));
  return cuda::WithFloatType(p.out.dtype, [&](auto zero) {
    return cuda::LaunchOverRows(
        "Linear", stream, p.out.shape[0], p.out.shape[1], kThreads,
        AddResidualKernel<decltype(zero)>, p.out, params.residual, params.out);
  });
}

}  // namespace tenon
