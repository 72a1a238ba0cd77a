#include "ops/qk_norm/qk_norm.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "tests/ops/qk_norm_fixture.h"

namespace tenon {
namespace {

using testing::IsClose;
using testing::kGuardBytes;
using testing::PackedQkNorm;
using testing::QkNormConfig;
using testing::QkNormTest;
using testing::TestTensor;

TEST_P(QkNormTest, Acceptance01_PackedMatchesReference) {
  constexpr int64_t kDistinctRows = 61;  // of which the reference is made
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    for (int64_t tokens : TokenCounts()) {
      for (NormRounding rounding :
           {NormRounding::kFloat32Multiply, NormRounding::kCastThenMultiply}) {
        // Many tokens repeat the rows of few: one mode is enough there.
        if (tokens > 1024 && rounding != NormRounding()) continue;
        SCOPED_TRACE(StrCat(shape.name, " tokens ", tokens, " rounding ",
                            static_cast<int>(rounding)));
        QkNormConfig c = FromShape(shape, tokens);
        c.rounding = rounding;
        c.distinct_rows = std::min(tokens, kDistinctRows);
        const PackedQkNorm packed = Make(c);
        ASSERT_NO_FATAL_FAILURE(Run(packed.params));
        ExpectOnlyHeadsChanged(packed);
        if (tokens == 0) continue;
        c.tokens = c.distinct_rows;
        const PackedQkNorm first = Make(c);
        ASSERT_NO_FATAL_FAILURE(Run(first.params));
        EXPECT_TRUE(IsClose(Heads(c, first.qkv.Values()), ExpectedNorm(first),
                            dtype(), Tolerance(rounding)));
        const std::vector<uint8_t> expected = first.qkv.Bytes();
        const std::vector<uint8_t> actual = packed.qkv.Bytes();
        const int64_t row =
            c.width() * static_cast<int64_t>(DTypeSize(dtype()));
        for (int64_t t = 0; t < tokens; ++t) {
          ASSERT_EQ(
              std::memcmp(&actual[kGuardBytes + t * row],
                          &expected[kGuardBytes + t % c.distinct_rows * row],
                          static_cast<size_t>(row)),
              0)
              << "token " << t;
        }
      }
    }
  }
}

TEST_P(QkNormTest, Acceptance01_AllHeadDimsAndWeights) {
  for (int64_t head_dim : {64, 128, 256}) {
    for (bool float_weights : {false, true}) {
      for (int64_t num_q_heads : {1, 3, 13}) {
        SCOPED_TRACE(StrCat("head_dim ", head_dim, " float weights ",
                            float_weights, " q heads ", num_q_heads));
        QkNormConfig c;
        c.tokens = 13;
        c.num_q_heads = num_q_heads;
        c.num_kv_heads = num_q_heads == 3 ? 5 : 1;  // also more K than Q
        c.head_dim = head_dim;
        c.gap = 16;
        c.padding = 8;
        c.float_weights = float_weights;
        const PackedQkNorm packed = Make(c, head_dim);
        ASSERT_NO_FATAL_FAILURE(Run(packed.params));
        EXPECT_TRUE(IsClose(Heads(c, packed.qkv.Values()), ExpectedNorm(packed),
                            dtype(), Tolerance(c.rounding)));
        ExpectOnlyHeadsChanged(packed);
        EXPECT_EQ(packed.q_weight.Bytes(), packed.q_weight.InitialBytes());
        EXPECT_EQ(packed.k_weight.Bytes(), packed.k_weight.InitialBytes());
      }
    }
  }
}

// Q and K in tensors of their own: Q with gaps between tokens and heads, K and
// V as the two halves of a KV buffer.
TEST_P(QkNormTest, Acceptance02_StridedEqualsPacked) {
  for (int64_t padding : {0, 8, 3}) {
    for (bool rotary : {false, true}) {
      SCOPED_TRACE(StrCat("padding ", padding, " rotary ", rotary));
      QkNormConfig c;
      c.tokens = 13;
      c.num_q_heads = 5;
      c.num_kv_heads = 3;
      PackedQkNorm packed = Make(c);
      if (rotary) AddRotary(&packed, 64);
      std::vector<float> q_values;
      std::vector<float> kv_values;
      const std::vector<double> values = packed.qkv.InitialValues();
      for (int64_t t = 0; t < c.tokens; ++t) {
        const double* row = &values[t * c.width()];
        q_values.insert(q_values.end(), row, row + c.k_offset());
        kv_values.insert(kv_values.end(), row + c.k_offset(), row + c.width());
      }
      const int64_t head = c.head_dim + padding;
      const TestTensor q(device(), dtype(), {c.tokens, c.num_q_heads, 128},
                         {c.num_q_heads * head + padding, head, 1}, q_values);
      // [tokens, K and V, heads, head_dim]
      const TestTensor kv(
          device(), dtype(), {c.tokens, 2, c.num_kv_heads, 128},
          {2 * c.num_kv_heads * head, c.num_kv_heads * head, head, 1},
          kv_values);
      QkNormParams p = testing::Unpacked(packed.params);
      p.q = q.view();
      p.k = kv.view();
      p.k.rank = 3;
      p.k.shape[1] = c.num_kv_heads;
      p.k.shape[2] = 128;
      p.k.stride[1] = head;
      p.k.stride[2] = 1;
      ASSERT_NO_FATAL_FAILURE(Run(packed.params));
      ASSERT_NO_FATAL_FAILURE(Run(p));
      const std::vector<double> expected = packed.qkv.Values();
      const std::vector<double> q_result = q.Values();
      const std::vector<double> kv_result = kv.Values();
      for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t kv_width = c.width() - c.k_offset();
        EXPECT_TRUE(std::equal(&q_result[t * c.k_offset()],
                               &q_result[t * c.k_offset()] + c.k_offset(),
                               &expected[t * c.width()]));
        EXPECT_TRUE(std::equal(&kv_result[t * kv_width],
                               &kv_result[t * kv_width] + kv_width,
                               &expected[t * c.width() + c.k_offset()]));
      }
      EXPECT_EQ(q.NumStrayWrites(), 0);
      EXPECT_EQ(kv.NumStrayWrites(), 0);
    }
  }
}

