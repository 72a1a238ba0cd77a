#ifndef TENON_TESTS_OPS_QK_NORM_FIXTURE_H_
#define TENON_TESTS_OPS_QK_NORM_FIXTURE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/qk_norm/qk_norm.h"
#include "tests/reference/qk_norm_reference.h"
#include "tests/reference/rms_norm_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/shapes.h"
#include "tests/testing/test_tensor.h"

namespace tenon::testing {

inline constexpr float kEpsilon = 1e-6f;
inline constexpr int64_t kMaxPositions = 37;
inline constexpr int64_t kGuardBytes =
    256;  // in front of a TestTensor's elements

struct QkNormConfig {
  int64_t tokens = 5;
  int64_t num_q_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 128;
  int64_t gap = 0;      // elements before, between and after Q, K and V
  int64_t padding = 0;  // elements between rows
  bool float_weights = false;
  NormRounding rounding = NormRounding::kFloat32Multiply;
  int64_t distinct_rows = 0;  // > 0: rows repeat with this period

  int64_t q_offset() const { return gap; }
  int64_t k_offset() const { return q_offset() + num_q_heads * head_dim + gap; }
  int64_t v_offset() const {
    return k_offset() + num_kv_heads * head_dim + gap;
  }
  int64_t width() const { return v_offset() + num_kv_heads * head_dim + gap; }
};

// The tensors of one call in the packed form.
struct PackedQkNorm {
  QkNormConfig config;
  TestTensor qkv, q_weight, k_weight;
  TestTensor cos_sin, positions;
  std::vector<int64_t> position_values;
  TestTensor k_cache, v_cache, slots;
  std::vector<int64_t> slot_values;
  QkNormParams params;
};

// Without what describes a packed row, for a call in the strided form.
inline QkNormParams Unpacked(QkNormParams p) {
  p.qkv = TensorView();
  p.q_offset = p.k_offset = p.v_offset = 0;
  p.num_q_heads = p.num_kv_heads = p.head_dim = 0;
  return p;
}

// The base of the suites of QkNorm.
class QkNormTest : public OpTest {
 protected:
  PackedQkNorm Make(const QkNormConfig& c, uint64_t seed = 1) {
    PackedQkNorm packed;
    packed.config = c;
    const int64_t distinct = c.distinct_rows > 0 ? c.distinct_rows : c.tokens;
    std::vector<float> values = Normal(distinct * c.width(), seed, 0.0f, 2.0f);
    for (int64_t i = distinct * c.width(); i < c.tokens * c.width(); ++i) {
      values.push_back(values[i - distinct * c.width()]);
    }
    packed.qkv = TestTensor(device(), dtype(), {c.tokens, c.width()},
                            {c.width() + c.padding, 1}, values);
    const DType weight_dtype = c.float_weights ? DType::kFloat32 : dtype();
    packed.q_weight = TestTensor(device(), weight_dtype, {c.head_dim},
                                 Normal(c.head_dim, seed + 1, 1.0f, 0.5f));
    packed.k_weight = TestTensor(device(), weight_dtype, {c.head_dim},
                                 Normal(c.head_dim, seed + 2, 1.0f, 0.5f));
    QkNormParams& p = packed.params;
    p.qkv = packed.qkv.view();
    p.q_offset = c.q_offset();
    p.k_offset = c.k_offset();
    p.v_offset = c.v_offset();
    p.num_q_heads = static_cast<int32_t>(c.num_q_heads);
    p.num_kv_heads = static_cast<int32_t>(c.num_kv_heads);
    p.head_dim = static_cast<int32_t>(c.head_dim);
    p.q_weight = packed.q_weight.view();
    p.k_weight = packed.k_weight.view();
    p.epsilon = kEpsilon;
    p.rounding = c.rounding;
    return packed;
  }

