#include "ops/attention/attention_config.h"

#include <algorithm>

#include "ops/attention/attention_hopper_prefill.h"

namespace tenon {
namespace {

// Query heads that the decode kernel attends with in one block: the rows of a
// tensor-core tile.
constexpr int64_t kHeadsPerBlock = 16;

// Blocks that fill a Hopper GPU twice over; fewer (query, KV head) pairs than
// this are cut into parts until there are about as many.
constexpr int64_t kTargetBlocks = 264;

constexpr int32_t kMaxTargetParts = 32;

// Partial results of one pass, in floats.
constexpr int64_t kCudaPassFloats = int64_t{16} << 20;
constexpr int64_t kCpuPassFloats = int64_t{4} << 20;

// The most that a widened copy of float8 caches may take: 32k keys of 4 KV
// heads of 128. Calls with more are served without one.
constexpr int64_t kMaxWidenedBytes = int64_t{128} << 20;

// Calls of so few tokens over so few keys do better without that copy, which is
// a launch of its own.
constexpr int64_t kFewKeys = 512;

// Leaves room for a tile past the end in 32-bit arithmetic.
constexpr int64_t kMaxContext = int64_t{1} << 30;

// A dimension of a CUDA grid ends at 65535.
constexpr int64_t kMaxRowsPerPass = 32768;

bool OnCpu(const AttentionParams& p) {
  return p.q.device.type == DeviceType::kCpu;
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows can be moved 16 bytes at a time. Unlike the shapes, which vary from call
// to call of a model, strides count even where a dimension has one element.
bool IsAligned(const TensorView& view) {
  const int64_t size = static_cast<int64_t>(DTypeSize(view.dtype));
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.stride[i] * size % 16 != 0) return false;
  }
  return true;
}

int32_t MaxKvLen(const AttentionParams& p) {
  if (p.k_cache.shape[0] == 0) return 0;  // no page that could be read
  int64_t capacity;
  if (__builtin_mul_overflow(p.block_table.shape[1], p.k_cache.shape[1],
                             &capacity)) {
    capacity = kMaxContext;
  }
  capacity = std::min(capacity, kMaxContext);
  if (p.max_kv_len > 0) capacity = std::min<int64_t>(capacity, p.max_kv_len);
  return static_cast<int32_t>(capacity);
}

int64_t MaxQueryLen(const AttentionParams& p) {
  return p.max_query_len > 0 ? std::min<int64_t>(p.max_query_len, p.q.shape[0])
                             : p.q.shape[0];
}

// Blocks of the decode kernel for each query and part.
int64_t BlocksPerQuery(const AttentionParams& p) {
  const int64_t kv_heads = p.k_cache.shape[2];
  return kv_heads * CeilDiv(p.q.shape[1] / kv_heads, kHeadsPerBlock);
}

AttentionParts SelectParts(const AttentionParams& p, int64_t num_rows) {
  if (OnCpu(p)) return {1, 512, 512};
  // By length alone, for any number of rows.
  if (p.batch_invariant) return {kMaxTargetParts, 256, 2048};
  const int64_t target = CeilDiv(
      kTargetBlocks, std::max<int64_t>(1, num_rows) * BlocksPerQuery(p));
  return {static_cast<int32_t>(std::min<int64_t>(target, kMaxTargetParts)), 64,
          2048};
}

// Workspace of one row's part: m, l and the unnormalised output of each head.
int64_t FloatsPerPart(const AttentionParams& p) {
  return p.q.shape[1] * (p.q.shape[2] + 2);
}

// Workspace of one row besides its parts: on the CPU, q in float32.
int64_t FloatsPerRow(const AttentionParams& p) {
  return OnCpu(p) ? p.q.shape[1] * p.q.shape[2] : 0;
}

int64_t PassFloats(const AttentionParams& p) {
  return OnCpu(p) ? kCpuPassFloats : kCudaPassFloats;
}

// What comes ahead of a widened copy.
size_t PartialBytes(const AttentionParams& p) {
  const int64_t rows = p.q.shape[0];
  const int32_t max_kv_len = MaxKvLen(p);
  AttentionParts parts = SelectParts(p, 1);
  const int64_t parts_of_one = std::max(1, parts.MaxCount(max_kv_len));
  if (!OnCpu(p) && parts_of_one == 1) return 0;  // written to `out` at once
  int64_t parts_of_all = rows * parts_of_one;
  if (!OnCpu(p) && !p.batch_invariant) {
    // rows * target < kTargetBlocks / blocks + rows; the right side, unlike the
    // left, never falls with more rows.
    parts.target = 1;
    parts_of_all = std::min(
        parts_of_all, std::max(CeilDiv(kTargetBlocks, BlocksPerQuery(p)) + rows,
                               rows * parts.MaxCount(max_kv_len)));
  }
  const int64_t all = rows * FloatsPerRow(p) + parts_of_all * FloatsPerPart(p);
  const int64_t one = FloatsPerRow(p) + parts_of_one * FloatsPerPart(p);
  return static_cast<size_t>(std::min(all, std::max(one, PassFloats(p)))) *
         sizeof(float);
}

// To what the copy engine can address.
size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Keys of each sequence in a widened copy; 0 where none is of use.
int64_t WidenedKeys(const AttentionParams& p) {
  const int64_t keys = MaxKvLen(p);
  const bool is_small = keys <= kFewKeys && p.q.shape[0] <= kFewKeys;
  if (OnCpu(p) || is_small || p.block_table.shape[0] == 0 ||
      p.k_cache.dtype != DType::kFloat8E4M3 ||
      SelectAttentionKernel(p) != AttentionKernel::kPrefill ||
      !CanUseHopperPrefill(p)) {
    return 0;
  }
  constexpr int64_t kUnit = 128;  // a tile
  return CeilDiv(keys, kUnit) * kUnit;
}

// K, V, and a block table. More than kMaxWidenedBytes may be any such number.
int64_t WidenedBytes(const AttentionParams& p, int64_t keys) {
  const int64_t num_seqs = p.block_table.shape[0];
  const int64_t key_bytes = 2 * p.k_cache.shape[2] * p.k_cache.shape[3] *
                            static_cast<int64_t>(DTypeSize(p.q.dtype));
  if (num_seqs > kMaxWidenedBytes || num_seqs * keys > kMaxWidenedBytes) {
    return kMaxWidenedBytes + 1;
  }
  return num_seqs * (keys * key_bytes + static_cast<int64_t>(sizeof(int32_t)));
}

}  // namespace

