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
  expect({"out overlaps up"}, [](MoeParams& p) { p.up.data = p.out.data; });
  expect({"out overlaps down"}, [](MoeParams& p) { p.down.data = p.out.data; });
  expect({"out is x"}, [](MoeParams& p) {
    p.out.data = p.x.data;
    p.out.stride[0] = 40;
  });
  expect({"residual", "[6, 31]", "[6, 32]"}, [](MoeParams& p) {
    p.residual = p.out;
    p.residual.shape[1] = 31;
  });
  expect({"residual", "int32"}, [](MoeParams& p) {
    p.residual = p.out;
    p.residual.dtype = DType::kInt32;
  });
  expect({"out overlaps residual"}, [](MoeParams& p) {
    p.residual = p.out;
    p.residual.data =
        p.out.As<char>() + static_cast<int64_t>(DTypeSize(p.out.dtype));
  });
  expect({"rows has rank 2, expected 3"}, [](MoeParams& p) { p.rows = p.out; });
  expect({"out or residual is given beside rows"}, [](MoeParams& p) {
    p.rows = MakeTensor(p.workspace, p.x.dtype, p.x.device, {6, 2, 32});
  });
  expect({"rows have gaps"}, [](MoeParams& p) {
    p.rows = MakeTensor(p.workspace, p.x.dtype, p.x.device, {6, 2, 32});
    p.rows.stride[0] = 72;
  });
  expect({"workspace overlaps rows"}, [](MoeParams& p) {
    p.rows = MakeTensor(p.workspace, p.x.dtype, p.x.device, {6, 2, 32});
    p.out = TensorView();
  });
  expect({"out overlaps topk_ids"},
         [](MoeParams& p) { p.topk_ids.data = p.out.data; });
  expect({"workspace is null"}, [](MoeParams& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](MoeParams& p) { p.workspace_size -= 1; });
  expect({"workspace", "aligned"}, [](MoeParams& p) {
    p.workspace = static_cast<char*>(p.workspace) + 8;
  });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

TEST_P(MoeValidationTest, RejectsBadScales) {
  Problem problem;
  problem.tokens = 6;
  problem.hidden = 160;
  problem.intermediate = 136;
  problem.num_experts = 4;
  problem.top_k = 2;
  problem.experts = Experts::kFp8Blocks;
  Call call(device(), dtype(), problem);
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeParams p = call.params();
    change(p);
    testing::ExpectInvalid(Moe(p, stream()), parts);
  };
  expect({"Moe", "gate of float8_e4m3 has no scales"},
         [](MoeParams& p) { p.gate.scales = ExpertScales(); });
  expect({"down of float8_e4m3 has no scales"},
         [](MoeParams& p) { p.down.scales.data = nullptr; });
  expect({"up", "dtype", "expected float8_e4m3"},
         [&](MoeParams& p) { p.up.dtype = dtype(); });
  expect({"up", "float8_e4m3", "expected", DTypeName(dtype())},
         [&](MoeParams& p) {
           p.gate.dtype = dtype();
           p.gate.scales = ExpertScales();
         });
  expect({"down", "has scales"}, [&](MoeParams& p) {
    p.gate.dtype = p.up.dtype = p.down.dtype = dtype();
    p.gate.scales = p.up.scales = ExpertScales();
    p.gate.data = p.up.data = p.x.data;  // aligned for any dtype
    p.down.data = p.x.data;
  });
  expect({"gate.scales", "block_rows 128", "block_cols 64"},
         [](MoeParams& p) { p.gate.scales.block_cols = 64; });
  expect({"up.scales", "block_rows 1", "expected gate's 128"},
         [](MoeParams& p) {
           p.up.scales.block_rows = 1;
           p.up.scales.block_cols = 0;
         });
  expect({"gate.scales", "row_stride 1", "at least 2"},
         [](MoeParams& p) { p.gate.scales.row_stride = 1; });
  expect({"up.scales", "expert_stride -2"},
         [](MoeParams& p) { p.up.scales.expert_stride = -2; });
  expect({"down.scales", "spans more"},
         [](MoeParams& p) { p.down.scales.expert_stride = int64_t{1} << 61; });
  expect({"out overlaps gate.scales"},
         [](MoeParams& p) { p.gate.scales.data = p.out.As<const float>(); });
  expect({"workspace overlaps down.scales"}, [](MoeParams& p) {
    p.down.scales.data = static_cast<const float*>(p.workspace);
  });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

