#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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

// fp8 values saturate, zeros keep their sign, a NaN stays one, whatever the
// scale; the largest and smallest ones are divided by in another way.
TEST_P(QkNormCacheTest, Fp8CacheDivides) {
  for (float scale : {1e-30f, 1e-20f, 0.0049f, 1.0f, 3.0f, 1e20f, 1e30f}) {
    SCOPED_TRACE(StrCat("scale ", scale));
    QkNormConfig c;
    c.tokens = 1;
    PackedQkNorm packed = Make(c);
    const std::vector<double> initial = packed.qkv.InitialValues();
    std::vector<float> values(initial.begin(), initial.end());
    const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, -1e-7f};
    std::copy(std::begin(special), std::end(special),
              values.begin() + c.v_offset());
    // Quotients of the scales above that lie half way between fp8 values.
    for (int i = 16; i < 64; ++i) {
      values[c.v_offset() + i] = scale * (i - 0.5f) / 4.0f;
    }
    packed.qkv = TestTensor(device(), dtype(), {1, c.width()}, values);
    packed.params.qkv = packed.qkv.view();
    AddCache(&packed, DType::kFloat8E4M3);
    packed.params.cache.k_scale = packed.params.cache.v_scale = scale;
    ASSERT_NO_FATAL_FAILURE(Run(packed.params));
    const std::vector<double> result = packed.qkv.Values();
    const int64_t width = c.num_kv_heads * c.head_dim;
    const int64_t begin = packed.slot_values[0] * width;
    for (const auto& [cache, offset] :
         {std::pair(&packed.k_cache, c.k_offset()),
          std::pair(&packed.v_cache, c.v_offset())}) {
      const std::vector<double> cached = cache->Values();
      for (int64_t i = 0; i < width; ++i) {
        const float v = static_cast<float>(result[offset + i]);
        const double expected = RoundTo(DType::kFloat8E4M3, v / scale);
        ASSERT_EQ(FloatBits(static_cast<float>(cached[begin + i])),
                  FloatBits(static_cast<float>(expected)))
            << "element " << i << ", value " << v;
      }
    }
  }
}

// Many tokens are laid out in another way than few: several to a tile, several
// steps to a warp, tiles in two dimensions of the grid.
TEST_P(QkNormCacheTest, ManyTokensEqualFew) {
  struct Case {
    QkNormConfig config;
    int64_t rotary_dim;
    DType cache_dtype;
  };
  std::vector<Case> cases;
  const bool cuda = device().type == DeviceType::kCuda;
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    for (DType cache_dtype : {dtype(), DType::kFloat8E4M3}) {
      cases.push_back(
          {FromShape(shape, cuda ? 1031 : 67), shape.rotary_dim, cache_dtype});
    }
  }
  if (cuda) {
    QkNormConfig c;
    c.tokens = 100003;
    c.num_q_heads = 1;
    c.num_kv_heads = 3;
    c.head_dim = 64;
    cases.push_back({c, 32, DType::kFloat8E4M3});
  }
  for (auto& [c, rotary_dim, cache_dtype] : cases) {
    SCOPED_TRACE(StrCat("tokens ", c.tokens, " q heads ", c.num_q_heads, " ",
                        DTypeName(cache_dtype)));
    c.distinct_rows = std::min<int64_t>(c.tokens, 61);
    PackedQkNorm many = Make(c);
    PackedQkNorm few = Make(c);
    for (PackedQkNorm* packed : {&many, &few}) {
      AddRotary(packed, rotary_dim);
      AddCache(packed, cache_dtype);
    }
    ASSERT_NO_FATAL_FAILURE(Run(many.params));
    std::vector<int64_t> tokens;   // to compare
    constexpr int64_t kCount = 7;  // in slices that are apart
    for (int64_t first :
         {int64_t{0}, c.tokens / 3, std::min<int64_t>(65530, c.tokens * 2 / 3),
          c.tokens - kCount}) {
      QkNormParams p = few.params;
      p.qkv = Rows(p.qkv, first, kCount);
      p.rotary.positions = Rows(p.rotary.positions, first, kCount);
      p.cache.slot_mapping = Rows(p.cache.slot_mapping, first, kCount);
      ASSERT_NO_FATAL_FAILURE(Run(p));
      for (int64_t t = first; t < first + kCount; ++t) tokens.push_back(t);
    }
    const auto expect_equal = [&](const TestTensor& a, const TestTensor& b,
                                  int64_t row_size, bool is_cache) {
      const std::vector<uint8_t> x = a.Bytes();
      const std::vector<uint8_t> y = b.Bytes();
      for (int64_t t : tokens) {
        if (is_cache && t % 2 == 1) continue;  // not written
        const int64_t row = is_cache ? many.slot_values[t] : t;
        const int64_t begin = testing::kGuardBytes + row * row_size;
        EXPECT_EQ(std::memcmp(&x[begin], &y[begin], row_size), 0)
            << "token " << t;
      }
    };
    const int64_t slot_size = c.num_kv_heads * c.head_dim *
                              static_cast<int64_t>(DTypeSize(cache_dtype));
    expect_equal(many.qkv, few.qkv,
                 c.width() * static_cast<int64_t>(DTypeSize(dtype())), false);
    expect_equal(many.k_cache, few.k_cache, slot_size, true);
    expect_equal(many.v_cache, few.v_cache, slot_size, true);
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
