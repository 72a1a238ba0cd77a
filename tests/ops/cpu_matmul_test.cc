#include "ops/core/cpu_matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/core/cpu_matmul_isa.h"
#include "tests/reference/linear_reference.h"
#include "tests/testing/random.h"

namespace tenon {
namespace {

using testing::Normal;

// Every instruction set that this host can run.
class CpuMatmulTest : public ::testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (GetParam() > DetectCpuIsa()) {
      GTEST_SKIP() << "no " << CpuIsaName(GetParam()) << " on this host";
    }
  }
};

// A weight matrix of some dtype: its bytes, and the values they stand for.
struct Weight {
  std::vector<uint8_t> bytes;
  std::vector<double> values;
};

template <class T>
Weight MakeWeightOf(int64_t count, uint64_t seed) {
  Weight weight;
  for (float v : Normal(count, seed)) {
    const T typed = FromFloat<T>(v);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&typed);
    weight.bytes.insert(weight.bytes.end(), bytes, bytes + sizeof(typed));
    weight.values.push_back(ToFloat(typed));
  }
  return weight;
}

Weight MakeWeight(DType dtype, int64_t count, uint64_t seed) {
  switch (dtype) {
    case DType::kFloat16:
      return MakeWeightOf<Float16>(count, seed);
    case DType::kBFloat16:
      return MakeWeightOf<BFloat16>(count, seed);
    default:
      return MakeWeightOf<float>(count, seed);
  }
}

TEST_P(CpuMatmulTest, MatchesReference) {
  constexpr float kUntouched = -7.0f;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int64_t rows : {1, 2, 3, 4, 9, 10, 67, 141}) {
      for (int64_t cols : {1, 3, 8, 13, 65}) {
        for (int64_t depth : {1, 3, 8, 16, 17, 111, 512, 515, 1100}) {
          if (rows * cols * depth > 2000000) continue;
          SCOPED_TRACE(::testing::Message() << DTypeName(dtype) << " " << rows
                                            << "x" << cols << "x" << depth);
          const std::vector<float> x = Normal(rows * depth, 1);
          const Weight weight = MakeWeight(dtype, cols * depth, 2);
          std::vector<float> out((cols + 1) * rows, kUntouched);
          CpuMatmulParams p;
          p.x = x.data();
          p.x_stride = p.weight_stride = p.depth = depth;
          p.weight = weight.bytes.data();
          p.weight_dtype = dtype;
          p.out = out.data();
          p.out_stride = cols + 1;
          p.rows = rows;
          p.cols = cols;
          CpuKernelsFor(GetParam()).matmul(p);
          const auto expected = reference::Linear(
              {x.begin(), x.end()}, weight.values, {}, rows, cols, depth);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < cols; ++c) {
              const double magnitude = expected.magnitude[r * cols + c];
              ASSERT_NEAR(out[r * (cols + 1) + c], expected.out[r * cols + c],
                          magnitude * std::ldexp(8.0 + depth / 8.0, -24));
            }
            ASSERT_EQ(out[r * (cols + 1) + cols], kUntouched);
          }
        }
      }
    }
  }
}

