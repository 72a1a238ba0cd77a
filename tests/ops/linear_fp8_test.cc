#include <gtest/gtest.h>

#include <cmath>

#include "ops/core/build_config.h"
#include "ops/core/device_info.h"
#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "ops/linear/linear_backend.h"
#include "ops/linear/linear_kernel.h"
#include "tests/ops/linear_fp8_fixture.h"
#include "tests/testing/compare.h"
#include "tests/testing/cuda_graph.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

// Linear with float8_e4m3 weights.

namespace tenon {
namespace {

using testing::Fewer;
using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;

using Call = testing::LinearFp8Call;
using Mode = testing::LinearMode;
using Options = testing::LinearFp8Options;
using Shape = testing::LinearShape;

class LinearFp8Test : public testing::LinearTestBase {
 protected:
  void CheckShape(Shape shape, Options options) {
    SCOPED_TRACE(StrCat(
        shape.tokens, "x", shape.out_features, "x", shape.in_features,
        options.per_channel ? " per channel" : " blocks",
        options.bias ? " bias" : "", options.float_out ? " float out" : "",
        " padding ", options.padding));
    reference::LinearResult expected;
    for (Mode mode : Modes()) {
      SCOPED_TRACE(LinearModeName(mode));
      const Call call(device(), dtype(), shape, options);
      if (mode == Mode::kDefault) expected = call.Expected();
      const std::vector<double> actual = OutOf(call, mode);
      call.ExpectOnlyOutChanged();
      ExpectClose(actual, expected, options.float_out, mode, shape.in_features);
      if (HasFailure()) return;
    }
  }

