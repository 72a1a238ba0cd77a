#ifndef TENON_OPS_ATTENTION_ATTENTION_CPU_KEYS_H_
#define TENON_OPS_ATTENTION_ATTENTION_CPU_KEYS_H_

#include <cstdint>

#include "ops/core/device_info.h"

// The inner loops of the CPU backend, for the instruction set of this host.

namespace tenon {

// Keys are folded in blocks, at most so many at a time.
inline constexpr int kMaxCpuKeys = 64;

// A block of keys of one KV head, in float32. `count` is 1 to kMaxCpuKeys.
struct AttentionKeys {
  const float* k[kMaxCpuKeys];
  const float* v[kMaxCpuKeys];
  int count = 0;
};

// The softmax of one query head over the keys seen so far, in units where
// exp(score) is 2^(k . q): out = sum of 2^(k . q - max) * v, sum likewise.
struct AttentionRow {
  const float* q;
  float* out;
  float* max;  // -infinity before the first key
  float* sum;
};

// Adds the first `count` of `keys` to the row. The bits depend on these keys
// and the row alone. head_dim is a multiple of 64.
void FoldKeys(CpuIsa isa, const AttentionKeys& keys, int count,
              int64_t head_dim, const AttentionRow& row);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_CPU_KEYS_H_
