#include "ops/quantize/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/quantize/fp8_scale.h"
#include "ops/quantize/quantize_cpu_isa.h"
#include "tests/reference/quantize_reference.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Fewer;
using testing::Normal;
using testing::TestTensor;

struct Blocks {
  int32_t rows;
  int32_t cols;
};
constexpr Blocks kAllBlocks[] = {{1, 128}, {128, 128}, {1, 0}};

// The tensors of one call.
class Call {
 public:
  Call(Device device, DType dtype, int64_t rows, int64_t cols, Blocks blocks,
       const std::vector<float>& x, int64_t padding = 0)
      : rows_(rows),
        cols_(cols),
        blocks_(blocks),
        x_(device, dtype, {rows, cols}, {cols + padding, 1}, x),
        out_(device, DType::kFloat8E4M3, {rows, cols}, {cols + padding, 1},
             {}) {
    if (blocks.cols == 0) {
      scales_ = TestTensor(device, DType::kFloat32, {rows});
      return;
    }
    const int64_t count_r = (rows + blocks.rows - 1) / blocks.rows;
    const int64_t count_c = (cols + blocks.cols - 1) / blocks.cols;
    scales_ = TestTensor(device, DType::kFloat32, {count_r, count_c},
                         {count_c + padding, 1}, {});
  }

  QuantizeFp8Params params() const {
    QuantizeFp8Params p;
    p.x = x_.view();
    p.out = out_.view();
    p.scales = scales_.view();
    p.block_rows = blocks_.rows;
    p.block_cols = blocks_.cols;
    return p;
  }

  reference::QuantizedFp8 Expected() const {
    return reference::QuantizeFp8(x_.InitialValues(), rows_, cols_,
                                  blocks_.rows, blocks_.cols);
  }

  const TestTensor& x() const { return x_; }
  const TestTensor& out() const { return out_; }
  const TestTensor& scales() const { return scales_; }

 private:
  int64_t rows_, cols_;
  Blocks blocks_;
  TestTensor x_;
  TestTensor out_;
  TestTensor scales_;
};

// The same values, where NaN is equal to itself and zeros differ by sign.
void ExpectSame(const std::vector<double>& actual,
                const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(expected[i])) {
      ASSERT_TRUE(std::isnan(actual[i])) << "element " << i;
    } else {
      ASSERT_EQ(actual[i], expected[i]) << "element " << i;
      ASSERT_EQ(std::signbit(actual[i]), std::signbit(expected[i]))
          << "element " << i;
    }
  }
}

