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
  const auto piece = 128 / static_cast<int64_t>(DTypeSize(cache.dtype));
  return cache.shape[0] > 0 && cache.stride[2] % piece == 0 &&
         cache.shape[2] * (cache.stride[2] / piece) < int64_t{1} << 31;
}

}  // namespace

bool CanUseHopperPrefill(const AttentionParams& p) {
  const int64_t head_dim = p.q.shape[2];
  const bool serves_dim =
      head_dim == 128 || (head_dim == 64 && p.k_cache.dtype == p.q.dtype);
  return p.q.dtype != DType::kFloat32 && serves_dim &&
         p.k_cache.shape[1] % 8 == 0 && CanMap(p.k_cache) && CanMap(p.v_cache);
}

}  // namespace tenon
