#include <limits>

#include "ops/moe/moe_tile_rows.h"
#include "tests/ops/moe_grouped_matmul_fixture.h"

namespace tenon::moe_grouped_matmul_test {
namespace {

class MoeGroupedMatmulRobustnessTest : public Fixture {};

TEST_P(MoeGroupedMatmulRobustnessTest, SkippedSlotsAreZero) {
  Problem problem;
  problem.num_experts = 4;
  problem.rows = 40;
  problem.cols = 64;
  problem.bias = problem.routing = true;
  problem.ids = {-1, 2, 4, -7, 0, 1 << 30, 3, 2, -1};
  ExpectMatches(problem);
  problem.out_padding = 3;
  ExpectMatches(problem);
  problem.ids.assign(70, -1);  // nothing at all to do
  Call call(device(), dtype(), problem);
  Run(call);
  EXPECT_EQ(call.out().Values(), std::vector<double>(70 * 40, 0.0));
  EXPECT_EQ(call.out().NumStrayWrites(), 0);
}

// Nothing outside the tensors is read or written, whatever the schedule says.
TEST_P(MoeGroupedMatmulRobustnessTest, AnyScheduleStaysInside) {
  constexpr int64_t kMin = std::numeric_limits<int32_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const std::vector<std::vector<int64_t>> all_offsets = {
      {0, 20, 35, 50},    {0, 51, 1000, 70},   {50, 20, 10, 0},
      {kMax, 0, kMax, 0}, {kMin, 10, 5, kMax}, {-100, -7, -3, 60}};
  const std::vector<std::vector<int64_t>> all_slots = {
      {0, 1, 2, 3}, {-1, 50, 51, kMax}, {kMin, -2, 49, 1 << 20}};
  Problem problem;
  problem.num_experts = 3;
  problem.rows = 40;
  problem.cols = 64;
  problem.bias = problem.routing = true;
  problem.slots_per_row = 4;
  problem.ids = RandomIds(50, 3);
  for (const auto& offsets : all_offsets) {
    for (const auto& slots : all_slots) {
      std::vector<int64_t> repeated;
      for (size_t i = 0; i < 50; ++i) repeated.push_back(slots[i % 4]);
      Call call(device(), dtype(), problem);
      const auto hostile_offsets = testing::TestTensor::FromIntegers(
          device(), DType::kInt32, {4}, offsets);
      const auto hostile_slots = testing::TestTensor::FromIntegers(
          device(), DType::kInt32, {50}, repeated);
      call.params().expert_offsets = hostile_offsets.view();
      call.params().sorted_slots = hostile_slots.view();
      Run(call);
      EXPECT_EQ(call.out().NumStrayWrites(), 0);
      EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    }
  }
}

TEST_P(MoeGroupedMatmulRobustnessTest, StridedTensors) {
  Problem problem;
  problem.num_experts = 3;
  problem.rows = 48;
  problem.cols = 96;
  problem.ids = RandomIds(50, 3);
  problem.slots_per_row = 4;
  for (int64_t padding : {1, 8, 13, 64}) {
    problem.x_padding = problem.weight_padding = problem.out_padding = padding;
    problem.expert_padding = 8 * padding;
    ExpectMatches(problem);
  }
}

// Columns [96, 192) of every down matrix, as one rank of two has them.
TEST_P(MoeGroupedMatmulRobustnessTest, ColumnSliceOfWeights) {
  Problem problem;
  problem.num_experts = 3;
  problem.rows = 40;
  problem.cols = 96;
  problem.ids = RandomIds(20, 3);
  Call call(device(), dtype(), problem);
  const TestTensor wide(device(), dtype(), {3, 40, 192},
                        Normal(3 * 40 * 192, 9));
  ExpertMatrices slice = MakeExpertMatrices(wide.view());
  slice.cols = 96;
  slice.data = static_cast<const char*>(slice.data) + 96 * DTypeSize(dtype());
  call.params().weights = slice;
  Run(call);
  std::vector<float> half;
  const std::vector<double> all = wide.InitialValues();
  for (int64_t row = 0; row < 3 * 40; ++row) {
    for (int64_t k = 96; k < 192; ++k) {
      half.push_back(static_cast<float>(all[row * 192 + k]));
    }
  }
  const std::vector<double> values = call.out().Values();
  const TestTensor contiguous(device(), dtype(), {3, 40, 96}, half);
  call.params().weights = MakeExpertMatrices(contiguous.view());
  Run(call);
  EXPECT_EQ(call.out().Values(), values);
}

TEST_P(MoeGroupedMatmulRobustnessTest, SomeRowsOfPackedWeights) {
  Problem problem;
  problem.num_experts = 3;
  problem.rows = 80;
  problem.cols = 64;
  problem.ids = RandomIds(20, 3);
  Call all(device(), dtype(), problem);
  Run(all);
  const std::vector<double> values = all.out().Values();
  problem.rows = 30;
  Call some(device(), dtype(), problem);
  some.params().weights = MakeExpertMatrices(all.weights().view(), 50, 30);
  Run(some);
  std::vector<double> expected;
  for (int64_t s = 0; s < 20; ++s) {
    expected.insert(expected.end(), values.begin() + s * 80 + 50,
                    values.begin() + (s + 1) * 80);
  }
  EXPECT_EQ(some.out().Values(), expected);
}

TEST_P(MoeGroupedMatmulRobustnessTest, TableOfPointersOnTheCpu) {
  Problem problem;
  problem.num_experts = 4;
  problem.rows = 24;
  problem.cols = 40;
  problem.ids = RandomIds(20, 4);
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<double> values = call.out().Values();
  // The same matrices in reverse order in memory.
  ExpertMatrices& w = call.params().weights;
  std::vector<TestTensor> matrices;
  std::vector<const void*> table;
  const std::vector<double> all = call.weights().InitialValues();
  for (int64_t e = 0; e < 4; ++e) {
    matrices.emplace_back(device(), dtype(), std::vector<int64_t>{24, 40},
                          std::vector<float>(all.begin() + e * 24 * 40,
                                             all.begin() + (e + 1) * 24 * 40));
    table.push_back(matrices.back().view().data);
  }
  w.table = table.data();
  w.data = nullptr;
  w.expert_stride = 0;
  if (on_cuda()) {
    testing::ExpectInvalid(MoeGroupedMatmul(call.params(), stream()),
                           {"weights", "table"});
    return;
  }
  Run(call);
  EXPECT_EQ(call.out().Values(), values);
}

// A row has the same bits alone, among 111 others, and among so many that other
// tiles are used.
TEST_P(MoeGroupedMatmulRobustnessTest, RowDoesNotDependOnTheOthers) {
  for (int64_t cols : {192, 200, 111}) {
    SCOPED_TRACE(cols);
    Problem problem;
    problem.num_experts = 2;
    problem.rows = 72;
    problem.cols = cols;
    problem.routing = true;
    problem.ids = RandomIds(900, 2);
    constexpr int64_t kSlot = 41;
    Call many(device(), dtype(), problem);
    many.params().batch_invariant = true;
    Run(many);
    const std::vector<double> expected = OutRows(many, {kSlot});
    for (int64_t count : {1, 112}) {
      SCOPED_TRACE(count);
      Problem smaller = problem;
      smaller.ids = RandomIds(count, 2, 10);
      smaller.ids.back() = problem.ids[kSlot];
      Call few(device(), dtype(), smaller);
      few.params().batch_invariant = true;
      few.params().weights = many.params().weights;
      // All slots have row kSlot of x.
      few.params().x = Rows(many.x().view(), kSlot, 1);
      few.params().x.shape[0] = count;
      few.params().x.stride[0] = 0;
      TestTensor weights(
          device(), DType::kFloat32, {count},
          std::vector<float>(
              static_cast<size_t>(count),
              Normal(900, 4, 0.2f, 0.1f)[static_cast<size_t>(kSlot)]));
      few.params().routing_weights = weights.view();
      Run(few);
      EXPECT_EQ(OutRows(few, {count - 1}), expected);
    }
  }
}

TEST_P(MoeGroupedMatmulRobustnessTest, ZeroSlotsIsOk) {
  Problem problem;
  problem.num_experts = 4;
  problem.rows = 8;
  problem.cols = 16;
  Call call(device(), dtype(), problem);
  EXPECT_TRUE(MoeGroupedMatmul(call.params(), stream()).ok());
}

TEST_P(MoeGroupedMatmulRobustnessTest, WorkspaceGrowsWithSlots) {
  size_t previous = 0;
  for (int64_t slots : {1, 8, 100, 1000, 3000}) {
    Problem problem;
    problem.num_experts = 16;
    problem.ids = RandomIds(slots, 16);
    Call call(device(), dtype(), problem);
    EXPECT_GE(call.params().workspace_size, previous);
    previous = call.params().workspace_size;
  }
  EXPECT_GT(previous, 0u);
  EXPECT_EQ(MoeGroupedMatmulWorkspaceBytes(MoeGroupedMatmulParams()), 0u);
}

TEST_P(MoeGroupedMatmulRobustnessTest, RejectsBadArguments) {
  Problem problem;
  problem.num_experts = 4;
  problem.rows = 24;
  problem.cols = 40;
  problem.ids = RandomIds(6, 4);
  problem.slots_per_row = 2;
  problem.bias = problem.routing = true;
  Call call(device(), dtype(), problem);
  using Params = MoeGroupedMatmulParams;
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    Params p = call.params();
    change(p);
    testing::ExpectInvalid(MoeGroupedMatmul(p, stream()), parts);
  };
  expect({"MoeGroupedMatmul", "x is missing"},
         [](Params& p) { p.x = TensorView(); });
  expect({"x", "[2, 40]", "[3, 40]"}, [](Params& p) { p.x.shape[0] = 2; });
  expect({"x", "[3, 39]"}, [](Params& p) { p.x.shape[1] = 39; });
  expect({"x", "int32"}, [](Params& p) { p.x.dtype = DType::kInt32; });
  expect({"weights", "neither"}, [](Params& p) { p.weights.data = nullptr; });
  expect({"weights", "both"}, [](Params& p) {
    p.weights.table = reinterpret_cast<const void* const*>(p.weights.data);
  });
  expect({"weights", "dtype"},
         [](Params& p) { p.weights.dtype = DType::kUInt8; });
  expect({"weights", "cuda:7"}, [](Params& p) {
    p.weights.device = {DeviceType::kCuda, 7};
  });
  expect({"weights", "row_stride 39"},
         [](Params& p) { p.weights.row_stride = 39; });
  expect({"weights", "expert_stride -1"},
         [](Params& p) { p.weights.expert_stride = -1; });
  expect({"weights", "2^63"},
         [](Params& p) { p.weights.expert_stride = int64_t{1} << 62; });
  expect({"weights", "aligned"}, [](Params& p) {
    p.weights.data = static_cast<const char*>(p.weights.data) + 1;
  });
  expect({"rows of weights is 0"}, [](Params& p) { p.weights.rows = 0; });
  expect({"cols of weights is 0"}, [](Params& p) { p.weights.cols = 0; });
  expect({"num_experts of weights is 1025"},
         [](Params& p) { p.weights.num_experts = 1025; });
  expect({"expert_offsets", "[5]", "[4]"},
         [](Params& p) { p.weights.num_experts = 3; });
  expect({"expert_offsets", "dtype"},
         [](Params& p) { p.expert_offsets.dtype = DType::kInt64; });
  expect({"sorted_slots", "rank 2"},
         [](Params& p) { p.sorted_slots.rank = 2; });
  expect({"slots_per_row is 0"}, [](Params& p) { p.slots_per_row = 0; });
  expect({"bias", "[3, 24]"}, [](Params& p) { p.bias.shape[0] = 3; });
  expect({"bias", "dtype"}, [](Params& p) { p.bias.dtype = DType::kInt64; });
  expect({"routing_weights", "[5]"},
         [](Params& p) { p.routing_weights.shape[0] = 5; });
  expect({"routing_weights", "dtype"},
         [](Params& p) { p.routing_weights.dtype = DType::kInt32; });
  expect({"out", "[5, 24]"}, [](Params& p) { p.out.shape[0] = 5; });
  expect({"out", "share memory"}, [](Params& p) { p.out.stride[0] = 23; });
  expect({"out overlaps x"}, [](Params& p) { p.x.data = p.out.data; });
  expect({"out overlaps bias"}, [](Params& p) { p.bias.data = p.out.data; });
  expect({"out overlaps weights"},
         [](Params& p) { p.weights.data = p.out.data; });
  expect({"workspace is null"}, [](Params& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](Params& p) { p.workspace_size -= 1; });
  expect({"workspace", "aligned"},
         [](Params& p) { p.workspace = static_cast<char*>(p.workspace) + 8; });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeGroupedMatmulRobustnessTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

TEST(MoeTileRowsTest, GrowsWithTheLoad) {
  // Qwen3-30B-A3B: 128 experts, 8 per token.
  const auto rows = [](int64_t tokens) {
    return MoeTileRows(DType::kBFloat16, true, 8 * tokens, 128);
  };
  EXPECT_EQ(rows(1), 16);
  EXPECT_EQ(rows(128), 16);
  EXPECT_EQ(rows(512), 64);
  EXPECT_EQ(rows(4096), 128);
  int32_t previous = kMoeMinTileRows;
  for (int64_t tokens = 1; tokens < 10000; tokens += 7) {
    EXPECT_GE(rows(tokens), previous);
    previous = rows(tokens);
    // What the kernels are built for.
    EXPECT_EQ(MoeTileRows(DType::kBFloat16, false, 8 * tokens, 128), 64);
    EXPECT_LE(MoeTileRows(DType::kFloat32, true, 8 * tokens, 128), 64);
  }
}

}  // namespace
}  // namespace tenon::moe_grouped_matmul_test
