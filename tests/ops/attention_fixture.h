#ifndef TENON_TESTS_OPS_ATTENTION_FIXTURE_H_
#define TENON_TESTS_OPS_ATTENTION_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "ops/attention/attention.h"
#include "tests/reference/attention_reference.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

// What the suites of Attention share: calls with their tensors, and the
// comparison with the reference.

namespace tenon::attention_test {

using testing::Fewer;
using testing::Normal;
using testing::SmallOr;
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
  // The layout of the caches: pages of [heads, slots] instead of [slots,
  // heads]; elements between heads.
  bool heads_outside = false;
  int64_t head_padding = 0;
};

inline float ScaleOf(const Shape& shape) {
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
    const int64_t row = dim + shape_.head_padding;
    const int64_t page = shape_.page_size * shape_.num_kv_heads * row;
    const std::vector<int64_t> strides =
        shape_.heads_outside
            ? std::vector<int64_t>{page, row, shape_.page_size * row, 1}
            : std::vector<int64_t>{page, shape_.num_kv_heads * row, row, 1};
    k_ = TestTensor(device, dtype, cache_shape, strides, k_poisoned);
    v_ = TestTensor(device, dtype, cache_shape, strides, v_poisoned);
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

}  // namespace tenon::attention_test

#endif  // TENON_TESTS_OPS_ATTENTION_FIXTURE_H_
