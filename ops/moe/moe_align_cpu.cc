#include <algorithm>

#include "ops/core/cpu_thread_pool.h"
#include "ops/moe/moe_align_backend.h"

namespace tenon {
namespace {

// Calls body(slot, expert) for the slots of one chunk that have an expert.
template <class Body>
void ForEachSlot(const MoeAlignParams& p, int64_t chunk, Body&& body) {
  const int64_t top_k = p.topk_ids.shape[1];
  const int64_t end =
      std::min((chunk + 1) * kMoeAlignChunkSlots, p.topk_ids.shape[0] * top_k);
  const uint32_t num_experts = static_cast<uint32_t>(p.num_experts);
  for (int64_t slot = chunk * kMoeAlignChunkSlots; slot < end;) {
    const int32_t* ids =
        p.topk_ids.As<int32_t>() + slot / top_k * p.topk_ids.stride[0];
    for (int64_t j = slot % top_k; j < top_k && slot < end; ++j, ++slot) {
      const uint32_t expert = static_cast<uint32_t>(ids[j]);
      if (expert < num_experts) body(slot, expert);
    }
  }
}

// Turns counts [num_chunks, num_experts] into the position of each chunk's
// first slot of each expert.
void CountsToPositions(const MoeAlignParams& p, int64_t num_chunks,
                       int32_t* counts) {
  int32_t* offsets = p.expert_offsets.As<int32_t>();
  int32_t position = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    offsets[e] = position;
    for (int64_t c = 0; c < num_chunks; ++c) {
      int32_t& entry = counts[c * p.num_experts + e];
      const int32_t count = entry;
      entry = position;
      position += count;
    }
  }
  offsets[p.num_experts] = position;
}

void WriteTiles(const MoeAlignParams& p) {
  const int32_t* offsets = p.expert_offsets.As<int32_t>();
  int64_t next = 0;
  const auto append = [&](int32_t expert, int32_t index, int64_t first) {
    int32_t* tile = p.tiles.As<int32_t>() + next++ * p.tiles.stride[0];
    tile[0] = expert;
    tile[1] = index;
    tile[2] = static_cast<int32_t>(first);
  };
  for (int32_t e = 0; e < p.num_experts; ++e) {
    int32_t index = 0;
    for (int64_t first = offsets[e]; first < offsets[e + 1];
         first += p.tile_rows) {
      append(e, index++, first);
    }
  }
  while (next < p.tiles.shape[0]) append(-1, 0, 0);
}

}  // namespace

Status MoeAlignCpu(const MoeAlignParams& p, Stream stream) {
  const int64_t num_slots = p.sorted_slots.shape[0];
  const int64_t num_chunks = MoeAlignNumChunks(num_slots);
  int32_t* counts = static_cast<int32_t*>(p.workspace);
  ParallelFor(stream, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t* chunk_counts = counts + c * p.num_experts;
      std::fill_n(chunk_counts, p.num_experts, 0);
      ForEachSlot(p, c, [&](int64_t, uint32_t e) { ++chunk_counts[e]; });
    }
  });
  CountsToPositions(p, num_chunks, counts);
  int32_t* sorted = p.sorted_slots.As<int32_t>();
  ParallelFor(stream, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t* positions = counts + c * p.num_experts;
      ForEachSlot(p, c, [&](int64_t slot, uint32_t e) {
        sorted[positions[e]++] = static_cast<int32_t>(slot);
      });
    }
  });
  const int32_t num_sorted = p.expert_offsets.As<int32_t>()[p.num_experts];
  std::fill(sorted + num_sorted, sorted + num_slots, -1);
  if (p.tiles.present()) WriteTiles(p);
  return Status();
}

}  // namespace tenon