  void ExpectClose(const std::vector<double>& actual,
                   const reference::LinearResult& expected, bool float_out,
                   Mode mode, int64_t depth) {
    ASSERT_EQ(actual.size(), expected.out.size());
    // Sums in float32: the error of a sum grows with its number of steps. The
    // accumulators of Hopper's fp8 instructions, which cuBLASLt uses, keep 14
    // bits.
    const double sum_error = mode == Mode::kCublasLt
                                 ? std::ldexp(1.0, -11)
                                 : std::ldexp(8.0 + depth / 4.0, -24);
    const DType out_dtype = float_out ? DType::kFloat32 : dtype();
    const double half_ulp = out_dtype == DType::kBFloat16  ? 0x1p-8
                            : out_dtype == DType::kFloat16 ? 0x1p-11
                                                           : 0x1p-23;
    for (size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(actual[i], expected.out[i],
                  std::fabs(expected.out[i]) * half_ulp + 0x1p-25 +
                      expected.magnitude[i] * sum_error)
          << "element " << i;
    }
    if (actual.empty()) return;
    const double error = testing::RelativeFrobeniusError(actual, expected.out);
    EXPECT_LT(error, mode == Mode::kCublasLt        ? 5e-3
                     : out_dtype == DType::kFloat32 ? 1e-5
                                                    : 4e-3);
  }
};

// The options take turns, so that all of them meet all kinds of sizes.
TEST_P(LinearFp8Test, MatchesReference) {
  const int64_t max_products =
      device().type == DeviceType::kCpu ? 300000 : 2000000;
  int turn = 0;
  for (int64_t tokens :
       Fewer<int64_t>({0, 1, 3, 4, 5, 8, 13, 17, 64, 111}, 4)) {
    for (int64_t out_features :
         Fewer<int64_t>({1, 13, 16, 111, 128, 192, 264}, 3)) {
      for (int64_t in_features :
           Fewer<int64_t>({1, 16, 111, 128, 192, 272, 1040}, 3)) {
        if (tokens * out_features * in_features > max_products) continue;
        Options options;
        options.per_channel = turn % 2 == 1;
        options.bias = turn % 3 == 1;
        options.float_out = turn % 5 < 2;
        options.padding = turn % 7 == 1 ? 3 : turn % 7 < 4 ? 16 : 0;
        ++turn;
        CheckShape({tokens, out_features, in_features}, options);
        if (HasFailure()) return;
      }
    }
  }
}

// Every option with sizes that the fast paths take.
TEST_P(LinearFp8Test, MatchesReferenceWithAlignedRows) {
  for (int64_t tokens : Fewer<int64_t>({1, 7, 16, 33, 130, 135}, 3)) {
    // Every third has each of them too, with and without.
    for (int option = 0; option < 8; option += SmallOr(3, 1)) {
      if (device().type == DeviceType::kCpu && tokens > 16 && option > 3) {
        continue;
      }
      CheckShape({tokens, 144, 336},
                 {(option & 1) != 0, (option & 2) != 0, (option & 4) != 0, 0});
      if (HasFailure()) return;
    }
  }
  for (bool per_channel : {false, true}) {
    CheckShape({2, 264, 4096}, {per_channel, true, false, 0});
    CheckShape({9, 48, 12288}, {per_channel, false, true, 16});
  }
}

// Where clusters share the depth: in even and uneven parts, with columns past
// the end, several passes of a cluster, rings that are filled again.
TEST_P(LinearFp8Test, MatchesReferenceWithTensOfTokens) {
  int option = 0;
  for (const Shape& shape : Fewer<Shape>({{9, 1, 512},
                                          {16, 13, 640},
                                          {17, 300, 1152},
                                          {32, 1000, 512},
                                          {33, 48, 2048},
                                          {64, 24, 4224},
                                          {63, 104, 768}},
                                         4)) {
    const int times = device().type == DeviceType::kCpu ? 1 : SmallOr(1, 3);
    for (int i = 0; i < times; ++i, option += 3) {
      CheckShape(shape, {(option & 1) != 0, (option & 2) != 0,
                         (option & 4) != 0, option % 5 == 0 ? 16 : 0});
      if (HasFailure()) return;
    }
  }
  if (device().type == DeviceType::kCpu) return;
  CheckShape({12, 12000, 512}, {true, false, true, 0});
  if (testing::SmallTests()) return;
  CheckShape({9, 5400, 2176}, {false, true, true, 0});
}

// Layer shapes of models, against the CPU backend.
TEST_P(LinearFp8Test, MatchesCpuAtModelShapes) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "is the CPU";
  for (Shape shape : Fewer<Shape>({{1, 5120, 2048},
                                   {4, 2048, 4096},
                                   {8, 5120, 2048},
                                   {16, 2048, 4096},
                                   {32, 2048, 4096},
                                   {64, 5120, 2048},
                                   {200, 5120, 2048},
                                   {514, 1024, 4096}},
                                  4)) {
    shape.out_features /= SmallOr(64, 1);
    shape.in_features /= SmallOr(2, 1);
    SCOPED_TRACE(
        StrCat(shape.tokens, "x", shape.out_features, "x", shape.in_features));
    const Call on_cpu(Device(), dtype(), shape, {false, true, true, 0});
    LinearParams p = on_cpu.params();
    p.workspace_size = LinearWorkspaceBytes(p);
    StatusOr<Buffer> workspace = Buffer::Allocate(Device(), p.workspace_size);
    ASSERT_TRUE(workspace.ok());
    p.workspace = workspace->data();
    ASSERT_TRUE(Linear(p, Stream()).ok());
    const std::vector<double> expected = on_cpu.Values();
    for (Mode mode : Modes()) {
      SCOPED_TRACE(LinearModeName(mode));
      for (bool float_out : {false, true}) {
        const Call call(device(), dtype(), shape, {false, true, float_out, 0});
        const bool exact = float_out || dtype() == DType::kFloat32;
        EXPECT_LT(testing::RelativeFrobeniusError(OutOf(call, mode), expected),
                  exact && mode != Mode::kCublasLt ? 1e-5 : 5e-3);
      }
    }
  }
}

TEST_P(LinearFp8Test, SameCallGivesTheSameBits) {
  for (Shape shape : {Shape{1, 520, 2048}, Shape{6, 64, 784},
                      Shape{24, 136, 1024}, Shape{150, 272, 512}}) {
    for (Mode mode : Modes()) {
      SCOPED_TRACE(StrCat(shape.tokens, " tokens, ", LinearModeName(mode)));
      const Call call(device(), dtype(), shape, {false, true, true, 0});
      const std::vector<double> first = OutOf(call, mode);
      for (int i = SmallOr(2, 0); i < 3; ++i) {
        EXPECT_EQ(OutOf(call, mode), first);
      }
    }
  }
}

TEST_P(LinearFp8Test, RowDoesNotDependOnTheContentOfOthers) {
  for (int64_t tokens : Fewer<int64_t>({2, 8, 9, 16, 32, 33, 64, 132}, 5)) {
    for (Mode mode : Modes()) {
      const int64_t in = mode == Mode::kCublasLt ? 512 : 272;
      SCOPED_TRACE(StrCat(tokens, " tokens, ", LinearModeName(mode)));
      const Call call(device(), dtype(), {tokens, 80, in}, {});
      ExpectTokenIgnoresOthers(call.params(), mode);
    }
  }
}

// All built-in kernels give an element the same bits, so this holds for the
// default as well where there is no cuBLASLt.
TEST_P(LinearFp8Test, RowDoesNotDependOnTheNumberOfOthers) {
  for (int64_t in_features : Fewer<int64_t>({272, 2048, 131})) {
    for (bool per_channel : {false, true}) {
      const Call all(device(), dtype(), {200, 200, in_features},
                     {per_channel, true, true, 0});
      for (Mode mode : Modes()) {
        if (mode == Mode::kCublasLt) continue;
        const std::vector<double> expected = OutOf(all, mode);
        for (int64_t tokens : Fewer<int64_t>(
                 {1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 111}, 5)) {
          for (int64_t first : {0, 89}) {
            SCOPED_TRACE(StrCat(tokens, " tokens from ", first));
            ExpectTokensAlone(all.params(), first, tokens, mode, expected);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(LinearFp8Test, AlignmentDoesNotChangeBits) {
  for (int64_t tokens : {1, 12, 70}) {
    const Call aligned(device(), dtype(), {tokens, 72, 272},
                       {false, true, true, 0});
    const Call odd(device(), dtype(), {tokens, 72, 272},
                   {false, true, true, 5});
    EXPECT_EQ(OutOf(aligned, Mode::kDefault), OutOf(odd, Mode::kDefault));
  }
}

TEST_P(LinearFp8Test, NanInARowStaysThere) {
  for (int64_t tokens : {3, 12, 24, 40, 100}) {
    for (Mode mode : Modes()) {
      const int64_t in = mode == Mode::kCublasLt ? 512 : 272;
      SCOPED_TRACE(StrCat(tokens, " tokens, ", LinearModeName(mode)));
      const Call call(device(), dtype(), {tokens, 48, in}, {});
      std::vector<float> x = Normal(tokens * in, 30);
      x[2 * in + 200] = NAN;
      const TestTensor x_tensor(device(), dtype(), {tokens, in}, x);
      LinearParams p = call.params();
      p.x = x_tensor.view();
      Run(p, mode);
      const std::vector<double> values = call.Values();
      for (size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(std::isnan(values[i]), i / 48 == 2) << "element " << i;
      }
    }
  }
}

// Each call reads what the one before wrote, and their kernels may be launched
// before that has ended.
TEST_P(LinearFp8Test, CallsInAGraphWaitForEachOther) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "for CUDA";
  if constexpr (kCudaBuilt) {
    const int64_t size = SmallOr(256, int64_t{1024});
    for (int64_t tokens : Fewer<int64_t>({1, 8, 16, 32, 40, 128}, 4)) {
      for (Mode mode : Modes()) {
        SCOPED_TRACE(StrCat(tokens, " tokens, ", LinearModeName(mode)));
        const Call first(device(), dtype(), {tokens, size, size}, {});
        const Call second(device(), dtype(), {tokens, size, size}, {}, 7);
        LinearParams p[2] = {first.params(), second.params()};
        p[1].x = p[0].out;
        Run(p[0], mode);
        Run(p[1], mode);
        const std::vector<double> expected = second.Values();

        std::vector<Buffer> workspaces;
        for (LinearParams& call : p) {
          call = WithMode(call, mode);
          call.workspace_size = LinearWorkspaceBytes(call);
          StatusOr<Buffer> workspace =
              Buffer::Allocate(device(), call.workspace_size);
          ASSERT_TRUE(workspace.ok());
          call.workspace = workspace->data();
          workspaces.push_back(*std::move(workspace));
        }
        const Status status =
            testing::RunAsCudaGraph(stream(), SmallOr(2, 5), [&]() -> Status {
              // What is read too early shows.
              for (int i = 0; i < 2; ++i) {
                TENON_RETURN_IF_ERROR(FillMemory(workspaces[i].data(), device(),
                                                 0xff, p[i].workspace_size,
                                                 stream()));
              }
              TENON_RETURN_IF_ERROR(FillMemory(
                  p[0].out.data, device(), 0xff,
                  NumElements(p[0].out) * DTypeSize(p[0].out.dtype), stream()));
              TENON_RETURN_IF_ERROR(Linear(p[0], stream()));
              return Linear(p[1], stream());
            });
        ASSERT_TRUE(status.ok()) << status.message();
        Finish();
        EXPECT_EQ(second.Values(), expected);
      }
    }
  }
}

TEST_P(LinearFp8Test, CpuResultDoesNotDependOnThreads) {
  if (device().type != DeviceType::kCpu) GTEST_SKIP() << "for the CPU";
  for (int64_t tokens : {1, 5, 70}) {
    const Call call(device(), dtype(), {tokens, 777, 300},
                    {false, true, false, 0});
    ExpectThreadsDoNotMatter(call.params());
  }
}

TEST_P(LinearFp8Test, WorkspaceGrowsWithTokens) {
  for (Mode mode : Modes()) {
    size_t previous = 0;
    for (int64_t tokens : {1, 8, 9, 64, 1000}) {
      LinearParams p;  // needs no data
      p.x = MakeTensor(nullptr, dtype(), device(), {tokens, 128});
      p.weight = MakeTensor(nullptr, DType::kFloat8E4M3, device(), {64, 128});
      p.weight_scales = MakeTensor(nullptr, DType::kFloat32, device(), {1, 1});
      p.out = MakeTensor(nullptr, dtype(), device(), {tokens, 64});
      p.cublas_lt = mode == Mode::kCublasLt ? cublas_lt_.get() : nullptr;
      const size_t bytes = LinearWorkspaceBytes(p);
      EXPECT_GT(bytes, 0u);
      EXPECT_GE(bytes, previous);
      previous = bytes;
      p.x.shape[1] = 127;
      EXPECT_EQ(LinearWorkspaceBytes(p), 0u);
    }
  }
}

TEST_P(LinearFp8Test, RejectsBadArguments) {
  const Call call(device(), dtype(), {4, 200, 272}, {false, true, false, 0});
  StatusOr<Buffer> workspace = Buffer::Allocate(device(), 1 << 16);
  ASSERT_TRUE(workspace.ok());
  LinearParams good = call.params();
  good.workspace = workspace->data();
  good.workspace_size = 1 << 16;
  using P = LinearParams;
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    P p = good;
    change(p);
    testing::ExpectInvalid(Linear(p, stream()), parts);
  };
  expect({"Linear", "weight_scales is missing"},
         [](P& p) { p.weight_scales = TensorView(); });
  expect({"weight_scales", "[3, 3]", "[2, 3]"},
         [](P& p) { p.weight_scales.shape[0] = 3; });
  expect({"weight_scales", "[2, 2]", "[2, 3]"},
         [](P& p) { p.weight_scales.shape[1] = 2; });
  expect({"weight_scales", "bfloat16"},
         [](P& p) { p.weight_scales.dtype = DType::kBFloat16; });
  expect({"weight_scales", "null data"},
         [](P& p) { p.weight_scales.data = nullptr; });
  expect({"weight_scales", "cuda:7"}, [](P& p) {
    p.weight_scales.device = {DeviceType::kCuda, 7};
  });
  expect({"weight_scales", "[2]", "[200]"},
         [](P& p) { p.weight_scales.rank = 1; });
  expect({"weight_scales is given", "float8_e4m3"}, [&](P& p) {
    p.weight = MakeTensor(p.weight.data, dtype(), device(), {100, 272});
    p.out.shape[1] = p.bias.shape[0] = 100;
  });
  expect({"x", "float8_e4m3"}, [](P& p) { p.x.dtype = DType::kFloat8E4M3; });
  expect({"out", "float8_e4m3"},
         [](P& p) { p.out.dtype = DType::kFloat8E4M3; });
  expect({"out overlaps weight_scales"},
         [](P& p) { p.weight_scales.data = p.out.data; });
  expect({"workspace is null"}, [](P& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](P& p) { p.workspace_size = 1000; });
  expect({"workspace overlaps x"}, [](P& p) { p.x.data = p.workspace; });
  expect({"workspace overlaps weight_scales"},
         [](P& p) { p.weight_scales.data = p.workspace; });
  call.ExpectOnlyOutChanged();
}

TEST(LinearFp8KernelTest, IsChosenByTokensAlignmentAndScales) {
  alignas(16) static char memory[16];
  LinearParams p;
  const auto select = [&](int64_t tokens) {
    p.x = MakeTensor(memory, DType::kBFloat16, Device(), {tokens, 2048});
    p.out = MakeTensor(memory, DType::kBFloat16, Device(),
                       {tokens, p.weight.shape[0]});
    return SelectLinearFp8Kernel(p);
  };
  p.weight = MakeTensor(memory, DType::kFloat8E4M3, Device(), {5120, 2048});
  p.weight_scales = MakeTensor(memory, DType::kFloat32, Device(), {40, 16});
  EXPECT_EQ(select(1), LinearKernel::kGemv);
  EXPECT_EQ(select(kLinearFp8GemvTokens), LinearKernel::kGemv);
  EXPECT_EQ(select(kLinearFp8GemvTokens + 1), LinearKernel::kSmallTile);
  EXPECT_EQ(select(64), LinearKernel::kSmallTile);
  EXPECT_EQ(select(65), LinearKernel::kMediumTile);
  EXPECT_EQ(select(512), LinearKernel::kLargeTile);
  // Any address will do: it is not used.
  p.cublas_lt = reinterpret_cast<CublasLt*>(memory);
  EXPECT_EQ(select(kLinearFp8GemvTokens), LinearKernel::kGemv);
  EXPECT_EQ(select(kLinearFp8GemvTokens + 1), LinearKernel::kCublasLt);
  p.batch_invariant = true;
  EXPECT_EQ(select(512), LinearKernel::kLargeTile);
  p.batch_invariant = false;
  p.weight_scales.stride[0] = 17;
  EXPECT_EQ(select(512), LinearKernel::kLargeTile);
  p.weight_scales = MakeTensor(memory, DType::kFloat32, Device(), {5120});
  EXPECT_EQ(select(512), LinearKernel::kLargeTile);
  p.weight.stride[0] = 2049;
  EXPECT_EQ(select(1), LinearKernel::kMediumTile);
  EXPECT_EQ(select(512), LinearKernel::kMediumTile);
}

// Else a test of the clusters may test something else.
TEST_P(LinearFp8Test, ClustersTakeTensOfTokens) {
  if (device().type == DeviceType::kCpu || dtype() == DType::kFloat32) {
    GTEST_SKIP() << "for the kernels of CUDA";
  }
  if (cublas_lt_ == nullptr) GTEST_SKIP() << "they take calls with cuBLASLt";
  if constexpr (kCudaBuilt) {
    StatusOr<DeviceInfo> info = GetDeviceInfo(device());
    ASSERT_TRUE(info.ok());
    if (info->compute_capability != 90) GTEST_SKIP() << "for Hopper";
    const auto takes = [&](Shape shape, auto&& change) {
      const Call call(device(), dtype(), shape, {});
      LinearParams p = call.params();
      p.cublas_lt = cublas_lt_.get();
      change(p);
      return LinearFp8Clusters(p);
    };
    const auto as_is = [](LinearParams&) {};
    EXPECT_TRUE(takes({9, 5120, 2048}, as_is));
    EXPECT_TRUE(takes({64, 2048, 4096}, as_is));
    EXPECT_FALSE(takes({8, 512, 2048}, as_is));
    EXPECT_FALSE(takes({65, 512, 2048}, as_is));
    EXPECT_FALSE(takes({9, 512, 384}, as_is));
    EXPECT_FALSE(takes({9, 512, 528}, as_is));
    EXPECT_FALSE(takes({9, 512, 2048},
                       [](LinearParams& p) { p.batch_invariant = true; }));
    EXPECT_FALSE(
        takes({9, 512, 2048}, [](LinearParams& p) { p.cublas_lt = nullptr; }));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, LinearFp8Test,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
