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
using testing::Fewer;
using testing::SmallOr;
using testing::TestTensor;

class AttentionPrefillTest : public attention_test::AttentionTest {
 protected:
  // Whether many queries are too slow for a small test: without tensor cores.
  bool IsTooSlow() const {
    return testing::SmallTests() && dtype() == DType::kFloat32;
  }
};

struct HeadAndCache {
  int64_t head_dim;
  bool float8_cache;
};
std::vector<HeadAndCache> HeadsAndCaches() {
  return {{64, false}, {128, false}, {128, true}};
}

// Around the ends of tiles of 64 and 128 keys, and of tiles of rows.
TEST_P(AttentionPrefillTest, MatchesReferenceAtTheEdgesOfTiles) {
  std::vector<Sequence> sequences;
  for (int32_t length : {63, 64, 65, 127, 128, 129, 257}) {
    for (int32_t queries : {9, 16, 17, 64, 128}) {
      if (queries <= length) sequences.push_back({queries, length});
    }
  }
  for (const auto [head_dim, float8_cache] : HeadsAndCaches()) {
    for (int64_t page_size : {16, 64}) {
      if (!OnCuda() && (head_dim == 128) == (page_size == 64)) continue;
      SCOPED_TRACE(StrCat(head_dim, " pages of ", page_size,
                          float8_cache ? ", fp8" : ""));
      Shape shape;
      shape.num_heads = OnCuda() ? 8 : 2;
      shape.num_kv_heads = 1;
      shape.head_dim = head_dim;
      shape.page_size = page_size;
      shape.float8_cache = float8_cache;
      shape.sequences = Fewer(sequences, 8);
      shape.uncovered_tokens = 3;
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 61 : 41));
    }
  }
}

// Pages from a few keys to more than a tile; some need other kernels.
TEST_P(AttentionPrefillTest, MatchesReferenceForPageSizes) {
  for (int64_t page_size :
       Fewer<int64_t>({8, 20, 24, 32, 48, 96, 128, 256, 384})) {
    if (!OnCuda() && page_size % 5 != 0 && !testing::SmallTests()) continue;
    for (bool heads_outside : {false, true}) {
      for (int64_t head_padding : Fewer<int64_t>({0, 8, 64, 128})) {
        if (page_size % 16 == 0 && page_size > 32 && head_padding > 0) continue;
        if (!OnCuda() && head_padding == 128) continue;
        for (bool float8_cache : {false, true}) {
          SCOPED_TRACE(StrCat("pages of ", page_size, ", heads outside ",
                              heads_outside, ", padding ", head_padding,
                              float8_cache ? ", fp8" : ""));
          Shape shape;
          shape.num_heads = SmallOr(4, 8);
          shape.num_kv_heads = 2;
          shape.head_dim = head_padding == 8 ? 64 : 128;
          shape.page_size = page_size;
          shape.float8_cache = float8_cache;
          shape.heads_outside = heads_outside;
          shape.head_padding = head_padding;
          shape.sequences = {{37, SmallOr(100, 300)},
                             {1, 50},
                             {20, 20},
                             {SmallOr(40, 130), SmallOr(200, 515)}};
          Problem problem(device(), dtype(), shape);
          ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 29 : 37));
        }
      }
    }
  }
}

TEST_P(AttentionPrefillTest, MatchesReferenceForGroups) {
  for (int64_t group : Fewer<int64_t>({1, 2, 3, 5, 8, 12, 33}, 3)) {
    for (const auto [head_dim, float8_cache] : HeadsAndCaches()) {
      if (!OnCuda() && (group > 3 || head_dim > 64)) continue;
      if (group > 5 && IsTooSlow()) continue;
      SCOPED_TRACE(
          StrCat(group, " heads of ", head_dim, float8_cache ? ", fp8" : ""));
      Shape shape;
      shape.num_heads = 2 * group;
      shape.num_kv_heads = 2;
      shape.head_dim = head_dim;
      shape.float8_cache = float8_cache;
      shape.sequences = {
          {SmallOr(100, 200), SmallOr(150, 333)}, {9, 140}, {70, 70}};
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem, OnCuda() ? 43 : 7));
    }
  }
}

