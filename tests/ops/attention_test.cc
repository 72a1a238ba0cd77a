#include "ops/attention/attention.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "ops/attention/attention_config.h"
#include "tests/reference/attention_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/shapes.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::TestTensor;

struct Sequence {
  int32_t queries = 1;
  int32_t kv_len = 1;
};

struct Shape {
  int64_t num_heads = 8;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 64;
  int64_t page_size = 16;
  std::vector<Sequence> sequences;
  int64_t uncovered_tokens = 0;  // after those of the sequences
  bool float8_cache = false;
  bool packed = false;  // q inside wider rows, and out in its place
};

float ScaleOf(const Shape& shape) {
  return 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
}

// The tensors of one call. Every cache position that no query may read holds
// NaN, as do workspace and output.
class Problem {
 public:
  Problem(Device device, DType dtype, Shape shape, uint64_t seed = 1)
      : shape_(std::move(shape)) {
    const int64_t heads = shape_.num_heads;
    const int64_t dim = shape_.head_dim;
    tokens_ = shape_.uncovered_tokens;
    int64_t max_pages = 1;
    std::vector<int64_t> starts = {0};
    std::vector<int64_t> kv_lens;
    for (const Sequence& s : shape_.sequences) {
      tokens_ += s.queries;
      starts.push_back(starts.back() + s.queries);
      kv_lens.push_back(s.kv_len);
      max_pages = std::max(max_pages, NumPages(s));
    }
    const int64_t width =
        shape_.packed ? heads + 2 * shape_.num_kv_heads + 1 : heads;
    q_ = TestTensor(device, dtype, {tokens_, heads, dim}, {width * dim, dim, 1},
                    Normal(tokens_ * heads * dim, seed));
    if (!shape_.packed) out_ = TestTensor(device, dtype, {tokens_, heads, dim});
    query_start_ = TestTensor::FromIntegers(
        device, DType::kInt32, {static_cast<int64_t>(starts.size())}, starts);
    kv_len_ = TestTensor::FromIntegers(
        device, DType::kInt32, {static_cast<int64_t>(kv_lens.size())}, kv_lens);
    MakeCaches(device, shape_.float8_cache ? DType::kFloat8E4M3 : dtype,
               max_pages, seed);
    p_.q = q_.view();
    p_.k_cache = k_.view();
    p_.v_cache = v_.view();
    p_.block_table = table_.view();
    p_.query_start = query_start_.view();
    p_.kv_len = kv_len_.view();
    p_.out = shape_.packed ? q_.view() : out_.view();
    p_.scale = ScaleOf(shape_);
    if (shape_.float8_cache) {
      p_.k_scale = 0.75f;
      p_.v_scale = 1.5f;
    }
  }

  AttentionParams& params() { return p_; }
  const TestTensor& out() const { return shape_.packed ? q_ : out_; }
  const TestTensor& q() const { return q_; }
  const TestTensor& k() const { return k_; }
  const TestTensor& v() const { return v_; }
  const TestTensor& workspace() const { return workspace_; }
  int64_t tokens() const { return tokens_; }
  std::vector<int64_t> TableEntries() const { return table_.Integers(); }

  // With exactly the workspace that is asked for.
  Status Run(Stream stream) {
    const auto bytes = static_cast<int64_t>(AttentionWorkspaceBytes(p_));
    workspace_ = TestTensor(p_.q.device, DType::kUInt8, {bytes});
    p_.workspace = workspace_.view().data;
    p_.workspace_size = static_cast<size_t>(bytes);
    return Attention(p_, stream);
  }

