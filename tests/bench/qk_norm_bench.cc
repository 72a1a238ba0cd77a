// Norm of Q and K in the packed QKV row, alone, with the rotary embedding, and
// with the write into the paged cache.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "ops/qk_norm/qk_norm.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

constexpr int64_t kMaxPositions = 8192;
constexpr int64_t kPageSize = 16;

enum class Variant { kNorm, kNormRotary, kNormRotaryCache };

const char* VariantName(Variant variant) {
  switch (variant) {
    case Variant::kNorm:
      return "qk_norm";
    case Variant::kNormRotary:
      return "qk_norm+rope";
    case Variant::kNormRotaryCache:
      break;
  }
  return "qk_norm+rope+cache";
}

std::vector<float> CosSinTable(int32_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  std::vector<float> table(static_cast<size_t>(kMaxPositions * rotary_dim));
  for (int64_t i = 0; i < half; ++i) {
    const double frequency = std::pow(1e6, -2.0 * i / rotary_dim);
    for (int64_t position = 0; position < kMaxPositions; ++position) {
      float* row = &table[position * rotary_dim];
      row[i] = static_cast<float>(std::cos(position * frequency));
      row[half + i] = static_cast<float>(std::sin(position * frequency));
    }
  }
  return table;
}

// Q and K are read and written; for the cache, V is read and K and V written.
double Bytes(const testing::ModelShape& shape, int64_t tokens, DType dtype,
             Variant variant) {
  double heads = 2.0 * (shape.num_heads + shape.num_kv_heads);
  if (variant == Variant::kNormRotaryCache) heads += 3.0 * shape.num_kv_heads;
  return heads * shape.head_dim *
         static_cast<double>(tokens * DTypeSize(dtype));
}

void RunCase(bench::Bench& b, const testing::ModelShape& shape, int64_t tokens,
             DType dtype, Variant variant, const TensorView& cos_sin) {
  if (!b.Wants(VariantName(variant))) return;
  const double bytes = Bytes(shape, tokens, dtype, variant);
  const int64_t pages = (tokens + kPageSize - 1) / kPageSize;
  bench::Tensors tensors(b.device());
  std::mt19937 rng(1);
  std::vector<int32_t> positions(static_cast<size_t>(tokens));
  for (int32_t& position : positions) position = rng() % kMaxPositions;
  std::vector<int64_t> slots(static_cast<size_t>(pages * kPageSize));
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), rng);

  std::vector<QkNormParams> params(b.NumSets(bytes));
  for (QkNormParams& p : params) {
    p.qkv = tensors.Random(dtype, {tokens, shape.qkv_width()});
    p.num_q_heads = shape.num_heads;
    p.num_kv_heads = shape.num_kv_heads;
    p.head_dim = shape.head_dim;
    p.k_offset = int64_t{shape.num_heads} * shape.head_dim;
    p.v_offset = p.k_offset + int64_t{shape.num_kv_heads} * shape.head_dim;
    p.q_weight = tensors.Random(dtype, {shape.head_dim});
    p.k_weight = tensors.Random(dtype, {shape.head_dim});
    p.epsilon = 1e-6f;
    if (variant == Variant::kNorm) continue;
    p.rotary.cos_sin = cos_sin;
    p.rotary.positions = tensors.Of(positions, {tokens});
    p.rotary.rotary_dim = shape.rotary_dim;
    if (variant == Variant::kNormRotary) continue;
    for (TensorView* cache : {&p.cache.k_cache, &p.cache.v_cache}) {
      *cache = tensors.Zeros(
          dtype, {pages, kPageSize, shape.num_kv_heads, shape.head_dim});
    }
    p.cache.slot_mapping = tensors.Of(slots, {tokens});
  }
  bench::Case what = {VariantName(variant), shape.name, tokens, dtype, bytes};
  what.copy_bytes = bytes;
  b.Run(what, static_cast<int>(params.size()),
        [&](int i) { return QkNorm(params[i], b.stream()); });
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  using tenon::Variant;
  tenon::bench::Options options;
  options.copy = true;
  tenon::bench::Bench b(argc, argv, "qk_norm_bench", options);
  for (const auto& shape : b.Shapes()) {
    tenon::bench::Tensors tensors(b.device());
    const tenon::TensorView cos_sin =
        tensors.Of(tenon::CosSinTable(shape.rotary_dim),
                   {tenon::kMaxPositions, shape.rotary_dim});
    for (DType dtype : b.DTypes({DType::kBFloat16})) {
      for (Variant variant :
           {Variant::kNorm, Variant::kNormRotary, Variant::kNormRotaryCache}) {
        for (int64_t tokens :
             b.Tokens({1, 8, 64, 128, 1024, 2048, 4096, 8192, 16384},
                      {1, 8, 64, 128, 1024, 4096})) {
          tenon::RunCase(b, shape, tokens, dtype, variant, cos_sin);
        }
      }
    }
  }
  return b.Finish();
}
