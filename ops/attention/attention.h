#ifndef TENON_OPS_ATTENTION_ATTENTION_H_
#define TENON_OPS_ATTENTION_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// Causal grouped-query attention over a paged KV cache, for a ragged batch: any
// mix of decode rows (one query) and prefill or verification rows (several).
//
// Sequence s has queries query_start[s] to query_start[s + 1] - 1, which are
// its last ones: with n of them and kv_len[s] cached tokens (their own K and V
// included, already written), query i attends to cache positions 0 to
// kv_len[s] - n + i. Query head h reads KV head h / (num_heads / num_kv_heads).
//   out = softmax(q * k^T * scale) * v
//
// Shapes:
//   q, out       [tokens, num_heads, head_dim], strides of dims 0 and 1 free
//   k_cache,     [num_pages, page_size, num_kv_heads, head_dim], strides of
//   v_cache      dims 0 to 2 free
//   block_table  [num_seqs, max_pages] int32: page p of sequence s holds its
//                positions p * page_size on; entries past its length are unread
//   query_start  [num_seqs + 1] int32, from 0 to tokens, non-decreasing
//   kv_len       [num_seqs] int32
// q and out have one dtype, float32, float16 or bfloat16; the caches have the
// same or float8_e4m3 (value = stored * scale). head_dim is 64, 128 or 256;
// num_heads is a multiple of num_kv_heads. page_size is 1 to 65536.
//
// The arrays are device memory: their contents are the caller's promise. Rows
// with kv_len < their number of queries get zeros for queries at negative
// positions, and so do tokens that belong to no sequence; a block-table entry
// outside [0, num_pages) is treated as page 0; lengths are cut to the bounds.
//
// Numerics: scores, softmax and the weighted sum accumulate in float32
// (half-precision probabilities feed the tensor cores where those are used),
// one rounding at the store. A long context is cut into parts that are combined
// in order: the same call gives the same bits, and a query does not depend on
// what the other sequences hold. How it is cut follows from its length, and on
// CUDA from the number of queries in the call; not so on Hopper, where a single
// query of a sequence has the same bits in any company (float32 and odd strides
// or page sizes aside). With batch_invariant it follows from the length alone:
// then a query's result is the same whether it is computed alone or in a chunk
// of several, in any company. On the CPU that always holds.
// NaN in a query, or in a key or value that it attends to, makes it NaN.
//
// CUDA kernels (see attention_config.h) are at their best where q, out and the
// caches can be accessed 16 bytes at a time and page_size is a power of two
// from 8 on; any other stride and size works. Sequences without queries, and
// those with a kv_len of 0, cost next to nothing, and so does a bound far above
// the lengths: a captured graph may have rows to spare.
//
// Aliasing: out may be q, and overlaps nothing else. Does not allocate or
// synchronise; can be captured in a CUDA graph (the grid depends on shapes
// alone). Needs `workspace` of AttentionWorkspaceBytes(params). Zero tokens is
// OK.
struct AttentionParams {
  TensorView q;
  TensorView k_cache;
  TensorView v_cache;
  TensorView block_table;
  TensorView query_start;
  TensorView kv_len;
  TensorView out;
  float scale = 0.0f;  // usually 1 / sqrt(head_dim); must be given: > 0, finite
  float k_scale = 1.0f;  // of fp8 caches; 1 otherwise
  float v_scale = 1.0f;
  // Upper bounds known on the host, which size the grid: of kv_len, and of the
  // queries of one sequence (1: a pure decode batch). 0: from the shapes
  // (max_pages * page_size, and tokens).
  int32_t max_kv_len = 0;
  int32_t max_query_len = 0;
  bool batch_invariant = false;
  // A promise that changes no bit: the kernels ahead of this call in the
  // stream, back to and including the first one that is not QkNorm's, do not
  // write block_table, query_start and kv_len, nor the cache but for the call's
  // own tokens, and that first one waits for those ahead of it before it lets
  // the next one start (as all of this library do but QkNorm). Then these are
  // read while those kernels still run (programmatic dependent launch), where
  // kernels can. Kernels further ahead may have written anything.
  bool early_reads = false;
  void* workspace = nullptr;
  size_t workspace_size = 0;
};

// What Attention checks of everything but where memory lies and overlaps.
Status ValidateAttentionShapes(const AttentionParams& params);

// An upper bound that grows with tokens and max_kv_len; depends on shapes,
// dtypes, bounds and device alone. On CUDA, sequences of many queries over
// float8 caches may take 128 MiB of it. 0 for invalid params.
size_t AttentionWorkspaceBytes(const AttentionParams& params);

Status Attention(const AttentionParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_H_