// A view that no vector access fits has the same bits.
TEST_P(QkNormTest, Acceptance02_UnalignedEqualsAligned) {
  // Head dim, rotated elements, whether the cache is of fp8.
  for (const auto& [head_dim, rotary_dim, fp8] :
       std::vector<std::tuple<int64_t, int64_t, bool>>{{64, 64, false},
                                                       {64, 32, true},
                                                       {128, 128, true},
                                                       {128, 64, true},
                                                       {128, 64, false},
                                                       {256, 256, false},
                                                       {256, 96, true}}) {
    SCOPED_TRACE(StrCat("head_dim ", head_dim, " rotary_dim ", rotary_dim,
                        " fp8 ", fp8));
    const DType cache_dtype = fp8 ? DType::kFloat8E4M3 : dtype();
    QkNormConfig c;
    c.head_dim = head_dim;
    c.tokens = 9;
    c.rounding = rotary_dim < head_dim ? NormRounding::kCastThenMultiply
                                       : NormRounding::kFloat32Multiply;
    PackedQkNorm aligned = Make(c);
    AddRotary(&aligned, rotary_dim);
    AddCache(&aligned, cache_dtype);
    QkNormConfig moved = c;
    moved.gap = 1;
    moved.padding = 2;
    PackedQkNorm unaligned = Make(moved);
    std::vector<float> values;
    const std::vector<double> source = aligned.qkv.InitialValues();
    for (int64_t t = 0; t < c.tokens; ++t) {
      const double* row = &source[t * c.width()];
      const auto add = [&](int64_t begin, int64_t end) {
        values.push_back(3.0f);
        values.insert(values.end(), row + begin, row + end);
      };
      add(0, c.k_offset());
      add(c.k_offset(), c.v_offset());
      add(c.v_offset(), c.width());
      values.push_back(3.0f);
    }
    unaligned.qkv = TestTensor(device(), dtype(), {c.tokens, moved.width()},
                               {moved.width() + moved.padding, 1}, values);
    unaligned.params.qkv = unaligned.qkv.view();
    AddRotary(&unaligned, rotary_dim, DType::kInt64, 1);
    AddCache(&unaligned, cache_dtype, 1);
    ASSERT_NO_FATAL_FAILURE(Run(aligned.params));
    ASSERT_NO_FATAL_FAILURE(Run(unaligned.params));
    EXPECT_EQ(Heads(c, aligned.qkv.Values()),
              Heads(moved, unaligned.qkv.Values()));
    ExpectOnlyHeadsChanged(unaligned);
    const auto bits = [](const TestTensor& tensor) {
      std::vector<double> values = tensor.Values();
      for (double& v : values) v = std::isnan(v) ? 1e30 : v;  // poison
      return values;
    };
    EXPECT_EQ(bits(aligned.k_cache), bits(unaligned.k_cache));
    EXPECT_EQ(bits(aligned.v_cache), bits(unaligned.v_cache));
    EXPECT_EQ(unaligned.k_cache.NumStrayWrites(), 0);
    EXPECT_EQ(unaligned.v_cache.NumStrayWrites(), 0);
  }
}

