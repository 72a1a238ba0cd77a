#ifndef TENON_OPS_ATTENTION_ATTENTION_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_CUDA_CUH_

#include <cstdint>

#include "ops/attention/attention_backend.h"
#include "ops/core/core_cuda.cuh"

// What the attention kernels share: their arguments, and who reads what.

namespace tenon::cuda {

// Query heads that one block of the generic and decode kernels attends with;
// more of them per KV head take more blocks.
inline constexpr int kHeadsPerBlock = 16;

struct AttentionArgs {
  AttentionParams params;
  AttentionPlan plan;
  int64_t first_row = 0;  // of this pass
  // Of [row of the pass, head, part], where plan.max_parts > 1: the weighted
  // sum of the values, and the largest score with the sum of weights under it.
  float* partial_out = nullptr;
  float2* partial_softmax = nullptr;
};

Status LaunchGenericAttention(const AttentionArgs& args, int64_t rows,
                              Stream stream);
Status LaunchDecodeAttention(const AttentionArgs& args, int64_t rows,
                             Stream stream);
Status LaunchPrefillAttention(const AttentionArgs& args, Stream stream);
// Where CanUseHopperDecode; all rows at once.
Status LaunchHopperDecodeAttention(const AttentionArgs& args, Stream stream);
// The same, where CanUseHopperPrefill(), on a GPU of sm_90.
Status LaunchHopperPrefill(const AttentionArgs& args, Stream stream);

// Copies float8 caches as the plan says (widened_keys > 0); *widened is the
// call that reads the copy.
Status LaunchWidenCaches(const AttentionArgs& args, Stream stream,
                         AttentionParams* widened);

// Blocks over the query heads: x of the grids of rows.
inline unsigned HeadBlocks(const AttentionParams& p) {
  const int64_t kv_heads = p.k_cache.shape[2];
  return static_cast<unsigned>(
      kv_heads *
      CeilDiv<int64_t, int64_t>(p.q.shape[1] / kv_heads, kHeadsPerBlock));
}

#ifdef __CUDACC__

// One query of a sequence. token < 0: none to serve here.
struct Query {
  int64_t token = -1;
  int32_t sequence = -1;
  int32_t length = 0;  // keys that it attends to
};

// Keys that query `index` of the `count` of a sequence attends to.
__device__ __forceinline__ int32_t ContextLength(const AttentionArgs& args,
                                                 int64_t sequence,
                                                 int64_t index, int64_t count) {
  int64_t kv_len = args.params.kv_len.As<const int32_t>()[sequence];
  kv_len = min(kv_len, int64_t{args.plan.max_kv_len});
  return static_cast<int32_t>(
      max(int64_t{0}, min(kv_len, kv_len - count + index + 1)));
}

// Of a sequence, of those that exist.
__device__ __forceinline__ int64_t NumQueries(const AttentionParams& p,
                                              int64_t sequence) {
  const auto* start = p.query_start.As<const int32_t>();
  const auto token = [&](int64_t s) {
    return max(int64_t{0}, min(p.q.shape[0], int64_t{start[s]}));
  };
  return token(sequence + 1) - token(sequence);
}

// The sequence that `token` belongs to: the last that starts at or before it.
// -1: before the first.
__device__ __forceinline__ int32_t FindSequence(const AttentionParams& p,
                                                int64_t token) {
  const auto* start = p.query_start.As<const int32_t>();
  const int32_t num_seqs = static_cast<int32_t>(p.block_table.shape[0]);
  // So it is wherever every sequence has one query.
  if (token < num_seqs && start[token] <= token && start[token + 1] > token) {
    return static_cast<int32_t>(token);
  }
  int32_t low = 0;
  int32_t high = num_seqs;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (start[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// The query of a row of the plan.
__device__ __forceinline__ Query FindQuery(const AttentionArgs& args,
                                           int64_t row) {
  const AttentionParams& p = args.params;
  const auto* start = p.query_start.As<const int32_t>();
  const int32_t per_seq = args.plan.queries_per_seq;
  Query query;
  int64_t token = row;
  if (per_seq == 0) {
    query.sequence = FindSequence(p, row);
  } else {
    query.sequence = static_cast<int32_t>(row / per_seq);
    token = start[query.sequence] + row % per_seq;
  }
  const bool covered = query.sequence >= 0 && token < start[query.sequence + 1];
  if (!covered) {  // tokens of no sequence get zeros
    query.sequence = -1;
    if (per_seq == 0) query.token = token;
    return query;
  }
  const int64_t count =
      int64_t{start[query.sequence + 1]} - start[query.sequence];
  if (token < 0 || token >= p.q.shape[0] ||
      (args.plan.kernel == AttentionKernel::kPrefill &&
       count > kMaxDecodeQueries)) {
    return query;
  }
  query.token = token;
  query.length =
      ContextLength(args, query.sequence, token - start[query.sequence], count);
  return query;
}

// The keys [begin, end) of a part of a query's context.
struct KeyRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ KeyRange FindPart(const AttentionArgs& args,
                                             int32_t length, int32_t part) {
  const int64_t part_length = args.plan.parts.Length(length);
  const int64_t begin = min(part * part_length, int64_t{length});
  return {static_cast<int32_t>(begin),
          static_cast<int32_t>(min(begin + part_length, int64_t{length}))};
}

// Where the cache holds a key of a sequence.
struct Slot {
  int32_t page = 0;
  int32_t offset = 0;
};
__device__ __forceinline__ Slot FindSlot(const AttentionParams& p,
                                         int64_t sequence, int32_t key) {
  const auto page_size = static_cast<uint32_t>(p.k_cache.shape[1]);
  const uint32_t index = static_cast<uint32_t>(key) / page_size;
  const int32_t page =
      p.block_table
          .As<const int32_t>()[sequence * p.block_table.stride[0] + index];
  Slot slot;
  slot.page = page >= 0 && page < p.k_cache.shape[0] ? page : 0;
  slot.offset =
      static_cast<int32_t>(static_cast<uint32_t>(key) - index * page_size);
  return slot;
}
__device__ __forceinline__ int64_t CacheOffset(const TensorView& cache,
                                               Slot slot, int64_t kv_head) {
  return slot.page * cache.stride[0] + slot.offset * cache.stride[1] +
         kv_head * cache.stride[2];
}

// The output, from the weighted sum of the values and the sum of the weights.
__device__ __forceinline__ float Normalize(float value, float sum,
                                           float v_scale) {
  return sum == 0.0f ? 0.0f : value * (v_scale / sum);
}

// Stores element d of a part of a head: into `out` if there are no others.
template <class T>
__device__ __forceinline__ void StorePart(const AttentionArgs& args,
                                          int64_t row, const Query& query,
                                          int64_t head, int32_t part, int32_t d,
                                          float value, float max, float sum) {
  const AttentionParams& p = args.params;
  if (args.plan.max_parts == 1) {
    p.out.As<T>()[query.token * p.out.stride[0] + head * p.out.stride[1] + d] =
        FromFloat<T>(Normalize(value, sum, p.v_scale));
    return;
  }
  const int64_t index =
      (row * p.q.shape[1] + head) * args.plan.max_parts + part;
  args.partial_out[index * p.q.shape[2] + d] = value;
  if (d == 0) args.partial_softmax[index] = make_float2(max, sum);
}

#endif  // __CUDACC__

}  // namespace tenon::cuda

#endif  // TENON_OPS_ATTENTION_ATTENTION_CUDA_CUH_
