// Decode and verification rows: few queries of many sequences.

#include <gtest/gtest.h>

#include <algorithm>

#include "ops/attention/attention_hopper_decode.h"
#include "ops/core/device_info.h"
#include "tests/ops/attention_fixture.h"

namespace tenon {
namespace {

using attention_test::Problem;
using attention_test::Sequence;
using attention_test::Shape;
using testing::Fewer;
using testing::SmallOr;
using testing::TestTensor;

class AttentionDecodeTest : public attention_test::AttentionTest {
 protected:
  // Whether single queries have the same bits in any company, without
  // batch_invariant.
  bool IgnoresTheBatch() const {
    return !OnCuda() || (dtype() != DType::kFloat32 &&
                         GetDeviceInfo(device())->compute_capability == 90);
  }
};

TEST_P(AttentionDecodeTest, ServesEveryGroup) {
  for (int64_t group : Fewer<int64_t>({1, 2, 3, 5, 8, 12, 16, 20, 32, 33}, 4)) {
    for (int64_t head_dim : {64, 128, 256}) {
      for (bool float8_cache : {false, true}) {
        if (!OnCuda() && (group + head_dim / 64 + float8_cache) % 3 != 0) {
          continue;
        }
        SCOPED_TRACE(StrCat("groups of ", group, ", head_dim ", head_dim,
                            float8_cache ? ", fp8" : ""));
        Shape shape;
        shape.num_heads = 2 * group;
        shape.num_kv_heads = 2;
        shape.head_dim = head_dim;
        shape.float8_cache = float8_cache;
        shape.sequences = {{1, 1}, {1, 16}, {1, 17}, {1, 200}, {1, 64}};
        Problem problem(device(), dtype(), shape);
        problem.params().max_query_len = 1;
        ASSERT_NO_FATAL_FAILURE(Check(problem));
      }
    }
  }
}

TEST_P(AttentionDecodeTest, ServesEveryPageSize) {
  for (int64_t page_size :
       Fewer<int64_t>({1, 8, 16, 24, 32, 64, 128, 256}, 4)) {
    for (bool float8_cache : {false, true}) {
      SCOPED_TRACE(page_size);
      Shape shape;
      shape.num_heads = 8;
      shape.num_kv_heads = 2;
      shape.head_dim = 128;
      shape.page_size = page_size;
      shape.float8_cache = float8_cache;
      shape.sequences = {{1, 65}, {1, 300}, {1, 8}, {1, 129}};
      Problem problem(device(), dtype(), shape);
      problem.params().max_query_len = 1;
      ASSERT_NO_FATAL_FAILURE(Check(problem));
    }
  }
}

TEST_P(AttentionDecodeTest, VerifiesSeveralQueries) {
  for (int32_t queries : Fewer<int32_t>({2, 3, 5, 8})) {
    for (bool batch_invariant : {false, true}) {
      for (bool float8_cache : {false, true}) {
        if (!OnCuda() && batch_invariant) continue;
        SCOPED_TRACE(queries);
        Shape shape;
        shape.num_heads = 16;
        shape.num_kv_heads = 2;
        shape.head_dim = 128;
        shape.float8_cache = float8_cache;
        // Fewer cached tokens than queries, and across stages and pages.
        shape.sequences = {{queries, 1},
                           {1, 63},
                           {queries, 66},
                           {0, 0},
                           {queries, 127},
                           {2, 130},
                           {queries, SmallOr(200, 700)},
                           {queries, 64},
                           {queries, SmallOr(257, 1025)}};
        Problem problem(device(), dtype(), shape);
        problem.params().max_query_len = queries;
        problem.params().batch_invariant = batch_invariant;
        ASSERT_NO_FATAL_FAILURE(Check(problem, 3));
      }
    }
  }
}

// As a captured graph has it: bounds of the longest context, rows of padding.
TEST_P(AttentionDecodeTest, ServesAnyLengthBelowTheBound) {
  Shape shape;
  shape.num_heads = 8;
  shape.num_kv_heads = 1;
  shape.head_dim = 128;
  shape.sequences = {{1, 1}, {1, 0}, {1, 1000}, {1, 0}, {1, 70}, {1, 0}};
  shape.uncovered_tokens = 3;
  Problem problem(device(), dtype(), shape);
  const TestTensor table =
      TestTensor::FromIntegers(device(), DType::kInt32, {6, 8192}, [&] {
        std::vector<int64_t> wide(6 * 8192, -1);
        const int64_t max_pages = problem.params().block_table.shape[1];
        const std::vector<int64_t> narrow = problem.TableEntries();
        for (int64_t s = 0; s < 6; ++s) {
          std::copy_n(&narrow[s * max_pages], max_pages, &wide[s * 8192]);
        }
        return wide;
      }());
  problem.params().block_table = table.view();
  problem.params().max_query_len = 1;
  problem.params().max_kv_len = 0;
  ASSERT_NO_FATAL_FAILURE(Check(problem));
}

TEST_P(AttentionDecodeTest, SingleQueryHasTheSameBitsInAnyCompany) {
  if (!IgnoresTheBatch()) GTEST_SKIP() << "only with batch_invariant";
  // On Hopper, two teams of warps to a block, and two blocks to an SM.
  const std::vector<int> counts =
      OnCuda() ? std::vector<int>{24, 36} : std::vector<int>{9};
  for (int kind = 0; kind < 2 * static_cast<int>(counts.size()); ++kind) {
    const bool float8_cache = kind % 2 != 0;
    const int count = counts[kind / 2];
    SCOPED_TRACE(StrCat(count, float8_cache ? ", fp8" : ""));
    Shape shape;
    shape.num_heads = 16;
    shape.num_kv_heads = 2;
    shape.head_dim = 128;
    shape.float8_cache = float8_cache;
    const int64_t width = 16 * 128;
    for (int i = 0; i < count; ++i) {
      shape.sequences.push_back({1, 1 + i * 177 % SmallOr(150, 1500)});
    }
    Problem batch(device(), dtype(), shape);
    batch.params().max_query_len = 1;
    const std::vector<double> of_batch = RowsOf(batch, 0, count);
    for (int i = 0; i < count; i += OnCuda() ? SmallOr(23, 7) : 4) {
      SCOPED_TRACE(i);
      AttentionParams p = batch.params();
      const TestTensor start =
          TestTensor::FromIntegers(device(), DType::kInt32, {2}, {0, 1});
      const TestTensor out(device(), dtype(), {1, 16, 128});
      p.q = Rows(p.q, i, 1);
      p.out = out.view();
      p.block_table = Rows(p.block_table, i, 1);
      p.query_start = start.view();
      p.kv_len = Rows(p.kv_len, i, 1);
      for (bool early_reads : {false, true}) {
        p.early_reads = early_reads;
        ASSERT_TRUE(Attention(p, stream()).ok());
        Finish();
        const std::vector<double> alone = out.Values();
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(),
                               of_batch.begin() + i * width));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionDecodeTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

// ---------------------------------------------------------------------------
// The choices for Hopper
// ---------------------------------------------------------------------------

AttentionParams ShapeOnly(int64_t num_seqs, int32_t queries,
                          int64_t num_kv_heads = 4) {
  const Device device = {DeviceType::kCuda, 0};
  const int64_t tokens = num_seqs * queries;
  AttentionParams p;
  p.q = p.out = MakeTensor(nullptr, DType::kBFloat16, device,
                           {tokens, 8 * num_kv_heads, 128});
  p.k_cache = p.v_cache = MakeTensor(nullptr, DType::kBFloat16, device,
                                     {4096, 16, num_kv_heads, 128});
  p.block_table = MakeTensor(nullptr, DType::kInt32, device, {num_seqs, 64});
  p.query_start = MakeTensor(nullptr, DType::kInt32, device, {num_seqs + 1});
  p.kv_len = MakeTensor(nullptr, DType::kInt32, device, {num_seqs});
  p.scale = 1.0f;
  p.max_query_len = queries;
  return p;
}

HopperDecodePlan PlanOf(const AttentionParams& p) {
  return PlanHopperDecode(p, PlanAttention(p));
}

TEST(AttentionHopperDecodeTest, ClustersFillTheGpuOnce) {
  struct Expected {
    int64_t num_seqs;
    int32_t blocks;
    int32_t teams;
  };
  for (const Expected& e : std::vector<Expected>{{1, 16, 1},
                                                 {2, 16, 1},
                                                 {4, 8, 1},
                                                 {8, 4, 1},
                                                 {9, 2, 2},
                                                 {16, 2, 2},
                                                 {17, 2, 1},
                                                 {32, 2, 1},
                                                 {64, 2, 1},
                                                 {500, 2, 1}}) {
    const HopperDecodePlan plan = PlanOf(ShapeOnly(e.num_seqs, 1));
    EXPECT_EQ(plan.cluster_blocks, e.blocks) << e.num_seqs;
    EXPECT_EQ(plan.teams, e.teams) << e.num_seqs;
  }
  EXPECT_EQ(PlanOf(ShapeOnly(8, 1, 1)).cluster_blocks, 16);
}

TEST(AttentionHopperDecodeTest, TilesHoldEveryQuery) {
  for (int32_t queries = 1; queries <= 40; ++queries) {
    for (bool batch_invariant : {false, true}) {
      if (queries > kMaxDecodeQueries && !batch_invariant) continue;
      AttentionParams p = ShapeOnly(3, queries);
      p.batch_invariant = batch_invariant;
      const HopperDecodePlan plan = PlanOf(p);
      EXPECT_LE(plan.queries_per_tile * 8, kDecodeRows);
      if (!plan.aligned) {
        EXPECT_GE(plan.tiles_per_seq * plan.queries_per_tile, queries);
        continue;
      }
      // Wherever its first query is, a sequence ends before the next begins.
      const int32_t per_tile = plan.queries_per_tile;
      for (int32_t into = 0; into < per_tile; ++into) {
        const int64_t tiles = (into + queries + per_tile - 1) / per_tile;
        for (int64_t before : {0, 1, 7, 8, 101}) {
          EXPECT_LE(AlignedTileStart(before, 2, per_tile) + tiles,
                    AlignedTileStart(before + queries, 3, per_tile));
        }
      }
    }
  }
}

TEST(AttentionHopperDecodeTest, RefusesWhatItCannotServe) {
  const auto can = [](auto&& change) {
    AttentionParams p = ShapeOnly(8, 1);
    change(p);
    return CanUseHopperDecode(p, PlanAttention(p));
  };
  using P = AttentionParams;
  EXPECT_TRUE(can([](P&) {}));
  EXPECT_TRUE(can(
      [](P& p) { p.k_cache.dtype = p.v_cache.dtype = DType::kFloat8E4M3; }));
  EXPECT_FALSE(can([](P& p) { p.q.dtype = p.out.dtype = DType::kFloat32; }));
  EXPECT_FALSE(can([](P& p) { p.q.stride[1] = 132; }));
  EXPECT_FALSE(can([](P& p) { p.k_cache.shape[1] = 4; }));
  EXPECT_FALSE(can([](P& p) { p.k_cache.shape[1] = 48; }));
  EXPECT_FALSE(can([](P& p) { p.k_cache.shape[0] = 0; }));
  EXPECT_FALSE(can([](P& p) { p.v_cache.stride[0] = 0; }));
  EXPECT_FALSE(can([](P& p) { p.block_table.shape[0] = 0; }));
  EXPECT_FALSE(can([](P& p) { p.q.shape[1] = 17 * 4; }));
}

}  // namespace
}  // namespace tenon
