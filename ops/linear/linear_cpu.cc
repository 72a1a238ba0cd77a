#include <algorithm>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/linear/linear_backend.h"

namespace tenon {
namespace {

// Float32 results wait on the stack for the bias and for rounding, at most this
// many at a time.
constexpr int64_t kTileElements = 4096;
constexpr int64_t kTileRows = 64;

char* ElementOf(const TensorView& tensor, int64_t offset) {
  return tensor.As<char>() +
         offset * static_cast<int64_t>(DTypeSize(tensor.dtype));
}

const void* RowOf(const TensorView& matrix, int64_t row) {
  return ElementOf(matrix, row * matrix.stride[0]);
}

// Converts x to a contiguous float32 matrix.
void ConvertX(const LinearParams& p, float* to, Stream stream) {
  const int64_t in_features = p.x.shape[1];
  const int64_t grain = 16384 / in_features + 1;
  ParallelFor(stream, p.x.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      CpuConvertToFloat(p.x.dtype, RowOf(p.x, row), in_features,
                        to + row * in_features);
    }
  });
}

// Adds the bias (null: none) to float32 sums and rounds them into out.
void Finish(const LinearParams& p, const CpuMatmulParams& m, const float* bias,
            int64_t row, int64_t col) {
  for (int64_t r = 0; r < m.rows; ++r) {
    float* sums = m.out + r * m.out_stride;
    for (int64_t c = 0; c < m.cols && bias != nullptr; ++c) sums[c] += bias[c];
    CpuConvertFromFloat(p.out.dtype, sums, m.cols,
                        ElementOf(p.out, (row + r) * p.out.stride[0] + col));
  }
}

// Columns [begin, end) of out; x is float32.
void MultiplyColumns(const LinearParams& p, const float* x, int64_t x_stride,
                     int64_t begin, int64_t end) {
  alignas(64) float tile[kTileElements];
  alignas(64) float bias[kTileElements];
  const int64_t tokens = p.x.shape[0];
  const int64_t tile_rows = std::min(tokens, kTileRows);
  const int64_t tile_cols = kTileElements / tile_rows / 8 * 8;
  for (int64_t col = begin; col < end; col += tile_cols) {
    CpuMatmulParams m;
    m.cols = std::min(end - col, tile_cols);
    m.depth = p.x.shape[1];
    m.x_stride = x_stride;
    m.weight = RowOf(p.weight, col);
    m.weight_dtype = p.weight.dtype;
    m.weight_stride = p.weight.stride[0];
    m.out = tile;
    m.out_stride = m.cols;
    if (p.bias.present()) {
      CpuConvertToFloat(p.bias.dtype, ElementOf(p.bias, col), m.cols, bias);
    }
    for (int64_t row = 0; row < tokens; row += tile_rows) {
      m.x = x + row * x_stride;
      m.rows = std::min(tokens - row, tile_rows);
      CpuMatmul(m);
      Finish(p, m, p.bias.present() ? bias : nullptr, row, col);
    }
  }
}

}  // namespace

size_t LinearCpuWorkspaceBytes(const LinearParams& p) {
  if (p.x.dtype == DType::kFloat32) return 0;
  return static_cast<size_t>(p.x.shape[0] * p.x.shape[1]) * sizeof(float);
}

Status LinearCpu(const LinearParams& p, Stream stream) {
  const float* x = p.x.As<const float>();
  int64_t x_stride = p.x.stride[0];
  if (p.x.dtype != DType::kFloat32) {
    float* converted = static_cast<float*>(p.workspace);
    ConvertX(p, converted, stream);
    x = converted;
    x_stride = p.x.shape[1];
  }
  // Pieces of some 64 columns at least, four for each thread where that allows.
  const int64_t out_features = p.weight.shape[0];
  const int64_t pieces = int64_t{4} * NumThreads(stream);
  const int64_t grain =
      std::max<int64_t>((out_features / pieces + 63) / 64 * 64, 64);
  ParallelFor(stream, out_features, grain, [&](int64_t begin, int64_t end) {
    MultiplyColumns(p, x, x_stride, begin, end);
  });
  return Status();
}

}  // namespace tenon
