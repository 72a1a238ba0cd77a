#include "ops/rms_norm/rms_norm.h"

#include <gtest/gtest.h>

#include "tests/reference/rms_norm_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::IsClose;
using testing::Normal;
using testing::RoundTo;
using testing::TestTensor;

constexpr float kEpsilon = 1e-6f;

class RmsNormTest : public testing::OpTest {
 protected:
  TestTensor Tensor(std::vector<int64_t> shape, std::vector<int64_t> strides,
                    uint64_t seed, float mean = 0.0f) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    return TestTensor(device(), dtype(), shape, strides,
                      Normal(count, seed, mean));
  }

  // Reference of one call: rows of x (+ residual, rounded) normalised.
  std::vector<double> Expected(const TestTensor& x, const TestTensor& weight,
                               const TestTensor* residual,
                               NormRounding rounding) {
    const int64_t hidden = x.view().shape[1];
    std::vector<double> v = x.InitialValues();
    if (residual != nullptr) {
      const std::vector<double> r = residual->InitialValues();
      for (size_t i = 0; i < v.size(); ++i)
        v[i] = RoundTo(dtype(), v[i] + r[i]);
    }
    std::vector<double> expected;
    for (size_t begin = 0; begin < v.size(); begin += hidden) {
      const auto row = reference::RmsNorm(
          {v.begin() + begin, v.begin() + begin + hidden},
          weight.InitialValues(), kEpsilon, [&](double value) {
            return rounding == NormRounding::kCastThenMultiply
                       ? RoundTo(dtype(), value)
                       : value;
          });
      expected.insert(expected.end(), row.begin(), row.end());
    }
    return expected;
  }

  testing::Closeness Tolerance(NormRounding rounding) const {
    testing::Closeness closeness;
    // Float32 sums differ from the reference in their last bits, which moves a
    // whole row one way.
    if (dtype() == DType::kFloat32) return {16, 0.0, 0.0, false};
    // A one-ulp difference before the weight is up to two after it.
    if (rounding == NormRounding::kCastThenMultiply) closeness.max_ulp = 2;
    return closeness;
  }
};

TEST_P(RmsNormTest, MatchesReference) {
  for (const auto& [tokens, hidden, padding] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 0},
                                                          {3, 13, 0},
                                                          {7, 111, 5},
                                                          {2, 128, 0},
                                                          {5, 2048, 8},
                                                          {33, 4096, 0},
                                                          {2, 8192, 0},
                                                          {3, 16392, 16}}) {
    for (NormRounding rounding :
         {NormRounding::kFloat32Multiply, NormRounding::kCastThenMultiply}) {
      SCOPED_TRACE(StrCat(tokens, "x", hidden, " padding ", padding,
                          " rounding ", static_cast<int>(rounding)));
      const int64_t stride = hidden + padding;
      TestTensor x = Tensor({tokens, hidden}, {stride, 1}, 1);
      TestTensor weight = Tensor({hidden}, {1}, 2, 1.0f);
      TestTensor out(device(), dtype(), {tokens, hidden}, {stride, 1}, {});
      RmsNormParams p;
      p.x = x.view();
      p.weight = weight.view();
      p.out = out.view();
      p.epsilon = kEpsilon;
      p.rounding = rounding;
      const Status status = RmsNorm(p, stream());
      ASSERT_TRUE(status.ok()) << status.message();
      Finish();
      EXPECT_TRUE(IsClose(out.Values(), Expected(x, weight, nullptr, rounding),
                          dtype(), Tolerance(rounding)));
      EXPECT_EQ(x.Bytes(), x.InitialBytes());
      EXPECT_EQ(out.NumStrayWrites(), 0);
    }
  }
}