// A call that chooses its experts itself.
class RoutedCall {
 public:
  RoutedCall(Device device, DType dtype, Experts experts, int64_t tokens)
      : problem_(MakeProblem(experts, tokens)), call_(device, dtype, problem_) {
    logits_ =
        TestTensor(device, dtype, {tokens, 5}, {7, 1}, Normal(tokens * 5, 21));
    weights_ = TestTensor(device, DType::kFloat32, {tokens, 3});
    ids_ = TestTensor::FromIntegers(
        device, DType::kInt32, {tokens, 3},
        std::vector<int64_t>(static_cast<size_t>(3 * tokens), -1));
    router_.logits = logits_.view();
    router_.topk_weights = weights_.view();
    router_.topk_ids = ids_.view();
    router_.top_k = 2;
    router_.renormalize = true;
    router_.num_fused_shared_experts = 1;
    params().topk_weights = weights_.view();
    params().topk_ids = ids_.view();
    params().router = &router_;
    call_.AddWorkspace();
  }

  MoeParams& params() { return call_.params(); }
  MoeRouterParams& router() { return router_; }
  const Call& call() const { return call_; }

 private:
  static Problem MakeProblem(Experts experts, int64_t tokens) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 48;
    problem.intermediate = 32;
    problem.num_experts = 6;
    problem.top_k = 3;
    problem.experts = experts;
    return problem;
  }

  Problem problem_;
  Call call_;
  TestTensor logits_, weights_, ids_;
  MoeRouterParams router_;
};

TEST_P(MoeValidationTest, RoutesItself) {
  for (Experts experts : {Experts::kAsX, Experts::kFp8Blocks}) {
    for (int64_t tokens : {1, 9, 700}) {  // the last in chunks on the CPU
      RoutedCall routed(device(), dtype(), experts, tokens);
      ASSERT_TRUE(Moe(routed.params(), stream()).ok());
      Finish();
      const std::vector<uint8_t> bytes = routed.call().out().Bytes();
      // The same in two calls.
      ASSERT_TRUE(MoeRouter(routed.router(), stream()).ok());
      routed.params().router = nullptr;
      ASSERT_TRUE(Moe(routed.params(), stream()).ok());
      Finish();
      EXPECT_EQ(routed.call().out().Bytes(), bytes) << tokens << " tokens";
      EXPECT_NE(bytes, routed.call().out().InitialBytes());
    }
  }
}

TEST_P(MoeValidationTest, RejectsBadRouter) {
  RoutedCall routed(device(), dtype(), Experts::kFp8Blocks, 6);
  const MoeRouterParams router = routed.router();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    routed.router() = router;
    MoeParams p = routed.params();
    change(p, routed.router());
    testing::ExpectInvalid(Moe(p, stream()), parts);
  };
  expect({"MoeRouter", "top_k"},
         [](MoeParams&, MoeRouterParams& r) { r.top_k = 6; });
  expect({"Moe", "router.topk_weights is not topk_weights"},
         [](MoeParams& p, MoeRouterParams&) {
           p.topk_weights.data = p.x.data;
           p.topk_weights.stride[0] = 12;
         });
  expect({"router.topk_ids is not topk_ids"},
         [](MoeParams& p, MoeRouterParams&) { p.topk_ids.stride[0] = 2; });
  expect({"router chooses among 4 experts and 1 shared", "expected 6"},
         [](MoeParams&, MoeRouterParams& r) { r.logits.shape[1] = 4; });
  expect({"out overlaps router.logits"},
         [](MoeParams& p, MoeRouterParams& r) { r.logits.data = p.out.data; });
  expect({"workspace overlaps router.logits"},
         [](MoeParams& p, MoeRouterParams& r) { r.logits.data = p.workspace; });
  expect({"topk_ids overlaps x"}, [](MoeParams& p, MoeRouterParams& r) {
    p.topk_ids.data = r.topk_ids.data = p.x.data;
  });
  expect({"topk_weights overlaps down.scales"},
         [](MoeParams& p, MoeRouterParams& r) {
           p.down.scales.data = static_cast<const float*>(r.topk_weights.data);
         });
  EXPECT_EQ(routed.call().out().Bytes(), routed.call().out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeValidationTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
