#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "ops/attention/attention.h"
#include "tests/ops/attention_fixture.h"

// Sequences with many queries: tiles of rows, tiles of keys, and their edges.

namespace tenon {
namespace {

using attention_test::Problem;
using attention_test::Sequence;
using attention_test::Shape;
using testing::TestTensor;

using AttentionPrefillTest = attention_test::AttentionTest;

// Around the ends of tiles of 64 and 128 keys, and of tiles of rows.
TEST_P(AttentionPrefillTest, MatchesReferenceAtTheEdgesOfTiles) {
  std::vector<Sequence> sequences;
  for (int32_t length : {63, 64, 65, 127, 128, 129, 257}) {
    for (int32_t queries : {9, 16, 17, 64, 128}) {
      if (queries <= length) sequences.push_back({queries, length});
    }
  }
  for (int64_t head_dim : {64, 128}) {
    for (int64_t page_size : {16, 64}) {
      if (!OnCuda() && (head_dim == 128) == (page_size == 64)) continue;
      SCOPED_TRACE(StrCat(head_dim, " pages of ", page_size));
      Shape shape;
      shape.num_heads = OnCuda() ? 8 : 2;
      shape.num_kv_heads = 1;
      shape.head_dim = head_dim;
      shape.page_size = page_size;
      shape.sequences = sequences;
      shape.uncovered_tokens = 3;
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 61 : 41));
    }
  }
}

// Pages from a few keys to more than a tile; some need other kernels.
TEST_P(AttentionPrefillTest, MatchesReferenceForPageSizes) {
  for (int64_t page_size : {8, 20, 24, 32, 48, 96, 128, 256, 384}) {
    if (!OnCuda() && page_size % 5 != 0) continue;
    for (bool heads_outside : {false, true}) {
      for (int64_t head_padding : {0, 8, 64}) {
        if (page_size % 16 == 0 && page_size > 32 && head_padding > 0) continue;
        SCOPED_TRACE(StrCat("pages of ", page_size, ", heads outside ",
                            heads_outside, ", padding ", head_padding));
        Shape shape;
        shape.num_heads = 8;
        shape.num_kv_heads = 2;
        shape.head_dim = head_padding == 8 ? 64 : 128;
        shape.page_size = page_size;
        shape.heads_outside = heads_outside;
        shape.head_padding = head_padding;
        shape.sequences = {{37, 300}, {1, 50}, {20, 20}, {130, 515}};
        Problem problem(device(), dtype(), shape);
        ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 29 : 37));
      }
    }
  }
}

TEST_P(AttentionPrefillTest, MatchesReferenceForGroups) {
  for (int64_t group : {1, 2, 3, 5, 8, 12, 33}) {
    for (int64_t head_dim : {64, 128}) {
      if (!OnCuda() && (group > 3 || head_dim > 64)) continue;
      SCOPED_TRACE(StrCat(group, " heads of ", head_dim));
      Shape shape;
      shape.num_heads = 2 * group;
      shape.num_kv_heads = 2;
      shape.head_dim = head_dim;
      shape.sequences = {{200, 333}, {9, 140}, {70, 70}};
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 43 : 7));
    }
  }
}

// Short sequences too are served where a call has one alone.
TEST_P(AttentionPrefillTest, ServesOneSequenceOfAnyLength) {
  for (const Sequence& s : std::vector<Sequence>{
           {1, 1}, {1, 300}, {8, 200}, {0, 7}, {3, 2}, {40, 1000}, {30, 12}}) {
    SCOPED_TRACE(StrCat(s.queries, " of ", s.kv_len));
    Shape shape;
    shape.num_heads = 8;
    shape.num_kv_heads = 2;
    shape.head_dim = 128;
    shape.sequences = {s};
    shape.uncovered_tokens = 12;
    Problem problem(device(), dtype(), shape);
    ASSERT_NO_FATAL_FAILURE(Check(problem));
  }
}

