#include <algorithm>
#include <cmath>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/moe/moe_swiglu_backend.h"

namespace tenon {
namespace {

constexpr int64_t kBlock = 256;  // columns of out converted at a time

// gate, up <- columns [first, first + count) of `row` (of x) as float32.
void LoadBlock(const MoeSwiGluParams& p, const char* row, int64_t first,
               int64_t count, float* gate, float* up) {
  const int64_t size = static_cast<int64_t>(DTypeSize(p.x.dtype));
  if (p.layout == SwiGluLayout::kBlocked) {
    CpuConvertToFloat(p.x.dtype, row + first * size, count, gate);
    CpuConvertToFloat(p.x.dtype, row + (p.out.shape[1] + first) * size, count,
                      up);
    return;
  }
  float pairs[2 * kBlock];
  CpuConvertToFloat(p.x.dtype, row + 2 * first * size, 2 * count, pairs);
  for (int64_t i = 0; i < count; ++i) {
    gate[i] = pairs[2 * i];
    up[i] = pairs[2 * i + 1];
  }
}

float Silu(float gate) { return gate / (1.0f + std::exp(-gate)); }

void ActivateRow(const MoeSwiGluParams& p, int64_t index) {
  const DType dtype = p.x.dtype;
  const int64_t size = static_cast<int64_t>(DTypeSize(dtype));
  const char* row = p.x.As<char>() + index * p.x.stride[0] * size;
  char* out = p.out.As<char>() + index * p.out.stride[0] * size;
  float gate[kBlock];
  float up[kBlock];
  for (int64_t first = 0; first < p.out.shape[1]; first += kBlock) {
    const int64_t count = std::min(kBlock, p.out.shape[1] - first);
    LoadBlock(p, row, first, count, gate, up);
    char* to = out + first * size;
    if (p.limit > 0.0f) {
      for (int64_t i = 0; i < count; ++i) {
        // Written so that NaN stays NaN.
        const float g = gate[i] > p.limit ? p.limit : gate[i];
        const float u = up[i] > p.limit    ? p.limit
                        : up[i] < -p.limit ? -p.limit
                                           : up[i];
        gate[i] = (u + 1.0f) * (g / (1.0f + std::exp(-p.alpha * g)));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) gate[i] = Silu(gate[i]);
      CpuConvertFromFloat(dtype, gate, count,
                          to);  // the rounding in the middle
      CpuConvertToFloat(dtype, to, count, gate);
      for (int64_t i = 0; i < count; ++i) gate[i] *= up[i];
    }
    CpuConvertFromFloat(dtype, gate, count, to);
  }
}

}  // namespace

Status MoeSwiGluCpu(const MoeSwiGluParams& p, Stream stream) {
  const int64_t grain = 4096 / p.out.shape[1] + 1;
  ParallelFor(stream, p.out.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) ActivateRow(p, row);
  });
  return Status();
}

}  // namespace tenon
