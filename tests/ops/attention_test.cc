#include "ops/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ops/attention/attention_config.h"
#include "tests/ops/attention_fixture.h"
#include "tests/testing/shapes.h"

namespace tenon {
namespace {

using attention_test::Problem;
using attention_test::Shape;
using testing::Fewer;
using testing::SmallOr;
using testing::TestTensor;

using AttentionTest = attention_test::AttentionTest;

TEST_P(AttentionTest, MatchesReferenceForHeadsAndPages) {
  struct Heads {
    int64_t heads, kv_heads;
  };
  // 12 heads to a KV head are GLM's; 20 are more than one tile of 16.
  for (const Heads& heads : Fewer<Heads>(
           {{1, 1}, {4, 2}, {8, 2}, {8, 1}, {16, 1}, {24, 2}, {20, 1}}, 3)) {
    for (int64_t head_dim : {64, 128, 256}) {
      for (int64_t page_size : Fewer<int64_t>({1, 13, 16, 64})) {
        if (!OnCuda() && (head_dim + heads.heads + page_size) % 3 != 0) {
          continue;  // a third of the product is enough for its one kernel
        }
        SCOPED_TRACE(StrCat(heads.heads, "/", heads.kv_heads, "/", head_dim,
                            " pages of ", page_size));
        Shape shape;
        shape.num_heads = heads.heads;
        shape.num_kv_heads = heads.kv_heads;
        shape.head_dim = head_dim;
        shape.page_size = page_size;
        shape.sequences = {{1, 70}, {1, 1}, {11, 43}, {3, 3}, {1, 16}};
        Problem problem(device(), dtype(), shape);
        ASSERT_NO_FATAL_FAILURE(Check(problem));
      }
    }
  }
}

TEST_P(AttentionTest, MatchesReferenceForContextLengths) {
  // Around a tile, a part of either backend, and several parts.
  std::vector<int32_t> lengths = {1, 13, 511, 512, 513, 1000, 4097};
  if (OnCuda()) {
    lengths.insert(lengths.end(), {63, 64, 65, 255, 256, 257, 2049});
  }
  for (int32_t length : Fewer(lengths, 4)) {
    if (length > SmallOr(1100, 5000)) continue;
    for (int32_t queries : {1, 2, 19}) {
      if (queries > length || (!OnCuda() && queries == 2)) continue;
      SCOPED_TRACE(StrCat(queries, " queries of ", length));
      Shape shape;
      shape.num_heads = length > 1000 ? 2 : 8;
      shape.num_kv_heads = length > 1000 ? 1 : 2;
      shape.head_dim = length > 1000 ? 64 : 128;
      shape.sequences = {{queries, length}};
      Problem problem(device(), dtype(), shape);
      problem.params().max_query_len = queries;
      ASSERT_NO_FATAL_FAILURE(Check(problem, queries > 2 ? 6 : 1));
      if (!OnCuda()) continue;
      problem.params().batch_invariant = true;
      ASSERT_NO_FATAL_FAILURE(Check(problem, queries > 2 ? 6 : 1));
    }
  }
}

TEST_P(AttentionTest, MixesDecodeAndPrefill) {
  Shape shape;
  shape.num_heads = SmallOr(4, 8);
  shape.num_kv_heads = 1;
  // Empty sequences in the middle and at the ends, unused tokens behind.
  shape.sequences = {{0, 0}, {1, 300}, {0, 5}, {70, 70}, {8, 90},    {9, 9},
                     {0, 0}, {33, 97}, {1, 1}, {2, 600}, {129, 140}, {0, 77}};
  shape.uncovered_tokens = 5;
  for (bool float8_cache : {false, true}) {
    for (int32_t max_query_len : Fewer<int32_t>({0, 129}, 1)) {
      for (bool batch_invariant : {false, true}) {
        shape.float8_cache = float8_cache;
        Problem problem(device(), dtype(), shape);
        problem.params().max_query_len = max_query_len;
        problem.params().max_kv_len = 600;
        problem.params().batch_invariant = batch_invariant;
        ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 1 : 3));
      }
      if (!OnCuda()) break;
    }
  }
}

