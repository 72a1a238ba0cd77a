#include <cstring>

#include "ops/moe/moe_gemm_cpu.h"
#include "ops/moe/moe_grouped_matmul_backend.h"

namespace tenon {
namespace {

constexpr int64_t kBlockCols = 64;

char* OutRow(const MoeGroupedMatmulParams& p, int64_t slot, int64_t col) {
  return p.out.As<char>() + (slot * p.out.stride[0] + col) *
                                static_cast<int64_t>(DTypeSize(p.out.dtype));
}

// What the schedule says of memory is not to be trusted: offsets are cut to the
// slots and made ascending.
void CutOffsets(const int32_t* offsets, int64_t num_experts, int64_t num_slots,
                int32_t* cut) {
  int64_t last = 0;
  for (int64_t e = 0; e <= num_experts; ++e) {
    last = std::max(last, std::min<int64_t>(offsets[e], num_slots));
    cut[e] = static_cast<int32_t>(last);
  }
}

// Adds the bias, applies the routing weight and writes the block's columns of
// one slot.
void FinishRow(const MoeGroupedMatmulParams& p, const MoeCpuBlock& block,
               const float* bias, int64_t slot, float* sums) {
  if (bias != nullptr) {
    for (int64_t c = 0; c < block.num_cols; ++c) sums[c] += bias[c];
  }
  if (p.routing_weights.present()) {
    const float weight = p.routing_weights.As<const float>()[slot];
    for (int64_t c = 0; c < block.num_cols; ++c) sums[c] *= weight;
  }
  CpuConvertFromFloat(p.out.dtype, sums, block.num_cols,
                      OutRow(p, slot, block.col));
}

void ComputeBlock(const MoeGroupedMatmulParams& p, const MoeCpuRows& gathered,
                  const MoeCpuBlock& block) {
  float bias[kBlockCols];
  if (p.bias.present()) {
    const int64_t offset = block.expert * p.bias.stride[0] + block.col;
    CpuConvertToFloat(
        p.bias.dtype,
        p.bias.As<const char>() +
            offset * static_cast<int64_t>(DTypeSize(p.bias.dtype)),
        block.num_cols, bias);
  }
  float sums[kMoeCpuTileRows][kBlockCols];
  for (int64_t first = block.begin; first < block.end;
       first += kMoeCpuTileRows) {
    const int64_t rows = std::min(kMoeCpuTileRows, block.end - first);
    MultiplyBlock(p.weights, block, gathered.From(first), rows, sums[0],
                  kBlockCols);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = p.sorted_slots.As<const int32_t>()[first + r];
      if (slot < 0 || slot >= p.sorted_slots.shape[0]) continue;
      FinishRow(p, block, p.bias.present() ? bias : nullptr, slot, sums[r]);
    }
  }
}

}  // namespace

Status MoeGroupedMatmulCpu(const MoeGroupedMatmulParams& p,
                           const MoeGroupedMatmulScratch& scratch,
                           Stream stream) {
  const int64_t num_slots = p.sorted_slots.shape[0];
  int32_t* const offsets = scratch.expert_offsets;
  CutOffsets(p.expert_offsets.As<const int32_t>(), p.weights.num_experts,
             num_slots, offsets);
  const int64_t num_sorted = offsets[p.weights.num_experts];
  if (num_sorted < num_slots) {
    // Which slots were skipped is known only from the others.
    const size_t row_bytes =
        static_cast<size_t>(p.weights.rows) * DTypeSize(p.out.dtype);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      std::memset(OutRow(p, slot, 0), 0, row_bytes);
    }
  }
  GatherRows(stream, p.x, p.sorted_slots.As<const int32_t>(), num_sorted,
             p.slots_per_row, scratch.gathered);
  const MoeCpuRows gathered = {scratch.gathered, scratch.gathered_scales,
                               p.weights.cols};
  if (IsFp8(p.weights)) QuantizeRows(stream, gathered, num_sorted);
  const int64_t num_active =
      FindActiveExperts(offsets, p.weights.num_experts, scratch.active_experts);
  ForEachMoeCpuBlock(stream, offsets, scratch.active_experts, num_active,
                     p.weights.rows, kBlockCols, [&](const MoeCpuBlock& block) {
                       ComputeBlock(p, gathered, block);
                     });
  return Status();
}

}  // namespace tenon
