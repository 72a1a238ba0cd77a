#include <algorithm>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/moe/moe_sum_reduce_backend.h"

namespace tenon {
namespace {

constexpr int64_t kBlock = 512;  // columns summed at a time

void SumToken(const MoeSumReduceParams& p, int64_t token) {
  const int64_t size = static_cast<int64_t>(DTypeSize(p.x.dtype));
  const char* x = p.x.As<char>() + token * p.x.stride[0] * size;
  char* out = p.out.As<char>() + token * p.out.stride[0] * size;
  float sum[kBlock];
  float term[kBlock];
  for (int64_t first = 0; first < p.x.shape[2]; first += kBlock) {
    const int64_t count = std::min(kBlock, p.x.shape[2] - first);
    CpuConvertToFloat(p.x.dtype, x + first * size, count, sum);
    for (int64_t j = 1; j < p.x.shape[1]; ++j) {
      CpuConvertToFloat(p.x.dtype, x + (j * p.x.stride[1] + first) * size,
                        count, term);
      for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
    }
    CpuConvertFromFloat(p.x.dtype, sum, count, out + first * size);
  }
}

}  // namespace

Status MoeSumReduceCpu(const MoeSumReduceParams& p, Stream stream) {
  // Pieces read some tens of kilobytes.
  const int64_t grain = 16384 / (p.x.shape[1] * p.x.shape[2]) + 1;
  ParallelFor(stream, p.x.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) SumToken(p, token);
  });
  return Status();
}

}  // namespace tenon
