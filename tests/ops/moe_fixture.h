#ifndef TENON_TESTS_OPS_MOE_FIXTURE_H_
#define TENON_TESTS_OPS_MOE_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "ops/core/graph.h"
#include "ops/moe/moe.h"
#include "tests/ops/expert_weights.h"
#include "tests/reference/moe_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

// What the suites of Moe share: calls with their tensors, and the comparison
// with the reference.

namespace tenon::moe_test {

using testing::Fewer;
using testing::Normal;
using testing::RelativeFrobeniusError;
using testing::RoundTo;
using testing::SmallOr;
using testing::TestTensor;
using testing::UniformIntegers;

struct Problem {
  int64_t tokens = 1;
  int64_t hidden = 1;
  int64_t intermediate = 1;
  int64_t num_experts = 1;
  int64_t top_k = 1;
  std::vector<int64_t> ids = {};  // [tokens, top_k]; empty: random
  int64_t padding = 0;            // of the rows of all tensors
  // Rows of x and ids repeat after this many tokens.
  int64_t period = int64_t{1} << 40;
  Experts experts = Experts::kAsX;

  std::string Text() const {
    constexpr const char* kExperts[] = {"", " fp8 blocks", " fp8 rows"};
    return StrCat(tokens, " tokens, hidden ", hidden, ", intermediate ",
                  intermediate, ", experts ", num_experts, ", top_k ", top_k,
                  ", padding ", padding, kExperts[static_cast<int>(experts)]);
  }
};

// Draws that repeat after `period` rows.
template <class T>
inline std::vector<T> Repeat(std::vector<T> rows, int64_t width, int64_t period,
                             int64_t tokens) {
  std::vector<T> values;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto row = rows.begin() + t % period * width;
    values.insert(values.end(), row, row + width);
  }
  return values;
}

// The tensors of one call.
class Call {
 public:
  Call(Device device, DType dtype, const Problem& problem)
      : problem_(problem), dtype_(dtype) {
    const int64_t tokens = problem.tokens, hidden = problem.hidden;
    const int64_t top_k = problem.top_k, period = problem.period;
    const int64_t padding = problem.padding;
    const int64_t intermediate = problem.intermediate;
    const int64_t num_experts = problem.num_experts;
    const int64_t rows = std::min(tokens, period);
    x_ = TestTensor(device, dtype, {tokens, hidden}, {hidden + padding, 1},
                    Repeat(Normal(rows * hidden, 1), hidden, period, tokens));
    ids_ = problem.ids.empty()
               ? Repeat(UniformIntegers(rows * top_k, 2, 0, num_experts - 1),
                        top_k, period, tokens)
               : problem.ids;
    topk_ids_ =
        TestTensor::FromIntegers(device, DType::kInt32, {tokens, top_k}, ids_);
    topk_weights_ = TestTensor(
        device, DType::kFloat32, {tokens, top_k}, {top_k + padding, 1},
        Repeat(Normal(rows * top_k, 3, 0.3f, 0.1f), top_k, period, tokens));
    if (problem.experts == Experts::kAsX) {
      // One packed tensor for gate and up, as checkpoints are loaded.
      gate_ = Weights(device, dtype, problem.experts,
                      {num_experts, 2 * intermediate, hidden}, padding, 4);
      p_.gate = MakeExpertMatrices(w13().view(), 0, intermediate);
      p_.up = MakeExpertMatrices(w13().view(), intermediate, intermediate);
    } else {
      gate_ = Weights(device, dtype, problem.experts,
                      {num_experts, intermediate, hidden}, padding, 4);
      up_ = Weights(device, dtype, problem.experts,
                    {num_experts, intermediate, hidden}, padding, 6);
      p_.gate = gate_.matrices();
      p_.up = up_.matrices();
    }
    down_ = Weights(device, dtype, problem.experts,
                    {num_experts, hidden, intermediate}, padding, 5);
    p_.down = down_.matrices();
    out_ =
        TestTensor(device, dtype, {tokens, hidden}, {hidden + padding, 1}, {});
    p_.x = x_.view();
    p_.topk_ids = topk_ids_.view();
    p_.topk_weights = topk_weights_.view();
    p_.out = out_.view();
    AddWorkspace();
  }