// Short sequences too are served where a call has one alone.
TEST_P(AttentionPrefillTest, ServesOneSequenceOfAnyLength) {
  for (const Sequence& s : std::vector<Sequence>{{1, 1},
                                                 {1, 300},
                                                 {8, 200},
                                                 {0, 7},
                                                 {3, 2},
                                                 {40, SmallOr(300, 1000)},
                                                 {30, 12}}) {
    for (bool float8_cache : {false, true}) {
      SCOPED_TRACE(
          StrCat(s.queries, " of ", s.kv_len, float8_cache ? ", fp8" : ""));
      Shape shape;
      shape.num_heads = 8;
      shape.num_kv_heads = 2;
      shape.head_dim = 128;
      shape.float8_cache = float8_cache;
      shape.sequences = {s};
      shape.uncovered_tokens = 12;
      Problem problem(device(), dtype(), shape);
      ASSERT_NO_FATAL_FAILURE(Check(problem));
    }
  }
}

// Sequences and tokens that have no keys, among some that do, as tiles of one
// block one after the other.
TEST_P(AttentionPrefillTest, ServesTilesWithoutKeys) {
  if (!OnCuda()) GTEST_SKIP() << "blocks go through tiles on CUDA alone";
  if (IsTooSlow()) GTEST_SKIP() << "float32 has no tiles";
  for (bool float8_cache : {false, true}) {
    SCOPED_TRACE(float8_cache ? "fp8" : "");
    Shape shape;
    shape.num_heads = 32;
    shape.num_kv_heads = 4;
    shape.head_dim = 128;
    shape.float8_cache = float8_cache;
    const int count = SmallOr(10, 60);
    for (int i = 0; i < count; ++i) {
      shape.sequences.push_back({40, i % 3 == 0 ? 40 + 8 * i : 0});
      shape.sequences.push_back({200, i % 4 == 0 ? 60 : 0});
    }
    shape.uncovered_tokens = SmallOr(100, 900);
    Problem problem(device(), dtype(), shape);
    ASSERT_NO_FATAL_FAILURE(Check(problem, 97));
  }
}

