#include "ops/moe/moe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "ops/core/build_config.h"
#include "tests/reference/moe_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/cuda_graph.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/shapes.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::RelativeFrobeniusError;
using testing::RoundTo;
using testing::TestTensor;
using testing::UniformIntegers;

struct Problem {
  int64_t tokens = 1;
  int64_t hidden = 1;
  int64_t intermediate = 1;
  int64_t num_experts = 1;
  int64_t top_k = 1;
  std::vector<int64_t> ids;  // [tokens, top_k]; empty: random
  int64_t padding = 0;       // of the rows of all tensors
  // Rows of x and ids repeat after this many tokens.
  int64_t period = int64_t{1} << 40;
};

// Draws that repeat after `period` rows.
template <class T>
std::vector<T> Repeat(std::vector<T> rows, int64_t width, int64_t period,
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
    const auto& [tokens, hidden, intermediate, num_experts, top_k, ids, padding,
                 period] = problem_;
    const int64_t rows = std::min(tokens, period);
    x_ = TestTensor(device, dtype, {tokens, hidden}, {hidden + padding, 1},
                    Repeat(Normal(rows * hidden, 1), hidden, period, tokens));
    ids_ = ids.empty()
               ? Repeat(UniformIntegers(rows * top_k, 2, 0, num_experts - 1),
                        top_k, period, tokens)
               : ids;
    topk_ids_ =
        TestTensor::FromIntegers(device, DType::kInt32, {tokens, top_k}, ids_);
    topk_weights_ = TestTensor(
        device, DType::kFloat32, {tokens, top_k}, {top_k + padding, 1},
        Repeat(Normal(rows * top_k, 3, 0.3f, 0.1f), top_k, period, tokens));
    // One packed tensor for gate and up, as checkpoints are loaded.
    const int64_t w13_stride = hidden + padding;
    w13_ = TestTensor(device, dtype, {num_experts, 2 * intermediate, hidden},
                      {2 * intermediate * w13_stride, w13_stride, 1},
                      Normal(num_experts * 2 * intermediate * hidden, 4, 0.0f,
                             1.0f / std::sqrt(static_cast<float>(hidden))));
    const int64_t w2_stride = intermediate + padding;
    w2_ =
        TestTensor(device, dtype, {num_experts, hidden, intermediate},
                   {hidden * w2_stride, w2_stride, 1},
                   Normal(num_experts * hidden * intermediate, 5, 0.0f,
                          1.0f / std::sqrt(static_cast<float>(intermediate))));
    out_ =
        TestTensor(device, dtype, {tokens, hidden}, {hidden + padding, 1}, {});
    p_.x = x_.view();
    p_.topk_ids = topk_ids_.view();
    p_.topk_weights = topk_weights_.view();
    p_.gate = MakeExpertMatrices(w13_.view(), 0, intermediate);
    p_.up = MakeExpertMatrices(w13_.view(), intermediate, intermediate);
    p_.down = MakeExpertMatrices(w2_.view());
    p_.out = out_.view();
    const size_t bytes = MoeWorkspaceBytes(p_);
    workspace_ =
        TestTensor(device, DType::kUInt8, {static_cast<int64_t>(bytes)});
    p_.workspace = workspace_.view().data;
    p_.workspace_size = bytes;
  }

  MoeParams& params() { return p_; }
  const TestTensor& x() const { return x_; }
  const TestTensor& w13() const { return w13_; }
  const TestTensor& w2() const { return w2_; }
  const TestTensor& out() const { return out_; }
  const TestTensor& workspace() const { return workspace_; }
  const std::vector<int64_t>& ids() const { return ids_; }

  // The reference of some tokens, with the stated roundings.
  std::vector<double> Expected(const std::vector<int64_t>& tokens) const {
    const std::vector<double> x = x_.InitialValues();
    const std::vector<double> w13 = w13_.InitialValues();
    const std::vector<double> w2 = w2_.InitialValues();
    const std::vector<double> routing = topk_weights_.InitialValues();
    const int64_t hidden = problem_.hidden, top_k = problem_.top_k;
    const int64_t matrix = problem_.intermediate * hidden;
    std::vector<double> expected;
    for (int64_t t : tokens) {
      std::vector<reference::MoeExpert> chosen;
      std::vector<double> weights;
      for (int64_t j = 0; j < top_k; ++j) {
        const int64_t e = ids_[t * top_k + j];
        if (e < 0 || e >= problem_.num_experts) continue;
        chosen.push_back({&w13[2 * e * matrix], &w13[(2 * e + 1) * matrix],
                          &w2[e * matrix]});
        weights.push_back(routing[t * top_k + j]);
      }
      const std::vector<double> y = reference::MoeToken(
          {x.begin() + t * hidden, x.begin() + (t + 1) * hidden},
          static_cast<size_t>(problem_.intermediate), chosen, weights,
          [&](double v) { return RoundTo(dtype_, v); });
      expected.insert(expected.end(), y.begin(), y.end());
    }
    return expected;
  }

 private:
  Problem problem_;
  DType dtype_;
  std::vector<int64_t> ids_;
  TestTensor x_, topk_ids_, topk_weights_, w13_, w2_, out_, workspace_;
  MoeParams p_;
};