  // Adds a rotary embedding; the last position is past the table where there
  // are enough tokens, and the one before it negative.
  void AddRotary(PackedQkNorm* packed, int64_t rotary_dim,
                 DType position_dtype = DType::kInt32, int64_t padding = 0) {
    const int64_t half = rotary_dim / 2;
    std::vector<float> table;
    for (int64_t position = 0; position < kMaxPositions; ++position) {
      for (int64_t i = 0; i < rotary_dim; ++i) {
        const double frequency =
            std::pow(1e4, -static_cast<double>(i % half) / half);
        const double angle = position * frequency;
        table.push_back(
            static_cast<float>(i < half ? std::cos(angle) : std::sin(angle)));
      }
    }
    packed->cos_sin =
        TestTensor(device(), DType::kFloat32, {kMaxPositions, rotary_dim},
                   {rotary_dim + padding, 1}, table);
    const int64_t tokens = packed->config.tokens;
    std::vector<int64_t>& positions = packed->position_values;
    positions = UniformIntegers(tokens, 7, 1, kMaxPositions - 1);
    if (tokens >= 4) {
      positions[tokens - 1] = kMaxPositions;
      positions[tokens - 2] = -1;
    }
    packed->positions =
        TestTensor::FromIntegers(device(), position_dtype, {tokens}, positions);
    packed->params.rotary = {packed->cos_sin.view(), packed->positions.view(),
                             static_cast<int32_t>(rotary_dim)};
  }

  // Adds a cache of pages of 3 slots in which every fourth token is skipped.
  void AddCache(PackedQkNorm* packed, DType cache_dtype, int64_t padding = 0) {
    const QkNormConfig& c = packed->config;
    constexpr int64_t kPageSize = 3;
    const int64_t pages = c.tokens / kPageSize + 2;
    const int64_t head = c.head_dim + padding;
    const int64_t slot = c.num_kv_heads * head + padding;
    const int64_t page = kPageSize * slot + padding;
    for (TestTensor* cache : {&packed->k_cache, &packed->v_cache}) {
      *cache = TestTensor(device(), cache_dtype,
                          {pages, kPageSize, c.num_kv_heads, c.head_dim},
                          {page, slot, head, 1}, {});
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
      // In descending order, so that a slot is not just its token.
      int64_t value = pages * kPageSize - 1 - t;
      if (t % 4 == 1) value = t % 8 == 1 ? -1 : INT64_MIN;
      if (t % 4 == 3) value = t % 8 == 3 ? pages * kPageSize : INT64_MAX;
      packed->slot_values.push_back(value);
    }
    packed->slots = TestTensor::FromIntegers(device(), DType::kInt64,
                                             {c.tokens}, packed->slot_values);
    const bool fp8 = cache_dtype == DType::kFloat8E4M3;
    packed->params.cache = {packed->k_cache.view(), packed->v_cache.view(),
                            packed->slots.view(), fp8 ? 0.013f : 1.0f,
                            fp8 ? 0.37f : 1.0f};
  }

