// What a layer does before its matrix products: on CUDA few launches do what
// MoeRouter, MoeAlign and QuantizeFp8 do one by one, and have to give the same
// bits.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/core/build_config.h"
#include "ops/moe/moe.h"
#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_router.h"
#include "ops/quantize/quantize.h"
#include "tests/testing/cuda_graph.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Fewer;
using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;
using testing::UniformIntegers;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of draws, and between them such that a router may trip over.
std::vector<float> HostileLogits(int64_t tokens, int64_t num_experts) {
  const int64_t drawn = std::min<int64_t>(tokens, 499);
  std::vector<float> values = Normal(drawn * num_experts, 21, 0.0f, 3.0f);
  values.resize(static_cast<size_t>(tokens * num_experts));
  for (int64_t t = 0; t < tokens; ++t) {
    if (t >= drawn) {
      std::copy_n(values.begin() + t % drawn * num_experts, num_experts,
                  values.begin() + t * num_experts);
      continue;
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      float& v = values[t * num_experts + e];
      switch (t % 16) {
        case 2:
          v = NAN;
          break;
        case 3:
          v = 0.25f;
          break;
        case 5:
          v = e % 3 == 0 ? NAN : v;
          break;
        case 7:
          v = e % 5 == 1 ? kInfinity : v;
          break;
        case 8:
          v = -kInfinity;
          break;
        case 10:
          v = e % 2 == 0 ? -0.0f : 0.0f;
          break;
        case 13:
          v = std::round(v);  // many ties
          break;
        default:
          break;
      }
    }
  }
  return values;
}

// One call of Moe, with a router in it, and what it is compared with.
struct Problem {
  int64_t tokens = 1;
  int64_t num_experts = 128;  // that the router chooses from
  int32_t top_k = 8;
  int64_t hidden = 16;
  int64_t intermediate = 8;
  int64_t padding = 0;  // of the rows of all tensors
  DType logits_dtype = DType::kFloat32;
  bool fp8 = false;
  std::vector<int64_t> ids;  // not empty: no router
  int64_t tail = 0;          // the last tokens that are padding
  MoeRouterParams options;   // but for the tensors and top_k
  bool biased = false;
};

class Call {
 public:
  Call(Device device, DType dtype, const Problem& p) : problem_(p) {
    const int64_t columns = p.top_k + p.options.num_fused_shared_experts;
    const int64_t num_matrices =
        p.num_experts + p.options.num_fused_shared_experts;
    logits_ = TestTensor(device, p.logits_dtype, {p.tokens, p.num_experts},
                         {p.num_experts + p.padding, 1},
                         p.ids.empty() ? HostileLogits(p.tokens, p.num_experts)
                                       : std::vector<float>());
    bias_ = TestTensor(device, DType::kFloat32, {p.num_experts},
                       Normal(p.num_experts, 22, 0.0f, 0.1f));
    weights_ = TestTensor(device, DType::kFloat32, {p.tokens, columns},
                          {columns + p.padding, 1}, {});
    if (p.ids.empty()) {
      ids_ = TestTensor(device, DType::kInt32, {p.tokens, columns},
                        {columns + 2 * p.padding, 1}, {});
    } else {
      ids_ = TestTensor::FromIntegers(device, DType::kInt32,
                                      {p.tokens, columns}, p.ids);
    }
    x_ = TestTensor(device, dtype, {p.tokens, p.hidden},
                    {p.hidden + p.padding, 1}, Normal(p.tokens * p.hidden, 23));
    const DType experts = p.fp8 ? DType::kFloat8E4M3 : dtype;
    w13_ = TestTensor(
        device, experts, {num_matrices, 2 * p.intermediate, p.hidden},
        Normal(num_matrices * 2 * p.intermediate * p.hidden, 24, 0.0f, 0.25f));
    w2_ = TestTensor(
        device, experts, {num_matrices, p.hidden, p.intermediate},
        Normal(num_matrices * p.intermediate * p.hidden, 25, 0.0f, 0.25f));
    out_ = TestTensor(device, dtype, {p.tokens, p.hidden},
                      {p.hidden + p.padding, 1}, {});
    router_ = p.options;
    router_.top_k = p.top_k;
    router_.logits = logits_.view();
    if (p.biased) router_.correction_bias = bias_.view();
    std::vector<int64_t> marks(p.tokens, 0);
    std::fill_n(marks.rbegin(), std::min(p.tail, p.tokens), -1);
    marks_ = TestTensor::FromIntegers(device, DType::kInt32, {p.tokens}, marks);
    if (p.tail > 0) router_.padding = marks_.view();
    router_.topk_weights = weights_.view();
    router_.topk_ids = ids_.view();

    params_.x = x_.view();
    params_.topk_weights = weights_.view();
    params_.topk_ids = ids_.view();
    params_.gate = MakeExpertMatrices(w13_.view(), 0, p.intermediate);
    params_.up =
        MakeExpertMatrices(w13_.view(), p.intermediate, p.intermediate);
    params_.down = MakeExpertMatrices(w2_.view());
    params_.out = out_.view();
    if (p.ids.empty()) params_.router = &router_;
    const size_t bytes = LayOutScratch(params_).bytes;
    workspace_ =
        TestTensor(device, DType::kUInt8, {static_cast<int64_t>(bytes)});
    params_.workspace = workspace_.view().data;
    params_.workspace_size = bytes;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Problem& problem() const { return problem_; }
  MoeParams& params() { return params_; }
  const MoeRouterParams& router() const { return router_; }
  const TestTensor& ids() const { return ids_; }
  const TestTensor& weights() const { return weights_; }
  const TestTensor& out() const { return out_; }

  int64_t NumStrayWrites() const {
    int64_t count = 0;
    for (const TestTensor* tensor :
         {&logits_, &bias_, &weights_, &ids_, &x_, &out_, &workspace_}) {
      count += tensor->NumStrayWrites();
    }
    return count + (logits_.Bytes() != logits_.InitialBytes()) +
           (x_.Bytes() != x_.InitialBytes());
  }

 private:
  Problem problem_;
  TestTensor logits_, bias_, weights_, ids_, x_, w13_, w2_, out_, workspace_,
      marks_;
  MoeRouterParams router_;
  MoeParams params_;
};

class MoePrepareTest : public testing::OpTest {
 protected:
  bool on_cuda() const { return device().type == DeviceType::kCuda; }

