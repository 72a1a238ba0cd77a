#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_H_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_H_

#include "ops/attention/attention.h"

namespace tenon {

// Whether the kernel for Hopper's wgmma can serve what a plan gives to
// kPrefill: a pure function of shapes, strides and dtypes. It can where
// head_dim is 64 or 128 (with float8 caches 128), page_size a multiple of 8,
// and KV heads of a slot are whole times 128 bytes apart.
bool CanUseHopperPrefill(const AttentionParams& params);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_H_