TEST_P(CpuMatmulTest, BitsDependOnDepthAlone) {
  constexpr int64_t kRows = 70;
  constexpr int64_t kCols = 29;
  for (int64_t depth : {7, 64, 1037}) {
    const std::vector<float> x = Normal(kRows * depth, 3);
    const Weight weight = MakeWeight(DType::kBFloat16, kCols * depth, 4);
    std::vector<float> all(kRows * kCols);
    CpuMatmulParams p;
    p.x = x.data();
    p.x_stride = p.weight_stride = p.depth = depth;
    p.weight = weight.bytes.data();
    p.weight_dtype = DType::kBFloat16;
    p.out = all.data();
    p.out_stride = kCols;
    p.rows = kRows;
    p.cols = kCols;
    CpuKernelsFor(GetParam()).matmul(p);
    for (int64_t rows : {1, 2, 3, 8, 12}) {
      for (int64_t row : {0, 41}) {
        const int64_t col = 5;
        std::vector<float> part(rows * (kCols - col));
        p.x = x.data() + row * depth;
        p.weight = weight.bytes.data() + col * depth * 2;
        p.out = part.data();
        p.out_stride = p.cols = kCols - col;
        p.rows = rows;
        CpuKernelsFor(GetParam()).matmul(p);
        for (int64_t r = 0; r < rows; ++r) {
          ASSERT_EQ(
              std::memcmp(&part[r * p.cols], &all[(row + r) * kCols + col],
                          p.cols * sizeof(float)),
              0)
              << "depth " << depth << " rows " << rows << " row " << row + r;
        }
      }
    }
  }
}

// An fp8 problem: the matrix that the weight is rows [first_row, first_row +
// cols) of, the quantised x, and their scales.
struct Fp8Problem {
  Fp8Problem(int64_t rows, int64_t cols, int64_t depth, int64_t first_row,
             int32_t block_rows)
      : weight(MakeWeightOf<Float8E4M3>((first_row + cols) * depth, 5)) {
    const int64_t blocks = (depth + 127) / 128;
    for (float v : Normal(rows * depth, 6, 0.0f, 100.0f)) {
      x.push_back(ToFloat(FromFloat<Float8E4M3>(v)));
    }
    x_scales = Normal(rows * blocks, 7, 0.02f, 0.004f);
    const int64_t weight_rows = first_row + cols;
    weight_scales = block_rows == 1 ? Normal(weight_rows, 8, 0.01f, 0.002f)
                                    : Normal((weight_rows + 127) / 128 * blocks,
                                             8, 0.01f, 0.002f);
    p.x = x.data();
    p.x_stride = p.weight_stride = p.depth = depth;
    p.weight = weight.bytes.data() + first_row * depth;
    p.weight_dtype = DType::kFloat8E4M3;
    p.rows = rows;
    p.cols = p.out_stride = cols;
    p.scales = {x_scales.data(),      blocks,
                weight_scales.data(), block_rows == 1 ? 1 : blocks,
                block_rows,           first_row};
  }

  reference::LinearResult Expected() const {
    const int64_t depth = p.depth, blocks = (depth + 127) / 128;
    std::vector<double> x_values, w_values;
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t k = 0; k < depth; ++k) {
        x_values.push_back(double{x[r * depth + k]} *
                           x_scales[r * blocks + k / 128]);
      }
    }
    for (int64_t c = 0; c < p.cols; ++c) {
      const int64_t row = p.scales.first_row + c;
      for (int64_t k = 0; k < depth; ++k) {
        w_values.push_back(weight.values[row * depth + k] *
                           (p.scales.block_rows == 1
                                ? weight_scales[row]
                                : weight_scales[row / 128 * blocks + k / 128]));
      }
    }
    return reference::Linear(x_values, w_values, {}, p.rows, p.cols, depth);
  }

  Weight weight;
  std::vector<float> x, x_scales, weight_scales;
  CpuMatmulParams p;
};

TEST_P(CpuMatmulTest, Fp8MatchesReference) {
  for (int32_t block_rows : {128, 1}) {
    for (int64_t rows : {1, 2, 3, 10, 70}) {
      for (int64_t cols : {1, 3, 13, 65, 290}) {
        for (int64_t depth : {1, 17, 127, 128, 129, 192, 515, 640, 1100}) {
          for (int64_t first_row : {0, 133}) {
            if (rows * cols * depth > 60000) continue;
            SCOPED_TRACE(::testing::Message()
                         << block_rows << " block_rows " << rows << "x" << cols
                         << "x" << depth << " from row " << first_row);
            Fp8Problem problem(rows, cols, depth, first_row, block_rows);
            std::vector<float> out(rows * cols);
            problem.p.out = out.data();
            CpuKernelsFor(GetParam()).matmul(problem.p);
            const auto expected = problem.Expected();
            for (int64_t i = 0; i < rows * cols; ++i) {
              ASSERT_NEAR(
                  out[i], expected.out[i],
                  expected.magnitude[i] * std::ldexp(10.0 + depth / 8.0, -24));
            }
          }
        }
      }
    }
  }
}