AttentionKernel SelectAttentionKernel(const AttentionParams& p) {
  const bool aligned = IsAligned(p.q) && IsAligned(p.out) &&
                       IsAligned(p.k_cache) && IsAligned(p.v_cache);
  if (p.q.dtype == DType::kFloat32 || !aligned) {
    return AttentionKernel::kGeneric;
  }
  return p.batch_invariant || MaxQueryLen(p) <= kMaxDecodeQueries
             ? AttentionKernel::kDecode
             : AttentionKernel::kPrefill;
}

AttentionPlan PlanAttention(const AttentionParams& p) {
  AttentionPlan plan;
  plan.kernel = SelectAttentionKernel(p);
  plan.max_kv_len = MaxKvLen(p);
  plan.num_rows = p.q.shape[0];
  const int64_t num_seqs = p.block_table.shape[0];
  // A sequence alone is not worth another launch, even if it were short.
  const int64_t slots = num_seqs > 1 ? num_seqs * kMaxDecodeQueries : 0;
  if (plan.kernel == AttentionKernel::kPrefill && slots < plan.num_rows &&
      !OnCpu(p)) {
    plan.queries_per_seq = kMaxDecodeQueries;
    plan.num_rows = slots;
  }
  plan.parts = SelectParts(p, plan.num_rows);
  plan.max_parts = std::max(1, plan.parts.MaxCount(plan.max_kv_len));
  const int64_t row_floats =
      FloatsPerRow(p) + plan.max_parts * FloatsPerPart(p);
  plan.rows_per_pass =
      std::clamp<int64_t>(PassFloats(p) / row_floats, 1, kMaxRowsPerPass);
  const int64_t keys = WidenedKeys(p);
  if (keys > 0 && WidenedBytes(p, keys) <= kMaxWidenedBytes) {
    plan.widened_keys = keys;
    plan.widened_at = RoundUp(PartialBytes(p));
  }
  return plan;
}

size_t PlannedWorkspaceBytes(const AttentionParams& p) {
  const size_t bytes = PartialBytes(p);
  const int64_t keys = WidenedKeys(p);
  if (keys == 0) return bytes;
  return RoundUp(bytes) +
         static_cast<size_t>(std::min(WidenedBytes(p, keys), kMaxWidenedBytes));
}

}  // namespace tenon
