#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/attention/attention.h"
#include "tests/ops/attention_fixture.h"

// Inputs at the edges of the contract and beyond them.

namespace tenon {
namespace {

using attention_test::Problem;
using attention_test::Shape;
using testing::Normal;
using testing::TestTensor;

using AttentionRobustnessTest = attention_test::AttentionTest;

TEST_P(AttentionRobustnessTest, QueriesWithoutKeysAreZero) {
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

// Errors upstream must show, and only where they are.
TEST_P(AttentionRobustnessTest, NanStaysInItsQuery) {
  for (int32_t queries : {3, 30}) {
    Shape shape;
    shape.num_heads = 4;
    shape.num_kv_heads = 1;
    shape.sequences = {{queries, 300}, {1, 20}};
    Problem problem(device(), dtype(), shape);
    const int64_t width = 4 * 64;
    std::vector<float> q;
    for (double value : problem.q().Values()) {
      q.push_back(static_cast<float>(value));
    }
    std::fill_n(q.begin() + 2 * width, width, NAN);
    TestTensor with_nan(device(), dtype(), {problem.tokens(), 4, 64}, q);
    problem.params().q = with_nan.view();
    const std::vector<double> values = RowsOf(problem, 0, problem.tokens());
    for (int64_t i = 0; i < problem.tokens() * width; ++i) {
      ASSERT_EQ(std::isnan(values[i]), i / width == 2) << i;
    }
  }
}

TEST_P(AttentionRobustnessTest, NoSequencesGiveZeros) {
  Shape shape;
  shape.uncovered_tokens = 11;
  Problem problem(device(), dtype(), shape);
  for (double value : RowsOf(problem, 0, 11)) ASSERT_EQ(value, 0.0);
}

TEST_P(AttentionRobustnessTest, NoPagesGiveZeros) {
  Shape shape;
  shape.sequences = {{2, 5}, {9, 9}};
  Problem problem(device(), dtype(), shape);
  problem.params().k_cache.shape[0] = 0;
  problem.params().v_cache.shape[0] = 0;
  for (double value : RowsOf(problem, 0, 11)) ASSERT_EQ(value, 0.0);
}

TEST_P(AttentionRobustnessTest, ZeroTokensIsOk) {
  Shape shape;
  shape.sequences = {{0, 3}};
  Problem problem(device(), dtype(), shape);
  EXPECT_TRUE(problem.Run(stream()).ok());
}

// What must not be, yet must not make a kernel read or write elsewhere.
TEST_P(AttentionRobustnessTest, ClampsPagesAndLengths) {
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

// A cache of 2^33 elements, of which only the pages in use have memory.
TEST_P(AttentionRobustnessTest, ReadsPagesBeyondTwoToThe31Elements) {
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

TEST_P(AttentionRobustnessTest, RejectsBadArguments) {
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
  expect({"num_heads (dimension 1 of q) is 7", "num_kv_heads", "k_cache) 2"},
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
  // The small arrays may be neighbours: whichever is named.
  expect({"out overlaps"}, [](P& p) { p.out.data = p.block_table.data; });
  expect({"out overlaps"}, [](P& p) { p.out.data = p.query_start.data; });
  expect({"out overlaps"}, [](P& p) { p.out.data = p.kv_len.data; });
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

INSTANTIATE_TEST_SUITE_P(Targets, AttentionRobustnessTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
