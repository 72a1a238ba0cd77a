#ifndef TENON_OPS_MOE_MOE_PREPARE_H_
#define TENON_OPS_MOE_MOE_PREPARE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace tenon {

// MoePrepareCuda's blocks that route, where one cluster does not suffice.
inline constexpr int64_t kMoePrepareMaxBlocks = 128;

// Tokens of each; a multiple of 32.
inline int64_t MoePrepareBlockTokens(int64_t tokens) {
  constexpr int64_t kStep = 32 * kMoePrepareMaxBlocks;
  return std::max<int64_t>((tokens + kStep - 1) / kStep, 1) * 32;
}

// What it needs for their counts. Grows with tokens.
inline size_t MoePrepareWorkspaceBytes(int64_t tokens, int64_t num_experts) {
  const int64_t blocks =
      std::min<int64_t>((tokens + 31) / 32, kMoePrepareMaxBlocks);
  return static_cast<size_t>(blocks * ((num_experts + 1) / 2 * 2)) *
         sizeof(uint16_t);
}

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_PREPARE_H_