// More tiles than a GPU has blocks: each goes through several.
TEST_P(AttentionPrefillTest, ServesALongPrompt) {
  if (!OnCuda()) GTEST_SKIP() << "the reference is slow at this size";
  if (IsTooSlow()) GTEST_SKIP() << "float32 has no tiles";
  for (const auto [head_dim, float8_cache] : HeadsAndCaches()) {
    const int32_t queries = SmallOr(560, 1111);
    for (int32_t context : {0, SmallOr(100, 777)}) {
      SCOPED_TRACE(
          StrCat(head_dim, " after ", context, float8_cache ? ", fp8" : ""));
      Shape shape;
      shape.num_heads = 32;
      shape.num_kv_heads = 4;
      shape.head_dim = head_dim;
      shape.float8_cache = float8_cache;
      shape.sequences = {{queries, queries + context}};
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
  for (const auto [head_dim, float8_cache] : HeadsAndCaches()) {
    Shape shape;
    shape.num_heads = OnCuda() ? 8 : 2;
    shape.num_kv_heads = OnCuda() ? 2 : 1;
    shape.head_dim = head_dim;
    shape.float8_cache = float8_cache;
    shape.sequences = {{kQueries, kContext + kQueries}};
    Problem whole(device(), dtype(), shape);
    const std::vector<double> expected = RowsOf(whole, 0, kQueries);
    const int64_t width = shape.num_heads * head_dim;
    int32_t first = 0;
    for (int32_t count : {9, 16, 100, 31, 94}) {
      SCOPED_TRACE(StrCat("queries ", first, " to ", first + count - 1,
                          float8_cache ? ", fp8" : ""));
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

// On Hopper, a copy of float8 caches that is widened ahead, or where bounds are
// too large for one, tiles widened as they are read.
TEST_P(AttentionPrefillTest, LargeBoundsChangeNoBitOverFloat8) {
  if (!OnCuda() || dtype() == DType::kFloat32) {
    GTEST_SKIP() << "tiles are of CUDA and half precision";
  }
  for (int64_t page_size : Fewer<int64_t>({8, 16, 24, 64, 256}, 3)) {
    for (bool heads_outside : {false, true}) {
      SCOPED_TRACE(
          StrCat("pages of ", page_size, ", heads outside ", heads_outside));
      Shape shape;
      shape.num_heads = SmallOr(8, 32);
      shape.num_kv_heads = SmallOr(1, 4);
      shape.head_dim = 128;
      shape.page_size = page_size;
      shape.float8_cache = true;
      shape.heads_outside = heads_outside;
      shape.sequences = {{37, 300}, {0, 9},   {20, 20},  {130, 515}, {9, 128},
                         {12, 0},   {64, 64}, {17, 129}, {40, 31}};
      shape.uncovered_tokens = 3;
      Problem problem(device(), dtype(), shape);
      const std::vector<uint8_t> expected = OutBytes(problem);
      const auto num_seqs = static_cast<int64_t>(shape.sequences.size());
      const int64_t columns = problem.params().block_table.shape[1];
      const int64_t wide = (int64_t{1} << 16) / page_size;
      std::vector<int64_t> entries(num_seqs * wide, 0x7fffffff);
      const std::vector<int64_t> used = problem.TableEntries();
      for (int64_t s = 0; s < num_seqs; ++s) {
        std::copy_n(&used[s * columns], columns, &entries[s * wide]);
      }
      TestTensor table = TestTensor::FromIntegers(device(), DType::kInt32,
                                                  {num_seqs, wide}, entries);
      problem.params().block_table = table.view();
      ASSERT_EQ(OutBytes(problem), expected);
      ASSERT_EQ(problem.out().NumStrayWrites(), 0);
      ASSERT_EQ(problem.workspace().NumStrayWrites(), 0);
    }
  }
}

// A key or a value that is not a number shows in all queries that attend to it;
// those far before it do not see it.
TEST_P(AttentionPrefillTest, NanInTheCacheShows) {
  const int64_t heads = SmallOr(1, 4);
  for (int i = 0; i < 4; ++i) {
    const bool in_value = i % 2 == 1;
    const bool float8_cache = i / 2 == 1;
    SCOPED_TRACE(
        StrCat(in_value ? "value" : "key", float8_cache ? ", fp8" : ""));
    Shape shape;
    shape.num_heads = heads;
    shape.num_kv_heads = 1;
    shape.head_dim = 128;
    shape.page_size = 64;
    shape.float8_cache = float8_cache;
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
    TestTensor with_nan(device(), cache.view().dtype,
                        {cache.view().shape[0], 64, 1, 128}, values);
    (in_value ? p.v_cache : p.k_cache) = with_nan.view();
    const std::vector<double> out = RowsOf(problem, 0, 400);
    for (int64_t token : {0, 127, 250, 300, 301, 399}) {
      for (int64_t j = 0; j < heads * 128; ++j) {
        if (in_value && j % 128 != 5) continue;  // other elements are numbers
        if (token == 250 && in_value) continue;  // shares a tile with it
        ASSERT_EQ(std::isnan(out[token * heads * 128 + j]), token >= 300)
            << token << " " << j;
      }
    }
  }
}

// Every float8 number, as a key and as a value, in every row and column of a
// tile of keys.
class AttentionFloat8Test : public AttentionPrefillTest {
 protected:
  static constexpr int64_t kSize = 128;  // keys, queries, and elements

  // The value of a code; those that are not numbers count as zero.
  static float Decode(int code) {
    const int exponent = code / 8 % 16;
    const int mantissa = code % 8;
    if (exponent == 15 && mantissa == 7) return 0.0f;
    const float magnitude = exponent == 0
                                ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(8.0f + mantissa, exponent - 10);
    return code < 128 ? magnitude : -magnitude;
  }

  using Matrix = std::vector<float>;

  // Of kSize queries of one head, the outputs.
  std::vector<double> Run(const Matrix& q, const Matrix& k, const Matrix& v) {
    const DType float8 = DType::kFloat8E4M3;
    const std::vector<int64_t> rows = {kSize, 1, kSize};
    const std::vector<int64_t> pages = {kSize / 16, 16, 1, kSize};
    TestTensor queries(device(), dtype(), rows, q);
    TestTensor keys(device(), float8, pages, k);
    TestTensor values(device(), float8, pages, v);
    TestTensor out(device(), dtype(), rows);
    TestTensor table = TestTensor::FromIntegers(
        device(), DType::kInt32, {1, kSize / 16}, {0, 1, 2, 3, 4, 5, 6, 7});
    TestTensor start =
        TestTensor::FromIntegers(device(), DType::kInt32, {2}, {0, kSize});
    TestTensor length =
        TestTensor::FromIntegers(device(), DType::kInt32, {1}, {kSize});
    AttentionParams p;
    p.q = queries.view();
    p.k_cache = keys.view();
    p.v_cache = values.view();
    p.block_table = table.view();
    p.query_start = start.view();
    p.kv_len = length.view();
    p.out = out.view();
    p.scale = 1.0f;
    p.v_scale = 1.5f;
    const auto bytes = static_cast<int64_t>(AttentionWorkspaceBytes(p));
    TestTensor workspace(device(), DType::kUInt8, {bytes});
    p.workspace = workspace.view().data;
    p.workspace_size = static_cast<size_t>(bytes);
    const Status status = Attention(p, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    return out.Values();
  }
};

// Each query sees the key of its own number alone.
TEST_P(AttentionFloat8Test, ReadsEveryValue) {
  Matrix q(kSize * kSize, 0.0f);
  Matrix v(kSize * kSize);
  for (int64_t i = 0; i < kSize; ++i) q[i * kSize + i] = 64.0f;
  const Matrix k = q;
  for (int round : {0, 1}) {
    for (int64_t i = 0; i < kSize * kSize; ++i) {
      v[i] = Decode(static_cast<int>(i / kSize * 37 + i % kSize * 2 + round) %
                    256);
    }
    const std::vector<double> out = Run(q, k, v);
    for (int64_t i = 0; i < kSize * kSize; ++i) {
      ASSERT_EQ(out[i], 1.5 * double{v[i]}) << i / kSize << ", " << i % kSize;
    }
  }
}

// A column of keys has the numbers of one exponent, which decide by how much
// the query of that column tells its keys apart.
TEST_P(AttentionFloat8Test, ReadsEveryKey) {
  Matrix q(kSize * kSize, 0.0f);
  Matrix k(kSize * kSize);
  Matrix v(kSize * kSize);
  for (int64_t i = 0; i < kSize; ++i) {
    const int exponent = static_cast<int>(i % 16);
    q[i * kSize + i] = std::ldexp(1.0f, 8 - std::max(1, exponent));
    for (int64_t key = 0; key < kSize; ++key) {
      const int code = static_cast<int>(key * 5 + i / 16) % 16;
      k[key * kSize + i] = Decode(code / 8 * 128 + exponent * 8 + code % 8);
      v[key * kSize + i] = Decode(static_cast<int>(key * 37 + i * 11) % 64);
    }
  }
  const std::vector<double> out = Run(q, k, v);
  for (int64_t i = 0; i < kSize; ++i) {
    std::vector<double> expected(kSize, 0.0);
    double sum = 0.0;
    for (int64_t key = 0; key <= i; ++key) {
      const double weight =
          std::exp(double{q[i * kSize + i]} * k[key * kSize + i]);
      sum += weight;
      for (int64_t j = 0; j < kSize; ++j) {
        expected[j] += 1.5 * weight * v[key * kSize + j];
      }
    }
    for (int64_t j = 0; j < kSize; ++j) {
      // Values are up to 2, and 1.5 times that.
      ASSERT_NEAR(out[i * kSize + j], expected[j] / sum,
                  3.0 * std::max(Roundoff(), 1e-6))
          << i << ", " << j;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionFloat8Test,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

INSTANTIATE_TEST_SUITE_P(Targets, AttentionPrefillTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