class QuantizeTest : public testing::OpTest {
 protected:
  void Run(const QuantizeFp8Params& p) {
    const Status status = QuantizeFp8(p, stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  // Every bit is that of the reference, and of the CPU.
  void Check(int64_t rows, int64_t cols, Blocks blocks,
             const std::vector<float>& x, int64_t padding = 0) {
    SCOPED_TRACE(StrCat(rows, "x", cols, " blocks ", blocks.rows, "x",
                        blocks.cols, " padding ", padding));
    const Call call(device(), dtype(), rows, cols, blocks, x, padding);
    Run(call.params());
    const reference::QuantizedFp8 expected = call.Expected();
    ExpectSame(call.out().Values(), expected.out);
    ExpectSame(call.scales().Values(), expected.scales);
    EXPECT_EQ(call.x().Bytes(), call.x().InitialBytes());
    EXPECT_EQ(call.out().NumStrayWrites(), 0);
    EXPECT_EQ(call.scales().NumStrayWrites(), 0);
    if (device().type == DeviceType::kCpu) return;
    const Call on_cpu(Device(), dtype(), rows, cols, blocks, x, padding);
    ASSERT_TRUE(QuantizeFp8(on_cpu.params(), Stream()).ok());
    EXPECT_EQ(call.out().Bytes(), on_cpu.out().Bytes());
    EXPECT_EQ(call.scales().Bytes(), on_cpu.scales().Bytes());
  }
};

TEST_P(QuantizeTest, MatchesReference) {
  for (const Blocks& blocks : kAllBlocks) {
    for (int64_t rows : Fewer<int64_t>({0, 1, 3, 13, 128, 130}, 4)) {
      for (int64_t cols :
           Fewer<int64_t>({1, 8, 13, 111, 128, 136, 192, 520}, 4)) {
        for (int64_t padding : {0, 3, 16}) {
          if (rows * cols > 10000 && padding == 3 && cols % 8 == 0) continue;
          Check(rows, cols, blocks, Normal(rows * cols, 1, 0.1f, 3.0f),
                padding);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(QuantizeTest, MatchesReferenceAtModelShapes) {
  for (const Blocks& blocks : kAllBlocks) {
    Check(7, 2048, blocks, Normal(7 * 2048, 2));
    Check(2, 6144, blocks, Normal(2 * 6144, 3));
    Check(300, 768, blocks, Normal(300 * 768, 4, 0.0f, 0.02f));
  }
}

// With 448 in the group the scale is 1, so the elements are rounded as they
// are.
TEST_P(QuantizeTest, RoundsTiesToEven) {
  std::vector<float> x = {448.0f};
  for (int code = 0; code < 0x7e; ++code) {
    // Halfway to the next value, and a little to either side.
    const double low = ToFloat(Float8E4M3{static_cast<uint8_t>(code)});
    const double high = ToFloat(Float8E4M3{static_cast<uint8_t>(code + 1)});
    const double middle = (low + high) / 2;
    for (double v : {low, middle, middle * (1 - 0x1p-7), middle * (1 + 0x1p-7),
                     middle * (1 - 0x1p-20), middle * (1 + 0x1p-20)}) {
      x.push_back(static_cast<float>(v));
      x.push_back(static_cast<float>(-v));
    }
    if (x.size() > 112) {
      x.resize(128, 0.0f);
      Check(1, 128, {1, 128}, x);
      x.resize(1);
    }
  }
}

// The largest magnitude becomes 448, whatever it is: the product may round to
// more, which saturates.
TEST_P(QuantizeTest, LargestElementBecomes448) {
  std::vector<float> x = Normal(512 * 128, 5);
  for (size_t i = 0; i < x.size(); i += 128) {
    x[i + i / 128 % 128] = i % 256 == 0 ? -10.0f - i : 10.0f + i / 3.0f;
  }
  const Call call(device(), dtype(), 512, 128, {1, 128}, x);
  Run(call.params());
  const std::vector<double> values = call.out().Values();
  for (size_t i = 0; i < values.size(); i += 128) {
    EXPECT_EQ(values[i + i / 128 % 128], i % 256 == 0 ? -448.0 : 448.0);
  }
  ExpectSame(values, call.Expected().out);
}

TEST_P(QuantizeTest, ZerosKeepTheirSignAndAFiniteScale) {
  for (const Blocks& blocks : kAllBlocks) {
    std::vector<float> x(2 * 160, 0.0f);
    x[3] = x[170] = -0.0f;
    Check(2, 160, blocks, x);
    const Call call(device(), dtype(), 2, 160, blocks, x);
    Run(call.params());
    for (double scale : call.scales().Values()) {
      EXPECT_EQ(scale, static_cast<double>(1e-10f / 448.0f));
    }
  }
}

// Below the floor of amax, elements round to few steps or to zero; denormals
// are not flushed before that.
TEST_P(QuantizeTest, TinyElements) {
  for (float size : {1e-9f, 1e-10f, 3e-11f, 1e-13f, 1e-30f, 1e-39f, 1e-44f}) {
    SCOPED_TRACE(size);
    for (const Blocks& blocks : kAllBlocks) {
      Check(2, 136, blocks, Normal(2 * 136, 6, 0.0f, size));
    }
  }
}

TEST_P(QuantizeTest, LargestFloats) {
  const float largest = dtype() == DType::kFloat16
                            ? 65504.0f
                            : ToFloat(BFloat16{0x7f7f});  // also a float32
  for (const Blocks& blocks : kAllBlocks) {
    std::vector<float> x = Normal(2 * 136, 7, 0.0f, largest / 8);
    x[5] = largest;
    x[200] = -largest;
    Check(2, 136, blocks, x);
  }
}

TEST_P(QuantizeTest, NanStaysAndSparesTheOthers) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Blocks& blocks : kAllBlocks) {
    std::vector<float> x = Normal(3 * 200, 8);
    x[0] = x[150] = nan;
    x[201] = -nan;
    Check(3, 200, blocks, x);
    const Call call(device(), dtype(), 3, 200, blocks, x);
    Run(call.params());
    int64_t num_nans = 0;
    for (double v : call.out().Values()) num_nans += std::isnan(v);
    EXPECT_EQ(num_nans, 3);
    for (double v : call.scales().Values()) EXPECT_TRUE(std::isfinite(v));
  }
  Check(1, 128, {1, 128}, std::vector<float>(128, nan));
}

TEST_P(QuantizeTest, InfinityMakesNoFiniteResult) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Blocks& blocks : kAllBlocks) {
    std::vector<float> x = Normal(2 * 136, 9);
    x[1] = infinity;
    x[2] = -infinity;
    Check(2, 136, blocks, x);
    const Call call(device(), dtype(), 2, 136, blocks, x);
    Run(call.params());
    const double scale = call.scales().Values()[0];
    EXPECT_TRUE(std::isinf(scale));
    const std::vector<double> values = call.out().Values();
    for (int i : {0, 1, 2, 3}) EXPECT_TRUE(std::isnan(values[i] * scale)) << i;
  }
}

TEST_P(QuantizeTest, AlignmentDoesNotChangeBits) {
  for (const Blocks& blocks : kAllBlocks) {
    const std::vector<float> x = Normal(5 * 264, 10);
    const Call aligned(device(), dtype(), 5, 264, blocks, x);
    const Call odd(device(), dtype(), 5, 264, blocks, x, 5);
    Run(aligned.params());
    Run(odd.params());
    EXPECT_EQ(aligned.out().Values(), odd.out().Values());
    EXPECT_EQ(aligned.scales().Values(), odd.scales().Values());
  }
}

TEST_P(QuantizeTest, RowDoesNotDependOnTheOthers) {
  for (const Blocks& blocks : {kAllBlocks[0], kAllBlocks[2]}) {
    const Call all(device(), dtype(), 37, 392, blocks, Normal(37 * 392, 11));
    Run(all.params());
    const TestTensor out(device(), DType::kFloat8E4M3, {1, 392});
    QuantizeFp8Params p = all.params();
    const int64_t per_row = NumElements(p.scales) / 37;
    const TestTensor scales =
        blocks.cols == 0 ? TestTensor(device(), DType::kFloat32, {1})
                         : TestTensor(device(), DType::kFloat32, {1, per_row});
    p.x = Rows(p.x, 29, 1);
    p.out = out.view();
    p.scales = scales.view();
    Run(p);
    const std::vector<double> values = all.out().Values();
    EXPECT_EQ(out.Values(), std::vector<double>(values.begin() + 29 * 392,
                                                values.begin() + 30 * 392));
    const std::vector<double> of_all = all.scales().Values();
    EXPECT_EQ(scales.Values(),
              std::vector<double>(of_all.begin() + 29 * per_row,
                                  of_all.begin() + 30 * per_row));
  }
}

TEST_P(QuantizeTest, GroupOnTheHostHasTheSameBits) {
  const Call call(device(), dtype(), 1, 128, {1, 128}, Normal(128, 12));
  Run(call.params());
  std::vector<float> x;
  for (double v : call.x().InitialValues()) x.push_back(v);
  Float8E4M3 out[128];
  const float scale = QuantizeFp8Group(x.data(), 128, out);
  const std::vector<double> values = call.out().Values();
  for (int i = 0; i < 128; ++i) EXPECT_EQ(values[i], ToFloat(out[i]));
  EXPECT_EQ(call.scales().Values()[0], scale);
}

TEST_P(QuantizeTest, RejectsBadArguments) {
  const Call call(device(), dtype(), 4, 200, {1, 128}, Normal(4 * 200, 13));
  const TestTensor row_scales(device(), DType::kFloat32, {4});
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    QuantizeFp8Params p = call.params();
    change(p);
    testing::ExpectInvalid(QuantizeFp8(p, stream()), parts);
  };
  using P = QuantizeFp8Params;
  expect({"QuantizeFp8", "x is missing"}, [](P& p) { p.x = TensorView(); });
  expect({"x", "rank 1"}, [](P& p) { p.x.rank = 1; });
  expect({"x", "null data"}, [](P& p) { p.x.data = nullptr; });
  expect({"x", "int32"}, [](P& p) { p.x.dtype = DType::kInt32; });
  expect({"x", "float8_e4m3"}, [](P& p) { p.x.dtype = DType::kFloat8E4M3; });
  expect({"x", "innermost stride 2"}, [](P& p) { p.x.stride[1] = 2; });
  expect({"columns of x", "0"}, [](P& p) { p.x.shape[1] = 0; });
  expect({"out is missing"}, [](P& p) { p.out = TensorView(); });
  expect({"out", "[4, 199]"}, [](P& p) { p.out.shape[1] = 199; });
  expect({"out", "uint8"}, [](P& p) { p.out.dtype = DType::kUInt8; });
  expect({"out", "share memory"}, [](P& p) { p.out.stride[0] = 100; });
  expect({"out overlaps x"}, [](P& p) { p.out.data = p.x.data; });
  expect({"scales is missing"}, [](P& p) { p.scales = TensorView(); });
  expect({"scales", "[4, 1]", "[4, 2]"}, [](P& p) { p.scales.shape[1] = 1; });
  expect({"scales", "bfloat16"},
         [](P& p) { p.scales.dtype = DType::kBFloat16; });
  expect({"scales", "cuda:7"}, [](P& p) {
    p.scales.device = {DeviceType::kCuda, 7};
  });
  expect({"scales overlaps out"},
         [](P& p) { p.scales.data = p.out.As<char>() + 16; });
  expect({"scales overlaps x"},
         [](P& p) { p.scales.data = p.x.As<char>() + 16; });
  expect({"block_rows", "64"}, [](P& p) { p.block_rows = 64; });
  expect({"block_cols", "127"}, [](P& p) { p.block_cols = 127; });
  expect({"block_rows", "128", "block_cols is 0"}, [](P& p) {
    p.block_rows = 128;
    p.block_cols = 0;
  });
  expect({"scales", "[4, 2]", "[1, 2]"}, [](P& p) { p.block_rows = 128; });
  expect({"scales", "rank 2", "1"}, [](P& p) { p.block_cols = 0; });
  expect({"scales", "rank 1", "2"},
         [&](P& p) { p.scales = row_scales.view(); });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
  EXPECT_EQ(call.scales().Bytes(), call.scales().InitialBytes());
}

// Of every instruction set: the bits of a float's conversion, for all counts.
TEST(QuantizeKernelsTest, RoundLikeTheScalarConversion) {
  std::vector<float> x = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN};
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    // All bfloat16, and floats beside those: the ties of e4m3 are among them.
    for (uint32_t low : {0x0000u, 0x0001u, 0xffffu}) {
      x.push_back(FloatFromBits(bits << 16 | low));
    }
  }
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    const QuantizeKernels kernels = QuantizeKernelsFor(isa);
    std::vector<Float8E4M3> out(x.size());
    kernels.scale(x.data(), static_cast<int64_t>(x.size()), 1.0f, out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const int expected =
          std::isnan(x[i]) ? 0x7f : FromFloat<Float8E4M3>(x[i]).bits;
      ASSERT_EQ(out[i].bits, expected) << x[i] << ", isa " << CpuIsaName(isa);
    }
    const std::vector<float> values = Normal(70, 14);
    for (int64_t count = 0; count <= 70; ++count) {
      float amax = 0.5f;
      for (int64_t i = 0; i < count; ++i) {
        amax = std::max(amax, std::fabs(values[i]));
      }
      EXPECT_EQ(kernels.max_magnitude(values.data(), count, 0.5f), amax);
    }
    const float with_nan[] = {1.0f, NAN, -3.0f, -NAN, 2.0f};
    EXPECT_EQ(kernels.max_magnitude(with_nan, 5, 0.0f), 3.0f);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, QuantizeTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
