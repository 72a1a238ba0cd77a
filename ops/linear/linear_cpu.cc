#include <algorithm>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/linear/linear_backend.h"
#include "ops/quantize/fp8_scale.h"

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

// x as float32, contiguous, with its scales where the weight is fp8.
struct FloatX {
  const float* data = nullptr;
  int64_t stride = 0;
  const float* scales = nullptr;  // [tokens, groups]
};

// Quantises a row of x, held as float32, in place.
void QuantizeRow(int64_t count, float* x, float* scales) {
  Float8E4M3 q[kFp8GroupSize];
  for (int64_t begin = 0; begin < count; begin += kFp8GroupSize) {
    const int64_t size = std::min<int64_t>(count - begin, kFp8GroupSize);
    *scales++ = QuantizeFp8Group(x + begin, size, q);
    CpuConvertToFloat(DType::kFloat8E4M3, q, size, x + begin);
  }
}

void QuantizeX(const LinearParams& p, float* to, float* scales, Stream stream) {
  const int64_t in_features = p.x.shape[1];
  const int64_t groups = NumFp8Groups(in_features);
  const int64_t grain = 4096 / in_features + 1;
  ParallelFor(stream, p.x.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* x = to + row * in_features;
      CpuConvertToFloat(p.x.dtype, RowOf(p.x, row), in_features, x);
      QuantizeRow(in_features, x, scales + row * groups);
    }
  });
}

bool IsFp8(const LinearParams& p) {
  return p.weight.dtype == DType::kFloat8E4M3;
}

// In the workspace, unless x will do as it is.
FloatX MakeX(const LinearParams& p, Stream stream) {
  FloatX x;
  x.stride = p.x.shape[1];
  if (!IsFp8(p) && p.x.dtype == DType::kFloat32) {
    x.data = p.x.As<const float>();
    x.stride = p.x.stride[0];
    return x;
  }
  float* converted = static_cast<float*>(p.workspace);
  x.data = converted;
  if (!IsFp8(p)) {
    ConvertX(p, converted, stream);
    return x;
  }
  float* scales = converted + NumElements(p.x);
  QuantizeX(p, converted, scales, stream);
  x.scales = scales;
  return x;
}

// Rounds `sums` to out's dtype and adds elements of the residual.
void AddResidual(const LinearParams& p, int64_t row, int64_t col, int64_t count,
                 float* sums) {
  alignas(64) float rounded[kTileElements];  // of any dtype
  CpuConvertFromFloat(p.out.dtype, sums, count, rounded);
  CpuConvertToFloat(p.out.dtype, rounded, count, sums);
  float* const residual = rounded;
  CpuConvertToFloat(p.residual.dtype,
                    ElementOf(p.residual, row * p.residual.stride[0] + col),
                    count, residual);
  for (int64_t c = 0; c < count; ++c) sums[c] += residual[c];
}

// Adds the bias (null: none) to float32 sums and rounds them into out.
void Finish(const LinearParams& p, const CpuMatmulParams& m, const float* bias,
            int64_t row, int64_t col) {
  for (int64_t r = 0; r < m.rows; ++r) {
    float* sums = m.out + r * m.out_stride;
    for (int64_t c = 0; c < m.cols && bias != nullptr; ++c) sums[c] += bias[c];
    if (p.residual.present()) AddResidual(p, row + r, col, m.cols, sums);
    CpuConvertFromFloat(p.out.dtype, sums, m.cols,
                        ElementOf(p.out, (row + r) * p.out.stride[0] + col));
  }
}

