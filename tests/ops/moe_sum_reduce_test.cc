#include "ops/moe/moe_sum_reduce.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/reference/moe_sum_reduce_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/huge_memory.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::RoundTo;
using testing::TestTensor;

class MoeSumReduceTest : public testing::OpTest {
 protected:
  std::vector<double> Expected(const TestTensor& x) {
    const TensorView& view = x.view();
    std::vector<double> sums = reference::MoeSumReduce(
        x.InitialValues(), view.shape[0], view.shape[1], view.shape[2]);
    for (double& v : sums) v = RoundTo(dtype(), v);
    return sums;
  }

  // Bit-equality, on x with the given strides.
  void RunAndCheck(std::vector<int64_t> shape, std::vector<int64_t> strides,
                   int64_t out_padding) {
    SCOPED_TRACE(StrCat(shape[0], "x", shape[1], "x", shape[2], " strides ",
                        strides[0], ", ", strides[1]));
    const TestTensor x(device(), dtype(), shape, strides,
                       Normal(shape[0] * shape[1] * shape[2], 1));
    TestTensor out(device(), dtype(), {shape[0], shape[2]},
                   {shape[2] + out_padding, 1}, {});
    MoeSumReduceParams p;
    p.x = x.view();
    p.out = out.view();
    const Status status = MoeSumReduce(p, stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_EQ(out.Values(), Expected(x));
    EXPECT_EQ(x.Bytes(), x.InitialBytes());
    EXPECT_EQ(out.NumStrayWrites(), 0);
  }
};

TEST_P(MoeSumReduceTest, Acceptance21_BitEqualToSequentialSum) {
  for (const auto& [tokens, top_k, hidden] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 1},
                                                          {3, 2, 13},
                                                          {13, 5, 111},
                                                          {111, 7, 16},
                                                          {2, 8, 2048},
                                                          {3, 9, 2056},
                                                          {5, 17, 520},
                                                          {1, 8, 5120}}) {
    const int64_t dense = top_k * hidden;
    RunAndCheck({tokens, top_k, hidden}, {dense, hidden, 1}, 0);
    RunAndCheck({tokens, top_k, hidden}, {dense + 8 * top_k, hidden + 8, 1}, 8);
    RunAndCheck({tokens, top_k, hidden}, {dense + top_k + 1, hidden + 1, 1}, 3);
    // As [top_k, tokens, hidden] in memory.
    RunAndCheck({tokens, top_k, hidden}, {hidden, tokens * hidden, 1}, 0);
  }
}

TEST_P(MoeSumReduceTest, Acceptance21_ManyTokens) {
  if (device().type != DeviceType::kCuda) {
    GTEST_SKIP() << "covered by smaller shapes";
  }
  RunAndCheck({1024, 8, 2048}, {8 * 2048, 2048, 1}, 0);
  RunAndCheck({70001, 3, 24}, {3 * 24, 24, 1}, 0);
  RunAndCheck({2, 2, 70000}, {2 * 70000, 70000, 1}, 0);
}

// 1 + tiny + ... would grow if the small terms were added first.
TEST_P(MoeSumReduceTest, Acceptance21_OrderIsThatOfTheChoices) {
  const float tiny = 5.9604645e-8f;  // half an ulp of 1: a tie, goes to even
  const TestTensor first(device(), DType::kFloat32, {1, 3, 1},
                         {1.0f, tiny, tiny});
  const TestTensor last(device(), DType::kFloat32, {1, 3, 1},
                        {tiny, tiny, 1.0f});
  TestTensor out(device(), DType::kFloat32, {1, 1});
  MoeSumReduceParams p;
  p.out = out.view();
  p.x = first.view();
  ASSERT_TRUE(MoeSumReduce(p, stream()).ok());
  Finish();
  EXPECT_EQ(out.Values()[0], 1.0);
  p.x = last.view();
  ASSERT_TRUE(MoeSumReduce(p, stream()).ok());
  Finish();
  EXPECT_EQ(out.Values()[0], 1.0f + 2 * tiny);
}

