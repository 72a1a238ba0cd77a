#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/ops/qk_norm_fixture.h"
#include "tests/testing/test_size.h"

namespace tenon {
namespace {

using testing::IsClose;
using testing::kMaxPositions;
using testing::PackedQkNorm;
using testing::QkNormConfig;
using testing::RoundTo;

class QkNormRotaryTest : public testing::QkNormTest {};

// Rotated heads against the rotation of the op's own norm: what is left is one
// rounding, and the tail must be the norm bit by bit.
TEST_P(QkNormRotaryTest, Acceptance08_RotaryOfTheNorm) {
  for (const auto& [head_dim, rotary_dim] :
       testing::Fewer<std::pair<int64_t, int64_t>>({{128, 128},
                                                    {128, 64},
                                                    {64, 64},
                                                    {64, 32},
                                                    {256, 256},
                                                    {256, 64},
                                                    {128, 96},
                                                    {128, 48},
                                                    {128, 16},
                                                    {128, 2},
                                                    {64, 6},
                                                    {256, 130},
                                                    {128, 126}},
                                                   7)) {
    // Few heads, so that warps have idle lanes; up to 8, with K beside Q.
    for (int64_t num_q_heads : {1, 2, 3, 4, 5, 6, 7, 8}) {
      SCOPED_TRACE(StrCat("head_dim ", head_dim, " rotary_dim ", rotary_dim,
                          " q heads ", num_q_heads));
      QkNormConfig c;
      c.tokens = 9;
      c.num_q_heads = num_q_heads;
      c.num_kv_heads = num_q_heads % 3 + 1;
      c.head_dim = head_dim;
      c.gap = 8;
      c.rounding = num_q_heads % 2 == 0 ? NormRounding::kCastThenMultiply
                                        : NormRounding::kFloat32Multiply;
      const PackedQkNorm norm = Make(c, rotary_dim);
      PackedQkNorm packed = Make(c, rotary_dim);
      AddRotary(&packed, rotary_dim,
                num_q_heads % 2 == 0 ? DType::kInt64 : DType::kInt32,
                num_q_heads % 4 == 3 ? 1 : 0);
      ASSERT_NO_FATAL_FAILURE(Run(norm.params));
      ASSERT_NO_FATAL_FAILURE(Run(packed.params));
      ExpectOnlyHeadsChanged(packed);
      const std::vector<double> normed = Heads(c, norm.qkv.Values());
      const std::vector<double> actual = Heads(c, packed.qkv.Values());
      testing::Closeness closeness;
      // Where the rotation cancels, the float32 products' rounding remains.
      closeness.absolute = 16.0 * std::ldexp(1.0, -24);
      if (dtype() == DType::kFloat32) closeness.min_exact = 0.0;
      // Few rotated elements have errors at all.
      closeness.check_bias = dtype() != DType::kFloat32 && rotary_dim >= 32;
      EXPECT_TRUE(IsClose(actual, ExpectedRotation(packed, normed), dtype(),
                          closeness));
      for (size_t i = 0; i < actual.size(); ++i) {
        const int64_t row = (c.num_q_heads + c.num_kv_heads) * head_dim;
        const int64_t position =
            packed.position_values[static_cast<int64_t>(i) / row];
        const bool rotated = position >= 0 && position < kMaxPositions &&
                             static_cast<int64_t>(i) % head_dim < rotary_dim;
        if (!rotated) {
          ASSERT_EQ(FloatBits(static_cast<float>(actual[i])),
                    FloatBits(static_cast<float>(normed[i])))
              << "element " << i;
        }
      }
    }
  }
}

// Norm and rotation against fp64 from end to end, on the shapes of the models.
TEST_P(QkNormRotaryTest, Acceptance08_NormAndRotaryMatchReference) {
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    SCOPED_TRACE(shape.name);
    const QkNormConfig c = FromShape(shape, 17);
    PackedQkNorm packed = Make(c);
    AddRotary(&packed, shape.rotary_dim);
    ASSERT_NO_FATAL_FAILURE(Run(packed.params));
    std::vector<double> expected = ExpectedNorm(packed);
    for (double& v : expected) v = RoundTo(dtype(), v);
    expected = ExpectedRotation(packed, expected);
    testing::Closeness closeness = Tolerance(c.rounding);
    closeness.min_exact = std::min(closeness.min_exact, 0.998);
    // One rounding of an operand, of magnitude up to 16.
    closeness.absolute = std::ldexp(1.0, dtype() == DType::kFloat32   ? -18
                                         : dtype() == DType::kFloat16 ? -7
                                                                      : -4);
    EXPECT_TRUE(
        IsClose(Heads(c, packed.qkv.Values()), expected, dtype(), closeness));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, QkNormRotaryTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
