#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "ops/core/status.h"
#include "ops/core/validate.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"

namespace tenon {
namespace {

using testing::ExpectInvalid;

TEST(StatusTest, CodesAreThoseOfAbsl) {
  EXPECT_EQ(static_cast<int>(StatusCode::kInvalidArgument), 3);
  EXPECT_EQ(static_cast<int>(StatusCode::kNotFound), 5);
  EXPECT_EQ(static_cast<int>(StatusCode::kResourceExhausted), 8);
  EXPECT_EQ(static_cast<int>(StatusCode::kFailedPrecondition), 9);
  EXPECT_EQ(static_cast<int>(StatusCode::kUnimplemented), 12);
  EXPECT_EQ(static_cast<int>(StatusCode::kInternal), 13);
  EXPECT_EQ(static_cast<int>(StatusCode::kUnavailable), 14);
  EXPECT_EQ(static_cast<int>(StatusCode::kDataLoss), 15);
  EXPECT_EQ(InvalidArgumentError("a").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(NotFoundError("a").code(), StatusCode::kNotFound);
  EXPECT_EQ(ResourceExhaustedError("a").code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(FailedPreconditionError("a").code(),
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(UnimplementedError("a").code(), StatusCode::kUnimplemented);
  EXPECT_EQ(InternalError("a").code(), StatusCode::kInternal);
  EXPECT_EQ(UnavailableError("a").code(), StatusCode::kUnavailable);
  EXPECT_EQ(DataLossError("a").code(), StatusCode::kDataLoss);
}

TEST(StatusTest, CopiesAndMoves) {
  const Status ok;
  EXPECT_TRUE(ok.ok());
  EXPECT_EQ(ok.code(), StatusCode::kOk);
  EXPECT_STREQ(ok.message(), "");
  Status error = InvalidArgumentError("value ", 7, " of ", 1.5);
  EXPECT_FALSE(error.ok());
  EXPECT_STREQ(error.message(), "value 7 of 1.5");
  Status copy = error;
  EXPECT_STREQ(copy.message(), error.message());
  const Status moved = std::move(copy);
  EXPECT_EQ(moved.code(), StatusCode::kInvalidArgument);
  error = ok;
  EXPECT_TRUE(error.ok());
  error = moved;
  EXPECT_STREQ(error.message(), "value 7 of 1.5");
  const Status& self = error;
  error = self;
  EXPECT_STREQ(error.message(), "value 7 of 1.5");
}

TEST(StatusTest, ReturnIfErrorEvaluatesOnce) {
  int calls = 0;
  const auto run = [&](bool fail) {
    TENON_RETURN_IF_ERROR((++calls, fail ? InternalError("no") : Status()));
    return NotFoundError("went on");
  };
  EXPECT_STREQ(run(true).message(), "no");
  EXPECT_STREQ(run(false).message(), "went on");
  EXPECT_EQ(calls, 2);
}

TEST(StatusOrTest, HoldsAValueOrAnError) {
  StatusOr<std::unique_ptr<int>> value = std::make_unique<int>(5);
  ASSERT_TRUE(value.ok());
  EXPECT_TRUE(value.status().ok());
  EXPECT_EQ(**value, 5);
  const std::unique_ptr<int> taken = *std::move(value);
  EXPECT_EQ(*taken, 5);
  const StatusOr<int> error = NotFoundError("nothing");
  EXPECT_FALSE(error.ok());
  EXPECT_STREQ(error.status().message(), "nothing");
  const StatusOr<int> misused = Status();
  EXPECT_FALSE(misused.ok());
  EXPECT_EQ(misused.status().code(), StatusCode::kInternal);
}

class ValidateTest : public ::testing::Test {
 protected:
  Status Check(const TensorView& view) const {
    return CheckTensor("Op", "x", view, {kAnySize, 8}, kFloatDTypes, Device{});
  }
  Status CheckWritten(const TensorView& view) const {
    return CheckOutput("Op", "x", view, {kAnySize, 8}, kFloatDTypes, Device{});
  }

  alignas(256) float memory_[1024] = {};
  TensorView x_ = MakeTensor(memory_, DType::kFloat32, Device{}, {4, 8});
};

TEST_F(ValidateTest, CheckTensorNamesWhatIsWrong) {
  EXPECT_TRUE(Check(x_).ok());
  ExpectInvalid(Check(TensorView()), {"Op: x is missing"});
  TensorView bad = x_;
  bad.rank = 3;
  ExpectInvalid(Check(bad), {"Op: x has rank 3, expected 2"});
  bad.rank = -1;
  ExpectInvalid(Check(bad), {"rank -1"});
  bad = x_;
  bad.dtype = DType::kInt32;
  ExpectInvalid(Check(bad), {"Op: x has dtype int32, expected float32 or "
                             "float16 or bfloat16"});
  for (int dtype : {0, -1, 8, 31, 32, 1 << 30}) {
    bad.dtype = static_cast<DType>(dtype);
    ExpectInvalid(Check(bad), {"x has dtype invalid"});
  }
  bad = x_;
  bad.device = {DeviceType::kCuda, 1};
  ExpectInvalid(Check(bad), {"Op: x is on cuda:1, expected cpu:0"});
  bad = x_;
  bad.shape[1] = 9;
  ExpectInvalid(Check(bad), {"Op: x has shape [4, 9], expected [*, 8]"});
  bad = x_;
  bad.shape[0] = -4;
  ExpectInvalid(Check(bad), {"Op: x has shape [-4, 8], expected [*, 8]"});
  bad = x_;
  bad.stride[0] = -8;
  ExpectInvalid(Check(bad),
                {"Op: x has stride -8 in dimension 0, expected >= 0"});
  bad = x_;
  bad.stride[1] = 2;
  ExpectInvalid(Check(bad), {"Op: x has innermost stride 2, expected 1"});
  bad = x_;
  bad.stride[0] = int64_t{1} << 61;
  ExpectInvalid(Check(bad), {"Op: x with shape [4, 8]", "2^63"});
  bad = x_;
  bad.data = nullptr;
  ExpectInvalid(Check(bad), {"Op: x has null data"});
  bad.data = reinterpret_cast<char*>(memory_) + 2;
  ExpectInvalid(Check(bad), {"Op: x has data that is not aligned to its "
                             "float32 elements"});
  bad.shape[0] = 0;  // empty: data does not matter
  EXPECT_TRUE(Check(bad).ok());
  bad.data = nullptr;
  EXPECT_TRUE(Check(bad).ok());
}

TEST_F(ValidateTest, InputsMayRepeatRowsButOutputsMayNot) {
  TensorView rows = x_;
  rows.stride[0] = 0;
  EXPECT_TRUE(Check(rows).ok());
  ExpectInvalid(CheckWritten(rows), {"Op: x has elements that share memory: "
                                     "shape [4, 8], strides [0, 1]"});
  rows.stride[0] = 7;
  ExpectInvalid(CheckWritten(rows), {"share memory"});
  rows.stride[0] = 8;
  EXPECT_TRUE(CheckWritten(rows).ok());
  rows.shape[0] = 1;
  rows.stride[0] = 0;  // one row: its stride does not matter
  EXPECT_TRUE(CheckWritten(rows).ok());
  // 2^61 rows of 8 elements: their number wraps to zero in 64 bits.
  rows.shape[0] = int64_t{1} << 61;
  EXPECT_TRUE(Check(rows).ok());
  ExpectInvalid(CheckWritten(rows), {"share memory"});
}

TEST_F(ValidateTest, OutputsMayBePermuted) {
  TensorView view = MakeTensor(memory_, DType::kFloat32, Device{}, {2, 3, 4});
  view.stride[0] = 4;
  view.stride[1] = 8;
  const auto check = [&] {
    return CheckOutput("Op", "x", view, {2, 3, 4}, kFloatDTypes, Device{});
  };
  EXPECT_TRUE(check().ok());
  view.stride[0] = 3;
  EXPECT_FALSE(check().ok());
}

TEST_F(ValidateTest, RangesAndWorkspace) {
  EXPECT_TRUE(CheckRange("Op", "n", 1, 1, 3).ok());
  EXPECT_TRUE(CheckRange("Op", "n", 3, 1, 3).ok());
  ExpectInvalid(CheckRange("Op", "n", 0, 1, 3),
                {"Op: n is 0, expected 1 to 3"});
  ExpectInvalid(CheckRange("Op", "n", 4, 1, 3),
                {"Op: n is 4, expected 1 to 3"});
  EXPECT_TRUE(CheckFinite("Op", "t", 0.5, 0.0, 1.0).ok());
  ExpectInvalid(CheckFinite("Op", "t", NAN, 0.0, 1.0), {"Op: t is nan"});
  ExpectInvalid(CheckFinite("Op", "t", INFINITY, 0.0, INFINITY),
                {"Op: t is inf"});
  ExpectInvalid(CheckFinite("Op", "t", 1.5, 0.0, 1.0),
                {"Op: t is 1.5, expected 0 to 1"});
  const Device cuda = {DeviceType::kCuda, 0};
  EXPECT_TRUE(CheckWorkspace("Op", nullptr, 0, 0, cuda, {}).ok());
  EXPECT_TRUE(CheckWorkspace("Op", memory_, 64, 64, cuda, {}).ok());
  ExpectInvalid(CheckWorkspace("Op", nullptr, 64, 64, Device{}, {}),
                {"Op: workspace is null, expected 64 bytes"});
  ExpectInvalid(CheckWorkspace("Op", memory_, 63, 64, Device{}, {}),
                {"Op: workspace_size is 63, expected at least 64"});
  EXPECT_TRUE(CheckWorkspace("Op", memory_ + 16, 64, 64, Device{}, {}).ok());
  ExpectInvalid(CheckWorkspace("Op", memory_ + 16, 64, 64, cuda, {}),
                {"Op: workspace is not aligned to 256 bytes"});
  const TensorView row =
      MakeTensor(memory_ + 16, DType::kFloat32, Device{}, {16});
  EXPECT_TRUE(CheckWorkspace("Op", memory_, 128, 64, Device{},
                             {{"x", TensorView()}, {"y", row}})
                  .ok());
  ExpectInvalid(CheckWorkspace("Op", memory_, 128, 65, Device{}, {{"y", row}}),
                {"Op: workspace overlaps y"});
}

TEST_F(ValidateTest, Separate) {
  const TensorView a = MakeTensor(memory_, DType::kFloat32, Device{}, {4});
  const TensorView b = MakeTensor(memory_ + 4, DType::kFloat32, Device{}, {4});
  const TensorView c = MakeTensor(memory_ + 3, DType::kFloat32, Device{}, {4});
  EXPECT_TRUE(
      CheckSeparate("Op", {"a", a}, {{"b", b}, {"none", TensorView()}}).ok());
  ExpectInvalid(CheckSeparate("Op", {"a", a}, {{"b", b}, {"c", c}}),
                {"Op: a overlaps c"});
}

TEST_F(ValidateTest, MemoryOverlaps) {
  const TensorView matrix =
      MakeTensor(memory_, DType::kFloat32, Device{}, {8, 16});
  EXPECT_TRUE(MemoryOverlaps(matrix, matrix));
  EXPECT_TRUE(MemoryOverlaps(Rows(matrix, 0, 5), Rows(matrix, 4, 1)));
  EXPECT_FALSE(MemoryOverlaps(Rows(matrix, 0, 4), Rows(matrix, 4, 4)));
  // Column slices interleave without sharing an element.
  EXPECT_FALSE(MemoryOverlaps(Columns(matrix, 0, 8), Columns(matrix, 8, 8)));
  EXPECT_FALSE(MemoryOverlaps(Columns(matrix, 8, 8), Columns(matrix, 0, 8)));
  EXPECT_TRUE(MemoryOverlaps(Columns(matrix, 0, 9), Columns(matrix, 8, 8)));
  EXPECT_FALSE(MemoryOverlaps(Columns(Rows(matrix, 2, 4), 0, 4),
                              Columns(matrix, 4, 12)));
  // The same offset in rows further down.
  EXPECT_TRUE(MemoryOverlaps(Columns(Rows(matrix, 2, 4), 4, 4),
                             Columns(matrix, 4, 12)));
  // A slice that runs over the end of a row into the next one's start.
  TensorView wrapped = Columns(matrix, 12, 8);
  wrapped.shape[0] = 7;
  EXPECT_TRUE(MemoryOverlaps(wrapped, Columns(matrix, 0, 4)));
  EXPECT_FALSE(MemoryOverlaps(wrapped, Columns(matrix, 4, 8)));
  // K and V of every head side by side: [tokens, heads, 2, 4].
  TensorView k = MakeTensor(memory_, DType::kFloat32, Device{}, {8, 2, 4});
  k.stride[0] = 16;
  k.stride[1] = 8;
  TensorView v = k;
  v.data = memory_ + 4;
  EXPECT_FALSE(MemoryOverlaps(k, v));
  v.data = memory_ + 3;
  EXPECT_TRUE(MemoryOverlaps(k, v));
  // Nothing and other devices share nothing.
  EXPECT_FALSE(MemoryOverlaps(Rows(matrix, 1, 0), matrix));
  EXPECT_FALSE(MemoryOverlaps(TensorView(), matrix));
  TensorView other = matrix;
  other.device = {DeviceType::kCuda, 0};
  EXPECT_FALSE(MemoryOverlaps(other, matrix));
}

// MemoryOverlaps against marking every byte.
TEST_F(ValidateTest, MemoryOverlapsNeverMissesASharedByte) {
  const std::vector<int64_t> draws = testing::UniformIntegers(120000, 3, 0, 23);
  size_t next = 0;
  int interleaved = 0;
  const auto draw_view = [&](DType dtype) {
    TensorView view = MakeTensor(memory_, dtype, Device{},
                                 {1 + draws[next] % 4, 1 + draws[next + 1] % 3,
                                  1 + draws[next + 2] % 3});
    view.data = reinterpret_cast<char*>(memory_) +
                draws[next + 3] * static_cast<int64_t>(DTypeSize(dtype));
    view.stride[0] = draws[next + 4];
    view.stride[1] = draws[next + 5] / 2;
    next += 6;
    return view;
  };
  const auto mark = [&](const TensorView& view) {
    std::vector<bool> bytes(4096);
    const int64_t size = static_cast<int64_t>(DTypeSize(view.dtype));
    const int64_t base =
        view.As<char>() - reinterpret_cast<const char*>(memory_);
    for (int64_t i = 0; i < view.shape[0]; ++i) {
      for (int64_t j = 0; j < view.shape[1]; ++j) {
        const int64_t row =
            base + (i * view.stride[0] + j * view.stride[1]) * size;
        for (int64_t b = 0; b < view.shape[2] * size; ++b)
          bytes[row + b] = true;
      }
    }
    return bytes;
  };
  while (next + 12 <= draws.size()) {
    const TensorView a = draw_view(DType::kFloat32);
    const TensorView b = draw_view(DType::kFloat16);
    const std::vector<bool> a_bytes = mark(a);
    const std::vector<bool> b_bytes = mark(b);
    bool shared = false;
    for (size_t i = 0; i < a_bytes.size(); ++i) {
      shared |= a_bytes[i] && b_bytes[i];
    }
    if (shared) {
      ASSERT_TRUE(MemoryOverlaps(a, b));
    }
    ASSERT_EQ(MemoryOverlaps(a, b), MemoryOverlaps(b, a));
    interleaved += !shared && !MemoryOverlaps(a, b);
  }
  EXPECT_GT(interleaved, 0);
}

TEST_F(ValidateTest, NoBackend) {
  const Status status = NoBackendError("Op", {DeviceType::kCuda, 2});
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_STREQ(status.message(), "Op: this build has no backend for cuda:2");
}

TEST(TensorViewTest, SlicesShareMemory) {
  float memory[24];
  const TensorView matrix =
      MakeMatrix(memory, DType::kFloat32, Device{}, 4, 5, 6);
  EXPECT_EQ(NumElements(matrix), 20);
  EXPECT_EQ(NumElements(TensorView()), 0);
  EXPECT_EQ(Rows(matrix, 2, 2).As<float>(), memory + 12);
  EXPECT_EQ(Rows(matrix, 2, 2).shape[0], 2);
  EXPECT_EQ(Columns(matrix, 3, 2).As<float>(), memory + 3);
  EXPECT_EQ(Columns(matrix, 3, 2).stride[0], 6);
  const TensorView cube =
      MakeTensor(memory, DType::kFloat32, Device{}, {2, 3, 4});
  EXPECT_EQ(cube.stride[0], 12);
  EXPECT_EQ(cube.stride[1], 4);
  EXPECT_EQ(cube.stride[2], 1);
}

}  // namespace
}  // namespace tenon