TEST_P(QkNormTest, Acceptance03_RoundingModesDiffer) {
  if (dtype() == DType::kFloat32) GTEST_SKIP() << "one rounding in float32";
  QkNormConfig c;
  const PackedQkNorm one = Make(c);
  c.rounding = NormRounding::kCastThenMultiply;
  const PackedQkNorm two = Make(c);
  ASSERT_NO_FATAL_FAILURE(Run(one.params));
  ASSERT_NO_FATAL_FAILURE(Run(two.params));
  EXPECT_NE(one.qkv.Values(), two.qkv.Values());
}

// Tokens far apart: 2^31 elements and more from the first. On the CPU the rows
// lie in address space that has memory only where it is touched.
TEST_P(QkNormTest, Acceptance05_OffsetsBeyond2To31) {
  if (device().type == DeviceType::kCuda) GTEST_SKIP() << "see the next test";
  QkNormConfig c;
  c.tokens = 4;
  c.num_q_heads = 2;
  c.num_kv_heads = 1;
  PackedQkNorm packed = Make(c);
  AddRotary(&packed, 128);
  AddCache(&packed, dtype());
  const int64_t size = static_cast<int64_t>(DTypeSize(dtype()));
  const int64_t stride = (int64_t{1} << 30) + 64;
  const size_t bytes =
      static_cast<size_t>((c.tokens - 1) * stride + c.width()) * size;
  const auto reserve = [&] {
    return static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                   -1, 0));
  };
  char* const rows = reserve();
  char* const cache = reserve();  // of K: one slot a page
  ASSERT_NE(static_cast<void*>(rows), MAP_FAILED);
  ASSERT_NE(static_cast<void*>(cache), MAP_FAILED);
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::memcpy(rows + t * stride * size,
                &packed.qkv.InitialBytes()[kGuardBytes + t * c.width() * size],
                static_cast<size_t>(c.width() * size));
  }
  ASSERT_NO_FATAL_FAILURE(Run(packed.params));
  QkNormParams far = packed.params;
  far.qkv.data = rows;
  far.qkv.stride[0] = stride;
  const TestTensor v_cache(device(), dtype(), {4, 1, 1, 128});
  const TestTensor slots = TestTensor::FromIntegers(device(), DType::kInt64,
                                                    {c.tokens}, {3, -1, 0, 2});
  far.cache.k_cache = v_cache.view();
  far.cache.k_cache.data = cache;
  far.cache.k_cache.stride[0] = stride;
  far.cache.v_cache = v_cache.view();
  far.cache.slot_mapping = slots.view();
  ASSERT_NO_FATAL_FAILURE(Run(far));
  const std::vector<uint8_t> expected = packed.qkv.Bytes();
  for (int64_t t = 0; t < c.tokens; ++t) {
    const uint8_t* row = &expected[kGuardBytes + t * c.width() * size];
    EXPECT_EQ(std::memcmp(rows + t * stride * size, row,
                          static_cast<size_t>(c.width() * size)),
              0)
        << "token " << t;
    const int64_t slot = std::vector<int64_t>{3, -1, 0, 2}[t];
    if (slot < 0) continue;
    EXPECT_EQ(
        std::memcmp(cache + slot * stride * size, row + c.k_offset() * size,
                    static_cast<size_t>(c.head_dim * size)),
        0)
        << "slot " << slot;
  }
  munmap(rows, bytes);
  munmap(cache, bytes);
}