std::vector<int64_t> FirstTokens(int64_t count) {
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) tokens[i] = i;
  return tokens;
}

class MoeTest : public testing::OpTest {
 protected:
  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  // The reference rounds where the op does, so only the float32 sums differ,
  // and the few roundings that they move.
  double MaxError() const {
    switch (dtype()) {
      case DType::kFloat32:
        return 4e-6;
      case DType::kFloat16:
        return 4e-4;
      default:
        return 2.5e-3;
    }
  }

  void Run(Call& call) {
    const Status status = Moe(call.params(), stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  void ExpectMatches(const Problem& problem) {
    SCOPED_TRACE(StrCat(problem.tokens, " tokens, hidden ", problem.hidden,
                        ", intermediate ", problem.intermediate, ", experts ",
                        problem.num_experts, ", top_k ", problem.top_k));
    Call call(device(), dtype(), problem);
    Run(call);
    std::vector<double> actual = call.out().Values();
    const int64_t checked = std::min<int64_t>(problem.tokens, 128);
    actual.resize(static_cast<size_t>(checked * problem.hidden));
    EXPECT_LT(
        RelativeFrobeniusError(actual, call.Expected(FirstTokens(checked))),
        MaxError());
    EXPECT_EQ(call.out().NumStrayWrites(), 0);
    EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    EXPECT_EQ(call.x().Bytes(), call.x().InitialBytes());
  }

  // Row `row` of a [tokens, hidden] result.
  static std::vector<double> Row(const std::vector<double>& values, int64_t row,
                                 int64_t hidden) {
    return {values.begin() + row * hidden, values.begin() + (row + 1) * hidden};
  }
};

TEST_P(MoeTest, MatchesReference) {
  for (const auto& [tokens, hidden, intermediate, experts, top_k] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>>{
           {1, 1, 1, 1, 1},
           {1, 64, 48, 16, 8},
           {3, 13, 7, 5, 2},   // elements must be read one by one
           {8, 64, 33, 4, 4},  // so here, for the down projection
           {13, 96, 192, 160, 8},
           {16, 72, 40, 3,
            8},  // several tiles of an expert, without a schedule
           {40, 64, 32, 3, 32},
           {111, 128, 64, 8, 4},
           {130, 40, 24, 1, 2}}) {
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = hidden;
    problem.intermediate = intermediate;
    problem.num_experts = experts;
    problem.top_k = top_k;
    ExpectMatches(problem);
    problem.padding = 5;
    ExpectMatches(problem);
    problem.padding = 8;
    ExpectMatches(problem);
  }
}

// The widths of the models; the CPU takes smaller ones.
TEST_P(MoeTest, ModelShapes) {
  for (const testing::ModelShape& shape : testing::kModelShapes) {
    SCOPED_TRACE(shape.name);
    Problem problem;
    problem.hidden = on_cuda() ? shape.hidden : shape.hidden / 4;
    problem.intermediate = on_cuda() ? shape.intermediate : 96;
    problem.num_experts = 4;
    problem.top_k = on_cuda() ? shape.top_k : 2;
    problem.tokens = on_cuda() ? 500 : 3;
    Call call(device(), dtype(), problem);
    const std::vector<double> expected = call.Expected({0});
    for (int64_t tokens : {int64_t{1}, problem.tokens / 40 + 1,
                           problem.tokens / 5 + 1, problem.tokens}) {
      SCOPED_TRACE(tokens);
      MoeParams p = call.params();
      p.x = Rows(p.x, 0, tokens);
      p.topk_ids = Rows(p.topk_ids, 0, tokens);
      p.topk_weights = Rows(p.topk_weights, 0, tokens);
      p.out = Rows(p.out, 0, tokens);
      ASSERT_TRUE(Moe(p, stream()).ok());
      Finish();
      EXPECT_LT(RelativeFrobeniusError(
                    Row(call.out().Values(), 0, problem.hidden), expected),
                MaxError());
    }
  }
}

TEST_P(MoeTest, EveryTileHeight) {
  Problem problem;
  problem.hidden = 136;
  problem.intermediate = 72;
  problem.top_k = 3;
  problem.num_experts = 6;
  for (int64_t tokens : {23, 110, 600}) {
    problem.tokens = tokens;
    ExpectMatches(problem);
  }
}

TEST_P(MoeTest, UnequalLoads) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 32;
  problem.num_experts = 7;
  problem.top_k = 2;
  for (int64_t tokens : {5, 40, 64, 65, 200}) {
    problem.tokens = tokens;
    problem.ids.assign(static_cast<size_t>(2 * tokens), 6);  // even twice
    ExpectMatches(problem);
    problem.ids[3] = 0;
    ExpectMatches(problem);
  }
}

TEST_P(MoeTest, SkippedIdsContributeNothing) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 40;
  problem.num_experts = 4;
  problem.top_k = 3;
  for (int64_t tokens : {6, 90}) {
    problem.tokens = tokens;
    problem.ids = UniformIntegers(3 * tokens, 6, -2, 5);
    std::fill_n(problem.ids.begin() + 3, 3, -1);  // token 1: none at all
    ExpectMatches(problem);
    Call call(device(), dtype(), problem);
    Run(call);
    EXPECT_EQ(Row(call.out().Values(), 1, 64), std::vector<double>(64, 0.0));
  }
}

