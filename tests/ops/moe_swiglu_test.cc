#include "ops/moe/moe_swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/reference/moe_swiglu_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/huge_memory.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::IsClose;
using testing::Normal;
using testing::RoundTo;
using testing::TestTensor;

struct Form {
  SwiGluLayout layout = SwiGluLayout::kBlocked;
  float limit = 0.0f;
  float alpha = 0.0f;
};

constexpr Form kForms[] = {{SwiGluLayout::kBlocked, 0.0f, 0.0f},
                           {SwiGluLayout::kInterleaved, 0.0f, 0.0f},
                           {SwiGluLayout::kBlocked, 7.0f, 1.702f},
                           {SwiGluLayout::kInterleaved, 2.0f, 1.702f}};

class MoeSwiGluTest : public testing::OpTest {
 protected:
  MoeSwiGluParams Params(const Form& form, const TensorView& x,
                         const TensorView& out) {
    MoeSwiGluParams p;
    p.x = x;
    p.out = out;
    p.layout = form.layout;
    p.limit = form.limit;
    p.alpha = form.alpha;
    return p;
  }

  std::vector<double> Expected(const Form& form, const std::vector<double>& x,
                               int64_t width) {
    std::vector<double> out(x.size() / 2);
    for (size_t i = 0; i < out.size(); ++i) {
      const double* row = &x[i / width * 2 * width];
      const int64_t column = static_cast<int64_t>(i) % width;
      const bool blocked = form.layout == SwiGluLayout::kBlocked;
      const double gate = row[blocked ? column : 2 * column];
      const double up = row[blocked ? width + column : 2 * column + 1];
      out[i] = form.limit > 0.0f
                   ? reference::SwiGluLimited(gate, up, form.limit, form.alpha)
                   : reference::SwiGlu(gate, up, [&](double v) {
                       return RoundTo(dtype(), v);
                     });
    }
    return out;
  }

  testing::Closeness Tolerance(const Form& form) const {
    // Clamping makes elements equal, and so their errors.
    const bool check_bias = form.limit == 0.0f;
    // The exponential multiplies the rounding error of alpha * gate by that.
    if (dtype() == DType::kFloat32) return {24, 0.0, 0.0, check_bias};
    // A one-ulp difference in the middle is up to two after the product.
    return {2, 0.999, 0.0, check_bias};
  }

  // Runs and compares, with x and out strided by `padding` extra elements.
  void RunAndCheck(const Form& form, int64_t rows, int64_t width,
                   int64_t padding) {
    SCOPED_TRACE(StrCat(rows, "x", width, " padding ", padding, " layout ",
                        static_cast<int>(form.layout), " limit ", form.limit));
    TestTensor x(device(), dtype(), {rows, 2 * width}, {2 * width + padding, 1},
                 Normal(rows * 2 * width, 1, 0.0f, 3.0f));
    TestTensor out(device(), dtype(), {rows, width}, {width + padding, 1}, {});
    const MoeSwiGluParams p = Params(form, x.view(), out.view());
    const Status status = MoeSwiGlu(p, stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_TRUE(IsClose(out.Values(), Expected(form, x.InitialValues(), width),
                        dtype(), Tolerance(form)));
    EXPECT_EQ(x.Bytes(), x.InitialBytes());
    EXPECT_EQ(out.NumStrayWrites(), 0);
    const std::vector<uint8_t> bytes = out.Bytes();
    ASSERT_TRUE(MoeSwiGlu(p, stream()).ok());
    Finish();
    EXPECT_EQ(out.Bytes(), bytes);
  }
};

TEST_P(MoeSwiGluTest, Acceptance19_MatchesReference) {
  for (const Form& form : kForms) {
    for (const auto& [rows, width, padding] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 0},
                                                            {2, 2, 3},
                                                            {3, 13, 0},
                                                            {111, 111, 5},
                                                            {8, 192, 0},
                                                            {1, 768, 0},
                                                            {37, 768, 8},
                                                            {37, 768, 1},
                                                            {5, 2056, 16}}) {
      RunAndCheck(form, rows, width, padding);
    }
  }
}