// The shape at which an int32 offset fails first: token 524288 of rows of 4096.
TEST_P(QkNormTest, Acceptance05_HalfAMillionTokens) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "see the test above";
  constexpr int64_t kTokens = 524291;
  constexpr int64_t kFirstProbe = 524287;
  QkNormConfig c;
  c.tokens = 3;
  c.num_q_heads = 24;
  c.num_kv_heads = 4;
  ASSERT_EQ(c.width(), 4096);
  PackedQkNorm packed = Make(c);
  const size_t row = static_cast<size_t>(c.width()) * DTypeSize(dtype());
  StatusOr<Buffer> buffer = Buffer::Allocate(device(), kTokens * row);
  if (buffer.status().code() == StatusCode::kResourceExhausted) {
    GTEST_SKIP() << buffer.status().message();
  }
  ASSERT_TRUE(buffer.ok()) << buffer.status().message();
  char* const rows = static_cast<char*>(buffer->data());
  ASSERT_TRUE(FillMemory(rows, device(), 0, kTokens * row, stream()).ok());
  ASSERT_TRUE(CopyMemory(rows + kFirstProbe * row, device(),
                         packed.params.qkv.data, device(), 3 * row, stream())
                  .ok());
  QkNormParams far = packed.params;
  far.qkv = MakeTensor(rows, dtype(), device(), {kTokens, c.width()});
  ASSERT_NO_FATAL_FAILURE(Run(far));
  ASSERT_NO_FATAL_FAILURE(Run(packed.params));
  std::vector<uint8_t> probes(5 * row);
  ASSERT_TRUE(CopyMemory(probes.data(), Device{},
                         rows + (kFirstProbe - 1) * row, device(),
                         probes.size(), stream())
                  .ok());
  Finish();
  const std::vector<uint8_t> expected = packed.qkv.Bytes();
  EXPECT_EQ(std::memcmp(&probes[row], &expected[kGuardBytes], 3 * row), 0);
  for (size_t i = 0; i < row; ++i) {  // the neighbours are zero, of any sign
    ASSERT_EQ(probes[i] & 0x7f, 0);
    ASSERT_EQ(probes[4 * row + i] & 0x7f, 0);
  }
}

TEST_P(QkNormTest, Acceptance06_RowDoesNotDependOnTheOthers) {
  QkNormConfig c = FromShape(testing::kModelShapes[0],
                             device().type == DeviceType::kCuda ? 1500 : 67);
  c.padding = 5;  // rows have all alignments
  for (bool rotary : {false, true}) {
    PackedQkNorm all = Make(c);
    PackedQkNorm alone = Make(c);
    if (rotary) {
      AddRotary(&all, 128);
      AddRotary(&alone, 128);
    }
    ASSERT_NO_FATAL_FAILURE(Run(all.params));
    // Token by token, in groups of other sizes, and not in order.
    for (const auto& [first, count] :
         std::vector<std::pair<int64_t, int64_t>>{{41, 1}, {0, 13}, {50, 7}}) {
      QkNormParams p = alone.params;
      p.qkv = Rows(p.qkv, first, count);
      if (rotary) p.rotary.positions = Rows(p.rotary.positions, first, count);
      ASSERT_NO_FATAL_FAILURE(Run(p));
      const std::vector<uint8_t> expected = all.qkv.Bytes();
      const std::vector<uint8_t> actual = alone.qkv.Bytes();
      const size_t row =
          static_cast<size_t>(c.width() + c.padding) * DTypeSize(dtype());
      EXPECT_EQ(std::memcmp(&expected[kGuardBytes + first * row],
                            &actual[kGuardBytes + first * row],
                            count * row - c.padding * DTypeSize(dtype())),
                0)
          << "tokens from " << first;
    }
  }
}

TEST_P(QkNormTest, SameCallGivesTheSameBits) {
  QkNormConfig c;
  c.tokens = 111;
  std::vector<uint8_t> first;
  for (int run = 0; run < 3; ++run) {
    PackedQkNorm packed = Make(c);
    AddRotary(&packed, 96);
    AddCache(&packed, DType::kFloat8E4M3);
    ASSERT_NO_FATAL_FAILURE(Run(packed.params));
    std::vector<uint8_t> bytes = packed.qkv.Bytes();
    const std::vector<uint8_t> cache = packed.k_cache.Bytes();
    bytes.insert(bytes.end(), cache.begin(), cache.end());
    if (run == 0) first = bytes;
    EXPECT_EQ(bytes, first);
  }
}