TEST_P(AttentionTest, DecodesABatch) {
  Shape shape;
  shape.num_heads = 8;
  shape.num_kv_heads = 1;
  for (int i = 0; i < 37; ++i) shape.sequences.push_back({1, 1 + 29 * i});
  for (bool batch_invariant : {false, true}) {
    if (batch_invariant && !OnCuda()) break;
    Problem problem(device(), dtype(), shape);
    problem.params().max_query_len = 1;
    problem.params().batch_invariant = batch_invariant;
    ASSERT_NO_FATAL_FAILURE(Check(problem));
  }
}

TEST_P(AttentionTest, ReadsFloat8Caches) {
  for (int64_t head_dim : {64, 128, 256}) {
    for (int64_t page_size : {16, 13}) {
      Shape shape;
      shape.num_heads = 8;
      shape.num_kv_heads = 2;
      shape.head_dim = head_dim;
      shape.page_size = page_size;
      shape.float8_cache = true;
      shape.sequences = {{1, 270}, {17, 100}, {1, 7}, {4, 65}};
      SCOPED_TRACE(StrCat(head_dim, " pages of ", page_size));
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem));
    }
  }
}

TEST_P(AttentionTest, WorksInPlaceInsidePackedRows) {
  for (int32_t queries : {1, 40}) {
    Shape shape;
    shape.num_heads = 6;
    shape.num_kv_heads = 2;
    shape.head_dim = 128;
    shape.packed = true;
    shape.sequences = {{queries, 300}, {1, 130}};
    Problem problem(device(), dtype(), shape);
    ASSERT_NO_FATAL_FAILURE(Check(problem, 5));
  }
}

// Views that cannot be read 16 bytes at a time.
TEST_P(AttentionTest, WorksOnUnalignedViews) {
  Shape shape;
  shape.num_heads = 4;
  shape.num_kv_heads = 2;
  shape.sequences = {{1, 70}, {12, 30}, {0, 1}, {2, 2}};
  shape.uncovered_tokens = 2;
  Problem problem(device(), dtype(), shape);
  AttentionParams& p = problem.params();
  const TestTensor out(device(), dtype(), {17, 4, 64}, {4 * 65, 65, 1}, {});
  p.out = out.view();
  ASSERT_TRUE(problem.Run(stream()).ok());
  Finish();
  EXPECT_EQ(out.NumStrayWrites(), 0);
  problem.PrepareReference();
  const std::vector<double> values = out.Values();
  for (int64_t token = 0; token < problem.tokens(); ++token) {
    const std::vector<double> expected = problem.Expected(token);
    for (int64_t i = 0; i < 256; ++i) {
      ASSERT_NEAR(values[token * 256 + i], expected[i],
                  MaxError(problem, expected[i]));
    }
  }
}

// A query's bits: alone, or in a chunk with the others of its sequence, amid
// other sequences, on one thread or more.
TEST_P(AttentionTest, BatchInvariantQueryIsTheSameAloneAndInAChunk) {
  Shape shape;
  shape.num_heads = 8;
  shape.num_kv_heads = 2;
  shape.head_dim = 128;
  const int32_t length = SmallOr(300, 700);
  shape.sequences = {{21, length}};
  Problem chunk(device(), dtype(), shape);
  chunk.params().batch_invariant = true;
  const std::vector<double> of_chunk = RowsOf(chunk, 0, 21);
  const int64_t width = 8 * 128;
  for (int32_t query : Fewer<int32_t>({0, 1, 7, 20})) {
    SCOPED_TRACE(query);
    // The same memory, described as a decode row.
    TestTensor start =
        TestTensor::FromIntegers(device(), DType::kInt32, {2}, {0, 1});
    TestTensor kv_len = TestTensor::FromIntegers(device(), DType::kInt32, {1},
                                                 {length - 21 + query + 1});
    TestTensor out(device(), dtype(), {1, 8, 128});
    AttentionParams p = chunk.params();
    p.q = Rows(p.q, query, 1);
    p.out = out.view();
    p.query_start = start.view();
    p.kv_len = kv_len.view();
    p.max_query_len = 1;
    p.max_kv_len = length;
    for (Stream s : {stream(), Stream{stream().cuda, nullptr}}) {
      ASSERT_TRUE(Attention(p, s).ok());
      Finish();
      const std::vector<double> alone = out.Values();
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(),
                             of_chunk.begin() + query * width));
    }
  }
}

