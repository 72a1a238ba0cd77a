#include "ops/attention/attention_hopper_decode.h"

#include <algorithm>

namespace tenon {
namespace {

// One for each of the 132 SMs of an H100, and not more.
constexpr int64_t kBlocks = 132;

// A dimension of a CUDA grid ends at 65535.
constexpr int64_t kMaxTiles = 65535;

bool IsPowerOfTwo(int64_t v) { return (v & (v - 1)) == 0; }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

HopperDecodePlan PlanHopperDecode(const AttentionParams& p,
                                  const AttentionPlan& plan) {
  const int64_t tokens = p.q.shape[0];
  const int64_t num_seqs = p.block_table.shape[0];
  const int64_t kv_heads = p.k_cache.shape[2];
  const int64_t group = p.q.shape[1] / kv_heads;
  int64_t queries =
      p.max_query_len > 0 ? std::min<int64_t>(p.max_query_len, tokens) : tokens;
  if (plan.kernel == AttentionKernel::kPrefill) {
    queries = std::min<int64_t>(queries, kMaxDecodeQueries);
  }
  HopperDecodePlan d;
  d.queries_per_tile = static_cast<int32_t>(
      std::max<int64_t>(1, std::min(queries, kDecodeRows / group)));
  d.aligned = p.batch_invariant && queries > 1;
  if (d.aligned) {
    while (!IsPowerOfTwo(d.queries_per_tile)) --d.queries_per_tile;
    d.tiles_per_seq = 0;
    d.num_tiles = AlignedTileStart(tokens, num_seqs, d.queries_per_tile);
  } else {
    d.tiles_per_seq =
        static_cast<int32_t>(CeilDiv(queries, d.queries_per_tile));
    d.num_tiles = num_seqs * d.tiles_per_seq;
  }
  // As many blocks to a cluster as fill the GPU, since memory has to be asked
  // by all of it; more only wait for each other.
  const int64_t clusters = std::min(d.num_tiles, tokens) * kv_heads;
  d.cluster_blocks = kDecodeParts;
  while (d.cluster_blocks > 2 && d.cluster_blocks * clusters > kBlocks) {
    d.cluster_blocks /= 2;
  }
  // Two teams hide each other's latency as two blocks of an SM do, with more
  // room for stages.
  const bool alone = d.cluster_blocks * clusters <= kBlocks;
  d.teams = alone && d.cluster_blocks == 2 ? 2 : 1;
  return d;
}

bool CanUseHopperDecode(const AttentionParams& p, const AttentionPlan& plan) {
  if (plan.kernel == AttentionKernel::kGeneric) return false;
  const int64_t page_size = p.k_cache.shape[1];
  const int64_t row_bytes =
      p.k_cache.shape[3] * static_cast<int64_t>(DTypeSize(p.k_cache.dtype));
  const int64_t kv_heads = p.k_cache.shape[2];
  if (p.q.shape[1] / kv_heads > kDecodeRows || kv_heads > 65535 ||
      row_bytes % 128 != 0 || page_size < 8 || !IsPowerOfTwo(page_size) ||
      p.k_cache.shape[0] == 0 || plan.max_kv_len == 0) {
    return false;
  }
  for (int i = 0; i < 3; ++i) {  // what TMA takes
    if (p.k_cache.stride[i] <= 0 || p.v_cache.stride[i] <= 0) return false;
  }
  const int64_t num_tiles = PlanHopperDecode(p, plan).num_tiles;
  return num_tiles > 0 && num_tiles <= kMaxTiles;
}

}  // namespace tenon
