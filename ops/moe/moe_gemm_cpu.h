#ifndef TENON_OPS_MOE_MOE_GEMM_CPU_H_
#define TENON_OPS_MOE_MOE_GEMM_CPU_H_

#include <algorithm>
#include <cstdint>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/moe/expert_matrices.h"
#include "ops/quantize/fp8_scale.h"

// How the CPU backends of grouped matmul and of the fused layer share out the
// experts' matrix products: a piece of work is a block of columns of one expert
// with all its rows, so that every weight is read from memory once. Private to
// ops/moe.

namespace tenon {

// Rows that are multiplied at once; their sums live on the stack.
inline constexpr int64_t kMoeCpuTileRows = 48;

// Positions [begin, end) in sorted_slots of one expert, and some columns of its
// matrices.
struct MoeCpuBlock {
  int64_t expert = 0;
  int64_t begin = 0;
  int64_t end = 0;
  int64_t col = 0;
  int64_t num_cols = 0;
};

// Writes the experts that have slots to `active`; returns their number.
inline int64_t FindActiveExperts(const int32_t* expert_offsets,
                                 int64_t num_experts, int32_t* active) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (expert_offsets[e] < expert_offsets[e + 1]) {
      active[count++] = static_cast<int32_t>(e);
    }
  }
  return count;
}

// Calls body(const MoeCpuBlock&) for all blocks of up to block_cols of `cols`
// columns, on the stream's threads.
template <class Body>
void ForEachMoeCpuBlock(Stream stream, const int32_t* expert_offsets,
                        const int32_t* active, int64_t num_active, int64_t cols,
                        int64_t block_cols, const Body& body) {
  const int64_t per_expert = (cols + block_cols - 1) / block_cols;
  ParallelFor(stream, num_active * per_expert, 1,
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  MoeCpuBlock block;
                  block.expert = active[i / per_expert];
                  block.begin = expert_offsets[block.expert];
                  block.end = expert_offsets[block.expert + 1];
                  block.col = i % per_expert * block_cols;
                  block.num_cols = std::min(block_cols, cols - block.col);
                  body(block);
                }
              });
}

// Rows of float32 one after the other. Those that meet fp8 weights are
// quantised and have scales, one per group of columns.
struct MoeCpuRows {
  float* values = nullptr;
  float* scales = nullptr;
  int64_t cols = 0;

  MoeCpuRows From(int64_t row) const {
    return {values + row * cols,
            scales == nullptr ? nullptr : scales + row * NumFp8Groups(cols),
            cols};
  }
};

// sums [rows, block.num_cols], rows `sums_stride` apart =
//   x [rows, cols of m] * (the block's rows of the expert's matrix)^T
inline void MultiplyBlock(const ExpertMatrices& m, const MoeCpuBlock& block,
                          const MoeCpuRows& x, int64_t rows, float* sums,
                          int64_t sums_stride) {
  CpuMatmulParams p;
  p.x = x.values;
  p.x_stride = m.cols;
  p.weight = ExpertRow(m, block.expert, block.col);
  p.weight_dtype = m.dtype;
  p.weight_stride = m.row_stride;
  p.out = sums;
  p.out_stride = sums_stride;
  p.rows = rows;
  p.cols = block.num_cols;
  p.depth = m.cols;
  if (IsFp8(m)) {
    p.scales.x = x.scales;
    p.scales.x_stride = NumFp8Groups(m.cols);
    p.scales.weight = m.scales.data + block.expert * m.scales.expert_stride;
    p.scales.weight_stride = m.scales.row_stride;
    p.scales.block_rows = m.scales.block_rows;
    p.scales.first_row = block.col;
  }
  CpuMatmul(p);
}

// gathered[i] = row sorted_slots[i] / slots_per_row of x, as float32; anything
// where x has no such row.
inline void GatherRows(Stream stream, const TensorView& x,
                       const int32_t* sorted_slots, int64_t count,
                       int64_t slots_per_row, float* gathered) {
  const int64_t cols = x.shape[1];
  const int64_t row_bytes =
      x.stride[0] * static_cast<int64_t>(DTypeSize(x.dtype));
  // Pieces of about 16k elements, so that threads are worth waking.
  ParallelFor(stream, count, 16384 / cols + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = sorted_slots[i] / slots_per_row;
      if (row < 0 || row >= x.shape[0]) continue;
      CpuConvertToFloat(x.dtype, x.As<const char>() + row * row_bytes, cols,
                        gathered + i * cols);
    }
  });
}

// Quantises the first `count` rows to fp8, in place: values become those of
// e4m3, still held as float32.
inline void QuantizeRows(Stream stream, const MoeCpuRows& rows, int64_t count) {
  const int64_t groups = NumFp8Groups(rows.cols);
  ParallelFor(
      stream, count, 4096 / rows.cols + 1, [&](int64_t begin, int64_t end) {
        Float8E4M3 quantised[kFp8GroupSize];
        for (int64_t i = begin * groups; i < end * groups; ++i) {
          const int64_t col = i % groups * kFp8GroupSize;
          const int64_t size =
              std::min<int64_t>(kFp8GroupSize, rows.cols - col);
          float* const values = rows.values + i / groups * rows.cols + col;
          rows.scales[i] = QuantizeFp8Group(values, size, quantised);
          CpuConvertToFloat(DType::kFloat8E4M3, quantised, size, values);
        }
      });
}

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_GEMM_CPU_H_