TEST_P(RmsNormTest, AddsTheResidualInPlace) {
  for (int64_t hidden : {13, 2048, 12288}) {
    SCOPED_TRACE(hidden);
    TestTensor x = Tensor({5, hidden}, {hidden, 1}, 3);
    TestTensor residual = Tensor({5, hidden}, {hidden + 8, 1}, 4, 0.5f);
    TestTensor weight = Tensor({hidden}, {1}, 5, 1.0f);
    RmsNormParams p;
    p.x = p.out = x.view();  // in place
    p.residual = residual.view();
    p.weight = weight.view();
    p.epsilon = kEpsilon;
    ASSERT_TRUE(RmsNorm(p, stream()).ok());
    Finish();
    std::vector<double> sum = x.InitialValues();
    const std::vector<double> r = residual.InitialValues();
    for (size_t i = 0; i < sum.size(); ++i) {
      sum[i] = RoundTo(dtype(), sum[i] + r[i]);
    }
    EXPECT_EQ(residual.Values(), sum);
    EXPECT_EQ(residual.NumStrayWrites(), 0);
    EXPECT_TRUE(IsClose(x.Values(), Expected(x, weight, &residual, p.rounding),
                        dtype(), Tolerance(p.rounding)));
  }
}

TEST_P(RmsNormTest, RoundingModesDiffer) {
  if (dtype() == DType::kFloat32) GTEST_SKIP() << "one rounding in float32";
  TestTensor x = Tensor({4, 256}, {256, 1}, 6);
  TestTensor weight = Tensor({256}, {1}, 7, 1.0f);
  TestTensor out(device(), dtype(), {4, 256});
  RmsNormParams p;
  p.x = x.view();
  p.weight = weight.view();
  p.out = out.view();
  p.epsilon = kEpsilon;
  ASSERT_TRUE(RmsNorm(p, stream()).ok());
  Finish();
  const std::vector<double> one_rounding = out.Values();
  p.rounding = NormRounding::kCastThenMultiply;
  ASSERT_TRUE(RmsNorm(p, stream()).ok());
  Finish();
  EXPECT_NE(out.Values(), one_rounding);
}

TEST_P(RmsNormTest, RowDoesNotDependOnTheOthers) {
  constexpr int64_t kHidden = 2056;
  TestTensor x = Tensor({67, kHidden}, {kHidden, 1}, 8);
  TestTensor weight = Tensor({kHidden}, {1}, 9, 1.0f);
  TestTensor all(device(), dtype(), {67, kHidden});
  TestTensor one(device(), dtype(), {1, kHidden});
  RmsNormParams p;
  p.x = x.view();
  p.weight = weight.view();
  p.out = all.view();
  p.epsilon = kEpsilon;
  ASSERT_TRUE(RmsNorm(p, stream()).ok());
  p.x = Rows(x.view(), 41, 1);
  p.out = one.view();
  ASSERT_TRUE(RmsNorm(p, stream()).ok());
  Finish();
  const std::vector<double> values = all.Values();
  EXPECT_EQ(one.Values(), std::vector<double>(values.begin() + 41 * kHidden,
                                              values.begin() + 42 * kHidden));
}

TEST_P(RmsNormTest, AlignmentDoesNotChangeBits) {
  constexpr int64_t kHidden = 1032;
  constexpr int64_t kStride = kHidden + 9;  // odd: most rows are not aligned
  for (DType weight_dtype : {dtype(), DType::kFloat32}) {
    TestTensor x = Tensor({5, kHidden}, {kHidden, 1}, 14);
    TestTensor padded = Tensor({5, kHidden}, {kStride, 1}, 14);
    TestTensor weight(device(), weight_dtype, {kHidden},
                      Normal(kHidden, 15, 1.0f));
    TestTensor residual = Tensor({5, kHidden}, {kHidden, 1}, 16);
    TestTensor padded_residual = Tensor({5, kHidden}, {kStride, 1}, 16);
    RmsNormParams p;
    p.x = p.out = x.view();
    p.residual = residual.view();
    p.weight = weight.view();
    p.epsilon = kEpsilon;
    ASSERT_TRUE(RmsNorm(p, stream()).ok());
    p.x = p.out = padded.view();
    p.residual = padded_residual.view();
    ASSERT_TRUE(RmsNorm(p, stream()).ok());
    Finish();
    EXPECT_EQ(x.Values(), padded.Values());
    EXPECT_EQ(residual.Values(), padded_residual.Values());
    EXPECT_EQ(padded.NumStrayWrites(), 0);
    EXPECT_EQ(padded_residual.NumStrayWrites(), 0);
  }
}