// Columns [begin, end) of out.
void MultiplyColumns(const LinearParams& p, const FloatX& x, int64_t begin,
                     int64_t end) {
  alignas(64) float tile[kTileElements];
  alignas(64) float bias[kTileElements];
  const int64_t tokens = p.x.shape[0];
  const int64_t groups = NumFp8Groups(p.x.shape[1]);
  const int64_t tile_rows = std::min(tokens, kTileRows);
  const int64_t tile_cols = kTileElements / tile_rows / 8 * 8;
  for (int64_t col = begin; col < end; col += tile_cols) {
    CpuMatmulParams m;
    m.cols = std::min(end - col, tile_cols);
    m.depth = p.x.shape[1];
    m.x_stride = x.stride;
    m.weight = RowOf(p.weight, col);
    m.weight_dtype = p.weight.dtype;
    m.weight_stride = p.weight.stride[0];
    m.out = tile;
    m.out_stride = m.cols;
    if (IsFp8(p)) {
      m.scales.x_stride = groups;
      m.scales.weight = p.weight_scales.As<const float>();
      m.scales.weight_stride = p.weight_scales.stride[0];
      m.scales.block_rows = p.weight_scales.rank == 2 ? kFp8GroupSize : 1;
      m.scales.first_row = col;
    }
    if (p.bias.present()) {
      CpuConvertToFloat(p.bias.dtype, ElementOf(p.bias, col), m.cols, bias);
    }
    for (int64_t row = 0; row < tokens; row += tile_rows) {
      m.x = x.data + row * x.stride;
      if (IsFp8(p)) m.scales.x = x.scales + row * groups;
      m.rows = std::min(tokens - row, tile_rows);
      CpuMatmul(m);
      Finish(p, m, p.bias.present() ? bias : nullptr, row, col);
    }
  }
}

}  // namespace

size_t LinearCpuWorkspaceBytes(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  int64_t count = 0;
  if (IsFp8(p) || p.x.dtype != DType::kFloat32) count = tokens * p.x.shape[1];
  if (IsFp8(p)) count += tokens * NumFp8Groups(p.x.shape[1]);
  return static_cast<size_t>(count) * sizeof(float);
}

void AddLinearTermsCpu(LinearParams* p, Stream stream) {
  const LinearTerms& t = p->terms;
  if (!t.present()) return;
  const int64_t count = t.ids.shape[1];
  const int64_t cols = p->x.shape[1];
  ParallelFor(stream, p->x.shape[0], 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kCols = 256;
    float sums[kCols], term[kCols];
    uint32_t rounded[kCols];  // of any dtype
    for (int64_t token = begin; token < end; ++token) {
      const auto* ids = t.ids.As<const int32_t>() + token * t.ids.stride[0];
      for (int64_t col = 0; col < cols; col += kCols) {
        const int64_t n = std::min(kCols, cols - col);
        std::fill_n(sums, n, 0.0f);
        for (int64_t j = 0; j < count; ++j) {
          if (ids[j] < 0 || ids[j] >= t.num_ids) continue;
          CpuConvertToFloat(t.rows.dtype,
                            ElementOf(t.rows, (token * count + j) * cols + col),
                            n, term);
          for (int64_t c = 0; c < n; ++c) sums[c] += term[c];
        }
        CpuConvertFromFloat(p->x.dtype, sums, n, rounded);
        CpuConvertToFloat(p->x.dtype, rounded, n, sums);
        CpuConvertToFloat(
            p->x.dtype, ElementOf(p->x, token * p->x.stride[0] + col), n, term);
        for (int64_t c = 0; c < n; ++c) sums[c] += term[c];
        CpuConvertFromFloat(p->x.dtype, sums, n,
                            ElementOf(t.sum, token * t.sum.stride[0] + col));
      }
    }
  });
  p->x = t.sum;
  p->terms = LinearTerms();
}

Status LinearCpu(const LinearParams& p, Stream stream) {
  const FloatX x = MakeX(p, stream);
  // Pieces of some 64 columns at least, four for each thread where that allows.
  const int64_t out_features = p.weight.shape[0];
  const int64_t pieces = int64_t{4} * NumThreads(stream);
  const int64_t grain =
      std::max<int64_t>((out_features / pieces + 63) / 64 * 64, 64);
  ParallelFor(stream, out_features, grain, [&](int64_t begin, int64_t end) {
    MultiplyColumns(p, x, begin, end);
  });
  return Status();
}

}  // namespace tenon