  // Of `token`, all heads.
  std::vector<double> Expected(int64_t token) const {
    int64_t sequence = 0;
    int64_t begin = 0;
    const int64_t count = static_cast<int64_t>(shape_.sequences.size());
    while (sequence < count &&
           begin + shape_.sequences[sequence].queries <= token) {
      begin += shape_.sequences[sequence++].queries;
    }
    int64_t length = 0;
    if (sequence < count) {
      const Sequence& s = shape_.sequences[sequence];
      length = std::max<int64_t>(0, s.kv_len - s.queries + token - begin + 1);
    }
    const int64_t group = shape_.num_heads / shape_.num_kv_heads;
    const int64_t dim = shape_.head_dim;
    std::vector<double> expected;
    for (int64_t head = 0; head < shape_.num_heads; ++head) {
      const double* q = &q_values_[static_cast<size_t>(
          (token * shape_.num_heads + head) * dim)];
      const auto at = [&](const std::vector<double>& cache, int64_t i) {
        return &cache[static_cast<size_t>(
            CacheOffset(sequence, i, head / group))];
      };
      std::vector<double> row = reference::Attention(
          {q, q + dim}, length, [&](int64_t i) { return at(k_values_, i); },
          [&](int64_t i) { return at(v_values_, i); },
          double{p_.scale} * p_.k_scale);
      for (double& value : row) expected.push_back(value * p_.v_scale);
    }
    return expected;
  }

  void PrepareReference() {
    q_values_ = q_.InitialValues();
    k_values_ = k_.InitialValues();
    v_values_ = v_.InitialValues();
  }

 private:
  int64_t NumPages(const Sequence& s) const {
    return (s.kv_len + shape_.page_size - 1) / shape_.page_size;
  }

  int64_t CacheOffset(int64_t sequence, int64_t position,
                      int64_t kv_head) const {
    const int64_t page = pages_[sequence][position / shape_.page_size];
    return ((page * shape_.page_size + position % shape_.page_size) *
                shape_.num_kv_heads +
            kv_head) *
           shape_.head_dim;
  }

  // Pages in shuffled order; page 0 belongs to nobody.
  void MakeCaches(Device device, DType dtype, int64_t max_pages,
                  uint64_t seed) {
    int64_t num_pages = 1;
    for (const Sequence& s : shape_.sequences) num_pages += NumPages(s);
    std::vector<int64_t> order(static_cast<size_t>(num_pages - 1));
    std::iota(order.begin(), order.end(), 1);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    std::vector<int64_t> table;
    size_t next = 0;
    for (const Sequence& s : shape_.sequences) {
      std::vector<int64_t> pages;
      for (int64_t i = 0; i < NumPages(s); ++i) pages.push_back(order[next++]);
      table.insert(table.end(), pages.begin(), pages.end());
      table.resize(table.size() + max_pages - pages.size(), 0x7fffffff);
      pages_.push_back(std::move(pages));
    }
    table_ = TestTensor::FromIntegers(
        device, DType::kInt32, {static_cast<int64_t>(pages_.size()), max_pages},
        table);
    const int64_t dim = shape_.head_dim;
    const int64_t count =
        num_pages * shape_.page_size * shape_.num_kv_heads * dim;
    const std::vector<float> k = Normal(count, seed + 1);
    const std::vector<float> v = Normal(count, seed + 2);
    std::vector<float> k_poisoned(k.size(), NAN);
    std::vector<float> v_poisoned(v.size(), NAN);
    for (size_t s = 0; s < pages_.size(); ++s) {
      for (int64_t i = 0; i < shape_.sequences[s].kv_len; ++i) {
        for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
          const int64_t at = CacheOffset(static_cast<int64_t>(s), i, head);
          std::copy_n(&k[at], dim, &k_poisoned[at]);
          std::copy_n(&v[at], dim, &v_poisoned[at]);
        }
      }
    }
    const std::vector<int64_t> cache_shape = {num_pages, shape_.page_size,
                                              shape_.num_kv_heads, dim};
    k_ = TestTensor(device, dtype, cache_shape, k_poisoned);
    v_ = TestTensor(device, dtype, cache_shape, v_poisoned);
  }

  Shape shape_;
  int64_t tokens_ = 0;
  std::vector<std::vector<int64_t>> pages_;
  TestTensor q_, out_, k_, v_, table_, query_start_, kv_len_, workspace_;
  std::vector<double> q_values_, k_values_, v_values_;
  AttentionParams p_;
};

class AttentionTest : public testing::OpTest {
 protected:
  bool OnCuda() const { return device().type == DeviceType::kCuda; }

