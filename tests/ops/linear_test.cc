#include "ops/linear/linear.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/linear/linear_kernel.h"
#include "tests/ops/linear_fixture.h"
#include "tests/testing/compare.h"

namespace tenon {
namespace {

using testing::Fewer;
using testing::LinearCall;
using testing::LinearMode;
using testing::LinearModeName;
using testing::LinearOptions;
using testing::LinearShape;
using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;

class LinearTest : public testing::LinearTestBase {
 protected:
  void ExpectMatches(const LinearCall& call, LinearMode mode, DType out_dtype,
                     const reference::LinearResult& expected, int64_t depth) {
    Run(call.params(), mode);
    call.ExpectOnlyOutChanged();
    const std::vector<double> actual = call.Values();
    ASSERT_EQ(actual.size(), expected.out.size());
    // Sums in float32: the error of a sum grows with its number of steps, and
    // tensor cores truncate where others round. Then half an ulp of out.
    const double sum_error = std::ldexp(8.0 + depth / 4.0, -24);
    double half_ulp = 0.0;
    double tiny = 0.0;
    if (out_dtype == DType::kBFloat16) half_ulp = std::ldexp(1.0, -8);
    if (out_dtype == DType::kFloat16) {
      half_ulp = std::ldexp(1.0, -11);
      tiny = std::ldexp(1.0, -25);
    }
    for (size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(actual[i], expected.out[i],
                  std::fabs(expected.out[i]) * half_ulp + tiny +
                      expected.magnitude[i] * sum_error)
          << "element " << i;
    }
    if (actual.empty()) return;
    EXPECT_LT(testing::RelativeFrobeniusError(actual, expected.out),
              out_dtype == DType::kFloat32 ? 1e-5 : 4e-3);
    if (out_dtype == DType::kFloat32 || actual.size() < 1000) return;
    // Nearly all elements are those of an exact sum, and the others unbiased.
    testing::Closeness closeness;
    closeness.min_exact = 0.9;
    closeness.absolute = 0.05;
    EXPECT_TRUE(testing::IsClose(actual, expected.out, out_dtype, closeness));
  }

