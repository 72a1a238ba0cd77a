#ifndef TENON_OPS_MOE_MOE_BACKEND_H_
#define TENON_OPS_MOE_MOE_BACKEND_H_

#include "ops/core/workspace.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_align.h"

namespace tenon {

// Tokens that the CPU processes at once: enough rows per expert to multiply
// efficiently, few enough that intermediates stay small.
inline constexpr int64_t kMoeCpuChunkTokens = 512;

// The pieces of the workspace, for one chunk of tokens. A slot is a (token,
// choice) pair of the chunk.
struct MoeScratch {
  int32_t* expert_offsets = nullptr;  // these as in MoeAlign
  int32_t* sorted_slots = nullptr;
  int32_t* tiles = nullptr;  // CUDA
  void* align = nullptr;     // for AlignChunk and MoePrepareCuda
  size_t align_bytes = 0;
  int32_t* active_experts = nullptr;  // CPU
  float* gathered = nullptr;          // CPU: x by position in sorted_slots
  // silu(gate) * up. CUDA: rows by slot, in x's dtype, or quantised to fp8
  // where the experts are. CPU: by position in sorted_slots, rounded to x's
  // dtype (quantised) but held as float32.
  void* hidden = nullptr;
  // With fp8 experts; groups of 128 columns.
  void* x_fp8 = nullptr;             // CUDA: [tokens, hidden]
  float* x_scales = nullptr;         // CUDA: [tokens, groups of hidden]
  float* hidden_scales = nullptr;    // of `hidden`: [slots, groups]
  float* gathered_scales = nullptr;  // CPU: of `gathered`
  void* weighted = nullptr;  // rows of the down projection by slot, x's dtype
  size_t bytes = 0;
};
MoeScratch LayOutScratch(const MoeParams& params);

// Aligns the chunk's topk_ids into the scratch. tile_rows 0: no tiles.
Status AlignChunk(const MoeParams& chunk, const MoeScratch& scratch,
                  int32_t tile_rows, int64_t num_tiles, Stream stream);

// CUDA: all that goes before the matrix products, in one launch at decode
// sizes. Routes, if there is chunk.router, into topk_weights and topk_ids;
// fills expert_offsets and sorted_slots as AlignChunk does, and, where the
// experts are fp8, x_fp8 and x_scales as QuantizeFp8 does.
Status MoePrepareCuda(const MoeParams& chunk, const MoeScratch& scratch,
                      Stream stream);

// Backends trust `chunk`: Moe() has validated it. It has at most
// kMoeChunkTokens (kMoeCpuChunkTokens) tokens, and at least one. Its router, if
// any, has its tokens and is not called yet.
Status MoeCpu(const MoeParams& chunk, const MoeScratch& scratch, Stream stream);
Status MoeCuda(const MoeParams& chunk, const MoeScratch& scratch,
               Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_BACKEND_H_