  // Unit roundoff of the dtype.
  double Roundoff() const {
    switch (dtype()) {
      case DType::kFloat32:
        return 0x1p-24;
      case DType::kFloat16:
        return 0x1p-11;
      default:
        return 0x1p-8;
    }
  }

  // Runs the call and compares every `stride`-th token.
  void Check(Problem& problem, int64_t stride = 1) {
    const Status status = problem.Run(stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
    ASSERT_EQ(problem.out().NumStrayWrites(), 0);
    ASSERT_EQ(problem.workspace().NumStrayWrites(), 0);
    ASSERT_EQ(problem.k().Bytes(), problem.k().InitialBytes());
    problem.PrepareReference();
    const std::vector<double> values = problem.out().Values();
    const int64_t width =
        problem.params().q.shape[1] * problem.params().q.shape[2];
    double error = 0.0;
    double norm = 0.0;
    for (int64_t token = 0; token < problem.tokens(); token += stride) {
      const std::vector<double> expected = problem.Expected(token);
      for (int64_t i = 0; i < width; ++i) {
        const double actual = values[token * width + i];
        const double difference = actual - expected[i];
        ASSERT_LE(std::fabs(difference), MaxError(problem, expected[i]))
            << "token " << token << " element " << i << " is " << actual
            << ", expected " << expected[i];
        error += difference * difference;
        norm += expected[i] * expected[i];
      }
    }
    // Rounding the output, and on tensor cores the probabilities, errs by half
    // a roundoff or so each; float32 errs in the last bits of its sums.
    const double limit = dtype() == DType::kFloat32 ? 3e-6 : Roundoff();
    EXPECT_LE(std::sqrt(error), limit * std::sqrt(norm));
  }

  // The output is a weighted mean of values of up to about 5 (times v_scale).
  // Its rounding adds a roundoff of itself; probabilities rounded for tensor
  // cores add up to one of the largest value; float32 sums 1e-6 of that.
  double MaxError(Problem& problem, double expected) const {
    const double largest = 5.0 * problem.params().v_scale;
    const bool rounds_probabilities = OnCuda() && dtype() != DType::kFloat32;
    const double of_largest = rounds_probabilities ? Roundoff() : 2e-6;
    return Roundoff() * std::fabs(expected) + of_largest * largest;
  }

  std::vector<uint8_t> OutBytes(Problem& problem) {
    const Status status = problem.Run(stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    return problem.out().Bytes();
  }

  // The outputs of tokens [first, first + count).
  std::vector<double> RowsOf(Problem& problem, int64_t first, int64_t count) {
    const Status status = problem.Run(stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    const std::vector<double> values = problem.out().Values();
    const int64_t width =
        problem.params().q.shape[1] * problem.params().q.shape[2];
    return {values.begin() + first * width,
            values.begin() + (first + count) * width};
  }
};

TEST_P(AttentionTest, MatchesReferenceForHeadsAndPages) {
  struct Heads {
    int64_t heads, kv_heads;
  };
  // 12 heads to a KV head are GLM's; 20 are more than one tile of 16.
  for (const Heads& heads : std::vector<Heads>{
           {1, 1}, {4, 2}, {8, 2}, {8, 1}, {16, 1}, {24, 2}, {20, 1}}) {
    for (int64_t head_dim : {64, 128, 256}) {
      for (int64_t page_size : {1, 13, 16, 64}) {
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
  for (int32_t length :
       {1, 13, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 2049, 4097}) {
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
  shape.num_heads = 8;
  shape.num_kv_heads = 1;
  // Empty sequences in the middle and at the ends, unused tokens behind.
  shape.sequences = {{0, 0}, {1, 300}, {0, 5}, {70, 70}, {8, 90},    {9, 9},
                     {0, 0}, {33, 97}, {1, 1}, {2, 600}, {129, 140}, {0, 77}};
  shape.uncovered_tokens = 5;
  for (bool float8_cache : {false, true}) {
    for (int32_t max_query_len : {0, 129}) {
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
  shape.sequences = {{21, 700}};
  Problem chunk(device(), dtype(), shape);
  chunk.params().batch_invariant = true;
  const std::vector<double> of_chunk = RowsOf(chunk, 0, 21);
  const int64_t width = 8 * 128;
  for (int32_t query : {0, 1, 7, 20}) {
    SCOPED_TRACE(query);
    // The same memory, described as a decode row.
    TestTensor start =
        TestTensor::FromIntegers(device(), DType::kInt32, {2}, {0, 1});
    TestTensor length = TestTensor::FromIntegers(device(), DType::kInt32, {1},
                                                 {700 - 21 + query + 1});
    TestTensor out(device(), dtype(), {1, 8, 128});
    AttentionParams p = chunk.params();
    p.q = Rows(p.q, query, 1);
    p.out = out.view();
    p.query_start = start.view();
    p.kv_len = length.view();
    p.max_query_len = 1;
    p.max_kv_len = 700;
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

TEST_P(AttentionTest, QueriesWithoutKeysAreZero) {
  Shape shape;
  shape.num_heads = 4;
  shape.num_kv_heads = 1;
  // More queries than cached tokens, none cached, a negative length's clamp.
  shape.sequences = {{5, 2}, {1, 0}, {12, 0}, {20, 7}, {1, 9}};
  Problem problem(device(), dtype(), shape);
  ASSERT_NO_FATAL_FAILURE(Check(problem));
  const std::vector<double> values = problem.out().Values();
  EXPECT_EQ(values[0], 0.0);
  EXPECT_NE(values[3 * 4 * 64], 0.0);

  TestTensor negative = TestTensor::FromIntegers(device(), DType::kInt32, {5},
                                                 {-1, -5, -100, -7, -9});
  problem.params().kv_len = negative.view();
  for (double value : RowsOf(problem, 0, problem.tokens())) {
    ASSERT_EQ(value, 0.0);
  }
}

TEST_P(AttentionTest, NoSequencesGiveZeros) {
  Shape shape;
  shape.uncovered_tokens = 11;
  Problem problem(device(), dtype(), shape);
  for (double value : RowsOf(problem, 0, 11)) ASSERT_EQ(value, 0.0);
}

TEST_P(AttentionTest, NoPagesGiveZeros) {
  Shape shape;
  shape.sequences = {{2, 5}, {9, 9}};
  Problem problem(device(), dtype(), shape);
  problem.params().k_cache.shape[0] = 0;
  problem.params().v_cache.shape[0] = 0;
  for (double value : RowsOf(problem, 0, 11)) ASSERT_EQ(value, 0.0);
}

TEST_P(AttentionTest, ZeroTokensIsOk) {
  Shape shape;
  shape.sequences = {{0, 3}};
  Problem problem(device(), dtype(), shape);
  EXPECT_TRUE(problem.Run(stream()).ok());
}

// What must not be, yet must not make a kernel read or write elsewhere.
TEST_P(AttentionTest, ClampsPagesAndLengths) {
  for (int32_t queries : {1, 14}) {
    Shape shape;
    shape.num_heads = 4;
    shape.num_kv_heads = 1;
    shape.sequences = {{queries, 48}};
    Problem problem(device(), dtype(), shape);
    AttentionParams& p = problem.params();
    // Pages out of range are page 0, which another table may name.
    TestTensor bad = TestTensor::FromIntegers(device(), DType::kInt32, {1, 3},
                                              {-1, 2, 0x7fffffff});
    TestTensor zero =
        TestTensor::FromIntegers(device(), DType::kInt32, {1, 3}, {0, 2, 0});
    // Page 0 holds NaN: give it values.
    TestTensor cache(device(), dtype(), {4, 16, 1, 64},
                     Normal(4 * 16 * 64, 21));
    p.k_cache = p.v_cache = cache.view();
    p.block_table = bad.view();
    const std::vector<double> of_bad = RowsOf(problem, 0, queries);
    p.block_table = zero.view();
    EXPECT_EQ(RowsOf(problem, 0, queries), of_bad);
    EXPECT_FALSE(std::isnan(of_bad[0]));

    // A length past the table, and past the bound.
    TestTensor length =
        TestTensor::FromIntegers(device(), DType::kInt32, {1}, {1 << 30});
    p.kv_len = length.view();
    EXPECT_EQ(RowsOf(problem, 0, queries), of_bad);
  }
}

TEST_P(AttentionTest, ServesMoreThanOnePass) {
  // Few splits of a long bound need more workspace than a pass has.
  Shape shape;
  shape.num_heads = 64;
  shape.num_kv_heads = 1;
  shape.sequences = {{0, 0}, {1, 100}, {OnCuda() ? 300 : 60, 310}};
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
  for (const testing::ModelShape& model : testing::kModelShapes) {
    SCOPED_TRACE(model.name);
    Shape shape;
    shape.num_heads = model.num_heads;
    shape.num_kv_heads = model.num_kv_heads;
    shape.head_dim = model.head_dim;
    shape.page_size = 64;
    shape.sequences = {{1, 4097}, {512, 1000}, {1, 1024}, {4, 2000}};
    Problem problem(device(), dtype(), shape);
    ASSERT_NO_FATAL_FAILURE(Check(problem, 101));
  }
}

// A cache of 2^33 elements, of which only the pages in use have memory.
TEST_P(AttentionTest, ReadsPagesBeyondTwoToThe31Elements) {
  if (OnCuda()) GTEST_SKIP() << "sparse memory is the CPU's";
  constexpr int64_t kPages = int64_t{1} << 17;
  constexpr int64_t kPageStride = int64_t{1} << 16;
  const size_t bytes = kPages * kPageStride * DTypeSize(dtype());
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Shape shape;
  shape.num_heads = 2;
  shape.num_kv_heads = 1;
  shape.sequences = {{1, 48}};
  Problem problem(device(), dtype(), shape);
  AttentionParams& p = problem.params();
  const std::vector<double> near = RowsOf(problem, 0, 1);
  TensorView far = p.k_cache;
  far.data = memory;
  far.shape[0] = kPages;
  far.stride[0] = kPageStride;
  const std::vector<int64_t> near_pages = problem.TableEntries();
  const std::vector<int64_t> far_pages = {kPages - 1, 5, kPages - 3};
  // The value pages sit in the same memory, half a page further.
  const auto page_of = [&](int64_t page) {
    return static_cast<char*>(memory) +
           page * kPageStride * static_cast<int64_t>(DTypeSize(dtype()));
  };
  const size_t page_bytes = 16 * 64 * DTypeSize(dtype());
  const size_t half = kPageStride / 2 * DTypeSize(dtype());
  for (size_t i = 0; i < 3; ++i) {
    std::memcpy(page_of(far_pages[i]), Rows(p.k_cache, near_pages[i], 1).data,
                page_bytes);
    std::memcpy(page_of(far_pages[i]) + half,
                Rows(p.v_cache, near_pages[i], 1).data, page_bytes);
  }
  TestTensor table =
      TestTensor::FromIntegers(device(), DType::kInt32, {1, 3}, far_pages);
  p.block_table = table.view();
  p.k_cache = far;
  p.v_cache = far;
  p.v_cache.data = static_cast<char*>(memory) + half;
  EXPECT_EQ(RowsOf(problem, 0, 1), near);
  munmap(memory, bytes);
}

TEST_P(AttentionTest, RejectsBadArguments) {
  Shape shape;
  shape.sequences = {{1, 20}, {3, 600}};
  Problem problem(device(), dtype(), shape);
  ASSERT_TRUE(problem.Run(stream()).ok());
  Finish();
  const std::vector<uint8_t> bytes = problem.out().Bytes();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    AttentionParams p = problem.params();
    change(p);
    parts.push_back("Attention");
    testing::ExpectInvalid(Attention(p, stream()), parts);
  };
  using P = AttentionParams;
  expect({"q is missing"}, [](P& p) { p.q = TensorView(); });
  expect({"q", "int32"}, [](P& p) { p.q.dtype = DType::kInt32; });
  expect({"q", "rank 2"}, [](P& p) { p.q.rank = 2; });
  expect({"q", "null data"}, [](P& p) { p.q.data = nullptr; });
  expect({"head_dim", "32"}, [](P& p) {
    p.q.shape[2] = p.k_cache.shape[3] = p.v_cache.shape[3] = 32;
  });
  expect({"k_cache", "rank 3"}, [](P& p) { p.k_cache.rank = 3; });
  expect({"k_cache", "dtype"}, [](P& p) { p.k_cache.dtype = DType::kUInt8; });
  expect({"k_cache", "128"}, [](P& p) { p.k_cache.shape[3] = 128; });
  expect({"page_size", "0"},
         [](P& p) { p.k_cache.shape[1] = p.v_cache.shape[1] = 0; });
  expect({"page_size", "65537"},
         [](P& p) { p.k_cache.shape[1] = p.v_cache.shape[1] = 65537; });
  expect({"num_kv_heads", "0"},
         [](P& p) { p.k_cache.shape[2] = p.v_cache.shape[2] = 0; });
  expect({"num_heads 7", "num_kv_heads 2"},
         [](P& p) { p.q.shape[1] = p.out.shape[1] = 7; });
  expect({"num_heads", "0"}, [](P& p) { p.q.shape[1] = p.out.shape[1] = 0; });
  expect({"v_cache", "dtype"},
         [](P& p) { p.v_cache.dtype = DType::kFloat8E4M3; });
  expect({"v_cache", "shape"}, [](P& p) { p.v_cache.shape[0] += 1; });
  expect({"block_table", "dtype"},
         [](P& p) { p.block_table.dtype = DType::kInt64; });
  expect({"block_table", "cuda:7"}, [](P& p) {
    p.block_table.device = {DeviceType::kCuda, 7};
  });
  expect({"query_start", "[2]", "[3]"},
         [](P& p) { p.query_start.shape[0] = 2; });
  expect({"kv_len", "[3]", "[2]"}, [](P& p) { p.kv_len.shape[0] = 3; });
  expect({"out", "[3, 8, 64]"}, [](P& p) { p.out.shape[0] = 3; });
  expect({"out", "dtype"}, [](P& p) { p.out.dtype = DType::kInt64; });
  expect({"out", "share memory"}, [](P& p) { p.out.stride[1] = 63; });
  expect({"out overlaps q"},
         [](P& p) { p.out.data = p.q.As<char>() + 64 * 8; });
  expect({"out overlaps k_cache"}, [](P& p) { p.out.data = p.k_cache.data; });
  expect({"out is q", "dimension 0"}, [](P& p) {
    p.out.data = p.q.data;
    p.out.stride[0] *= 2;
  });
  expect({"scale", "0"}, [](P& p) { p.scale = 0.0f; });
  expect({"scale", "nan"}, [](P& p) { p.scale = NAN; });
  expect({"k_scale", "inf"}, [](P& p) { p.k_scale = INFINITY; });
  expect({"v_scale", "-1"}, [](P& p) { p.v_scale = -1.0f; });
  expect({"k_scale", "2"}, [](P& p) { p.k_scale = 2.0f; });
  expect({"max_kv_len", "-1"}, [](P& p) { p.max_kv_len = -1; });
  expect({"max_query_len", "-2"}, [](P& p) { p.max_query_len = -2; });
  expect({"workspace is null"}, [](P& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](P& p) { p.workspace_size -= 1; });
  expect({"workspace", "aligned"}, [](P& p) {
    p.workspace = static_cast<char*>(p.workspace) + 4;
    p.workspace_size += 4;
  });
  EXPECT_EQ(problem.out().Bytes(), bytes);
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

// ---------------------------------------------------------------------------
// Choices, which are the host's alone
// ---------------------------------------------------------------------------

AttentionParams ShapeOnly(DeviceType type, int64_t tokens, int64_t num_seqs,
                          int32_t max_kv_len) {
  const Device device = {type, 0};
  AttentionParams p;
  p.q = p.out =
      MakeTensor(nullptr, DType::kBFloat16, device, {tokens, 32, 128});
  p.k_cache = p.v_cache =
      MakeTensor(nullptr, DType::kBFloat16, device, {4096, 16, 4, 128});
  p.block_table = MakeTensor(nullptr, DType::kInt32, device, {num_seqs, 2560});
  p.query_start = MakeTensor(nullptr, DType::kInt32, device, {num_seqs + 1});
  p.kv_len = MakeTensor(nullptr, DType::kInt32, device, {num_seqs});
  p.scale = 1.0f;
  p.max_kv_len = max_kv_len;
  return p;
}

TEST(AttentionConfigTest, SelectsTheKernel) {
  AttentionParams p = ShapeOnly(DeviceType::kCuda, 64, 64, 0);
  p.max_query_len = 1;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.max_query_len = kMaxDecodeQueries;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.max_query_len = kMaxDecodeQueries + 1;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kPrefill);
  p.max_query_len = 0;  // up to 64
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kPrefill);
  p.batch_invariant = true;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.out.stride[1] = 129;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
  p.out.stride[1] = 128;
  p.k_cache.stride[0] += 4;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
  p = ShapeOnly(DeviceType::kCuda, 4, 64, 0);
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.q.dtype = p.out.dtype = p.k_cache.dtype = p.v_cache.dtype = DType::kFloat32;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
}

TEST(AttentionConfigTest, PartsCoverEveryContext) {
  for (const AttentionParts& parts :
       {AttentionParts{1, 512, 512}, AttentionParts{32, 256, 2048},
        AttentionParts{1, 64, 2048}, AttentionParts{9, 64, 2048}}) {
    int32_t most = 0;
    for (int64_t context = 1; context < int64_t{1} << 31;
         context += 1 + context / 97) {
      const auto c = static_cast<int32_t>(context);
      const int64_t length = parts.Length(c);
      const int64_t count = parts.Count(c);
      ASSERT_EQ(length % AttentionParts::kLengthUnit, 0);
      ASSERT_GE(length * count, context);
      ASSERT_LT(length * (count - 1), context);
      ASSERT_LE(count, AttentionParts::kMaxCount);
      ASSERT_LE(count, parts.MaxCount(c)) << context;
      ASSERT_GE(parts.MaxCount(c), most);
      most = parts.MaxCount(c);
    }
  }
}

TEST(AttentionConfigTest, WorkspaceIsEnoughAndNeverShrinks) {
  for (DeviceType type : {DeviceType::kCpu, DeviceType::kCuda}) {
    for (bool batch_invariant : {false, true}) {
      for (int32_t max_kv_len : {1, 64, 65, 1000, 2049, 40960, 0}) {
        size_t previous = 0;
        for (int64_t tokens = 1; tokens < 3000; tokens += 1 + tokens / 9) {
          AttentionParams p = ShapeOnly(type, tokens, 16, max_kv_len);
          p.batch_invariant = batch_invariant;
          const size_t bytes = AttentionWorkspaceBytes(p);
          ASSERT_GE(bytes, previous);
          previous = bytes;
          p.max_kv_len = 1;
          ASSERT_LE(AttentionWorkspaceBytes(p), bytes);
          p.max_kv_len = max_kv_len;
          for (int32_t max_query_len : {0, 1, 8}) {
            p.max_query_len = max_query_len;
            const AttentionPlan plan = PlanAttention(p);
            const int64_t rows = std::min(plan.num_rows, plan.rows_per_pass);
            const bool on_cpu = type == DeviceType::kCpu;
            if (plan.max_parts == 1 && !on_cpu) continue;
            const int64_t floats =
                rows * 32 * (plan.max_parts * 130 + (on_cpu ? 128 : 0));
            ASSERT_LE(static_cast<size_t>(floats) * 4, bytes)
                << tokens << " tokens, max_kv_len " << max_kv_len;
          }
        }
      }
    }
  }
}

TEST(AttentionConfigTest, InvalidParamsNeedNoWorkspace) {
  AttentionParams p = ShapeOnly(DeviceType::kCpu, 4, 4, 0);
  EXPECT_GT(AttentionWorkspaceBytes(p), 0u);
  p.q.shape[1] = 33;
  EXPECT_EQ(AttentionWorkspaceBytes(p), 0u);
}

}  // namespace
}  // namespace tenon