  void CheckShape(LinearShape shape, LinearOptions options) {
    SCOPED_TRACE(StrCat(shape.tokens, "x", shape.out_features, "x",
                        shape.in_features, options.bias ? " bias" : "",
                        options.float_out ? " float out" : "", " padding ",
                        options.padding, " offset ", options.offset));
    const DType out_dtype = options.float_out ? DType::kFloat32 : dtype();
    reference::LinearResult expected;
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(LinearModeName(mode));
      const LinearCall call(device(), dtype(), shape, options);
      if (mode == LinearMode::kDefault) expected = call.Expected();
      ExpectMatches(call, mode, out_dtype, expected, shape.in_features);
    }
  }
};

// The options take turns, so that all of them meet all kinds of sizes.
TEST_P(LinearTest, MatchesReference) {
  // The reference takes most of the time.
  const int64_t max_products =
      device().type == DeviceType::kCpu ? 500000 : 2000000;
  int turn = 0;
  const auto widths = Fewer<int64_t>({1, 8, 13, 64, 111, 192, 2048}, 3);
  for (int64_t tokens : Fewer<int64_t>({0, 1, 2, 3, 7, 13, 64, 111}, 4)) {
    for (int64_t out_features : widths) {
      for (int64_t in_features : widths) {
        if (tokens * out_features * in_features > max_products) continue;
        LinearOptions options;
        options.bias = turn % 2 == 1;
        options.float_out = turn % 3 == 1;
        options.padding = turn % 5 == 1 ? 3 : turn % 5 == 2 ? 8 : 0;
        options.offset = turn % 7 == 3 ? 1 : 0;
        ++turn;
        CheckShape({tokens, out_features, in_features}, options);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Every option with sizes that the fast paths take.
TEST_P(LinearTest, MatchesReferenceWithAlignedRows) {
  for (int64_t tokens : Fewer<int64_t>({1, 5, 8, 9, 33, 130}, 3)) {
    for (bool bias : {false, true}) {
      for (bool float_out : {false, true}) {
        for (int64_t padding : {0, 8}) {
          CheckShape({tokens, 72, 328}, {bias, float_out, padding, 0});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
  CheckShape({2, 264, 4096}, {true, false, 0, 0});
  CheckShape({1, 7, 12288}, {false, false, 0, 0});
  CheckShape({17, 40, 8192}, {true, false, 0, 0});
}

// Layer shapes of models, against the CPU backend, which the tests above hold
// to the reference.
TEST_P(LinearTest, MatchesCpuAtModelShapes) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "is the CPU";
  for (LinearShape shape : Fewer<LinearShape>({{1, 5120, 2048},
                                               {4, 2048, 4096},
                                               {8, 5120, 2048},
                                               {32, 2048, 4096},
                                               {200, 5120, 2048},
                                               {512, 1024, 4096}},
                                              3)) {
    shape.out_features /= SmallOr(64, 1);
    shape.in_features /= SmallOr(2, 1);
    SCOPED_TRACE(
        StrCat(shape.tokens, "x", shape.out_features, "x", shape.in_features));
    const LinearCall on_cpu(Device(), dtype(), shape, {true, true, 0, 0});
    std::vector<float> scratch(shape.tokens * shape.in_features + 16);
    LinearParams p = on_cpu.params();
    p.workspace_size = LinearWorkspaceBytes(p);
    p.workspace = reinterpret_cast<void*>(
        (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    ASSERT_TRUE(Linear(p, Stream()).ok());
    const std::vector<double> expected = on_cpu.Values();
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(LinearModeName(mode));
      for (bool float_out : {false, true}) {
        const LinearCall call(device(), dtype(), shape,
                              {true, float_out, 0, 0});
        const std::vector<double> actual = OutOf(call, mode);
        const bool exact = float_out || dtype() == DType::kFloat32;
        EXPECT_LT(testing::RelativeFrobeniusError(actual, expected),
                  exact ? 1e-5 : 4e-3);
      }
    }
  }
}

TEST_P(LinearTest, SameCallGivesTheSameBits) {
  for (LinearShape shape :
       {LinearShape{1, 520, 2048}, LinearShape{6, 64, 776},
        LinearShape{24, 136, 4096}, LinearShape{150, 264, 512}}) {
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(StrCat(shape.tokens, " tokens, ", LinearModeName(mode)));
      const LinearCall call(device(), dtype(), shape, {true, true, 0, 0});
      const std::vector<double> first = OutOf(call, mode);
      for (int i = SmallOr(2, 0); i < 3; ++i) {
        EXPECT_EQ(OutOf(call, mode), first);
      }
    }
  }
}

TEST_P(LinearTest, RowDoesNotDependOnTheContentOfOthers) {
  for (int64_t tokens : {2, 8, 16, 64, 130}) {
    const LinearCall call(device(), dtype(), {tokens, 72, 264}, {});
    for (LinearMode mode : Modes()) {
      SCOPED_TRACE(StrCat(tokens, " tokens, ", LinearModeName(mode)));
      ExpectTokenIgnoresOthers(call.params(), mode);
    }
  }
}

TEST_P(LinearTest, BatchInvariantRowDoesNotDependOnTheNumberOfOthers) {
  const LinearMode mode = device().type == DeviceType::kCpu
                              ? LinearMode::kDefault
                              : LinearMode::kBatchInvariant;
  for (int64_t in_features : Fewer<int64_t>({264, 2048, 131})) {
    const LinearCall all(device(), dtype(), {200, 200, in_features},
                         {true, true, 0, 0});
    const std::vector<double> expected = OutOf(all, mode);
    for (int64_t tokens :
         Fewer<int64_t>({1, 2, 8, 9, 16, 17, 64, 65, 111}, 4)) {
      for (int64_t first : {0, 89}) {
        SCOPED_TRACE(StrCat(tokens, " tokens from ", first));
        ExpectTokensAlone(all.params(), first, tokens, mode, expected);
      }
    }
  }
}

TEST_P(LinearTest, CpuResultDoesNotDependOnThreads) {
  if (device().type != DeviceType::kCpu) GTEST_SKIP() << "for the CPU";
  for (int64_t tokens : {1, 5, 70}) {
    const LinearCall call(device(), dtype(), {tokens, 777, 300},
                          {true, false, 0, 0});
    ExpectThreadsDoNotMatter(call.params());
  }
}

// Rows that are 2^31 elements apart.
TEST_P(LinearTest, OffsetsBeyond31Bits) {
  if (dtype() != DType::kBFloat16) GTEST_SKIP() << "one dtype will do";
  constexpr int64_t kStride = (int64_t{1} << 31) + 64;
  constexpr int64_t kSize = 64;
  const LinearCall call(device(), dtype(), {2, kSize, kSize}, {});
  const std::vector<double> expected = OutOf(call, LinearMode::kDefault);
  StatusOr<Buffer> buffer =
      Buffer::Allocate(device(), (kStride + kSize) * sizeof(BFloat16));
  if (!buffer.ok()) GTEST_SKIP() << buffer.status().message();
  const auto copy_row = [&](const TensorView& to, const TensorView& from,
                            int64_t row) {
    ASSERT_TRUE(CopyMemory(Rows(to, row, 1).data, device(),
                           Rows(from, row, 1).data, device(),
                           kSize * sizeof(BFloat16), stream())
                    .ok());
  };
  const TensorView far =
      MakeMatrix(buffer->data(), dtype(), device(), 2, kSize, kStride);
  for (LinearMode mode : Modes()) {
    SCOPED_TRACE(LinearModeName(mode));
    LinearParams p = call.params();
    p.x = far;  // then the weight's first two rows, then out
    for (int64_t row : {0, 1}) copy_row(far, call.params().x, row);
    Run(p, mode);
    const std::vector<double> of_far_x = call.Values();
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(of_far_x[i], expected[i], 0.2);
    }

    const TestTensor narrow(device(), dtype(), {2, 2});
    p = call.params();
    p.weight = far;
    for (int64_t row : {0, 1}) copy_row(far, call.params().weight, row);
    p.out = narrow.view();
    Run(p, mode);
    const std::vector<double> values = narrow.Values();
    for (int i = 0; i < 4; ++i) {
      EXPECT_NEAR(values[i], expected[i / 2 * kSize + i % 2], 0.2);
    }

    p = call.params();
    p.out = far;
    Run(p, mode);
    const TestTensor near(device(), dtype(), {2, kSize});
    for (int64_t row : {0, 1}) copy_row(near.view(), far, row);
    Finish();
    const std::vector<double> copied = near.Values();
    for (size_t i = 0; i < copied.size(); ++i) {
      EXPECT_NEAR(copied[i], expected[i], 0.2);
    }
  }
}

TEST_P(LinearTest, ZeroTokensIsOk) {
  const LinearCall call(device(), dtype(), {0, 64, 64}, {true, false, 0, 0});
  EXPECT_EQ(LinearWorkspaceBytes(call.params()), 0u);
  EXPECT_TRUE(Linear(call.params(), stream()).ok());
}

TEST_P(LinearTest, WorkspaceGrowsWithTokens) {
  for (LinearMode mode : Modes()) {
    size_t previous = 0;
    for (int64_t tokens : {1, 8, 9, 64, 1000}) {
      // Needs no data.
      LinearParams p;
      p.x = MakeTensor(nullptr, dtype(), device(), {tokens, 128});
      p.weight = MakeTensor(nullptr, dtype(), device(), {64, 128});
      p.out = MakeTensor(nullptr, dtype(), device(), {tokens, 64});
      p.cublas_lt = mode == LinearMode::kCublasLt ? cublas_lt_.get() : nullptr;
      const size_t bytes = LinearWorkspaceBytes(p);
      EXPECT_GE(bytes, previous);
      previous = bytes;
      p.x.shape[1] = 127;
      EXPECT_EQ(LinearWorkspaceBytes(p), 0u);
    }
  }
}

TEST_P(LinearTest, RejectsBadArguments) {
  const LinearCall call(device(), dtype(), {4, 48, 64}, {true, false, 0, 0});
  StatusOr<Buffer> workspace = Buffer::Allocate(device(), 1 << 16);
  ASSERT_TRUE(workspace.ok());
  LinearParams good = call.params();
  good.workspace = workspace->data();
  good.workspace_size = 1 << 16;
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    LinearParams p = good;
    change(p);
    testing::ExpectInvalid(Linear(p, stream()), parts);
  };
  expect({"Linear", "x is missing"},
         [](LinearParams& p) { p.x = TensorView(); });
  expect({"x", "rank 1"}, [](LinearParams& p) { p.x.rank = 1; });
  expect({"x", "null data"}, [](LinearParams& p) { p.x.data = nullptr; });
  expect({"x", "int64"}, [](LinearParams& p) { p.x.dtype = DType::kInt64; });
  expect({"x", "stride -1"}, [](LinearParams& p) { p.x.stride[0] = -1; });
  expect({"x", "innermost stride 2"},
         [](LinearParams& p) { p.x.stride[1] = 2; });
  expect({"in_features", "0"}, [](LinearParams& p) { p.x.shape[1] = 0; });
  expect({"tokens", "2147483648"}, [](LinearParams& p) {
    p.x.shape[0] = p.out.shape[0] = int64_t{1} << 31;
  });
  expect({"weight is missing"},
         [](LinearParams& p) { p.weight = TensorView(); });
  expect({"weight", "[48, 63]", "[*, 64]"},
         [](LinearParams& p) { p.weight.shape[1] = 63; });
  expect({"weight", "dtype"},
         [](LinearParams& p) { p.weight.dtype = DType::kUInt8; });
  expect({"out_features", "0"},
         [](LinearParams& p) { p.weight.shape[0] = p.out.shape[1] = 0; });
  expect({"bias", "[47]", "[48]"},
         [](LinearParams& p) { p.bias.shape[0] = 47; });
  expect({"bias", "cuda:7"}, [](LinearParams& p) {
    p.bias.device = {DeviceType::kCuda, 7};
  });
  expect({"out", "[3, 48]", "[4, 48]"},
         [](LinearParams& p) { p.out.shape[0] = 3; });
  expect({"out", "dtype"},
         [](LinearParams& p) { p.out.dtype = DType::kInt32; });
  expect({"out", "share memory"},
         [](LinearParams& p) { p.out.stride[0] = 47; });
  expect({"out overlaps x"}, [](LinearParams& p) { p.x.data = p.out.data; });
  expect({"out overlaps weight"},
         [](LinearParams& p) { p.weight.data = p.out.data; });
  expect({"out overlaps bias"},
         [](LinearParams& p) { p.bias.data = p.out.data; });
  const TestTensor normed(device(), dtype(), {4, 64});
  const TestTensor vector(device(), dtype(), {64}, Normal(64, 5));
  const auto expect_norm = [&](std::vector<std::string> parts, auto&& change) {
    expect(std::move(parts), [&](LinearParams& p) {
      p.norm.weight = vector.view();
      p.norm.out = normed.view();
      p.norm.epsilon = 1e-6f;
      change(p);
    });
  };
  expect({"norm.out", "without norm.weight"},
         [&](LinearParams& p) { p.norm.out = normed.view(); });
  const TestTensor rows(device(), dtype(), {4, 2, 64});
  const TestTensor ids(device(), DType::kInt32, {4, 2});
  const TestTensor terms_sum(device(), dtype(), {4, 64});
  const auto expect_terms = [&](std::vector<std::string> parts, auto&& change) {
    expect_norm(parts, [&](LinearParams& p) {
      p.terms = {rows.view(), ids.view(), 3, terms_sum.view()};
      change(p);
    });
  };
  expect({"terms", "without norm"}, [&](LinearParams& p) {
    p.terms = {rows.view(), ids.view(), 3, terms_sum.view()};
  });
  expect_terms({"terms.rows", "[4, 2, 64]", "[4, 1, 64]"},
               [](LinearParams& p) { p.terms.ids.shape[1] = 1; });
  expect_terms({"terms.rows have gaps"},
               [](LinearParams& p) { p.terms.rows.stride[0] = 64; });
  expect_terms({"terms.ids"},
               [](LinearParams& p) { p.terms.ids = TensorView(); });
  expect_terms({"terms.num_ids", "-1"},
               [](LinearParams& p) { p.terms.num_ids = -1; });
  expect_terms({"terms.sum is missing"},
               [](LinearParams& p) { p.terms.sum = TensorView(); });
  expect_terms({"terms.sum overlaps x"},
               [](LinearParams& p) { p.terms.sum.data = p.x.data; });
  expect_norm({"norm.weight", "[63]", "[64]"},
              [](LinearParams& p) { p.norm.weight.shape[0] = 63; });
  expect_norm({"norm.out is missing"},
              [](LinearParams& p) { p.norm.out = TensorView(); });
  expect_norm({"norm.epsilon", "0"},
              [](LinearParams& p) { p.norm.epsilon = 0.0f; });
  expect_norm({"norm.rounding", "2"}, [](LinearParams& p) {
    p.norm.rounding = static_cast<NormRounding>(2);
  });
  expect_norm({"norm.out overlaps x"},
              [](LinearParams& p) { p.x.data = p.norm.out.data; });
  expect_norm({"out overlaps norm.weight"},
              [](LinearParams& p) { p.norm.weight.data = p.out.data; });
  expect({"residual", "[4, 47]", "[4, 48]"}, [](LinearParams& p) {
    p.residual = p.out;
    p.residual.shape[1] = 47;
  });
  expect({"residual", "int32"}, [](LinearParams& p) {
    p.residual = p.out;
    p.residual.dtype = DType::kInt32;
  });
  expect({"out is residual", "stride"}, [](LinearParams& p) {
    p.residual = p.out;
    p.residual.stride[0] = 64;
  });
  expect({"out overlaps residual"}, [](LinearParams& p) {
    p.residual = p.out;
    p.residual.data =
        p.out.As<char>() + static_cast<int64_t>(DTypeSize(p.out.dtype));
  });
  if (LinearWorkspaceBytes(good) > 0) {
    expect({"workspace is null"},
           [](LinearParams& p) { p.workspace = nullptr; });
    expect({"workspace_size", "1023", "1024"},
           [](LinearParams& p) { p.workspace_size = 1023; });
  }
  EXPECT_TRUE(Linear(good, stream()).ok());
  if (cublas_lt_ == nullptr) return;
  const LinearCall on_cpu(Device(), dtype(), {4, 48, 64}, {});
  LinearParams p = on_cpu.params();
  p.cublas_lt = cublas_lt_.get();
  testing::ExpectInvalid(Linear(p, Stream()), {"cublas_lt", "cuda:0", "cpu:0"});
}

TEST(LinearKernelTest, IsChosenByTokensAlignmentAndMode) {
  LinearProblem p;
  p.rows_aligned = p.rows_apart = true;
  const auto select = [&](int64_t tokens) {
    p.tokens = tokens;
    return SelectLinearKernel(p);
  };
  EXPECT_EQ(select(1), LinearKernel::kGemv);
  EXPECT_EQ(select(4), LinearKernel::kGemv);
  EXPECT_EQ(select(5), LinearKernel::kSmallTile);
  EXPECT_EQ(select(16), LinearKernel::kSmallTile);
  EXPECT_EQ(select(17), LinearKernel::kMediumTile);
  EXPECT_EQ(select(64), LinearKernel::kMediumTile);
  EXPECT_EQ(select(65), LinearKernel::kLargeTile);
  p.can_stream = true;
  EXPECT_EQ(select(1), LinearKernel::kStream);
  EXPECT_EQ(select(kLinearFewTokens), LinearKernel::kStream);
  EXPECT_EQ(select(64), LinearKernel::kStream);
  p.batch_invariant = true;
  EXPECT_EQ(select(1), LinearKernel::kSmallTile);
  p.can_stream = p.batch_invariant = false;
  p.has_cublas_lt = true;
  EXPECT_EQ(select(4), LinearKernel::kGemv);
  EXPECT_EQ(select(5), LinearKernel::kCublasLt);
  p.rows_apart = false;
  EXPECT_EQ(select(9), LinearKernel::kSmallTile);
  p.rows_apart = true;
  p.rows_aligned = false;
  EXPECT_EQ(select(1), LinearKernel::kCublasLt);
  p.has_bias = true;
  EXPECT_EQ(select(1), LinearKernel::kMediumTile);
  p.rows_aligned = true;
  EXPECT_EQ(select(9), LinearKernel::kSmallTile);
  p.out_aligned = true;
  EXPECT_EQ(select(9), LinearKernel::kCublasLt);
  p.rows_aligned = false;
  p.batch_invariant = true;
  EXPECT_EQ(select(1), LinearKernel::kMediumTile);
  EXPECT_EQ(select(1000), LinearKernel::kMediumTile);
  p.rows_aligned = true;
  EXPECT_EQ(select(1), LinearKernel::kSmallTile);
  EXPECT_EQ(select(1000), LinearKernel::kLargeTile);
}

TEST(CublasLtTest, NamesWhatIsMissing) {
  testing::ExpectInvalid(CublasLt::Create(Device()).status(),
                         {"CublasLt", "cpu:0"});
  const Status status = CublasLt::Create({DeviceType::kCuda, 99}).status();
  EXPECT_TRUE(status.code() == StatusCode::kUnavailable ||
              status.code() == StatusCode::kUnimplemented)
      << status.message();
  EXPECT_NE(std::string(status.message()).find("CublasLt"), std::string::npos)
      << status.message();
}

INSTANTIATE_TEST_SUITE_P(Targets, LinearTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