  void Run(const QkNormParams& params) {
    const Status status = QkNorm(params, stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  // The heads of Q and K of `values`, elements of qkv, one after another.
  static std::vector<double> Heads(const QkNormConfig& c,
                                   const std::vector<double>& values) {
    std::vector<double> heads;
    for (int64_t t = 0; t < c.tokens; ++t) {
      const double* row = &values[t * c.width()];
      heads.insert(heads.end(), row + c.q_offset(),
                   row + c.q_offset() + c.num_q_heads * c.head_dim);
      heads.insert(heads.end(), row + c.k_offset(),
                   row + c.k_offset() + c.num_kv_heads * c.head_dim);
    }
    return heads;
  }

  // The fp64 reference of the norm, with the rounding points of the mode.
  std::vector<double> ExpectedNorm(const PackedQkNorm& packed) {
    const QkNormConfig& c = packed.config;
    const std::vector<double> heads = Heads(c, packed.qkv.InitialValues());
    const std::vector<double> q_weight = packed.q_weight.InitialValues();
    const std::vector<double> k_weight = packed.k_weight.InitialValues();
    const auto round = [&](double v) {
      return c.rounding == NormRounding::kCastThenMultiply ? RoundTo(dtype(), v)
                                                           : v;
    };
    std::vector<double> expected;
    for (size_t i = 0; i < heads.size(); i += c.head_dim) {
      const int64_t h = static_cast<int64_t>(i) / c.head_dim %
                        (c.num_q_heads + c.num_kv_heads);
      const auto head = reference::RmsNorm(
          {heads.begin() + i, heads.begin() + i + c.head_dim},
          h < c.num_q_heads ? q_weight : k_weight, kEpsilon, round);
      expected.insert(expected.end(), head.begin(), head.end());
    }
    return expected;
  }

  // Rotates heads of normalised and rounded values in fp64.
  static std::vector<double> ExpectedRotation(const PackedQkNorm& packed,
                                              std::vector<double> heads) {
    const QkNormConfig& c = packed.config;
    const int64_t rotary_dim = packed.params.rotary.rotary_dim;
    const std::vector<double> table = packed.cos_sin.InitialValues();
    const int64_t row = (c.num_q_heads + c.num_kv_heads) * c.head_dim;
    for (int64_t i = 0; i < c.tokens * row; i += c.head_dim) {
      const int64_t position = packed.position_values[i / row];
      if (position < 0 || position >= kMaxPositions) continue;
      const double* cos_sin = &table[position * rotary_dim];
      const auto head =
          reference::Rotate({heads.begin() + i, heads.begin() + i + c.head_dim},
                            {cos_sin, cos_sin + rotary_dim / 2},
                            {cos_sin + rotary_dim / 2, cos_sin + rotary_dim});
      std::copy(head.begin(), head.end(), heads.begin() + i);
    }
    return heads;
  }

  Closeness Tolerance(NormRounding rounding) const {
    Closeness closeness;
    // Float32 throughout: each product rounds, and a sum that differs in its
    // last bits moves a whole head one way.
    if (dtype() == DType::kFloat32) return {4, 0.0, 0.0, false};
    // A one-ulp difference before the weight is up to two after it.
    if (rounding == NormRounding::kCastThenMultiply) closeness.max_ulp = 2;
    return closeness;
  }

  // Everything but Q and K has its initial bytes.
  void ExpectOnlyHeadsChanged(const PackedQkNorm& packed) {
    const QkNormConfig& c = packed.config;
    std::vector<uint8_t> bytes = packed.qkv.Bytes();
    const std::vector<uint8_t>& initial = packed.qkv.InitialBytes();
    const int64_t size = static_cast<int64_t>(DTypeSize(dtype()));
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t row = kGuardBytes + t * (c.width() + c.padding) * size;
      for (const auto& [offset, heads] :
           {std::pair(c.q_offset(), c.num_q_heads),
            std::pair(c.k_offset(), c.num_kv_heads)}) {
        std::memcpy(&bytes[row + offset * size], &initial[row + offset * size],
                    static_cast<size_t>(heads * c.head_dim * size));
      }
    }
    EXPECT_EQ(std::memcmp(bytes.data(), initial.data(), bytes.size()), 0);
  }

  std::vector<int64_t> TokenCounts() const {
    if (device().type == DeviceType::kCuda) {
      return {0, 1, 8, 64, 128, 1024, 2048, 4096, 8192};
    }
    return {0, 1, 8, 64, 128};
  }

  static QkNormConfig FromShape(const ModelShape& shape, int64_t tokens) {
    QkNormConfig c;
    c.tokens = tokens;
    c.num_q_heads = shape.num_heads;
    c.num_kv_heads = shape.num_kv_heads;
    c.head_dim = shape.head_dim;
    return c;
  }
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_QK_NORM_FIXTURE_H_