// More tiles than a GPU has blocks: each goes through several.
TEST_P(AttentionPrefillTest, ServesALongPrompt) {
  if (!OnCuda()) GTEST_SKIP() << "the reference is slow at this size";
  for (int64_t head_dim : {64, 128}) {
    for (int32_t context : {0, 777}) {
      SCOPED_TRACE(StrCat(head_dim, " after ", context));
      Shape shape;
      shape.num_heads = 32;
      shape.num_kv_heads = 4;
      shape.head_dim = head_dim;
      shape.sequences = {{1111, 1111 + context}};
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem, 211));
    }
  }
}

// A prompt in one call, or in chunks of whatever length (of more queries than
// are served one by one).
TEST_P(AttentionPrefillTest, ChunksGiveTheSameBits) {
  if (OnCuda() && dtype() == DType::kFloat32) {
    GTEST_SKIP() << "no tiles: a context is cut by the queries of the call";
  }
  constexpr int32_t kContext = 150;
  constexpr int32_t kQueries = 250;
  for (int64_t head_dim : {64, 128}) {
    Shape shape;
    shape.num_heads = OnCuda() ? 8 : 2;
    shape.num_kv_heads = OnCuda() ? 2 : 1;
    shape.head_dim = head_dim;
    shape.sequences = {{kQueries, kContext + kQueries}};
    Problem whole(device(), dtype(), shape);
    const std::vector<double> expected = RowsOf(whole, 0, kQueries);
    const int64_t width = shape.num_heads * head_dim;
    int32_t first = 0;
    for (int32_t count : {9, 16, 100, 31, 94}) {
      SCOPED_TRACE(StrCat("queries ", first, " to ", first + count - 1));
      TestTensor start =
          TestTensor::FromIntegers(device(), DType::kInt32, {2}, {0, count});
      TestTensor length = TestTensor::FromIntegers(device(), DType::kInt32, {1},
                                                   {kContext + first + count});
      TestTensor out(device(), dtype(),
                     {count, shape.num_heads, shape.head_dim});
      AttentionParams p = whole.params();
      p.q = Rows(p.q, first, count);
      p.out = out.view();
      p.query_start = start.view();
      p.kv_len = length.view();
      ASSERT_TRUE(Attention(p, stream()).ok());
      Finish();
      const std::vector<double> chunk = out.Values();
      EXPECT_TRUE(std::equal(chunk.begin(), chunk.end(),
                             expected.begin() + first * width));
      first += count;
    }
  }
}

// A key or a value that is not a number shows in all queries that attend to it;
// those far before it do not see it.
TEST_P(AttentionPrefillTest, NanInTheCacheShows) {
  for (bool in_value : {false, true}) {
    Shape shape;
    shape.num_heads = 4;
    shape.num_kv_heads = 1;
    shape.head_dim = 128;
    shape.page_size = 64;
    shape.sequences = {{400, 400}};
    Problem problem(device(), dtype(), shape);
    AttentionParams& p = problem.params();
    const TestTensor& cache = in_value ? problem.v() : problem.k();
    // Position 300: the 44th slot of the page of that sequence.
    const int64_t slot = problem.TableEntries()[300 / 64] * 64 + 300 % 64;
    std::vector<float> values;
    for (double value : cache.Values()) {
      values.push_back(static_cast<float>(value));
    }
    values[slot * 128 + 5] = NAN;
    TestTensor with_nan(device(), dtype(), {cache.view().shape[0], 64, 1, 128},
                        values);
    (in_value ? p.v_cache : p.k_cache) = with_nan.view();
    const std::vector<double> out = RowsOf(problem, 0, 400);
    for (int64_t token : {0, 127, 250, 300, 301, 399}) {
      for (int64_t i = 0; i < 4 * 128; ++i) {
        if (in_value && i % 128 != 5) continue;  // other elements are numbers
        if (token == 250 && in_value) continue;  // shares a tile with it
        ASSERT_EQ(std::isnan(out[token * 4 * 128 + i]), token >= 300)
            << token << " " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionPrefillTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
