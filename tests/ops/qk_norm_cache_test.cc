#include <gtest/gtest.h>

#include <cmath>

#include "tests/ops/qk_norm_fixture.h"

namespace tenon {
namespace {

using testing::PackedQkNorm;
using testing::QkNormConfig;
using testing::RoundTo;
using testing::TestTensor;

class QkNormCacheTest : public testing::QkNormTest {};

// What the cache must hold: K as it is in qkv after the call, V as before.
TEST_P(QkNormCacheTest, WritesTheCache) {
  for (DType cache_dtype : {dtype(), DType::kFloat8E4M3}) {
    for (const auto& [head_dim, padding, rotary_dim] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{128, 0, 0},
                                                            {128, 0, 128},
                                                            {64, 16, 32},
                                                            {256, 0, 64},
                                                            {128, 3, 64}}) {
      SCOPED_TRACE(StrCat(DTypeName(cache_dtype), " head_dim ", head_dim,
                          " padding ", padding, " rotary_dim ", rotary_dim));
      QkNormConfig c;
      c.tokens = 13;
      c.num_q_heads = 5;
      c.num_kv_heads = 3;
      c.head_dim = head_dim;
      c.gap = 8;
      const PackedQkNorm without = Make(c);
      PackedQkNorm packed = Make(c);
      if (rotary_dim > 0) AddRotary(&packed, rotary_dim);
      QkNormParams norm_only = without.params;
      norm_only.rotary = packed.params.rotary;
      AddCache(&packed, cache_dtype, padding);
      ASSERT_NO_FATAL_FAILURE(Run(norm_only));
      ASSERT_NO_FATAL_FAILURE(Run(packed.params));
      // The write changes nothing of the rest.
      EXPECT_EQ(packed.qkv.Bytes(), without.qkv.Bytes());
      const std::vector<double> values = packed.qkv.Values();
      const auto check = [&](const TestTensor& cache, int64_t offset,
                             float scale) {
        const int64_t width = c.num_kv_heads * head_dim;
        const int64_t num_slots = cache.view().shape[0] * cache.view().shape[1];
        std::vector<double> expected = cache.InitialValues();
        for (int64_t t = 0; t < c.tokens; ++t) {
          const int64_t slot = packed.slot_values[t];
          if (slot < 0 || slot >= num_slots) continue;
          for (int64_t i = 0; i < width; ++i) {
            const float v =
                static_cast<float>(values[t * c.width() + offset + i]);
            expected[slot * width + i] = RoundTo(cache_dtype, v / scale);
          }
        }
        const std::vector<double> actual = cache.Values();
        for (size_t i = 0; i < expected.size(); ++i) {
          ASSERT_EQ(FloatBits(static_cast<float>(actual[i])),
                    FloatBits(static_cast<float>(expected[i])))
              << "element " << i;
        }
        EXPECT_EQ(cache.NumStrayWrites(), 0);
      };
      check(packed.k_cache, c.k_offset(), packed.params.cache.k_scale);
      check(packed.v_cache, c.v_offset(), packed.params.cache.v_scale);
    }
  }
}

// fp8 values saturate, and a NaN stays one.
TEST_P(QkNormCacheTest, Fp8CacheSaturates) {
  QkNormConfig c;
  c.tokens = 1;
  PackedQkNorm packed = Make(c);
  const std::vector<double> initial = packed.qkv.InitialValues();
  std::vector<float> values(initial.begin(), initial.end());
  values[c.v_offset() + 5] = NAN;
  packed.qkv = TestTensor(device(), dtype(), {1, c.width()}, values);
  packed.params.qkv = packed.qkv.view();
  AddCache(&packed, DType::kFloat8E4M3);
  packed.params.cache.k_scale = packed.params.cache.v_scale = 1e-30f;
  ASSERT_NO_FATAL_FAILURE(Run(packed.params));
  const int64_t width = c.num_kv_heads * c.head_dim;
  const int64_t begin = packed.slot_values[0] * width;
  for (const TestTensor* cache : {&packed.k_cache, &packed.v_cache}) {
    const std::vector<double> cached = cache->Values();
    for (int64_t i = 0; i < width; ++i) {
      if (cache == &packed.v_cache && i == 5) {
        EXPECT_TRUE(std::isnan(cached[begin + i]));
      } else {
        EXPECT_EQ(std::fabs(cached[begin + i]), 448.0) << i;
      }
    }
  }
}

// The layout of engines that keep K and V of a page side by side.
TEST_P(QkNormCacheTest, CachesMayInterleave) {
  QkNormConfig c;
  c.tokens = 6;
  PackedQkNorm apart = Make(c);
  AddCache(&apart, dtype());
  const TensorView& view = apart.k_cache.view();
  const TestTensor both(
      device(), dtype(),
      {view.shape[0], 2, view.shape[1] * view.shape[2] * view.shape[3]});
  PackedQkNorm packed = Make(c);
  packed.params.cache = apart.params.cache;
  packed.params.cache.k_cache.data = both.view().data;
  packed.params.cache.k_cache.stride[0] = 2 * view.stride[0];
  packed.params.cache.v_cache = packed.params.cache.k_cache;
  packed.params.cache.v_cache.data =
      both.view().As<char>() +
      view.stride[0] * static_cast<int64_t>(DTypeSize(dtype()));
  ASSERT_NO_FATAL_FAILURE(Run(apart.params));
  ASSERT_NO_FATAL_FAILURE(Run(packed.params));
  const std::vector<double> k = apart.k_cache.Values();
  const std::vector<double> v = apart.v_cache.Values();
  const std::vector<double> actual = both.Values();
  for (size_t i = 0; i < actual.size(); ++i) {
    const size_t page = i / (2 * view.stride[0]);
    const size_t rest = i % (2 * view.stride[0]);
    const bool is_k = rest < static_cast<size_t>(view.stride[0]);
    const double expected = is_k ? k[page * view.stride[0] + rest]
                                 : v[(page - 1) * view.stride[0] + rest];
    ASSERT_TRUE(actual[i] == expected ||
                (std::isnan(actual[i]) && std::isnan(expected)))
        << "element " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, QkNormCacheTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
