#ifndef TENON_TESTS_REFERENCE_MOE_ALIGN_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_ALIGN_REFERENCE_H_

#include <cstdint>
#include <vector>

namespace tenon::reference {

struct MoeAlignment {
  std::vector<int64_t> expert_offsets;
  std::vector<int64_t> sorted_slots;
  std::vector<int64_t> tiles;  // triples
};

// Slots by expert in ascending order, then -1 for the skipped ones; and tiles
// of tile_rows slots of one expert, then (-1, 0, 0) up to num_tiles.
inline MoeAlignment MoeAlign(const std::vector<int64_t>& ids,
                             int64_t num_experts, int64_t tile_rows,
                             int64_t num_tiles) {
  std::vector<std::vector<int64_t>> slots(static_cast<size_t>(num_experts));
  for (size_t slot = 0; slot < ids.size(); ++slot) {
    if (ids[slot] >= 0 && ids[slot] < num_experts) {
      slots[ids[slot]].push_back(static_cast<int64_t>(slot));
    }
  }
  MoeAlignment out;
  int64_t offset = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    out.expert_offsets.push_back(offset);
    const int64_t count = static_cast<int64_t>(slots[e].size());
    for (int64_t tile = 0; tile * tile_rows < count; ++tile) {
      out.tiles.insert(out.tiles.end(), {e, tile, offset + tile * tile_rows});
    }
    out.sorted_slots.insert(out.sorted_slots.end(), slots[e].begin(),
                            slots[e].end());
    offset += count;
  }
  out.expert_offsets.push_back(offset);
  out.sorted_slots.resize(ids.size(), -1);
  while (static_cast<int64_t>(out.tiles.size()) < 3 * num_tiles) {
    out.tiles.insert(out.tiles.end(), {-1, 0, 0});
  }
  return out;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_ALIGN_REFERENCE_H_
