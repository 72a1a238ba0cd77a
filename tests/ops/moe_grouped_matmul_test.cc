#include "ops/moe/moe_grouped_matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/moe/moe_tile_rows.h"
#include "tests/reference/moe_grouped_matmul_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/shapes.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::RelativeFrobeniusError;
using testing::TestTensor;
using testing::UniformIntegers;

// A grouped matrix product and all that varies in the tests.
struct Problem {
  int64_t num_experts = 1;
  int64_t rows = 1;  // of the weights: columns of out
  int64_t cols = 1;
  std::vector<int64_t> ids;  // expert of every slot
  int64_t slots_per_row = 1;
  bool bias = false;
  bool routing = false;
  // Added to the strides.
  int64_t x_padding = 0;
  int64_t weight_padding = 0;
  int64_t expert_padding = 0;
  int64_t out_padding = 0;

  int64_t num_slots() const { return static_cast<int64_t>(ids.size()); }
  bool IsExpert(int64_t id) const { return id >= 0 && id < num_experts; }
};

// Contiguous x and weights of the caller, instead of random ones.
struct Data {
  const void* x = nullptr;
  const void* weights = nullptr;
};

// The tensors of one call.
class Call {
 public:
  Call(Device device, DType dtype, const Problem& problem, Data data = {})
      : problem_(problem) {
    const int64_t slots = problem.num_slots();
    const int64_t x_rows =
        (slots + problem.slots_per_row - 1) / problem.slots_per_row;
    const int64_t cols = problem.cols;
    const int64_t weight_stride = cols + problem.weight_padding;
    if (data.x != nullptr) {
      p_.x = MakeTensor(data.x, dtype, device, {x_rows, cols});
      p_.weights = MakeExpertMatrices(
          MakeTensor(data.weights, dtype, device,
                     {problem.num_experts, problem.rows, cols}));
    } else {
      x_ = TestTensor(device, dtype, {x_rows, cols},
                      {cols + problem.x_padding, 1}, Normal(x_rows * cols, 1));
      weights_ =
          TestTensor(device, dtype, {problem.num_experts, problem.rows, cols},
                     {problem.rows * weight_stride + problem.expert_padding,
                      weight_stride, 1},
                     Normal(problem.num_experts * problem.rows * cols, 2, 0.0f,
                            1.0f / std::sqrt(static_cast<float>(cols))));
      p_.x = x_.view();
      p_.weights = MakeExpertMatrices(weights_.view());
    }
    out_ = TestTensor(device, dtype, {slots, problem.rows},
                      {problem.rows + problem.out_padding, 1}, {});
    SortSlots(device);
    p_.out = out_.view();
    p_.slots_per_row = static_cast<int32_t>(problem.slots_per_row);
    if (problem.bias) {
      bias_ = TestTensor(device, dtype, {problem.num_experts, problem.rows},
                         Normal(problem.num_experts * problem.rows, 3));
      p_.bias = bias_.view();
    }
    if (problem.routing) {
      routing_ = TestTensor(device, DType::kFloat32, {slots},
                            Normal(slots, 4, 0.2f, 0.1f));
      p_.routing_weights = routing_.view();
    }
    const size_t bytes = MoeGroupedMatmulWorkspaceBytes(p_);
    workspace_ =
        TestTensor(device, DType::kUInt8, {static_cast<int64_t>(bytes)});
    p_.workspace = workspace_.view().data;
    p_.workspace_size = bytes;
  }

  MoeGroupedMatmulParams& params() { return p_; }
  const TestTensor& out() const { return out_; }
  const TestTensor& x() const { return x_; }
  const TestTensor& weights() const { return weights_; }
  const TestTensor& workspace() const { return workspace_; }

  // The reference of some slots, in fp64 without rounding.
  std::vector<double> Expected(const std::vector<int64_t>& slots) const {
    const std::vector<double> x = x_.InitialValues();
    const std::vector<double> weights = weights_.InitialValues();
    const std::vector<double> bias =
        problem_.bias ? bias_.InitialValues() : std::vector<double>();
    const std::vector<double> routing =
        problem_.routing ? routing_.InitialValues() : std::vector<double>();
    const int64_t cols = problem_.cols, rows = problem_.rows;
    std::vector<double> expected;
    for (int64_t slot : slots) {
      const int64_t e = problem_.ids[slot];
      std::vector<double> y(static_cast<size_t>(rows));
      if (problem_.IsExpert(e)) {
        const auto row = x.begin() + slot / problem_.slots_per_row * cols;
        std::vector<double> expert_bias;
        if (problem_.bias) {
          expert_bias.assign(bias.begin() + e * rows,
                             bias.begin() + (e + 1) * rows);
        }
        y = reference::MoeGroupedMatmulRow(
            {row, row + cols}, &weights[e * rows * cols],
            static_cast<size_t>(rows), expert_bias,
            problem_.routing ? routing[slot] : 1.0);
      }
      expected.insert(expected.end(), y.begin(), y.end());
    }
    return expected;
  }

