#include <gtest/gtest.h>

#include "ops/moe/moe.h"
#include "tests/ops/moe_fixture.h"

namespace tenon::moe_test {
namespace {

class MoeValidationTest : public Fixture {};

TEST_P(MoeValidationTest, RejectsBadArguments) {
  Problem problem;
  problem.tokens = 6;
  problem.hidden = 32;
  problem.intermediate = 24;
  problem.num_experts = 4;
  problem.top_k = 2;
  Call call(device(), dtype(), problem);
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeParams p = call.params();
    change(p);
    testing::ExpectInvalid(Moe(p, stream()), parts);
  };
  expect({"Moe", "x is missing"}, [](MoeParams& p) { p.x = TensorView(); });
  expect({"x", "int32"}, [](MoeParams& p) { p.x.dtype = DType::kInt32; });
  expect({"gate", "[4, 24, 32]", "[4, 24, 31]"},
         [](MoeParams& p) { p.x.shape[1] = 31; });
  expect({"hidden", "0"}, [](MoeParams& p) { p.x.shape[1] = 0; });
  expect({"intermediate", "is 0"}, [](MoeParams& p) { p.gate.rows = 0; });
  expect({"num_experts", "1025"},
         [](MoeParams& p) { p.gate.num_experts = 1025; });
  expect({"up", "[4, 23, 32]"}, [](MoeParams& p) { p.up.rows = 23; });
  expect({"up", "[3, 24, 32]"}, [](MoeParams& p) { p.up.num_experts = 3; });
  expect({"up", "dtype"}, [](MoeParams& p) { p.up.dtype = DType::kInt64; });
  expect({"up", "row_stride 31"}, [](MoeParams& p) { p.up.row_stride = 31; });
  expect({"down", "[4, 32, 25]"}, [](MoeParams& p) { p.down.cols = 25; });
  expect({"down", "neither"}, [](MoeParams& p) { p.down.data = nullptr; });
  expect({"down", "cuda:7"}, [](MoeParams& p) {
    p.down.device = {DeviceType::kCuda, 7};
  });
  expect({"topk_ids", "[5, 2]"}, [](MoeParams& p) { p.topk_ids.shape[0] = 5; });
  expect({"topk_ids", "dtype"},
         [](MoeParams& p) { p.topk_ids.dtype = DType::kInt64; });
  expect({"top_k", "33"}, [](MoeParams& p) { p.topk_ids.shape[1] = 33; });
  expect({"top_k", "is 0"}, [](MoeParams& p) { p.topk_ids.shape[1] = 0; });
  expect({"topk_weights", "[6, 1]"},
         [](MoeParams& p) { p.topk_weights.shape[1] = 1; });
  expect({"topk_weights", "dtype"},
         [](MoeParams& p) { p.topk_weights.dtype = DType::kBFloat16; });
  expect({"out", "[7, 32]"}, [](MoeParams& p) { p.out.shape[0] = 7; });
  expect({"out", "share memory"}, [](MoeParams& p) { p.out.stride[0] = 31; });
  expect({"out overlaps x"},
         [](MoeParams& p) { p.out.data = p.x.As<char>() + 64; });
  expect({"out overlaps up"},
         [](MoeParams& p) { p.out.data = const_cast<void*>(p.up.data); });
  expect({"out overlaps down"},
         [](MoeParams& p) { p.out.data = const_cast<void*>(p.down.data); });
  expect({"out is x"}, [](MoeParams& p) {
    p.out.data = p.x.data;
    p.out.stride[0] = 40;
  });
  expect({"out overlaps topk_ids"},
         [](MoeParams& p) { p.out.data = p.topk_ids.data; });
  expect({"workspace is null"}, [](MoeParams& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](MoeParams& p) { p.workspace_size -= 1; });
  expect({"workspace", "aligned"}, [](MoeParams& p) {
    p.workspace = static_cast<char*>(p.workspace) + 8;
  });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeValidationTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
