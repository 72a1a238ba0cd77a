#ifndef TENON_OPS_QK_NORM_QK_NORM_H_
#define TENON_OPS_QK_NORM_QK_NORM_H_

#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/rms_norm/rms_norm.h"

namespace tenon {

// Rotary position embedding, NeoX style: element i of the first half of the
// rotated dimensions pairs with element i of the second half.
//   a' = a * cos - b * sin,  b' = b * cos + a * sin
struct RotaryParams {
  // [max_positions, rotary_dim] float32: the cosines of the rotary_dim / 2
  // frequencies, then their sines. Not present: no rotation.
  TensorView cos_sin;
  // [tokens] int32 or int64. Device memory cannot be checked before the launch:
  // a position outside the table leaves the heads of its token unrotated.
  TensorView positions;
  int32_t rotary_dim = 0;  // even, 2 to head_dim; the tail stays as normalised
};

// Writes the finished K and the untouched V of each token into the paged cache.
struct KvCacheWriteParams {
  // [num_pages, page_size, num_kv_heads, head_dim]; page, slot and head strides
  // are free. Same dtype as q, or float8_e4m3. Not present: no write.
  TensorView k_cache;
  TensorView v_cache;
  // [tokens] int64: page * page_size + offset in the page; negative: skip.
  // A slot past the cache is skipped as well.
  TensorView slot_mapping;
  // fp8 caches store value / scale; both must be 1 otherwise.
  float k_scale = 1.0f;
  float v_scale = 1.0f;
};

// Attention pre-processing in one launch, in place: RMSNorm of every Q and K
// head, then (optionally) the rotary embedding, then (optionally) the K and V
// write into the paged cache.
//   x = head / sqrt(mean(head^2) + epsilon) * weight
//
// Packed form: `qkv` [tokens, row width] with the heads of Q from element
// q_offset of a row on, K from k_offset, V from v_offset; rows may be strided.
// Strided form: `q` [tokens, num_q_heads, head_dim] and `k`, `v` [tokens,
// num_kv_heads, head_dim] with free token and head strides (K may be a slice of
// a KV buffer). Give qkv or q and k; v is needed only for a cache write.
//
// q_weight, k_weight: [head_dim], the dtype of q or float32. Both must be
// given: a norm without its weight is an error, not an identity.
// head_dim is 64, 128 or 256. dtypes: float32, float16, bfloat16.
//
// Numerics: float32 throughout; see NormRounding for the weight. With rotation
// the normalised values are rounded to the dtype first (so the unrotated tail
// and the rotated part come from the same bits as the norm alone would give),
// then rotated in float32 and rounded once. fp8 cache values are the rounded
// results divided by the scale, rounded to nearest even, saturated at 448.
// Everything of a head depends on that head alone.
//
// Aliasing: in place; no tensor that is written may share memory with another
// one. Slices that interleave, such as the heads of K and V in one buffer, are
// fine.
// Elements outside Q and K (V, gaps) keep their bytes.
//
// Allocates nothing, does not synchronise, can be captured in a CUDA graph. On
// Hopper a kernel behind it that is launched as a programmatic dependent may
// begin while the kernel ahead of QkNorm still runs: before its own
// griddepcontrol.wait it may read nothing that either of them writes.
// Zero tokens is OK. Offsets are 64-bit: any number of tokens.
// Formula: Qwen3 (Hugging Face transformers, modeling_qwen3.py).
struct QkNormParams {
  // Packed form.
  TensorView qkv;
  int64_t q_offset = 0;  // in elements
  int64_t k_offset = 0;
  int64_t v_offset = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  // Strided form: qkv is not present, and the above are 0, since the three
  // counts come from the shapes.
  TensorView q;
  TensorView k;
  TensorView v;

  TensorView q_weight;
  TensorView k_weight;
  float epsilon = 0.0f;  // must be given: > 0, finite
  NormRounding rounding = NormRounding::kFloat32Multiply;
  RotaryParams rotary;
  KvCacheWriteParams cache;
};

Status QkNorm(const QkNormParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_QK_NORM_QK_NORM_H_