 private:
  // The CSR that MoeAlign makes.
  void SortSlots(Device device) {
    std::vector<int64_t> offsets, sorted;
    for (int64_t e = 0; e < problem_.num_experts; ++e) {
      offsets.push_back(static_cast<int64_t>(sorted.size()));
      for (int64_t s = 0; s < problem_.num_slots(); ++s) {
        if (problem_.ids[s] == e) sorted.push_back(s);
      }
    }
    offsets.push_back(static_cast<int64_t>(sorted.size()));
    sorted.resize(problem_.ids.size(), -1);
    offsets_ = TestTensor::FromIntegers(
        device, DType::kInt32, {static_cast<int64_t>(offsets.size())}, offsets);
    sorted_ = TestTensor::FromIntegers(device, DType::kInt32,
                                       {problem_.num_slots()}, sorted);
    p_.expert_offsets = offsets_.view();
    p_.sorted_slots = sorted_.view();
  }

  Problem problem_;
  TestTensor x_, weights_, offsets_, sorted_, bias_, routing_, out_, workspace_;
  MoeGroupedMatmulParams p_;
};

std::vector<int64_t> RandomIds(int64_t count, int64_t num_experts,
                               uint64_t seed = 5) {
  return UniformIntegers(count, seed, 0, num_experts - 1);
}

std::vector<int64_t> AllSlots(int64_t count) {
  std::vector<int64_t> slots(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) slots[i] = i;
  return slots;
}

class MoeGroupedMatmulTest : public testing::OpTest {
 protected:
  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  // One rounding to the dtype, of about 0.6 of half an ulp.
  double MaxError() const {
    switch (dtype()) {
      case DType::kFloat32:
        return 1e-6;
      case DType::kFloat16:
        return 4e-4;
      default:
        return 2.5e-3;
    }
  }

  // Rows of out, read without the rest.
  std::vector<double> OutRows(const Call& call,
                              const std::vector<int64_t>& slots) {
    const TensorView& view = call.out().view();
    const size_t row_bytes =
        static_cast<size_t>(view.shape[1]) * DTypeSize(view.dtype);
    std::vector<double> values;
    for (int64_t slot : slots) {
      std::vector<uint8_t> bytes(row_bytes);
      EXPECT_TRUE(CopyMemory(bytes.data(), Device{}, Rows(view, slot, 1).data,
                             device(), row_bytes, Stream())
                      .ok());
      EXPECT_TRUE(Synchronize(device(), Stream()).ok());
      const TestTensor row(Device{}, view.dtype, {view.shape[1]});
      std::memcpy(row.view().data, bytes.data(), row_bytes);
      const std::vector<double> v = row.Values();
      values.insert(values.end(), v.begin(), v.end());
    }
    return values;
  }

