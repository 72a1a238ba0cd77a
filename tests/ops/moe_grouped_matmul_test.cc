#include <algorithm>
#include <cmath>
#include <iterator>

#include "tests/ops/moe_grouped_matmul_fixture.h"
#include "tests/testing/shapes.h"

namespace tenon::moe_grouped_matmul_test {
namespace {

class MoeGroupedMatmulTest : public Fixture {};

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
  for (Problem problem :
       {RandomProblem(1, 1, 1, 1, 1), RandomProblem(1, 8, 160, 64, 192),
        RandomProblem(3, 2, 5, 13, 7), RandomProblem(13, 8, 160, 40, 192),
        RandomProblem(111, 1, 3, 130, 72), RandomProblem(111, 8, 16, 65, 111),
        RandomProblem(70, 4, 2, 96, 200), RandomProblem(500, 2, 2, 136, 64)}) {
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
  if (testing::SmallTests()) token_counts = {1, 12};
  std::vector<testing::ModelShape> shapes(std::begin(testing::kModelShapes),
                                          std::end(testing::kModelShapes));
  testing::ModelShape half = shapes[2];
  half.name = "qwen3-235b-a22b-tp8";
  half.intermediate /= 2;
  testing::ModelShape shared = shapes[3];
  shared.name = "glm-4.6-tp4, its shared expert among the others";
  ++shared.num_experts;
  ++shared.top_k;
  shapes.push_back(half);
  shapes.push_back(shared);
  for (const testing::ModelShape& shape : Fewer(shapes)) {
    for (bool down : {false, true}) {
      Problem problem;
      problem.num_experts = on_cuda() ? SmallOr(8, shape.num_experts) : 2;
      problem.rows = down ? shape.hidden : 2 * shape.intermediate;
      problem.rows /= SmallOr(8, 1);
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

TEST_P(MoeGroupedMatmulTest, Acceptance17_SameCallSameBits) {
  ExpectSameBitsAgain(RandomProblem(129, 4, 9, 136, 192));
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeGroupedMatmulTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_grouped_matmul_test