  // Anew, of NaN bytes.
  void AddWorkspace() {
    const size_t bytes = MoeWorkspaceBytes(p_);
    workspace_ =
        TestTensor(p_.x.device, DType::kUInt8, {static_cast<int64_t>(bytes)});
    p_.workspace = workspace_.view().data;
    p_.workspace_size = bytes;
  }

  MoeParams& params() { return p_; }
  const TestTensor& x() const { return x_; }
  const TestTensor& w13() const { return gate_.elements(); }
  const Weights& gate() const { return gate_; }  // and up, where packed
  const Weights& up() const { return up_; }
  const Weights& down() const { return down_; }
  const TestTensor& out() const { return out_; }
  const TestTensor& workspace() const { return workspace_; }
  const std::vector<int64_t>& ids() const { return ids_; }

  // The reference of some tokens, with the stated roundings.
  std::vector<double> Expected(const std::vector<int64_t>& tokens) const {
    const std::vector<double> x = x_.InitialValues();
    const std::vector<double> gate = gate_.Values();
    const bool packed = !IsFp8(problem_.experts);
    const std::vector<double> up =
        packed ? std::vector<double>() : up_.Values();
    const std::vector<double> down = down_.Values();
    const std::vector<double> routing = topk_weights_.InitialValues();
    const int64_t hidden = problem_.hidden, top_k = problem_.top_k;
    const int64_t matrix = problem_.intermediate * hidden;
    const auto round = [&](double v) { return RoundTo(dtype_, v); };
    std::vector<double> expected;
    for (int64_t t : tokens) {
      std::vector<reference::MoeExpert> chosen;
      std::vector<double> weights;
      for (int64_t j = 0; j < top_k; ++j) {
        const int64_t e = ids_[t * top_k + j];
        if (e < 0 || e >= problem_.num_experts) continue;
        chosen.push_back(
            {&gate[(packed ? 2 * e : e) * matrix],
             packed ? &gate[(2 * e + 1) * matrix] : &up[e * matrix],
             &down[e * matrix]});
        weights.push_back(routing[t * top_k + j]);
      }
      const reference::MoeRow row(x.begin() + t * hidden,
                                  x.begin() + (t + 1) * hidden);
      const auto intermediate = static_cast<size_t>(problem_.intermediate);
      const reference::MoeRow y =
          packed
              ? reference::MoeToken(row, intermediate, chosen, weights, round)
              : reference::MoeToken(Quantised(row), intermediate, chosen,
                                    weights, round, Quantised);
      expected.insert(expected.end(), y.begin(), y.end());
    }
    return expected;
  }

 private:
  Problem problem_;
  DType dtype_;
  std::vector<int64_t> ids_;
  TestTensor x_, topk_ids_, topk_weights_, out_, workspace_;
  Weights gate_, up_, down_;
  MoeParams p_;
};

inline std::vector<int64_t> FirstTokens(int64_t count) {
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) tokens[i] = i;
  return tokens;
}

class Fixture : public testing::OpTest {
 protected:
  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  // The reference rounds where the op does, so only the float32 sums differ,
  // and the few roundings that they move. Those of fp8 are coarse, and tensor
  // cores add products of fp8 with less than float32.
  double MaxError(Experts experts = Experts::kAsX) const {
    const bool fp8 = experts != Experts::kAsX;
    switch (dtype()) {
      case DType::kFloat32:
        return !fp8 ? 4e-6 : on_cuda() ? 1e-2 : 5e-4;
      case DType::kFloat16:
        return !fp8 ? 4e-4 : on_cuda() ? 1e-2 : 6e-4;
      default:
        return !fp8 ? 2.5e-3 : on_cuda() ? 1e-2 : 2.5e-3;
    }
  }