  void Run(Call& call) {
    const Status status = MoeGroupedMatmul(call.params(), stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  // Runs the problem and compares all of it with the reference.
  void ExpectMatches(const Problem& problem) {
    SCOPED_TRACE(StrCat(problem.num_slots(), " slots, ", problem.num_experts,
                        " experts, ", problem.rows, "x", problem.cols,
                        " slots_per_row ", problem.slots_per_row));
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<int64_t> slots = AllSlots(problem.num_slots());
    const std::vector<double> actual = call.out().Values();
    const std::vector<double> expected = call.Expected(slots);
    EXPECT_LT(RelativeFrobeniusError(actual, expected), MaxError());
    for (int64_t s : slots) {
      if (problem.IsExpert(problem.ids[s])) continue;
      for (int64_t n = 0; n < problem.rows; ++n) {
        ASSERT_EQ(actual[s * problem.rows + n], 0.0) << "skipped slot " << s;
      }
    }
    EXPECT_EQ(call.out().NumStrayWrites(), 0);
    EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    EXPECT_EQ(call.x().Bytes(), call.x().InitialBytes());
    EXPECT_EQ(call.weights().Bytes(), call.weights().InitialBytes());
  }
};

// One token on expert 0, nine on expert 1, as in the seed's own test.
TEST_P(MoeGroupedMatmulTest, Acceptance17_SeedCase) {
  Problem problem;
  problem.num_experts = 2;
  problem.rows = 1024;
  problem.cols = 512;
  problem.ids = {1, 1, 1, 0, 1, 1, 1, 1, 1, 1};
  Call call(device(), dtype(), problem);
  TestTensor x(device(), dtype(), {10, 512}, Normal(10 * 512, 6, 0.0f, 0.1f));
  TestTensor weights(device(), dtype(), {2, 1024, 512},
                     Normal(2 * 1024 * 512, 7, 0.0f, 0.1f));
  TestTensor routing(device(), DType::kFloat32, {10},
                     std::vector<float>(10, 0.5f));
  call.params().x = x.view();
  call.params().weights = MakeExpertMatrices(weights.view());
  call.params().routing_weights = routing.view();
  Run(call);
  const std::vector<double> actual = call.out().Values();
  const std::vector<double> xs = x.InitialValues();
  const std::vector<double> ws = weights.InitialValues();
  for (int64_t t = 0; t < 10; ++t) {
    const std::vector<double> expected = reference::MoeGroupedMatmulRow(
        {xs.begin() + t * 512, xs.begin() + (t + 1) * 512},
        &ws[problem.ids[t] * 1024 * 512], 1024, {}, 0.5);
    for (int64_t n = 0; n < 1024; ++n) {
      ASSERT_NEAR(actual[t * 1024 + n], expected[n], 1e-2) << t << ", " << n;
    }
  }
}

TEST_P(MoeGroupedMatmulTest, Acceptance17_MatchesReference) {
  for (const auto& [tokens, top_k, experts, rows, cols] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>>{
           {1, 1, 1, 1, 1},
           {1, 8, 160, 64, 192},
           {3, 2, 5, 13, 7},
           {13, 8, 160, 40, 192},
           {111, 1, 3, 130, 72},
           {111, 8, 16, 65, 111},
           {70, 4, 2, 96, 200},
           {500, 2, 2, 136, 64}}) {
    Problem problem;
    problem.num_experts = experts;
    problem.rows = rows;
    problem.cols = cols;
    problem.ids = RandomIds(tokens * top_k, experts);
    problem.slots_per_row = top_k;
    ExpectMatches(problem);
    problem.slots_per_row = 1;
    problem.bias = problem.routing = true;
    ExpectMatches(problem);
  }
}

// A large tensor that repeats some draws; cheap to make and to look up.
class RepeatedDraws {
 public:
  RepeatedDraws(Device device, DType dtype, int64_t count, uint64_t seed,
                float stddev)
      : period_(device, dtype, {kPeriod}, Normal(kPeriod, seed, 0.0f, stddev)),
        values_(period_.InitialValues()) {
    const size_t element = DTypeSize(dtype);
    const size_t bytes = static_cast<size_t>(count) * element;
    StatusOr<Buffer> buffer = Buffer::Allocate(device, bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    buffer_ = *std::move(buffer);
    const auto append = [&](size_t done, const void* from, size_t size) {
      size = std::min(size, bytes - done);
      EXPECT_TRUE(CopyMemory(static_cast<char*>(buffer_.data()) + done, device,
                             from, device, size, Stream())
                      .ok());
      return done + size;
    };
    size_t done = append(0, period_.view().data, kPeriod * element);
    while (done < bytes) done = append(done, buffer_.data(), done);
    EXPECT_TRUE(Synchronize(device, Stream()).ok());
  }

  const void* data() const { return buffer_.data(); }
  std::vector<double> Values(int64_t begin, int64_t count) const {
    std::vector<double> values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      values[i] = values_[(begin + i) % kPeriod];
    }
    return values;
  }

 private:
  static constexpr int64_t kPeriod = 100003;  // a multiple of no width
  TestTensor period_;
  std::vector<double> values_;
  Buffer buffer_;
};

// All matrices of the models. The CPU takes fewer experts and tokens.
TEST_P(MoeGroupedMatmulTest, Acceptance17_ModelShapes) {
  std::vector<int64_t> token_counts = {2};
  if (on_cuda()) token_counts = {1, 8, 12, 64, 112, 1024, 8192};
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    for (bool down : {false, true}) {
      Problem problem;
      problem.num_experts = on_cuda() ? shape.num_experts : 2;
      problem.rows = down ? shape.hidden : 2 * shape.intermediate;
      problem.cols = down ? shape.intermediate : shape.hidden;
      problem.slots_per_row = down ? 1 : shape.top_k;
      const int64_t matrix = problem.rows * problem.cols;
      const RepeatedDraws weights(
          device(), dtype(), problem.num_experts * matrix, 11,
          1.0f / std::sqrt(static_cast<float>(problem.cols)));
      for (int64_t tokens : token_counts) {
        SCOPED_TRACE(StrCat(shape.name, down ? " w2 " : " w13 ", tokens));
        problem.ids =
            RandomIds(tokens * shape.top_k, problem.num_experts, 9 + tokens);
        const int64_t x_rows = problem.num_slots() / problem.slots_per_row;
        const RepeatedDraws x(device(), dtype(), x_rows * problem.cols, 12,
                              1.0f);
        Call call(device(), dtype(), problem, {x.data(), weights.data()});
        Run(call);
        const std::vector<int64_t> sample =
            UniformIntegers(2, 8, 0, problem.num_slots() - 1);
        std::vector<double> expected;
        for (int64_t slot : sample) {
          const std::vector<double> w =
              weights.Values(problem.ids[slot] * matrix, matrix);
          const std::vector<double> y = reference::MoeGroupedMatmulRow(
              x.Values(slot / problem.slots_per_row * problem.cols,
                       problem.cols),
              w.data(), static_cast<size_t>(problem.rows), {}, 1.0);
          expected.insert(expected.end(), y.begin(), y.end());
        }
        EXPECT_LT(RelativeFrobeniusError(OutRows(call, sample), expected),
                  MaxError());
      }
    }
  }
}

TEST_P(MoeGroupedMatmulTest, Acceptance17_UnequalLoads) {
  Problem problem;
  problem.num_experts = 9;
  problem.rows = 72;
  problem.cols = 128;
  problem.bias = true;
  for (int64_t count : {1, 16, 17, 64, 65, 300}) {
    for (int64_t expert : {0, 4, 8}) {  // all others are empty
      problem.ids.assign(static_cast<size_t>(count), expert);
      ExpectMatches(problem);
    }
  }
  // Two experts, far apart in size.
  problem.ids.assign(400, 7);
  problem.ids[123] = 2;
  ExpectMatches(problem);
}

TEST_P(MoeGroupedMatmulTest, SkippedSlotsAreZero) {
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

TEST_P(MoeGroupedMatmulTest, StridedTensors) {
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
TEST_P(MoeGroupedMatmulTest, ColumnSliceOfWeights) {
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

TEST_P(MoeGroupedMatmulTest, SomeRowsOfPackedWeights) {
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

TEST_P(MoeGroupedMatmulTest, TableOfPointersOnTheCpu) {
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

TEST_P(MoeGroupedMatmulTest, Acceptance17_SameCallSameBits) {
  Problem problem;
  problem.num_experts = 9;
  problem.rows = 136;
  problem.cols = 192;
  problem.ids = RandomIds(129 * 4, 9);
  problem.slots_per_row = 4;
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<uint8_t> bytes = call.out().Bytes();
  for (int i = 0; i < 10; ++i) {
    Run(call);
    ASSERT_EQ(call.out().Bytes(), bytes) << "run " << i;
  }
}

// A row has the same bits alone, among 111 others, and among so many that other
// tiles are used.
TEST_P(MoeGroupedMatmulTest, RowDoesNotDependOnTheOthers) {
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

TEST_P(MoeGroupedMatmulTest, ZeroSlotsIsOk) {
  Problem problem;
  problem.num_experts = 4;
  problem.rows = 8;
  problem.cols = 16;
  Call call(device(), dtype(), problem);
  EXPECT_TRUE(MoeGroupedMatmul(call.params(), stream()).ok());
}

TEST_P(MoeGroupedMatmulTest, WorkspaceGrowsWithSlots) {
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

TEST_P(MoeGroupedMatmulTest, RejectsBadArguments) {
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
  expect({"out overlaps x"}, [](Params& p) { p.out.data = p.x.data; });
  expect({"out overlaps bias"}, [](Params& p) { p.out.data = p.bias.data; });
  expect({"workspace is null"}, [](Params& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](Params& p) { p.workspace_size -= 1; });
  expect({"workspace", "aligned"},
         [](Params& p) { p.workspace = static_cast<char*>(p.workspace) + 8; });
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeGroupedMatmulTest,
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
}  // namespace tenon