TEST_P(AttentionTest, SequenceDoesNotDependOnTheOthers) {
  Shape shape;
  shape.num_heads = 4;
  shape.num_kv_heads = 2;
  for (int32_t queries : {1, 5, 30}) {
    shape.sequences = {{3, 40}, {queries, 333}, {12, 12}, {1, 77}};
    Problem problem(device(), dtype(), shape);
    problem.params().max_kv_len = 1000;
    const std::vector<double> before = RowsOf(problem, 3, queries);
    // The others' queries become NaN, and one of them longer than it is.
    TestTensor q(device(), dtype(), {problem.tokens(), 4, 64});
    const Status status = CopyMemory(
        Rows(q.view(), 3, queries).data, device(),
        Rows(problem.q().view(), 3, queries).data, device(),
        static_cast<size_t>(queries) * 4 * 64 * DTypeSize(dtype()), stream());
    ASSERT_TRUE(status.ok());
    problem.params().q = q.view();
    EXPECT_EQ(RowsOf(problem, 3, queries), before);
  }
}

TEST_P(AttentionTest, SameCallGivesTheSameBits) {
  Shape shape;
  shape.num_heads = 8;
  shape.num_kv_heads = 1;
  shape.sequences = {{1, 1500}, {40, 200}, {1, 3}};
  Problem problem(device(), dtype(), shape);
  const std::vector<uint8_t> first = OutBytes(problem);
  EXPECT_EQ(OutBytes(problem), first);
}

TEST_P(AttentionTest, ServesMoreThanOnePass) {
  // Few splits of a long bound need more workspace than a pass has.
  Shape shape;
  shape.num_heads = 64;
  shape.num_kv_heads = 1;
  shape.sequences = {
      {0, 0}, {1, 100}, {OnCuda() ? SmallOr(130, 300) : 60, SmallOr(140, 310)}};
  Problem problem(device(), dtype(), shape);
  problem.params().batch_invariant = true;
  TestTensor table =
      TestTensor::FromIntegers(device(), DType::kInt32, {3, 4096}, [&] {
        std::vector<int64_t> wide(3 * 4096, 0);
        const int64_t max_pages = problem.params().block_table.shape[1];
        const std::vector<int64_t> narrow = problem.TableEntries();
        for (int64_t s = 0; s < 3; ++s) {
          std::copy_n(&narrow[s * max_pages], max_pages, &wide[s * 4096]);
        }
        return wide;
      }());
  problem.params().block_table = table.view();
  const AttentionPlan plan = PlanAttention(problem.params());
  EXPECT_LT(plan.rows_per_pass, plan.num_rows);
  ASSERT_NO_FATAL_FAILURE(Check(problem, 13));
}

TEST_P(AttentionTest, ServesTheShapesOfTheModels) {
  if (!OnCuda()) GTEST_SKIP() << "the reference is slow at these shapes";
  const std::vector<testing::ModelShape> models(
      std::begin(testing::kModelShapes), std::end(testing::kModelShapes));
  for (const testing::ModelShape& model : Fewer(models)) {
    SCOPED_TRACE(model.name);
    Shape shape;
    shape.num_heads = model.num_heads;
    shape.num_kv_heads = model.num_kv_heads;
    shape.head_dim = model.head_dim;
    shape.page_size = 64;
    shape.sequences = {{1, SmallOr(513, 4097)},
                       {SmallOr(40, 512), SmallOr(120, 1000)},
                       {1, SmallOr(128, 1024)},
                       {4, SmallOr(300, 2000)}};
    Problem problem(device(), dtype(), shape);
    ASSERT_NO_FATAL_FAILURE(Check(problem, 101));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