  void Run(Call& call) {
    const Status status = Moe(call.params(), stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  void ExpectMatches(const Problem& problem, int64_t max_checked = 128) {
    SCOPED_TRACE(problem.Text());
    Call call(device(), dtype(), problem);
    Run(call);
    std::vector<double> actual = call.out().Values();
    const int64_t checked = std::min<int64_t>(problem.tokens, max_checked);
    actual.resize(static_cast<size_t>(checked * problem.hidden));
    EXPECT_LT(
        RelativeFrobeniusError(actual, call.Expected(FirstTokens(checked))),
        MaxError(problem.experts));
    EXPECT_EQ(call.out().NumStrayWrites(), 0);
    EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    EXPECT_EQ(call.x().Bytes(), call.x().InitialBytes());
  }

  // That the call gives the same bits again, whatever its workspace holds, and
  // with one thread.
  void ExpectSameBitsAgain(const Problem& problem) {
    SCOPED_TRACE(problem.Text());
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<uint8_t> bytes = call.out().Bytes();
    const int times = SmallOr(2, 8);
    for (int i = 0; i < times; ++i) {
      if (i == times / 2) call.AddWorkspace();
      Run(call);
      ASSERT_EQ(call.out().Bytes(), bytes) << "run " << i;
    }
    Stream alone = stream();
    alone.cpu = nullptr;
    ASSERT_TRUE(Moe(call.params(), alone).ok());
    Finish();
    EXPECT_EQ(call.out().Bytes(), bytes) << "one thread";
  }

  // That the same comes of it where out is x.
  void ExpectInPlaceIsOutOfPlace(const Problem& problem) {
    SCOPED_TRACE(problem.Text());
    Call call(device(), dtype(), problem);
    Run(call);
    call.params().out = call.params().x;
    Run(call);
    EXPECT_EQ(call.x().Values(), call.out().Values());
    EXPECT_EQ(call.x().NumStrayWrites(), 0);
  }

  // That equal tokens, which come again after problem.period, have equal bits
  // in every chunk of the call: those of the reference.
  void ExpectEqualBitsForEqualTokens(const Problem& problem) {
    SCOPED_TRACE(problem.Text());
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<double> values = call.out().Values();
    const std::vector<double> first(
        values.begin(), values.begin() + problem.period * problem.hidden);
    EXPECT_LT(RelativeFrobeniusError(
                  first, call.Expected(FirstTokens(problem.period))),
              MaxError(problem.experts));
    int64_t different = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      different += values[i] != first[i % first.size()];
    }
    EXPECT_EQ(different, 0);
    EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
  }

  // That with batch_invariant tokens have the same bits alone, and among so
  // many that other kernels are chosen. `problem` has 900.
  void ExpectTokensIgnoreTheirNumber(const Problem& problem) {
    Call all(device(), dtype(), problem);
    all.params().batch_invariant = true;
    Run(all);
    const std::vector<double> expected = all.out().Values();
    for (const auto& [first, count] : std::vector<std::pair<int64_t, int64_t>>{
             {41, 1}, {41, 5}, {10, 112}, {800, 100}}) {
      SCOPED_TRACE(StrCat(count, " tokens from ", first));
      const TestTensor out(device(), dtype(), {count, problem.hidden});
      MoeParams p = all.params();
      p.x = Rows(p.x, first, count);
      p.topk_ids = Rows(p.topk_ids, first, count);
      p.topk_weights = Rows(p.topk_weights, first, count);
      p.out = out.view();
      ASSERT_TRUE(Moe(p, stream()).ok());
      Finish();
      EXPECT_EQ(out.Values(),
                std::vector<double>(
                    expected.begin() + first * problem.hidden,
                    expected.begin() + (first + count) * problem.hidden));
    }
  }

  // That a captured call gives the same bits.
  void ExpectSameBitsInAGraph(const Problem& problem) {
    SCOPED_TRACE(problem.Text());
    Call call(device(), dtype(), problem);
    Call captured(device(), dtype(), problem);
    Run(call);
    const StatusOr<Graph> graph = Graph::Capture(
        device(), stream(), [&] { return Moe(captured.params(), stream()); });
    ASSERT_TRUE(graph.ok()) << graph.status().message();
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(graph->Launch(stream()).ok());
    Finish();
    EXPECT_EQ(captured.out().Bytes(), call.out().Bytes());
  }

  // Row `row` of a [tokens, hidden] result.
  static std::vector<double> Row(const std::vector<double>& values, int64_t row,
                                 int64_t hidden) {
    return {values.begin() + row * hidden, values.begin() + (row + 1) * hidden};
  }
};

}  // namespace tenon::moe_test

#endif  // TENON_TESTS_OPS_MOE_FIXTURE_H_