// The intermediate sizes and row counts of the models, with wide grids.
TEST_P(MoeSwiGluTest, Acceptance19_ModelShapes) {
  if (device().type != DeviceType::kCuda) {
    GTEST_SKIP() << "covered by smaller shapes";
  }
  for (int64_t width : {192, 384, 768, 1536}) {
    RunAndCheck(kForms[0], 8192, width, 0);
  }
  RunAndCheck(kForms[1], 3, 20000, 0);
  RunAndCheck(kForms[0], 100003, 3, 0);
}

TEST_P(MoeSwiGluTest, Acceptance19_MiddleRounding) {
  if (dtype() == DType::kFloat32) GTEST_SKIP() << "one dtype, one rounding";
  constexpr int64_t kWidth = 512;
  TestTensor x(device(), dtype(), {4, 2 * kWidth}, Normal(8 * kWidth, 2));
  TestTensor out(device(), dtype(), {4, kWidth});
  ASSERT_TRUE(
      MoeSwiGlu(Params(kForms[0], x.view(), out.view()), stream()).ok());
  Finish();
  const std::vector<double> values = x.InitialValues();
  std::vector<double> one_rounding(4 * kWidth);
  for (int64_t i = 0; i < 4 * kWidth; ++i) {
    const int64_t at = i / kWidth * 2 * kWidth + i % kWidth;
    one_rounding[i] =
        RoundTo(dtype(), reference::SwiGlu(values[at], values[at + kWidth],
                                           [](double v) { return v; }));
  }
  EXPECT_NE(out.Values(), one_rounding);
}

TEST_P(MoeSwiGluTest, Acceptance19_LargeOffsets) {
  constexpr int64_t kRows = 3;
  constexpr int64_t kWidth = 40;
  constexpr int64_t kStride = (int64_t{1} << 30) + 64;  // row 2: beyond 2^31
  const size_t bytes = static_cast<size_t>((kRows - 1) * kStride + 2 * kWidth) *
                       DTypeSize(dtype());
  const testing::HugeMemory x_memory(device(), bytes);
  const testing::HugeMemory out_memory(device(), bytes);
  if (x_memory.data() == nullptr || out_memory.data() == nullptr) {
    GTEST_SKIP() << "not enough memory";
  }
  TestTensor x(device(), dtype(), {kRows, 2 * kWidth},
               Normal(kRows * 2 * kWidth, 3));
  TestTensor out(device(), dtype(), {kRows, kWidth});
  const TensorView far_x = MakeMatrix(x_memory.data(), dtype(), device(), kRows,
                                      2 * kWidth, kStride);
  const TensorView far_out =
      MakeMatrix(out_memory.data(), dtype(), device(), kRows, kWidth, kStride);
  for (int64_t row = 0; row < kRows; ++row) {
    ASSERT_TRUE(testing::CopyEntry(far_x, x.view(), row).ok());
  }
  for (const Form& form : kForms) {
    ASSERT_TRUE(MoeSwiGlu(Params(form, far_x, far_out), stream()).ok());
    Finish();
    for (int64_t row = 0; row < kRows; ++row) {
      ASSERT_TRUE(testing::CopyEntry(out.view(), far_out, row).ok());
    }
    Finish();
    testing::Closeness tolerance = Tolerance(form);
    tolerance.min_exact = 0.0;  // few elements
    EXPECT_TRUE(IsClose(out.Values(), Expected(form, x.InitialValues(), kWidth),
                        dtype(), tolerance));
  }
}

TEST_P(MoeSwiGluTest, ExtremeGates) {
  const float infinity = std::numeric_limits<float>::infinity();
  const TestTensor x(device(), dtype(), {1, 8},
                     {-200.0f, 200.0f, 0.0f, infinity, 1.0f, 2.0f, 3.0f, 1.0f});
  TestTensor out(device(), dtype(), {1, 4});
  ASSERT_TRUE(
      MoeSwiGlu(Params(kForms[0], x.view(), out.view()), stream()).ok());
  Finish();
  const std::vector<double> values = out.Values();
  EXPECT_NEAR(values[0], 0.0, 1e-37);
  EXPECT_EQ(values[1], 400.0);
  EXPECT_EQ(values[2], 0.0);
  EXPECT_EQ(values[3], infinity);
}