TEST_P(MoeTest, Acceptance22_InPlaceIsOutOfPlace) {
  for (int64_t tokens : {1, 7, 60, 700}) {
    SCOPED_TRACE(tokens);
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 72;
    problem.intermediate = 40;
    problem.num_experts = 9;
    problem.top_k = 4;
    problem.padding = 8;
    Call call(device(), dtype(), problem);
    Run(call);
    call.params().out = call.params().x;
    Run(call);
    EXPECT_EQ(call.x().Values(), call.out().Values());
    EXPECT_EQ(call.x().NumStrayWrites(), 0);
  }
}

// Equal tokens at different places give equal bits, so the edge is checked
// against the first period of the same call, and that against the reference.
TEST_P(MoeTest, Acceptance22_ChunkEdge) {
  for (int64_t tokens :
       {kMoeChunkTokens - 1, kMoeChunkTokens, kMoeChunkTokens + 1}) {
    SCOPED_TRACE(tokens);
    Problem problem;
    problem.tokens = tokens;
    problem.hidden = 16;
    problem.intermediate = 8;
    problem.num_experts = 5;
    problem.top_k = 2;
    problem.period = 97;
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<double> values = call.out().Values();
    const std::vector<double> first(values.begin(), values.begin() + 97 * 16);
    EXPECT_LT(RelativeFrobeniusError(first, call.Expected(FirstTokens(97))),
              MaxError());
    int64_t different = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      different += values[i] != first[i % first.size()];
    }
    EXPECT_EQ(different, 0);
    EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    call.params().out = call.params().x;
    Run(call);
    EXPECT_EQ(call.x().Values(), values);
  }
}

TEST_P(MoeTest, Acceptance22_RowDoesNotDependOnTheOthers) {
  Problem problem;
  problem.hidden = 200;
  problem.intermediate = 104;
  problem.num_experts = 3;
  problem.top_k = 2;
  problem.tokens = 900;
  Call all(device(), dtype(), problem);
  all.params().batch_invariant = true;
  Run(all);
  const std::vector<double> expected = all.out().Values();
  // Alone, and among so many that other kernels are chosen.
  for (const auto& [first, count] : std::vector<std::pair<int64_t, int64_t>>{
           {41, 1}, {41, 5}, {10, 112}, {800, 100}}) {
    SCOPED_TRACE(StrCat(count, " tokens from ", first));
    TestTensor out(device(), dtype(), {count, 200});
    MoeParams p = all.params();
    p.x = Rows(p.x, first, count);
    p.topk_ids = Rows(p.topk_ids, first, count);
    p.topk_weights = Rows(p.topk_weights, first, count);
    p.out = out.view();
    ASSERT_TRUE(Moe(p, stream()).ok());
    Finish();
    EXPECT_EQ(out.Values(),
              std::vector<double>(expected.begin() + first * 200,
                                  expected.begin() + (first + count) * 200));
  }
}

// One expert four times: the first row swallows the second, the third cancels
// it, and the fourth remains. In any other order of the choices it does not.
TEST_P(MoeTest, SumsInTheOrderOfChoices) {
  Problem problem;
  problem.hidden = 8;
  problem.intermediate = 16;
  problem.top_k = 4;
  problem.ids = {0, 0, 0, 0};
  Call call(device(), dtype(), problem);
  const TestTensor only_last(device(), DType::kFloat32, {1, 4},
                             {0.0f, 0.0f, 0.0f, 0x1p-11f});
  call.params().topk_weights = only_last.view();
  Run(call);
  const std::vector<double> expected = call.out().Values();
  for (double v : expected) EXPECT_NE(v, 0.0);
  const TestTensor weights(device(), DType::kFloat32, {1, 4},
                           {0x1p14f, 0x1p-11f, -0x1p14f, 0x1p-11f});
  call.params().topk_weights = weights.view();
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
}

