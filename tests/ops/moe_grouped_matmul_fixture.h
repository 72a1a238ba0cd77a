#ifndef TENON_TESTS_OPS_MOE_GROUPED_MATMUL_FIXTURE_H_
#define TENON_TESTS_OPS_MOE_GROUPED_MATMUL_FIXTURE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "ops/moe/moe_grouped_matmul.h"
#include "tests/ops/expert_weights.h"
#include "tests/reference/moe_grouped_matmul_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

// What the suites of MoeGroupedMatmul share: calls with their tensors, and the
// comparison with the reference.

namespace tenon::moe_grouped_matmul_test {

using moe_test::Experts;
using moe_test::Weights;
using testing::Fewer;
using testing::Normal;
using testing::RelativeFrobeniusError;
using testing::SmallOr;
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
  Experts experts = Experts::kAsX;

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
      weights_ = Weights(device, dtype, problem.experts,
                         {problem.num_experts, problem.rows, cols},
                         {problem.rows * weight_stride + problem.expert_padding,
                          weight_stride, 1},
                         problem.weight_padding, 2);
      p_.x = x_.view();
      p_.weights = weights_.matrices();
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
  const TestTensor& weights() const { return weights_.elements(); }
  const TestTensor& workspace() const { return workspace_; }

  // The reference of some slots, in fp64 without rounding.
  std::vector<double> Expected(const std::vector<int64_t>& slots) const {
    const std::vector<double> x = x_.InitialValues();
    const std::vector<double> weights = weights_.Values();
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
        const auto from = x.begin() + slot / problem_.slots_per_row * cols;
        const std::vector<double> row(from, from + cols);
        std::vector<double> expert_bias;
        if (problem_.bias) {
          expert_bias.assign(bias.begin() + e * rows,
                             bias.begin() + (e + 1) * rows);
        }
        y = reference::MoeGroupedMatmulRow(
            moe_test::IsFp8(problem_.experts) ? moe_test::Quantised(row) : row,
            &weights[e * rows * cols], static_cast<size_t>(rows), expert_bias,
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
  TestTensor x_, offsets_, sorted_, bias_, routing_, out_, workspace_;
  Weights weights_;
  MoeGroupedMatmulParams p_;
};

inline std::vector<int64_t> RandomIds(int64_t count, int64_t num_experts,
                                      uint64_t seed = 5) {
  return UniformIntegers(count, seed, 0, num_experts - 1);
}

// Tokens with top_k random experts each.
inline Problem RandomProblem(int64_t tokens, int64_t top_k, int64_t num_experts,
                             int64_t rows, int64_t cols) {
  Problem problem;
  problem.num_experts = num_experts;
  problem.rows = rows;
  problem.cols = cols;
  problem.ids = RandomIds(tokens * top_k, num_experts);
  problem.slots_per_row = top_k;
  return problem;
}

inline std::vector<int64_t> AllSlots(int64_t count) {
  std::vector<int64_t> slots(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) slots[i] = i;
  return slots;
}

class Fixture : public testing::OpTest {
 protected:
  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  // One rounding to the dtype, of about 0.6 of half an ulp. Tensor cores add
  // products of fp8 with less than float32.
  double MaxError(Experts experts = Experts::kAsX) const {
    const bool tensor_cores = moe_test::IsFp8(experts) && on_cuda();
    switch (dtype()) {
      case DType::kFloat32:
        if (tensor_cores) return 1e-3;
        return 4e-6;  // sums of thousands of products in float32
      case DType::kFloat16:
        return tensor_cores ? 1e-3 : 4e-4;
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

  void ExpectSameBitsAgain(const Problem& problem) {
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<uint8_t> bytes = call.out().Bytes();
    for (int i = 1; i < 10; ++i) {
      Run(call);
      ASSERT_EQ(call.out().Bytes(), bytes) << "run " << i;
    }
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
    EXPECT_LT(RelativeFrobeniusError(actual, expected),
              MaxError(problem.experts));
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

}  // namespace tenon::moe_grouped_matmul_test

#endif  // TENON_TESTS_OPS_MOE_GROUPED_MATMUL_FIXTURE_H_