TEST_P(MoeSwiGluTest, NanStaysNan) {
  const TestTensor x(device(), dtype(), {1, 4}, {NAN, 1.0f, 1.0f, NAN});
  TestTensor out(device(), dtype(), {1, 2});
  for (int form : {0, 2}) {
    ASSERT_TRUE(
        MoeSwiGlu(Params(kForms[form], x.view(), out.view()), stream()).ok());
    Finish();
    for (double value : out.Values()) EXPECT_TRUE(std::isnan(value));
  }
}

TEST_P(MoeSwiGluTest, RowDoesNotDependOnTheOthers) {
  constexpr int64_t kWidth = 776;
  const TestTensor x(device(), dtype(), {67, 2 * kWidth},
                     Normal(67 * 2 * kWidth, 4));
  TestTensor all(device(), dtype(), {67, kWidth});
  TestTensor one(device(), dtype(), {1, kWidth});
  ASSERT_TRUE(
      MoeSwiGlu(Params(kForms[0], x.view(), all.view()), stream()).ok());
  ASSERT_TRUE(
      MoeSwiGlu(Params(kForms[0], Rows(x.view(), 41, 1), one.view()), stream())
          .ok());
  Finish();
  const std::vector<double> values = all.Values();
  EXPECT_EQ(one.Values(), std::vector<double>(values.begin() + 41 * kWidth,
                                              values.begin() + 42 * kWidth));
}

TEST_P(MoeSwiGluTest, ZeroRowsIsOk) {
  const TestTensor x(device(), dtype(), {0, 64});
  TestTensor out(device(), dtype(), {0, 32});
  EXPECT_TRUE(
      MoeSwiGlu(Params(kForms[0], x.view(), out.view()), stream()).ok());
}

TEST_P(MoeSwiGluTest, RejectsBadArguments) {
  const TestTensor x(device(), dtype(), {4, 64}, Normal(4 * 64, 5));
  TestTensor out(device(), dtype(), {4, 32});
  const MoeSwiGluParams good = Params(kForms[0], x.view(), out.view());
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeSwiGluParams p = good;
    change(p);
    parts.push_back("MoeSwiGlu: ");
    testing::ExpectInvalid(MoeSwiGlu(p, stream()), parts);
  };
  using P = MoeSwiGluParams;
  expect({"x is missing"}, [](P& p) { p.x = TensorView(); });
  expect({"x", "null data"}, [](P& p) { p.x.data = nullptr; });
  expect({"x", "int32"}, [](P& p) { p.x.dtype = DType::kInt32; });
  expect({"x", "rank 3"}, [](P& p) { p.x.rank = 3; });
  expect({"x", "innermost stride 2"}, [](P& p) { p.x.stride[1] = 2; });
  expect({"columns of x is 0"}, [](P& p) { p.x.shape[1] = 0; });
  expect({"x has 63 columns", "even"}, [](P& p) { p.x.shape[1] = 63; });
  expect({"out", "[4, 31]", "[4, 32]"}, [](P& p) { p.out.shape[1] = 31; });
  expect({"out", "[5, 32]"}, [](P& p) { p.out.shape[0] = 5; });
  expect({"out", "dtype"}, [](P& p) { p.out.dtype = DType::kUInt8; });
  expect({"out", "share memory"}, [](P& p) { p.out.stride[0] = 31; });
  expect({"out is on cuda:7"}, [](P& p) {
    p.out.device = {DeviceType::kCuda, 7};
  });
  expect({"out overlaps x"}, [](P& p) { p.out.data = p.x.data; });
  expect({"layout is 2"},
         [](P& p) { p.layout = static_cast<SwiGluLayout>(2); });
  expect({"limit is -1"}, [](P& p) { p.limit = -1.0f; });
  expect({"limit is nan"}, [](P& p) { p.limit = NAN; });
  expect({"alpha (with a limit) is 0"}, [](P& p) { p.limit = 7.0f; });
  expect({"alpha (without a limit) is 1"}, [](P& p) { p.alpha = 1.0f; });
  expect({"alpha", "inf"}, [](P& p) {
    p.limit = 7.0f;
    p.alpha = std::numeric_limits<float>::infinity();
  });
  EXPECT_EQ(out.Bytes(), out.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeSwiGluTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
