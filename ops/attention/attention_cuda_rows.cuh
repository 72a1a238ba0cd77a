#ifndef TENON_OPS_ATTENTION_ATTENTION_CUDA_ROWS_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_CUDA_ROWS_CUH_

#include <cstdint>

#include "ops/attention/attention_cuda.cuh"

// The rows of the kernels for sequences with many queries. The rows of a
// sequence and KV head are its (query, head of the group) pairs, queries first,
// and a tile is kRows of them. So short chunks fill tiles too, and the queries
// of a tile are close together.

namespace tenon::cuda {

struct RowTile {
  int64_t first_token = 0;  // of the sequence
  int64_t num_queries = 0;  // of the sequence
  int32_t sequence = -1;    // -1: of none, the output is zero
  // The first row's, the one of the sequence, the other of the group.
  int32_t first_head = 0;
  int64_t first_query = 0;
  int32_t rows = 0;  // that exist; 0: nothing to do
};

// An upper bound of the tiles of all sequences before `sequence`, of the tokens
// before it: sum of ceil(n * group / kRows). Each sequence adds its partial
// tile at most.
template <int kRows>
__host__ __device__ __forceinline__ int64_t TileStart(int64_t tokens,
                                                      int64_t sequence,
                                                      int64_t group) {
  return (tokens * group + sequence * (kRows - 1)) / kRows;
}

// Of each KV head, for a grid. There is one more "sequence" for the tokens that
// belong to none.
template <int kRows>
inline int64_t MaxRowTiles(const AttentionParams& p) {
  return TileStart<kRows>(p.q.shape[0], p.block_table.shape[0] + 1,
                          p.q.shape[1] / p.k_cache.shape[2]);
}

#ifdef __CUDACC__

// To be called by whole warps.
template <int kRows>
__device__ __forceinline__ RowTile FindRowTile(const AttentionArgs& args,
                                               uint32_t group, int64_t tile) {
  const AttentionParams& p = args.params;
  const int64_t tokens = p.q.shape[0];
  const int32_t num_seqs = static_cast<int32_t>(p.block_table.shape[0]);
  const auto start = [&](int64_t sequence) {
    const int64_t first = p.query_start.As<const int32_t>()[sequence];
    return max(int64_t{0}, min(tokens, first));
  };
  // The last sequence whose tiles start at or before this one; sequence
  // num_seqs is the tokens that belong to none. A lane tries one of 32.
  int32_t low = 0;
  int32_t high = num_seqs;
  while (low < high) {
    const int32_t step = CeilDiv(high - low, 32);
    const int32_t s = low + (static_cast<int32_t>(threadIdx.x % 32) + 1) * step;
    const bool before =
        s <= high && TileStart<kRows>(start(s), s, group) <= tile;
    low += __popc(__ballot_sync(~0u, before)) * step;
    high = min(high, low + step - 1);
  }
  RowTile rows;
  rows.first_token = start(low);
  if (low == num_seqs) {
    rows.num_queries = tokens - rows.first_token;
  } else {
    rows.sequence = low;
    rows.num_queries = start(low + 1) - rows.first_token;
    // Those the decode kernel serves, if there is any that it does.
    if (args.plan.num_rows > 0 && rows.num_queries <= kMaxDecodeQueries) {
      return rows;
    }
  }
  const int64_t first_row =
      (tile - TileStart<kRows>(rows.first_token, low, group)) * kRows;
  const int64_t count = rows.num_queries * group - first_row;
  rows.rows = static_cast<int32_t>(max(int64_t{0}, min(count, int64_t{kRows})));
  rows.first_query = first_row / group;
  rows.first_head = static_cast<int32_t>(first_row - rows.first_query * group);
  return rows;
}

// Keys that row `row` of the tile attends to; 0 for rows past the last.
__device__ __forceinline__ int32_t RowLength(const AttentionArgs& args,
                                             const RowTile& rows,
                                             uint32_t group, int row) {
  if (rows.sequence < 0 || row >= rows.rows) return 0;
  const uint32_t query = (rows.first_head + row) / group;
  return ContextLength(args, rows.sequence, rows.first_query + query,
                       rows.num_queries);
}

// The element offset of a row of the tile in q or out.
__device__ __forceinline__ int64_t RowOffset(const TensorView& view,
                                             const RowTile& rows,
                                             uint32_t group, int64_t kv_head,
                                             int row) {
  const uint32_t index = rows.first_head + row;
  const uint32_t query = index / group;
  return (rows.first_token + rows.first_query + query) * view.stride[0] +
         (kv_head * group + (index - query * group)) * view.stride[1];
}

#endif  // __CUDACC__

}  // namespace tenon::cuda

#endif  // TENON_OPS_ATTENTION_ATTENTION_CUDA_ROWS_CUH_
