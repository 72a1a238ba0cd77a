#include <algorithm>
#include <cmath>

#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_gemm_cpu.h"

namespace tenon {
namespace {

// Columns of a piece of work; the gate and up halves make twice as many.
constexpr int64_t kHiddenCols = 32;
constexpr int64_t kOutCols = 64;

MoeCpuRows Gathered(const MoeParams& p, const MoeScratch& scratch) {
  return {scratch.gathered, scratch.gathered_scales, p.gate.cols};
}
MoeCpuRows Hidden(const MoeParams& p, const MoeScratch& scratch) {
  return {static_cast<float*>(scratch.hidden), scratch.hidden_scales,
          p.gate.rows};
}

// hidden[i] = silu(gathered[i] * gate^T) * (gathered[i] * up^T), rounded to x's
// dtype unless it is quantised later, for the positions and columns of the
// block.
void ComputeHidden(const MoeParams& p, const MoeScratch& scratch,
                   const MoeCpuBlock& block) {
  float gate[kMoeCpuTileRows][kHiddenCols];
  float up[kMoeCpuTileRows][kHiddenCols];
  uint32_t rounded[kHiddenCols];  // of any dtype
  for (int64_t first = block.begin; first < block.end;
       first += kMoeCpuTileRows) {
    const int64_t rows = std::min(kMoeCpuTileRows, block.end - first);
    const MoeCpuRows x = Gathered(p, scratch).From(first);
    MultiplyBlock(p.gate, block, x, rows, gate[0], kHiddenCols);
    MultiplyBlock(p.up, block, x, rows, up[0], kHiddenCols);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < block.num_cols; ++c) {
        const float g = gate[r][c];
        up[r][c] *= g / (1.0f + std::exp(-g));
      }
      float* to = Hidden(p, scratch).From(first + r).values + block.col;
      if (IsFp8(p.down)) {
        std::copy_n(up[r], block.num_cols, to);
        continue;
      }
      CpuConvertFromFloat(p.x.dtype, up[r], block.num_cols, rounded);
      CpuConvertToFloat(p.x.dtype, rounded, block.num_cols, to);
    }
  }
}

// Row `slot` of the weighted rows, from column `col` on.
char* WeightedRow(const MoeParams& p, const MoeScratch& scratch, int64_t slot,
                  int64_t col) {
  return static_cast<char*>(scratch.weighted) +
         (slot * p.x.shape[1] + col) *
             static_cast<int64_t>(DTypeSize(p.x.dtype));
}

// weighted[slot] = hidden[i] * down^T * routing weight, rounded to x's dtype.
void ComputeWeighted(const MoeParams& p, const MoeScratch& scratch,
                     const MoeCpuBlock& block) {
  const int64_t top_k = p.topk_ids.shape[1];
  float sums[kMoeCpuTileRows][kOutCols];
  for (int64_t first = block.begin; first < block.end;
       first += kMoeCpuTileRows) {
    const int64_t rows = std::min(kMoeCpuTileRows, block.end - first);
    MultiplyBlock(p.down, block, Hidden(p, scratch).From(first), rows, sums[0],
                  kOutCols);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = scratch.sorted_slots[first + r];
      const float weight =
          p.topk_weights
              .As<const float>()[slot / top_k * p.topk_weights.stride[0] +
                                 slot % top_k];
      for (int64_t c = 0; c < block.num_cols; ++c) sums[r][c] *= weight;
      CpuConvertFromFloat(p.x.dtype, sums[r], block.num_cols,
                          WeightedRow(p, scratch, slot, block.col));
    }
  }
}

// out[token] = sum of the token's weighted rows, in the order of its choices;
// then the residual.
void SumRows(const MoeParams& p, const MoeScratch& scratch, int64_t token) {
  constexpr int64_t kCols = 256;
  const int64_t hidden = p.x.shape[1];
  const int64_t top_k = p.topk_ids.shape[1];
  const int32_t* ids =
      p.topk_ids.As<const int32_t>() + token * p.topk_ids.stride[0];
  const auto element = [&](const TensorView& matrix, int64_t col) {
    return matrix.As<char>() + (token * matrix.stride[0] + col) *
                                   static_cast<int64_t>(DTypeSize(p.x.dtype));
  };
  float sums[kCols], row[kCols];
  for (int64_t col = 0; col < hidden; col += kCols) {
    const int64_t count = std::min(kCols, hidden - col);
    std::fill_n(sums, count, 0.0f);
    for (int64_t j = 0; j < top_k; ++j) {
      if (ids[j] < 0 || ids[j] >= p.gate.num_experts) continue;
      CpuConvertToFloat(p.x.dtype,
                        WeightedRow(p, scratch, token * top_k + j, col), count,
                        row);
      for (int64_t c = 0; c < count; ++c) sums[c] += row[c];
    }
    if (p.residual.present()) {
      float rounded[kCols];  // of any dtype
      CpuConvertFromFloat(p.x.dtype, sums, count, rounded);
      CpuConvertToFloat(p.x.dtype, rounded, count, sums);
      CpuConvertToFloat(p.x.dtype, element(p.residual, col), count, row);
      for (int64_t c = 0; c < count; ++c) sums[c] += row[c];
    }
    CpuConvertFromFloat(p.x.dtype, sums, count, element(p.out, col));
  }
}

}  // namespace

Status MoeCpu(const MoeParams& p, const MoeScratch& scratch, Stream stream) {
  if (p.router != nullptr) TENON_RETURN_IF_ERROR(MoeRouter(*p.router, stream));
  TENON_RETURN_IF_ERROR(AlignChunk(p, scratch, 0, 0, stream));
  const int32_t* offsets = scratch.expert_offsets;
  const int64_t num_experts = p.gate.num_experts;
  const int64_t num_active =
      FindActiveExperts(offsets, num_experts, scratch.active_experts);
  const int64_t num_sorted = offsets[num_experts];
  GatherRows(stream, p.x, scratch.sorted_slots, num_sorted, p.topk_ids.shape[1],
             scratch.gathered);
  if (IsFp8(p.gate)) QuantizeRows(stream, Gathered(p, scratch), num_sorted);
  ForEachMoeCpuBlock(stream, offsets, scratch.active_experts, num_active,
                     p.gate.rows, kHiddenCols, [&](const MoeCpuBlock& block) {
                       ComputeHidden(p, scratch, block);
                     });
  if (IsFp8(p.down)) QuantizeRows(stream, Hidden(p, scratch), num_sorted);
  ForEachMoeCpuBlock(stream, offsets, scratch.active_experts, num_active,
                     p.down.rows, kOutCols, [&](const MoeCpuBlock& block) {
                       ComputeWeighted(p, scratch, block);
                     });
  if (p.rows.present()) return Status();
  ParallelFor(stream, p.x.shape[0], 16384 / p.x.shape[1] + 1,
              [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; ++t) SumRows(p, scratch, t);
              });
  return Status();
}

}  // namespace tenon