TEST_P(MoeSumReduceTest, OneChoiceIsCopied) {
  // Starting from x rather than from 0 keeps the sign of zero.
  const TestTensor x(device(), dtype(), {1, 1, 2}, {-0.0f, 3.0f});
  TestTensor out(device(), dtype(), {1, 2});
  MoeSumReduceParams p;
  p.x = x.view();
  p.out = out.view();
  ASSERT_TRUE(MoeSumReduce(p, stream()).ok());
  Finish();
  EXPECT_TRUE(std::signbit(out.Values()[0]));
  EXPECT_EQ(out.Values()[1], 3.0);
}

TEST_P(MoeSumReduceTest, LargeOffsets) {
  constexpr int64_t kTokens = 3;
  constexpr int64_t kHidden = 40;
  constexpr int64_t kStride = (int64_t{1} << 30) + 64;  // token 2: beyond 2^31
  const size_t bytes =
      static_cast<size_t>((kTokens - 1) * kStride + 2 * kHidden) *
      DTypeSize(dtype());
  const testing::HugeMemory x_memory(device(), bytes);
  const testing::HugeMemory out_memory(device(), bytes);
  if (x_memory.data() == nullptr || out_memory.data() == nullptr) {
    GTEST_SKIP() << "not enough memory";
  }
  const TestTensor x(device(), dtype(), {kTokens, 2, kHidden},
                     Normal(kTokens * 2 * kHidden, 2));
  TestTensor out(device(), dtype(), {kTokens, kHidden});
  MoeSumReduceParams p;
  p.x = x.view();
  p.x.data = x_memory.data();
  p.x.stride[0] = kStride;
  p.out = MakeMatrix(out_memory.data(), dtype(), device(), kTokens, kHidden,
                     kStride);
  for (int64_t token = 0; token < kTokens; ++token) {
    ASSERT_TRUE(testing::CopyEntry(p.x, x.view(), token).ok());
  }
  ASSERT_TRUE(MoeSumReduce(p, stream()).ok());
  Finish();
  for (int64_t token = 0; token < kTokens; ++token) {
    ASSERT_TRUE(testing::CopyEntry(out.view(), p.out, token).ok());
  }
  Finish();
  EXPECT_EQ(out.Values(), Expected(x));
}

TEST_P(MoeSumReduceTest, ZeroTokensIsOk) {
  const TestTensor x(device(), dtype(), {0, 8, 64});
  TestTensor out(device(), dtype(), {0, 64});
  MoeSumReduceParams p;
  p.x = x.view();
  p.out = out.view();
  EXPECT_TRUE(MoeSumReduce(p, stream()).ok());
}

TEST_P(MoeSumReduceTest, RejectsBadArguments) {
  const TestTensor x(device(), dtype(), {4, 2, 64}, Normal(4 * 2 * 64, 3));
  TestTensor out(device(), dtype(), {4, 64});
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeSumReduceParams p;
    p.x = x.view();
    p.out = out.view();
    change(p);
    parts.push_back("MoeSumReduce: ");
    testing::ExpectInvalid(MoeSumReduce(p, stream()), parts);
  };
  using P = MoeSumReduceParams;
  expect({"x is missing"}, [](P& p) { p.x = TensorView(); });
  expect({"x", "null data"}, [](P& p) { p.x.data = nullptr; });
  expect({"x", "rank 2"}, [](P& p) { p.x.rank = 2; });
  expect({"x", "int32"}, [](P& p) { p.x.dtype = DType::kInt32; });
  expect({"x", "stride -1"}, [](P& p) { p.x.stride[1] = -1; });
  expect({"top_k", "is 0"}, [](P& p) { p.x.shape[1] = 0; });
  expect({"hidden", "is 0"}, [](P& p) { p.x.shape[2] = 0; });
  expect({"out is missing"}, [](P& p) { p.out = TensorView(); });
  expect({"out", "[4, 63]", "[4, 64]"}, [](P& p) { p.out.shape[1] = 63; });
  expect({"out", "[3, 64]"}, [](P& p) { p.out.shape[0] = 3; });
  expect({"out", "dtype"}, [](P& p) { p.out.dtype = DType::kUInt8; });
  expect({"out", "share memory"}, [](P& p) { p.out.stride[0] = 63; });
  expect({"out is on cuda:7"}, [](P& p) {
    p.out.device = {DeviceType::kCuda, 7};
  });
  expect({"out overlaps x"}, [](P& p) { p.out.data = p.x.data; });
  EXPECT_EQ(out.Bytes(), out.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeSumReduceTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
