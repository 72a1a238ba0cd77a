#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_H_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_H_

#include <cstdint>

#include "ops/attention/attention_config.h"

// The choices of the split-KV kernel for Hopper, pure functions of shapes,
// strides, dtypes and bounds.

namespace tenon {

// Keys that are loaded and attended to together.
inline constexpr int32_t kDecodeStageKeys = 64;

// Rows of a tile, (query, head) pairs: those of a tensor-core tile.
inline constexpr int32_t kDecodeRows = 16;

// Parts that a context is cut into, as many as a cluster can have blocks. Where
// follows from its length and the cache's dtype, so that a query's bits do not
// depend on how many blocks share the work.
inline constexpr int32_t kDecodeParts = 16;

struct HopperDecodePlan {
  // A tile is this many queries of a sequence, all heads of which that share a
  // KV head are the rows of a tensor-core tile: K and V are read once for them.
  int32_t queries_per_tile = 1;
  // Tiles begin at positions that are multiples of queries_per_tile, a power of
  // two. Then contexts of a tile are cut alike, whatever chunk it belongs to.
  bool aligned = false;
  int32_t tiles_per_seq = 1;  // 0, if aligned: AlignedTileStart
  int64_t num_tiles = 0;
  // Blocks, at most, that share a (tile, KV head): a cluster.
  int32_t cluster_blocks = 1;
  // Warps of a block are in so many teams, each with its own parts.
  int32_t teams = 1;
};

// An upper bound of the tiles of the first `sequence` sequences, which have
// `tokens` tokens together.
constexpr int64_t AlignedTileStart(int64_t tokens, int64_t sequence,
                                   int32_t queries_per_tile) {
  return tokens / queries_per_tile + 2 * sequence;
}

// Whether the kernel can serve a call that `plan` gives to kDecode, or the
// short sequences of one that it gives to kPrefill.
bool CanUseHopperDecode(const AttentionParams& params,
                        const AttentionPlan& plan);

HopperDecodePlan PlanHopperDecode(const AttentionParams& params,
                                  const AttentionPlan& plan);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_H_
