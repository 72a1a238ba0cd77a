#ifndef TENON_OPS_ATTENTION_ATTENTION_CONFIG_H_
#define TENON_OPS_ATTENTION_ATTENTION_CONFIG_H_

#include <cstddef>
#include <cstdint>

#include "ops/attention/attention.h"

// The choices of an Attention call: pure functions of shapes, strides, dtypes
// and bounds, so that they can be tested without a GPU and never differ between
// two calls that look alike.

namespace tenon {

enum class AttentionKernel {
  // Any dtype, stride and alignment, on plain arithmetic: float32, and views
  // that cannot be read 16 bytes at a time.
  kGeneric,
  // Split-KV on tensor cores: a block per (query, KV head, part of the
  // context), its rows the query heads that share the KV head. On Hopper in one
  // launch, see attention_hopper_decode.h.
  kDecode,
  // Tiles of (query, head) rows on tensor cores for the sequences of more than
  // kMaxDecodeQueries queries, kDecode for the others of the same call. So the
  // kernel of a query follows from the queries of its own sequence. (The tiles
  // serve a sequence that is alone whatever it has.) On Hopper with wgmma, see
  // attention_hopper_prefill.h.
  kPrefill,
};

// The most queries a sequence may have to be served query by query.
inline constexpr int32_t kMaxDecodeQueries = 8;

AttentionKernel SelectAttentionKernel(const AttentionParams& params);

// How a context is cut into parts that are attended to side by side and then
// combined in order. All parts of a context but the last have one length.
struct AttentionParts {
  int32_t target = 1;  // parts to cut into, within the lengths below
  int32_t min_length = 0;
  int32_t max_length = 0;

  // Bounds what one query can need of the workspace.
  static constexpr int32_t kMaxCount = 256;
  // Every length is a multiple of this, a whole number of any kernel's tiles.
  static constexpr int32_t kLengthUnit = 64;

  constexpr int32_t Length(int32_t context) const {
    int64_t length = Ceil(context, target);
    if (length > max_length) length = max_length;
    if (length < min_length) length = min_length;
    const int64_t floor = Ceil(context, kMaxCount);
    if (length < floor) length = floor;
    length = Ceil(length, kLengthUnit) * kLengthUnit;
    return static_cast<int32_t>(length < kLongest ? length : kLongest);
  }
  constexpr int32_t Count(int32_t context) const {
    return static_cast<int32_t>(Ceil(context, Length(context)));
  }
  // The most that Count() returns for contexts up to `max_context`.
  constexpr int32_t MaxCount(int32_t max_context) const {
    int64_t count = Ceil(max_context, min_length);
    if (count > target) count = target;
    const int64_t of_longest = Ceil(max_context, max_length);
    if (count < of_longest) count = of_longest;
    return static_cast<int32_t>(count < kMaxCount ? count : kMaxCount);
  }

 private:
  static constexpr int64_t kLongest = int64_t{1} << 30;
  static constexpr int64_t Ceil(int64_t a, int64_t b) {
    return (a + b - 1) / b;
  }
};

// What a backend does for a call.
struct AttentionPlan {
  AttentionKernel kernel = AttentionKernel::kGeneric;  // of CUDA
  AttentionParts parts;
  int32_t max_kv_len =
      0;                  // the bound, made explicit; lengths are clamped to it
  int32_t max_parts = 0;  // of any context up to max_kv_len
  // The queries attended to part by part. Where queries_per_seq is 0 a row is a
  // token, else that many rows belong to each sequence, used or not (which
  // saves the empty blocks of a long prefill's tokens). No rows: kPrefill's
  // tiles serve all.
  int32_t queries_per_seq = 0;
  int64_t num_rows = 0;
  // Rows whose partial results fit the workspace together. More are served in
  // several passes, which does not change their bits.
  int64_t rows_per_pass = 0;
  // For kPrefill on Hopper over float8 caches: the keys of each sequence in a
  // widened copy of them, which lies at widened_at of the workspace. 0: no
  // copy, which changes no bit.
  int64_t widened_keys = 0;
  size_t widened_at = 0;
};

// Of valid params with at least one token.
AttentionPlan PlanAttention(const AttentionParams& params);

// Of valid params. Never less for more tokens or a larger max_kv_len.
size_t PlannedWorkspaceBytes(const AttentionParams& params);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_CONFIG_H_
