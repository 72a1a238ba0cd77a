#include "ops/sampler/speculative.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/sampler/philox.h"
#include "ops/sampler/sampler.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;

struct Result {
  std::vector<int64_t> tokens;  // [sequences, drafts + 1]
  std::vector<int64_t> accepted;
  std::vector<int64_t> statuses;
};

class SpeculativeTest : public testing::OpTest {
 protected:
  Result Run(SpeculativeParams p, const std::vector<SamplingParams>& params) {
    const int64_t sequences = p.draft_tokens.shape[0];
    const int64_t drafts = p.draft_tokens.shape[1];
    StatusOr<Buffer> buffer =
        Buffer::Allocate(device(), params.size() * sizeof(SamplingParams) + 1);
    EXPECT_TRUE(buffer.ok());
    EXPECT_TRUE(CopyMemory(buffer->data(), device(), params.data(), Device(),
                           params.size() * sizeof(SamplingParams), stream())
                    .ok());
    if (!params.empty()) {
      p.params = static_cast<const SamplingParams*>(buffer->data());
    }
    TestTensor tokens(device(), DType::kInt32, {sequences, drafts + 1},
                      {drafts + 4, 1}, {});
    TestTensor accepted(device(), DType::kInt32, {sequences});
    TestTensor statuses(device(), DType::kInt32, {sequences});
    p.tokens = tokens.view();
    p.num_accepted = accepted.view();
    p.statuses = statuses.view();
    const Status status = Speculative(p, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_EQ(tokens.NumStrayWrites() + accepted.NumStrayWrites() +
                  statuses.NumStrayWrites(),
              0);
    return {tokens.Integers(), accepted.Integers(), statuses.Integers()};
  }

  TestTensor Ints(std::vector<int64_t> shape, std::vector<int64_t> values) {
    return TestTensor::FromIntegers(device(), DType::kInt32, std::move(shape),
                                    values);
  }

  // `rows` rows that are all `p`.
  TestTensor Repeated(const std::vector<float>& p, int64_t rows) {
    std::vector<float> all;
    for (int64_t i = 0; i < rows; ++i)
      all.insert(all.end(), p.begin(), p.end());
    return TestTensor(device(), DType::kFloat32,
                      {rows, static_cast<int64_t>(p.size())}, all);
  }

  static std::vector<SamplingParams> Params(int64_t sequences,
                                            uint64_t seed = 1) {
    std::vector<SamplingParams> params(static_cast<size_t>(sequences));
    for (size_t i = 0; i < params.size(); ++i) {
      params[i].seed = seed;
      params[i].position = 10 * i;
    }
    return params;
  }

  // What Sampler draws of one row of logits for all params, and by what
  // probabilities.
  void SampleAll(const TestTensor& logits,
                 const std::vector<SamplingParams>& params, RandomStream random,
                 const TestTensor& tokens, const TestTensor& probabilities) {
    const int64_t rows = static_cast<int64_t>(params.size());
    const TestTensor statuses(device(), DType::kInt32, {rows});
    const TestTensor bytes(device(), DType::kUInt8,
                           {rows * static_cast<int64_t>(sizeof(params[0]))});
    EXPECT_TRUE(CopyMemory(bytes.view().data, device(), params.data(), Device(),
                           params.size() * sizeof(params[0]), stream())
                    .ok());
    SamplerParams p;
    p.logits = logits.view();
    p.logits.shape[0] = rows;
    p.logits.stride[0] = 0;
    p.params = bytes.view().As<const SamplingParams>();
    p.stream = random;
    p.tokens = MakeTensor(tokens.view().data, DType::kInt32, device(), {rows});
    p.statuses = statuses.view();
    p.probabilities = probabilities.view();
    p.workspace_size = SamplerWorkspaceBytes(p);
    StatusOr<Buffer> workspace = Buffer::Allocate(device(), p.workspace_size);
    EXPECT_TRUE(workspace.ok());
    p.workspace = workspace->data();
    const Status status = Sampler(p, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
  }

  // Drafts drawn from q, by streams of their own; then the frequency of the
  // first token that comes out, over `trials`.
  std::vector<double> FirstTokens(const std::vector<float>& p,
                                  const std::vector<float>& q, int64_t trials,
                                  double* acceptance) {
    std::vector<int64_t> drafts;
    const std::vector<SamplingParams> params = Params(trials, 77);
    for (const SamplingParams& s : params) {
      double u = UniformAt(s.seed, s.position, RandomStream::kDraft);
      int64_t id = 0;
      while (id + 1 < static_cast<int64_t>(q.size()) && u >= q[id])
        u -= q[id++];
      drafts.push_back(id);
    }
    const TestTensor draft_tokens = Ints({trials, 1}, drafts);
    const TestTensor target = Repeated(p, 2 * trials);
    const TestTensor draft = Repeated(q, trials);
    SpeculativeParams s;
    s.draft_tokens = draft_tokens.view();
    s.target_probabilities = target.view();
    s.draft_probabilities = draft.view();
    const Result result = Run(s, params);
    std::vector<double> frequency(p.size());
    double accepted = 0.0;
    for (int64_t i = 0; i < trials; ++i) {
      frequency.at(result.tokens[2 * i]) += 1.0 / static_cast<double>(trials);
      accepted += static_cast<double>(result.accepted[i]);
    }
    *acceptance = accepted / static_cast<double>(trials);
    return frequency;
  }
};

std::vector<float> Softmax(const std::vector<float>& logits) {
  double sum = 0.0;
  for (float x : logits) sum += std::exp(double{x});
  std::vector<float> p;
  for (float x : logits) p.push_back(static_cast<float>(std::exp(x) / sum));
  return p;
}

// vLLM #47386, #54282: a draft and a residual that shared noise gave a token of
// 60 % 63 %.
TEST_P(SpeculativeTest,
       MarginalsAreTheTargetsWhateverIsDrafted_vLLM47386_vLLM54282) {
  const int64_t trials = SmallOr(2000, 60000);
  const std::vector<std::vector<float>> targets = {
      {0.6f, 0.3f, 0.1f}, Softmax(Normal(12, 1, 0.0f, 1.5f))};
  for (const std::vector<float>& p : targets) {
    std::vector<std::vector<float>> draft_models = {
        p, std::vector<float>(p.size(), 1.0f / static_cast<float>(p.size())),
        Softmax(Normal(static_cast<int64_t>(p.size()), 2, 0.0f, 2.0f))};
    for (const std::vector<float>& q : draft_models) {
      double acceptance = 0.0;
      const std::vector<double> frequency =
          FirstTokens(p, q, trials, &acceptance);
      double expected_acceptance = 0.0;
      double variation = 0.0;
      double floor = 0.0;
      for (size_t i = 0; i < p.size(); ++i) {
        expected_acceptance += std::min(p[i], q[i]);
        variation += 0.5 * std::abs(frequency[i] - p[i]);
        floor += 0.5 * std::sqrt(2.0 / M_PI * p[i] * (1 - p[i]) / trials);
      }
      EXPECT_LT(variation, 2.0 * floor);
      EXPECT_NEAR(acceptance, expected_acceptance, SmallOr(0.05, 0.01));
    }
  }
}

TEST_P(SpeculativeTest, EqualDistributionsAcceptAllDisjointOnesNone) {
  constexpr int64_t kSequences = 300;
  const std::vector<float> p = {0.0f, 0.5f, 0.0f, 0.5f};
  const std::vector<float> q = {0.25f, 0.0f, 0.75f, 0.0f};
  const TestTensor target = Repeated(p, 4 * kSequences);
  const TestTensor draft = Repeated(q, 3 * kSequences);
  const TestTensor same = Repeated(p, 3 * kSequences);
  std::vector<int64_t> of_p, of_q;
  for (int64_t i = 0; i < 3 * kSequences; ++i) {
    of_p.push_back(i % 2 ? 1 : 3);
    of_q.push_back(i % 2 ? 0 : 2);
  }
  const TestTensor p_tokens = Ints({kSequences, 3}, of_p);
  const TestTensor q_tokens = Ints({kSequences, 3}, of_q);
  SpeculativeParams s;
  s.target_probabilities = target.view();
  s.draft_tokens = p_tokens.view();
  s.draft_probabilities = same.view();
  const Result all = Run(s, Params(kSequences));
  s.draft_tokens = q_tokens.view();
  s.draft_probabilities = draft.view();
  const Result none = Run(s, Params(kSequences));
  for (int64_t i = 0; i < kSequences; ++i) {
    EXPECT_EQ(all.accepted[i], 3);
    for (int j = 0; j < 3; ++j) {
      EXPECT_EQ(all.tokens[4 * i + j], of_p[3 * i + j]);
    }
    EXPECT_EQ(all.tokens[4 * i + 3] % 2, 1);
    EXPECT_EQ(none.accepted[i], 0);
    EXPECT_EQ(none.tokens[4 * i] % 2, 1);
    EXPECT_EQ(none.tokens[4 * i + 1], -1);
    EXPECT_EQ(none.tokens[4 * i + 3], -1);
  }
}

// SGLang #35771: coin 0 <= 0 accepted a draft that the target cannot draw.
TEST_P(SpeculativeTest, SGLang35771_AnImpossibleDraftIsNeverAccepted) {
  const int64_t sequences = SmallOr(500, 5000);
  const TestTensor target = Repeated({0.0f, 1.0f}, 2 * sequences);
  const TestTensor drafts =
      Ints({sequences, 1}, std::vector<int64_t>(sequences, 0));
  const TestTensor draft = Repeated({1.0f, 0.0f}, sequences);
  const TestTensor zero = Repeated({0.0f, 1.0f}, sequences);  // q(draft) = 0
  for (const TestTensor* q : {&draft, &zero}) {
    SpeculativeParams s;
    s.draft_tokens = drafts.view();
    s.target_probabilities = target.view();
    s.draft_probabilities = q->view();
    const Result result = Run(s, Params(sequences));
    EXPECT_EQ(result.accepted, std::vector<int64_t>(sequences, 0));
    for (int64_t i = 0; i < sequences; ++i) {
      EXPECT_EQ(result.tokens[2 * i], 1);
    }
  }
}

TEST_P(SpeculativeTest, CertainDraftsByProbabilitiesHaveTheTargetsMarginals) {
  const int64_t trials = SmallOr(2000, 60000);
  const std::vector<float> p = {0.5f, 0.2f, 0.3f};
  const TestTensor target = Repeated(p, 2 * trials);
  for (int64_t draft : {0, 1}) {
    const TestTensor drafts =
        Ints({trials, 1}, std::vector<int64_t>(trials, draft));
    SpeculativeParams s;
    s.draft_tokens = drafts.view();
    s.target_probabilities = target.view();
    const Result result = Run(s, Params(trials, 5));
    std::vector<double> frequency(3);
    for (int64_t i = 0; i < trials; ++i) {
      frequency.at(result.tokens[2 * i]) += 1.0 / static_cast<double>(trials);
      EXPECT_EQ(result.accepted[i] == 1, result.tokens[2 * i] == draft);
    }
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_NEAR(frequency[i], p[i], SmallOr(0.05, 0.009));
    }
  }
}

// As a host uses it: Sampler draws from a draft model's bfloat16 logits, and
// tells by what probabilities, rounded or not; its noise is none of what is
// accepted by.
TEST_P(SpeculativeTest, DraftsOfTheSamplerHaveTheTargetsMarginals_DeepSpec31) {
  constexpr int64_t kTrials = 40000;
  constexpr int64_t kVocab = 20;
  std::vector<SamplingParams> params = Params(kTrials, 9);
  for (SamplingParams& s : params) {
    s.top_k = 12;
    s.temperature = 0.8f;
  }
  const TestTensor draft_logits(device(), DType::kBFloat16, {1, kVocab},
                                Normal(kVocab, 5, 0.0f, 2.0f));
  const TestTensor target_logits(device(), DType::kBFloat16, {1, kVocab},
                                 Normal(kVocab, 6, 0.0f, 2.0f));
  const TestTensor draft_tokens(device(), DType::kInt32, {kTrials, 1});
  const TestTensor q(device(), DType::kFloat32, {kTrials, kVocab});
  SampleAll(draft_logits, params, RandomStream::kDraft, draft_tokens, q);
  const TestTensor of_target(device(), DType::kInt32, {1, 1});
  const TestTensor p_row(device(), DType::kFloat32, {1, kVocab});
  SampleAll(target_logits, {params[0]}, RandomStream::kTarget, of_target,
            p_row);
  std::vector<float> p;
  for (double value : p_row.Values()) p.push_back(static_cast<float>(value));
  const TestTensor target = Repeated(p, 2 * kTrials);
  SpeculativeParams s;
  s.draft_tokens = draft_tokens.view();
  s.target_probabilities = target.view();
  s.draft_probabilities = q.view();
  const Result result = Run(s, params);
  std::vector<double> frequency(kVocab);
  for (int64_t i = 0; i < kTrials; ++i) {
    frequency.at(result.tokens[2 * i]) += 1.0 / kTrials;
  }
  double variation = 0.0;
  double floor = 0.0;
  for (int64_t id = 0; id < kVocab; ++id) {
    variation += 0.5 * std::abs(frequency[id] - p[id]);
    floor += 0.5 * std::sqrt(2.0 / M_PI * p[id] * (1 - p[id]) / kTrials);
    if (p[id] == 0.0f) {
      EXPECT_EQ(frequency[id], 0.0) << id;
    }
  }
  EXPECT_LT(variation, 2.0 * floor);
}

TEST_P(SpeculativeTest, ByTokensAcceptsWhileEqual) {
  const TestTensor drafts =
      Ints({5, 3}, {1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, -1, 2, 3});
  const TestTensor target = Ints(
      {5, 4}, {1, 2, 3, 4, 1, 9, 3, 4, 7, 2, 3, 4, 1, 2, -1, 4, -1, 2, 3, 4});
  const TestTensor counts = Ints({5}, {3, 3, 99, -1, 3});
  SpeculativeParams s;
  s.draft_tokens = drafts.view();
  s.target_tokens = target.view();
  Result result = Run(s, {});
  EXPECT_EQ(result.accepted, (std::vector<int64_t>{3, 1, 0, 2, 0}));
  EXPECT_EQ(result.tokens,
            (std::vector<int64_t>{1,  2,  3, 4, 1,  9,  -1, -1, 7,  -1,
                                  -1, -1, 1, 2, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(result.statuses, (std::vector<int64_t>{0, 0, 0, 1, 1}));
  s.num_drafts = counts.view();
  result = Run(s, {});
  EXPECT_EQ(result.accepted, (std::vector<int64_t>{3, 1, 0, 0, 0}));
  EXPECT_EQ(result.tokens[12], 1);  // no drafts: the target's first
}

// Exactly at the drawn uniforms, against sums in float64.
TEST_P(SpeculativeTest, DrawsInvertTheCumulativeSumInOrderOfId) {
  constexpr int64_t kVocab = 3001;
  constexpr int64_t kSequences = 40;
  const std::vector<float> p = Softmax(Normal(kVocab, 3, 0.0f, 1.0f));
  std::vector<float> q = Softmax(Normal(kVocab, 4, 0.0f, 1.0f));
  const TestTensor target = Repeated(p, 3 * kSequences);
  const TestTensor draft = Repeated(q, 2 * kSequences);
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < 2 * kSequences; ++i)
    tokens.push_back(i * 37 % kVocab);
  const TestTensor drafts = Ints({kSequences, 2}, tokens);
  SpeculativeParams s;
  s.draft_tokens = drafts.view();
  s.target_probabilities = target.view();
  s.draft_probabilities = draft.view();
  const std::vector<SamplingParams> params = Params(kSequences, 9);
  const Result result = Run(s, params);
  for (int64_t i = 0; i < kSequences; ++i) {
    int64_t accepted = 0;
    const auto uniform = [&](RandomStream stream) {
      return UniformAt(params[i].seed, params[i].position + accepted, stream);
    };
    for (; accepted < 2; ++accepted) {
      const int64_t d = tokens[2 * i + accepted];
      if (uniform(RandomStream::kAccept) * q[d] >= p[d]) break;
    }
    ASSERT_EQ(result.accepted[i], accepted);
    std::vector<double> sums;
    double sum = 0.0;
    for (int64_t id = 0; id < kVocab; ++id) {
      sum += accepted == 2 ? double{p[id]}
                           : std::max(0.0, double{p[id]} - double{q[id]});
      sums.push_back(sum);
    }
    const double u = uniform(accepted == 2 ? RandomStream::kTarget
                                           : RandomStream::kResidual);
    const int64_t token = result.tokens[3 * i + accepted];
    EXPECT_LE(u * sum, sums[token] + 1e-6);
    EXPECT_GE(u * sum, (token == 0 ? 0.0 : sums[token - 1]) - 1e-6);
  }
}

TEST_P(SpeculativeTest, RowsWithoutProbabilityHaveNoToken) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const TestTensor drafts = Ints({2, 1}, {1, 50});
  const TestTensor target(device(), DType::kFloat32, {4, 3},
                          {nan, nan, -1, 0, 0, 0, 0, 0, 0, 1, 0, 0});
  SpeculativeParams s;
  s.draft_tokens = drafts.view();
  s.target_probabilities = target.view();
  const Result result = Run(s, Params(2));
  EXPECT_EQ(result.tokens, (std::vector<int64_t>{-1, -1, -1, -1}));
  EXPECT_EQ(result.statuses, (std::vector<int64_t>{1, 1}));
}

TEST_P(SpeculativeTest, RejectsBadArguments) {
  const TestTensor drafts(device(), DType::kInt32, {2, 3});
  const TestTensor target_tokens(device(), DType::kInt32, {2, 4});
  const TestTensor target(device(), DType::kFloat32, {8, 5});
  const TestTensor draft(device(), DType::kFloat32, {6, 5});
  const TestTensor tokens(device(), DType::kInt32, {2, 4});
  const TestTensor accepted(device(), DType::kInt32, {2});
  const TestTensor statuses(device(), DType::kInt32, {2});
  SpeculativeParams good;
  good.draft_tokens = drafts.view();
  good.target_tokens = target_tokens.view();
  good.tokens = tokens.view();
  good.num_accepted = accepted.view();
  good.statuses = statuses.view();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    SpeculativeParams p = good;
    change(p);
    testing::ExpectInvalid(Speculative(p, stream()), parts);
  };
  expect({"Speculative", "draft_tokens is missing"},
         [](SpeculativeParams& p) { p.draft_tokens = TensorView(); });
  expect({"drafts", "65", "64"}, [](SpeculativeParams& p) {
    p.draft_tokens.shape[1] = p.draft_tokens.stride[0] = 65;
  });
  expect({"none of target_tokens"},
         [](SpeculativeParams& p) { p.target_tokens = TensorView(); });
  expect({"both of target_tokens"},
         [&](SpeculativeParams& p) { p.target_probabilities = target.view(); });
  expect({"draft_probabilities", "target_tokens"},
         [&](SpeculativeParams& p) { p.draft_probabilities = draft.view(); });
  expect({"params is null"}, [&](SpeculativeParams& p) {
    p.target_tokens = TensorView();
    p.target_probabilities = target.view();
  });
  expect({"draft_probabilities", "[6, 5]", "[6, 4]"},
         [&](SpeculativeParams& p) {
           p.target_tokens = TensorView();
           p.target_probabilities = Columns(target.view(), 0, 4);
           p.draft_probabilities = draft.view();
         });
  expect({"num_drafts", "[4]"}, [&](SpeculativeParams& p) {
    p.num_drafts = accepted.view();
    p.num_drafts.shape[0] = 4;
  });
  expect({"tokens", "[2, 3]", "[2, 4]"},
         [](SpeculativeParams& p) { p.tokens.shape[1] = 3; });
  expect({"statuses overlaps num_accepted"},
         [](SpeculativeParams& p) { p.statuses.data = p.num_accepted.data; });
  expect({"tokens overlaps draft_tokens"},
         [](SpeculativeParams& p) { p.tokens.data = p.draft_tokens.data; });
}

TEST_P(SpeculativeTest, ZeroSequencesIsOk) {
  const TestTensor none(device(), DType::kInt32, {0, 2});
  const TestTensor more(device(), DType::kInt32, {0, 3});
  const TestTensor flat(device(), DType::kInt32, {0});
  SpeculativeParams s;
  s.draft_tokens = none.view();
  s.target_tokens = more.view();
  s.tokens = more.view();
  s.num_accepted = s.statuses = flat.view();
  EXPECT_TRUE(Speculative(s, stream()).ok());
}

INSTANTIATE_TEST_SUITE_P(Targets, SpeculativeTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