TEST_P(CpuMatmulTest, Fp8BitsDependOnDepthAlone) {
  for (int32_t block_rows : {128, 1}) {
    for (int64_t depth : {100, 192, 1100}) {
      Fp8Problem problem(70, 150, depth, 40, block_rows);
      std::vector<float> all(70 * 150);
      problem.p.out = all.data();
      CpuKernelsFor(GetParam()).matmul(problem.p);
      for (int64_t rows : {1, 2, 11}) {
        for (int64_t col : {5, 88}) {
          constexpr int64_t kRow = 41, kCols = 60;
          std::vector<float> part(rows * kCols);
          CpuMatmulParams p = problem.p;
          p.x += kRow * depth;
          p.scales.x += kRow * p.scales.x_stride;
          p.weight = static_cast<const char*>(p.weight) + col * depth;
          p.scales.first_row += col;
          p.out = part.data();
          p.rows = rows;
          p.cols = p.out_stride = kCols;
          CpuKernelsFor(GetParam()).matmul(p);
          for (int64_t r = 0; r < rows; ++r) {
            ASSERT_EQ(
                std::memcmp(&part[r * kCols], &all[(kRow + r) * 150 + col],
                            kCols * sizeof(float)),
                0)
                << "depth " << depth << " rows " << rows << " col " << col;
          }
        }
      }
    }
  }
}

TEST_P(CpuMatmulTest, ConvertsEveryFp8ValueToFloat) {
  std::vector<Float8E4M3> all(256 + 5);  // the last ones are a partial vector
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].bits = static_cast<uint8_t>(i + 123);
  }
  std::vector<float> floats(all.size());
  CpuKernelsFor(GetParam())
      .convert_to_float(DType::kFloat8E4M3, all.data(),
                        static_cast<int64_t>(all.size()), floats.data());
  for (size_t i = 0; i < all.size(); ++i) {
    const float expected = ToFloat(all[i]);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[i])) << i;
    } else {
      ASSERT_EQ(FloatBits(floats[i]), FloatBits(expected)) << i;
    }
  }
}

TEST_P(CpuMatmulTest, ZeroDepthGivesZeros) {
  float out[6];
  std::fill_n(out, 6, 1.0f);
  CpuMatmulParams p;
  p.weight_dtype = DType::kFloat32;
  p.out = out;
  p.rows = 2;
  p.cols = p.out_stride = 3;
  CpuKernelsFor(GetParam()).matmul(p);
  for (float v : out) EXPECT_EQ(v, 0.0f);
}

template <class T>
void ExpectConvertsToFloat(CpuIsa isa) {
  std::vector<T> all(65536);
  for (size_t i = 0; i < all.size(); ++i)
    all[i].bits = static_cast<uint16_t>(i);
  std::vector<float> floats(all.size());
  CpuKernelsFor(isa).convert_to_float(
      kDTypeOf<T>, all.data(), static_cast<int64_t>(all.size()), floats.data());
  for (size_t i = 0; i < all.size(); ++i) {
    const float expected = ToFloat(all[i]);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[i])) << i;
    } else {
      ASSERT_EQ(FloatBits(floats[i]), FloatBits(expected)) << i;
    }
  }
}

TEST_P(CpuMatmulTest, ConvertsEvery16BitValueToFloat) {
  ExpectConvertsToFloat<Float16>(GetParam());
  ExpectConvertsToFloat<BFloat16>(GetParam());
}