// The heads of a rank alone give the bits that they have among all heads.
TEST_P(QkNormTest, Acceptance09_ShardsEqualTheWhole) {
  QkNormConfig whole;
  whole.tokens = 7;
  whole.num_q_heads = 16;
  whole.num_kv_heads = 4;
  PackedQkNorm all = Make(whole);
  AddRotary(&all, 128);
  ASSERT_NO_FATAL_FAILURE(Run(all.params));
  const std::vector<double> source = all.qkv.InitialValues();
  const std::vector<double> expected = all.qkv.Values();
  for (int64_t ranks : {1, 2, 4, 8}) {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      QkNormConfig c = whole;
      c.num_q_heads = whole.num_q_heads / ranks;
      // With more ranks than K heads, several ranks hold the same one.
      c.num_kv_heads = std::max<int64_t>(whole.num_kv_heads / ranks, 1);
      const int64_t first_kv = rank * whole.num_kv_heads / ranks;
      const int64_t q_column = rank * c.num_q_heads * 128;
      const int64_t q_width = c.num_q_heads * 128;
      const int64_t k_column = whole.k_offset() + first_kv * 128;
      const int64_t k_width = c.num_kv_heads * 128;
      const auto take = [&](const std::vector<double>& from, int64_t column,
                            int64_t count) {
        std::vector<float> values;
        for (int64_t t = 0; t < whole.tokens; ++t) {
          const double* row = &from[t * whole.width() + column];
          values.insert(values.end(), row, row + count);
        }
        return values;
      };
      const TestTensor q(device(), dtype(), {c.tokens, c.num_q_heads, 128},
                         take(source, q_column, q_width));
      const TestTensor k(device(), dtype(), {c.tokens, c.num_kv_heads, 128},
                         take(source, k_column, k_width));
      QkNormParams p = testing::Unpacked(all.params);
      p.q = q.view();
      p.k = k.view();
      ASSERT_NO_FATAL_FAILURE(Run(p));
      const auto as_floats = [](const std::vector<double>& values) {
        return std::vector<float>(values.begin(), values.end());
      };
      EXPECT_EQ(as_floats(q.Values()), take(expected, q_column, q_width));
      EXPECT_EQ(as_floats(k.Values()), take(expected, k_column, k_width));
    }
  }
}

TEST_P(QkNormTest, HeadsDoNotMixAndZeroHeadsStayZero) {
  QkNormConfig c;
  c.tokens = 3;
  PackedQkNorm clean = Make(c);
  AddRotary(&clean, 64);
  PackedQkNorm dirty = Make(c);
  std::vector<double> initial = dirty.qkv.InitialValues();
  std::vector<float> values(initial.begin(), initial.end());
  // Of token 1: head 1 NaN, K head 0 infinite, head 2 zero.
  const int64_t row = c.width();
  std::fill_n(&values[row + 128], 128, NAN);
  std::fill_n(&values[row + c.k_offset()], 128, INFINITY);
  std::fill_n(&values[row + 256], 128, 0.0f);
  dirty.qkv = TestTensor(device(), dtype(), {c.tokens, c.width()}, values);
  dirty.params.qkv = dirty.qkv.view();
  AddRotary(&dirty, 64);
  ASSERT_NO_FATAL_FAILURE(Run(clean.params));
  ASSERT_NO_FATAL_FAILURE(Run(dirty.params));
  const std::vector<double> expected = clean.qkv.Values();
  const std::vector<double> actual = dirty.qkv.Values();
  for (int64_t i = 0; i < 3 * row; ++i) {
    const int64_t column = i - row;
    if (column >= 128 && column < 256) {
      ASSERT_TRUE(std::isnan(actual[i])) << i;
    } else if (column >= 256 && column < 384) {
      ASSERT_EQ(actual[i], 0.0) << i;
    } else if (column < c.k_offset() || column >= c.k_offset() + 128) {
      ASSERT_EQ(actual[i], expected[i]) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, QkNormTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
