#include <algorithm>
#include <limits>

#include "ops/core/core_cuda.cuh"
#include "ops/embedding/embedding_backend.h"

namespace tenon {
namespace {

constexpr int kThreads = 256;

// All sizes in units of Access.
struct KernelParams {
  EmbeddingParams params;
  int64_t tokens;
  int64_t vocab;
  const void* table;
  int64_t table_stride;
  void* out;
  int64_t out_stride;
  int64_t row_size;
};

// One block per token copies its row, Access by Access.
template <class Access>
__global__ void __launch_bounds__(kThreads)
    EmbeddingKernel(const __grid_constant__ KernelParams p) {
  cuda::WaitForPreviousKernels();
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int64_t id = EmbeddingId(p.params, token);
    auto* const out = static_cast<Access*>(p.out) + token * p.out_stride;
    if (id < 0 || id >= p.vocab) {
      for (int64_t i = threadIdx.x; i < p.row_size; i += kThreads) {
        out[i] = Access{};
      }
      continue;
    }
    const auto* const row =
        static_cast<const Access*>(p.table) + id * p.table_stride;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < p.row_size; i += kThreads) {
      out[i] = row[i];
    }
  }
}

template <class Access>
Status LaunchEmbedding(const EmbeddingParams& p, Stream stream) {
  const int64_t element = static_cast<int64_t>(DTypeSize(p.out.dtype));
  const int64_t access = sizeof(Access);
  // The strides of one row do not matter and need not be divisible.
  const KernelParams kernel = {p,
                               p.out.shape[0],
                               p.table.shape[0],
                               p.table.data,
                               p.table.stride[0] * element / access,
                               p.out.data,
                               p.out.stride[0] * element / access,
                               p.out.shape[1] * element / access};
  const int64_t grid =
      std::min<int64_t>(p.out.shape[0], std::numeric_limits<int32_t>::max());
  return cuda::LaunchDependent(
      "Embedding", stream, dim3(static_cast<unsigned>(grid)), dim3(kThreads), 0,
      EmbeddingKernel<Access>, kernel);
}

}  // namespace

Status EmbeddingCuda(const EmbeddingParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.out.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const size_t element = DTypeSize(p.out.dtype);
  const bool wide =
      cuda::RowsAreWholeChunks(p.table) && cuda::RowsAreWholeChunks(p.out);
  if (wide) return LaunchEmbedding<uint4>(p, stream);
  return element == 4 ? LaunchEmbedding<uint32_t>(p, stream)
                      : LaunchEmbedding<uint16_t>(p, stream);
}

}  // namespace tenon