// Values of all exponents, at, just below and just above every tie.
std::vector<float> RoundingCases() {
  std::vector<float> cases = {std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN(),
                              std::numeric_limits<float>::denorm_min(),
                              65504.0f,
                              65519.9f,
                              65520.0f,
                              65536.0f};
  for (uint32_t high = 0; high < 0x7f80u; ++high) {
    for (uint32_t low : {0x0u, 0x1u, 0xfffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u,
                         0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      cases.push_back(FloatFromBits(high << 16 | low));
    }
  }
  const size_t count = cases.size();
  for (size_t i = 0; i < count; ++i) cases.push_back(-cases[i]);
  return cases;
}

template <class T>
void ExpectConvertsFromFloat(CpuIsa isa) {
  const std::vector<float> cases = RoundingCases();
  std::vector<T> converted(cases.size());
  CpuKernelsFor(isa).convert_from_float(kDTypeOf<T>, cases.data(),
                                        static_cast<int64_t>(cases.size()),
                                        converted.data());
  for (size_t i = 0; i < cases.size(); ++i) {
    if (std::isnan(cases[i])) {
      ASSERT_TRUE(std::isnan(ToFloat(converted[i]))) << i;
    } else {
      ASSERT_EQ(converted[i].bits, FromFloat<T>(cases[i]).bits) << cases[i];
    }
  }
}

TEST_P(CpuMatmulTest, RoundsFromFloatToNearestEven) {
  ExpectConvertsFromFloat<Float16>(GetParam());
  ExpectConvertsFromFloat<BFloat16>(GetParam());
}

TEST_P(CpuMatmulTest, ConvertsNoMoreThanAsked) {
  for (int64_t count = 0; count < 40; ++count) {
    const std::vector<float> from = Normal(count, 5);
    std::vector<BFloat16> narrow(count + 1, BFloat16{0x1234});
    std::vector<float> back(count + 1, -7.0f);
    CpuKernelsFor(GetParam())
        .convert_from_float(DType::kBFloat16, from.data(), count,
                            narrow.data());
    CpuKernelsFor(GetParam())
        .convert_to_float(DType::kBFloat16, narrow.data(), count, back.data());
    for (int64_t i = 0; i < count; ++i) {
      EXPECT_EQ(back[i], ToFloat(FromFloat<BFloat16>(from[i])));
    }
    EXPECT_EQ(narrow[count].bits, 0x1234);
    EXPECT_EQ(back[count], -7.0f);
    std::vector<float> copy(count + 1, -7.0f);
    CpuKernelsFor(GetParam())
        .convert_from_float(DType::kFloat32, from.data(), count, copy.data());
    EXPECT_TRUE(std::equal(from.begin(), from.end(), copy.begin()));
    EXPECT_EQ(copy[count], -7.0f);
  }
}

TEST(CpuMatmulDispatch, UsesThisHostsInstructions) {
  const std::vector<float> x = Normal(333, 6);
  const std::vector<float> weight = Normal(333, 7);
  float detected = 0.0f;
  float expected = 0.0f;
  CpuMatmulParams p;
  p.x = x.data();
  p.weight = weight.data();
  p.weight_dtype = DType::kFloat32;
  p.rows = p.cols = 1;
  p.depth = 333;
  p.out = &detected;
  CpuMatmul(p);
  p.out = &expected;
  CpuKernelsFor(DetectCpuIsa()).matmul(p);
  EXPECT_EQ(detected, expected);
}

INSTANTIATE_TEST_SUITE_P(Isas, CpuMatmulTest,
                         ::testing::Values(CpuIsa::kGeneric, CpuIsa::kAvx2,
                                           CpuIsa::kAvx512),
                         [](const auto& info) {
                           return info.param == CpuIsa::kAvx512
                                      ? "Avx512"
                                      : CpuIsaName(info.param);
                         });

}  // namespace
}  // namespace tenon