  // Bytes of device memory.
  std::vector<uint8_t> Read(const void* data, size_t bytes) {
    std::vector<uint8_t> host(bytes);
    const Status status =
        CopyMemory(host.data(), Device(), data, device(), bytes, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    return host;
  }

  // The layer with its router against router and layer.
  void ExpectSameAsSeparate(const Problem& problem) {
    SCOPED_TRACE(StrCat(problem.tokens, " tokens, ", problem.num_experts,
                        " experts, top ", problem.top_k));
    Call together(device(), dtype(), problem);
    Call separate(device(), dtype(), problem);
    separate.params().router = nullptr;
    ASSERT_TRUE(MoeRouter(separate.router(), stream()).ok());
    ASSERT_TRUE(Moe(separate.params(), stream()).ok());
    const Status status = Moe(together.params(), stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_EQ(together.ids().Bytes(), separate.ids().Bytes());
    EXPECT_EQ(together.weights().Bytes(), separate.weights().Bytes());
    EXPECT_EQ(together.out().Bytes(), separate.out().Bytes());
    EXPECT_EQ(together.NumStrayWrites(), 0);
  }

  // MoePrepareCuda against the ops that do its parts.
  void ExpectPrepares(const Problem& problem) {
    SCOPED_TRACE(StrCat(problem.tokens, " tokens, ", problem.num_experts,
                        " experts, top ", problem.top_k, ", hidden ",
                        problem.hidden, ", padding ", problem.padding));
    Call call(device(), dtype(), problem);
    Call expected(device(), dtype(), problem);
    MoeParams& p = call.params();
    const MoeScratch scratch = LayOutScratch(p);
    if constexpr (kCudaBuilt) {
      const Status status = MoePrepareCuda(p, scratch, stream());
      ASSERT_TRUE(status.ok()) << status.message();
    }
    if (p.router != nullptr) {
      ASSERT_TRUE(MoeRouter(expected.router(), stream()).ok());
    }
    const MoeScratch wanted = LayOutScratch(expected.params());
    ASSERT_TRUE(AlignChunk(expected.params(), wanted, 0, 0, stream()).ok());
    Finish();
    EXPECT_EQ(call.ids().Bytes(), expected.ids().Bytes());
    EXPECT_EQ(call.weights().Bytes(), expected.weights().Bytes());
    const size_t offsets = 4 * static_cast<size_t>(p.gate.num_experts + 1);
    const size_t slots = 4 * static_cast<size_t>(NumElements(p.topk_ids));
    EXPECT_EQ(Read(scratch.expert_offsets, offsets),
              Read(wanted.expert_offsets, offsets));
    EXPECT_EQ(Read(scratch.sorted_slots, slots),
              Read(wanted.sorted_slots, slots));
    EXPECT_EQ(call.NumStrayWrites(), 0);
    if (problem.fp8) ExpectQuantized(expected, scratch, wanted);
  }

  // `scratch` has the quantised x of `call`; `to` is to hold what it should be.
  void ExpectQuantized(Call& call, const MoeScratch& scratch,
                       const MoeScratch& to) {
    const TensorView& x = call.params().x;
    const int64_t groups = (x.shape[1] + 127) / 128;
    QuantizeFp8Params q;
    q.x = x;
    q.out = MakeTensor(to.x_fp8, DType::kFloat8E4M3, device(),
                       {x.shape[0], x.shape[1]});
    q.scales = MakeTensor(to.x_scales, DType::kFloat32, device(),
                          {x.shape[0], groups});
    ASSERT_TRUE(QuantizeFp8(q, stream()).ok());
    const size_t bytes = static_cast<size_t>(NumElements(q.out));
    EXPECT_EQ(Read(scratch.x_fp8, bytes), Read(to.x_fp8, bytes));
    const size_t scales = 4 * static_cast<size_t>(NumElements(q.scales));
    EXPECT_EQ(Read(scratch.x_scales, scales), Read(to.x_scales, scales));
  }
};

TEST_P(MoePrepareTest, Acceptance22_RouterInTheLayer) {
  for (int64_t num_experts :
       Fewer<int64_t>({8, 127, 128, 160, 256, 512, 1024}, 3)) {
    for (int64_t tokens : Fewer<int64_t>(
             {0, 1, 2, 7, 64, 255, 256, 257, 1024, 1025, 4096, 16384}, 5)) {
      if (tokens > (on_cuda() ? SmallOr(300, 20000) : 64)) continue;
      Problem problem;
      problem.tokens = tokens;
      problem.num_experts = num_experts;
      problem.options.renormalize = true;
      ExpectSameAsSeparate(problem);
    }
  }
}

TEST_P(MoePrepareTest, PaddingHasNoExpert) {
  for (int64_t tokens : Fewer<int64_t>({1, 4, 8, 16, 24, 40, 200, 600}, 3)) {
    if (tokens > (on_cuda() ? SmallOr(300, 20000) : 64)) continue;
    for (const bool fp8 : {false, true}) {
      Problem problem;
      problem.tokens = tokens;
      problem.tail = tokens / 3 + 1;
      problem.fp8 = fp8;
      problem.options.num_fused_shared_experts = tokens % 16 == 8 ? 2 : 0;
      if (!fp8) ExpectSameAsSeparate(problem);  // no scales to compute with
      if (on_cuda()) ExpectPrepares(problem);
    }
  }
}

TEST_P(MoePrepareTest, Acceptance22_ChunksOfTheLayer) {
  Problem problem;
  problem.tokens = kMoeChunkTokens + 3;
  problem.num_experts = 5;
  problem.top_k = 2;
  problem.hidden = 8;
  ExpectSameAsSeparate(problem);
}

// All that a router can be asked for.
std::vector<Problem> RouterOptions() {
  std::vector<Problem> problems;
  Problem p;
  p.padding = 3;
  problems.push_back(p);
  p.biased = true;
  p.options.scoring = MoeScoring::kSigmoid;
  p.options.renormalize = true;
  p.options.routed_scaling_factor = 2.5f;
  problems.push_back(p);
  p.num_experts = 256;
  p.options.num_expert_groups = 8;
  p.options.num_selected_groups = 4;
  p.logits_dtype = DType::kFloat16;
  problems.push_back(p);
  p.options.group_score = MoeGroupScore::kMax;
  p.options.num_fused_shared_experts = 3;
  p.logits_dtype = DType::kBFloat16;
  problems.push_back(p);
  p.num_experts = 1000;
  p.options.num_expert_groups = 500;
  p.options.num_selected_groups = 50;
  p.top_k = 29;
  problems.push_back(p);
  p.num_experts = 40;
  p.options.num_expert_groups = 1;
  p.options.num_selected_groups = 1;
  p.options.num_fused_shared_experts = 1;
  p.top_k = 31;
  p.biased = false;
  problems.push_back(p);
  p.num_experts = 1;
  p.top_k = 1;
  problems.push_back(p);
  return problems;
}

TEST_P(MoePrepareTest, EveryRouterOption) {
  for (Problem problem : RouterOptions()) {
    for (int64_t tokens : Fewer<int64_t>({1, 19, 70, 300, 1500}, 3)) {
      if (tokens > (on_cuda() ? SmallOr(300, 20000) : 300)) continue;
      problem.tokens = tokens;
      ExpectSameAsSeparate(problem);
    }
  }
}

TEST_P(MoePrepareTest, SameAsItsParts) {
  if (!on_cuda()) GTEST_SKIP() << "one function on CUDA alone";
  for (Problem problem : Fewer(RouterOptions(), 3)) {
    for (int64_t tokens : Fewer<int64_t>({1, 2, 7, 16, 17, 33, 128, 129, 256,
                                          448, 449, 1024, 1025, 4097, 32768},
                                         5)) {
      if (tokens > SmallOr(500, 5000) && problem.num_experts > SmallOr(0, 128))
        continue;
      problem.tokens = tokens;
      problem.fp8 = tokens % 2 == 0 || tokens > 1024;
      ExpectPrepares(problem);
    }
  }
}

TEST_P(MoePrepareTest, QuantizesRowsOfAnyWidth) {
  if (!on_cuda()) GTEST_SKIP() << "one function on CUDA alone";
  Problem problem;
  problem.fp8 = true;
  for (int64_t hidden : Fewer<int64_t>({1, 128, 192, 200, 333, 2048}, 3)) {
    for (int64_t tokens : Fewer<int64_t>({1, 13, 111, SmallOr(130, 1030)})) {
      for (int64_t padding : {0, 3, 8}) {
        problem.hidden = hidden;
        problem.tokens = tokens;
        problem.padding = padding;
        ExpectPrepares(problem);
      }
    }
  }
}

// Ids that the caller gives may be of no expert, and of one expert twice.
TEST_P(MoePrepareTest, GivenIds) {
  if (!on_cuda()) GTEST_SKIP() << "one function on CUDA alone";
  Problem problem;
  problem.fp8 = true;
  for (const auto& [low, high] : Fewer<std::pair<int64_t, int64_t>>(
           {{0, 127}, {-20, 200}, {3, 3}, {5, 7}, {-9, -1}, {128, 300}}, 3)) {
    for (int64_t tokens :
         Fewer<int64_t>({1, 9, 30, 64, 250, 448, 700, 3000, 20000}, 4)) {
      for (int32_t top_k : Fewer<int32_t>({1, 8, 11})) {
        if (tokens > SmallOr(500, 5000) && top_k != SmallOr(0, 8)) continue;
        problem.tokens = tokens;
        problem.top_k = top_k;
        problem.ids = UniformIntegers(tokens * top_k, 26, low, high);
        ExpectPrepares(problem);
      }
    }
  }
}

TEST_P(MoePrepareTest, SameCallSameBits) {
  if (!on_cuda()) GTEST_SKIP() << "one function on CUDA alone";
  for (int64_t tokens : Fewer<int64_t>({1, 200, 1024, SmallOr(500, 5000)}, 3)) {
    Problem problem;
    problem.tokens = tokens;
    problem.fp8 = true;
    Call call(device(), dtype(), problem);
    std::vector<uint8_t> first;
    for (int i = 0; i < SmallOr(2, 10); ++i) {
      if constexpr (kCudaBuilt) {
        const MoeScratch scratch = LayOutScratch(call.params());
        const Status status = testing::RunAsCudaGraph(stream(), 3, [&] {
          return MoePrepareCuda(call.params(), scratch, stream());
        });
        ASSERT_TRUE(status.ok()) << status.message();
      }
      Finish();
      const std::vector<uint8_t> bytes =
          Read(call.params().workspace, call.params().workspace_size);
      if (i == 0) first = bytes;
      EXPECT_EQ(bytes, first);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, MoePrepareTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
