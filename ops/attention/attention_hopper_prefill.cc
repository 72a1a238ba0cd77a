#include "ops/attention/attention_hopper_prefill.h"

namespace tenon {
namespace {

// Limits of tensor maps: positive strides of less than 2^40 bytes (here of 8
// slots), coordinates of 31 bits.
bool CanMap(const TensorView& cache) {
  constexpr int64_t kMaxStride = int64_t{1} << 35;
  for (int i = 0; i < 3; ++i) {
    if (cache.stride[i] <= 0 || cache.stride[i] > kMaxStride) return false;
  }
  return cache.shape[0] > 0 && cache.stride[2] % 64 == 0 &&
         cache.shape[2] * (cache.stride[2] / 64) < int64_t{1} << 31;
}

}  // namespace

bool CanUseHopperPrefill(const AttentionParams& p) {
  const int64_t head_dim = p.q.shape[2];
  return p.q.dtype != DType::kFloat32 && p.k_cache.dtype == p.q.dtype &&
         (head_dim == 64 || head_dim == 128) && p.k_cache.shape[1] % 8 == 0 &&
         CanMap(p.k_cache) && CanMap(p.v_cache);
}

}  // namespace tenon