TEST_P(MoeTest, SameCallSameBits) {
  Problem problem;
  problem.hidden = 136;
  problem.intermediate = 72;
  problem.num_experts = 9;
  problem.top_k = 4;
  for (int64_t tokens : {8, 129}) {
    problem.tokens = tokens;
    Call call(device(), dtype(), problem);
    Run(call);
    const std::vector<uint8_t> bytes = call.out().Bytes();
    for (int i = 0; i < 10; ++i) {
      Run(call);
      ASSERT_EQ(call.out().Bytes(), bytes) << tokens << " tokens, run " << i;
    }
  }
}

TEST_P(MoeTest, NumberOfThreadsDoesNotMatter) {
  Problem problem;
  problem.hidden = 96;
  problem.intermediate = 72;
  problem.num_experts = 9;
  problem.top_k = 4;
  problem.tokens = 50;
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<uint8_t> bytes = call.out().Bytes();
  Stream alone = stream();
  alone.cpu = nullptr;
  ASSERT_TRUE(Moe(call.params(), alone).ok());
  Finish();
  EXPECT_EQ(call.out().Bytes(), bytes);
}

// Gate and up from tensors of their own, with other strides, and on the CPU
// from tables of pointers.
TEST_P(MoeTest, SeparateMatrices) {
  Problem problem;
  problem.hidden = 64;
  problem.intermediate = 40;
  problem.num_experts = 4;
  problem.top_k = 2;
  problem.tokens = 20;
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<double> expected = call.out().Values();
  const std::vector<double> w13 = call.w13().InitialValues();
  std::vector<float> up;
  for (int64_t e = 0; e < 4; ++e) {
    const auto begin = w13.begin() + (2 * e + 1) * 40 * 64;
    up.insert(up.end(), begin, begin + 40 * 64);
  }
  const TestTensor separate(device(), dtype(), {4, 40, 64}, {40 * 72, 72, 1},
                            up);
  call.params().up = MakeExpertMatrices(separate.view());
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
  if (on_cuda()) return;
  std::vector<const void*> table;
  for (int64_t e = 0; e < 4; ++e) {
    table.push_back(ExpertRow(call.params().up, e, 0));
  }
  call.params().up.data = nullptr;
  call.params().up.table = table.data();
  Run(call);
  EXPECT_EQ(call.out().Values(), expected);
}

TEST_P(MoeTest, Acceptance22_GraphReplay) {
  if constexpr (kCudaBuilt) {
    if (!on_cuda()) GTEST_SKIP() << "graphs are of CUDA";
    for (int64_t tokens : {1, 8, 100, 3000}) {
      SCOPED_TRACE(tokens);
      Problem problem;
      problem.tokens = tokens;
      problem.hidden = 128;
      problem.intermediate = 64;
      problem.num_experts = 16;
      problem.top_k = 8;
      Call call(device(), dtype(), problem);
      Call captured(device(), dtype(), problem);
      Run(call);
      const Status status = testing::RunAsCudaGraph(
          stream(), 3, [&] { return Moe(captured.params(), stream()); });
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(captured.out().Bytes(), call.out().Bytes());
    }
  } else {
    GTEST_SKIP() << "built without CUDA";
  }
}

TEST_P(MoeTest, Acceptance22_ZeroTokensIsOk) {
  Problem problem;
  problem.tokens = 0;
  problem.hidden = 16;
  problem.intermediate = 8;
  problem.num_experts = 4;
  problem.top_k = 2;
  Call call(device(), dtype(), problem);
  EXPECT_TRUE(Moe(call.params(), stream()).ok());
}

TEST_P(MoeTest, Acceptance22_WorkspaceQuery) {
  Problem problem;
  problem.hidden = 16;
  problem.intermediate = 8;
  problem.num_experts = 64;
  problem.top_k = 8;
  problem.tokens = 1;
  Call call(device(), dtype(), problem);
  size_t previous = 0;
  MoeParams p = call.params();
  for (int64_t tokens = 1; tokens < 3 * kMoeChunkTokens;
       tokens += tokens / 7 + 1) {
    p.x.shape[0] = p.out.shape[0] = tokens;
    p.topk_ids.shape[0] = p.topk_weights.shape[0] = tokens;
    const size_t bytes = MoeWorkspaceBytes(p);
    ASSERT_GE(bytes, previous) << tokens;
    previous = bytes;
  }
  p.x.shape[0] = p.out.shape[0] = 100 * kMoeChunkTokens;
  p.topk_ids.shape[0] = p.topk_weights.shape[0] = 100 * kMoeChunkTokens;
  EXPECT_EQ(MoeWorkspaceBytes(p), previous);  // bounded by the chunk
  EXPECT_EQ(MoeWorkspaceBytes(MoeParams()), 0u);
}

TEST_P(MoeTest, RejectsBadArguments) {
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

INSTANTIATE_TEST_SUITE_P(Targets, MoeTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