TEST_P(RmsNormTest, ZeroTokensIsOk) {
  TestTensor x(device(), dtype(), {0, 64});
  TestTensor weight = Tensor({64}, {1}, 10);
  RmsNormParams p;
  p.x = p.out = x.view();
  p.weight = weight.view();
  p.epsilon = kEpsilon;
  EXPECT_TRUE(RmsNorm(p, stream()).ok());
}

TEST_P(RmsNormTest, AllZeroRowGivesZero) {
  TestTensor x(device(), dtype(), {2, 64}, std::vector<float>(128, 0.0f));
  TestTensor weight = Tensor({64}, {1}, 11);
  RmsNormParams p;
  p.x = p.out = x.view();
  p.weight = weight.view();
  p.epsilon = kEpsilon;
  ASSERT_TRUE(RmsNorm(p, stream()).ok());
  Finish();
  for (double v : x.Values()) EXPECT_EQ(v, 0.0);
}

TEST_P(RmsNormTest, RejectsBadArguments) {
  TestTensor x = Tensor({4, 64}, {64, 1}, 12);
  TestTensor weight = Tensor({64}, {1}, 13);
  TestTensor out(device(), dtype(), {4, 64});
  RmsNormParams good;
  good.x = x.view();
  good.weight = weight.view();
  good.out = out.view();
  good.epsilon = kEpsilon;
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    RmsNormParams p = good;
    change(p);
    testing::ExpectInvalid(RmsNorm(p, stream()), parts);
  };
  expect({"RmsNorm", "x is missing"},
         [](RmsNormParams& p) { p.x = TensorView(); });
  expect({"x", "null data"}, [](RmsNormParams& p) { p.x.data = nullptr; });
  expect({"x", "rank 3"}, [](RmsNormParams& p) { p.x.rank = 3; });
  expect({"x", "int32"}, [](RmsNormParams& p) { p.x.dtype = DType::kInt32; });
  expect({"x", "stride -1"}, [](RmsNormParams& p) { p.x.stride[0] = -1; });
  expect({"x", "innermost stride 2"},
         [](RmsNormParams& p) { p.x.stride[1] = 2; });
  expect({"x", "2^63"},
         [](RmsNormParams& p) { p.x.stride[0] = int64_t{1} << 62; });
  expect({"x", "[-1, 64]"}, [](RmsNormParams& p) { p.x.shape[0] = -1; });
  expect({"weight", "[63]", "[64]"},
         [](RmsNormParams& p) { p.weight.shape[0] = 63; });
  expect({"weight", "dtype"},
         [](RmsNormParams& p) { p.weight.dtype = DType::kUInt8; });
  expect({"out", "[3, 64]"}, [](RmsNormParams& p) { p.out.shape[0] = 3; });
  expect({"out", "share memory"},
         [](RmsNormParams& p) { p.out.stride[0] = 63; });
  expect({"out", "cuda:7"}, [](RmsNormParams& p) {
    p.out.device = {DeviceType::kCuda, 7};
  });
  expect({"out overlaps x"},
         [](RmsNormParams& p) { p.out.data = p.x.As<char>() + 64; });
  expect({"residual overlaps"}, [](RmsNormParams& p) { p.residual = p.x; });
  expect({"out overlaps weight"},
         [](RmsNormParams& p) { p.weight.data = p.out.As<char>() + 64; });
  expect({"epsilon", "0"}, [](RmsNormParams& p) { p.epsilon = 0.0f; });
  expect({"epsilon", "nan"}, [](RmsNormParams& p) { p.epsilon = NAN; });
  expect({"rounding", "2"},
         [](RmsNormParams& p) { p.rounding = static_cast<NormRounding>(2); });
  EXPECT_EQ(out.Bytes(), out.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, RmsNormTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
