#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sampler/philox.h"
#include "ops/sampler/sampler.h"
#include "tests/ops/sampler_test_base.h"
#include "tests/testing/random.h"

// Whether draws follow the distribution. Seeds are fixed, so that a test either
// always passes or always fails.

namespace tenon {
namespace {

using testing::Drawn;
using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;

// Standard normal deviation of a chi-square statistic (Wilson and Hilferty):
// 3.09 is a probability of 1e-3.
double ChiSquareDeviation(double statistic, double degrees) {
  const double spread = 2.0 / (9.0 * degrees);
  return (std::cbrt(statistic / degrees) - (1.0 - spread)) / std::sqrt(spread);
}

// Pools the tokens expected fewer than five times.
double ChiSquareDeviation(const std::vector<int64_t>& counts,
                          const std::vector<double>& probability,
                          double draws) {
  double statistic = 0.0;
  double degrees = -1.0;
  double rare_expected = 0.0;
  double rare_count = 0.0;
  const auto add = [&](double count, double expected) {
    statistic += (count - expected) * (count - expected) / expected;
    degrees += 1.0;
  };
  for (size_t i = 0; i < counts.size(); ++i) {
    const double expected = probability[i] * draws;
    const double count = static_cast<double>(counts[i]);
    if (expected >= 5.0) {
      add(count, expected);
    } else {
      rare_expected += expected;
      rare_count += count;
    }
  }
  if (rare_expected > 0.0) add(rare_count, rare_expected);
  return degrees < 1.0 ? 0.0 : ChiSquareDeviation(statistic, degrees);
}

class SamplerStatisticsTest : public testing::SamplerTestBase {
 protected:
  static constexpr int64_t kFewDraws = 2000;  // of a small test

  bool OnGpu() const { return device().type == DeviceType::kCuda; }
  // How often each token comes in `draws` draws at consecutive positions. All
  // memory is made once: most of the time is the host's.
  std::vector<int64_t> Count(const TestTensor& logits,
                             const SamplingParams& sampling, int64_t draws) {
    const int64_t batch = std::min<int64_t>(draws, OnGpu() ? 1 << 19 : 1 << 15);
    std::vector<SamplingParams> params(static_cast<size_t>(batch), sampling);
    std::vector<int32_t> tokens(static_cast<size_t>(batch));
    const size_t params_bytes = params.size() * sizeof(SamplingParams);
    const size_t tokens_bytes = tokens.size() * sizeof(int32_t);
    Buffer device_params = OnDevice(params.data(), params_bytes);
    const Buffer device_tokens = OnDevice(tokens.data(), tokens_bytes);
    const Buffer statuses = OnDevice(tokens.data(), tokens_bytes);
    SamplerParams p;
    p.logits = Repeat(logits.view(), batch);
    p.params = static_cast<const SamplingParams*>(device_params.data());
    p.tokens =
        MakeTensor(device_tokens.data(), DType::kInt32, device(), {batch});
    p.statuses = MakeTensor(statuses.data(), DType::kInt32, device(), {batch});
    const std::vector<char> scratch(SamplerWorkspaceBytes(p), '\xff');
    const Buffer workspace = OnDevice(scratch.data(), scratch.size());
    p.workspace = workspace.data();
    p.workspace_size = scratch.size();

    std::vector<int64_t> counts(static_cast<size_t>(logits.view().shape[1]));
    for (int64_t drawn = 0; drawn < draws; drawn += batch) {
      for (int64_t i = 0; i < batch; ++i) {
        params[i].position =
            sampling.position + static_cast<uint64_t>(drawn + i);
      }
      Status status = CopyMemory(device_params.data(), device(), params.data(),
                                 Device(), params_bytes, stream());
      if (status.ok()) status = Sampler(p, stream());
      Finish();
      if (status.ok()) {
        status = CopyMemory(tokens.data(), Device(), device_tokens.data(),
                            device(), tokens_bytes, stream());
      }
      Finish();
      EXPECT_TRUE(status.ok()) << status.message();
      if (!status.ok()) break;
      const int64_t rows = std::min(batch, draws - drawn);
      for (int64_t i = 0; i < rows; ++i) ++counts.at(tokens[i]);
    }
    return counts;
  }

  void ExpectFollows(const TestTensor& logits, const SamplingParams& sampling,
                     int64_t draws) {
    const reference::Distribution expected = reference::KeptDistribution(
        logits.InitialValues(), ReferenceOf(sampling));
    ASSERT_GT(expected.margin, 1e-6) << "choose another top_p";
    const std::vector<int64_t> counts = Count(logits, sampling, draws);
    for (size_t i = 0; i < counts.size(); ++i) {
      if (expected.probability[i] == 0.0) {
        EXPECT_EQ(counts[i], 0) << "token " << i << " was filtered";
      }
    }
    EXPECT_LT(ChiSquareDeviation(counts, expected.probability,
                                 static_cast<double>(draws)),
              3.09);
  }

  void ExpectManyFollow(uint64_t filter, SamplingParams sampling) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    constexpr int64_t kDrawsOnCpu = 50000;  // each takes ten times as long
#else
    constexpr int64_t kDrawsOnCpu = 1000000;
#endif
    sampling.seed = 20 + filter;
    sampling.temperature = 0.9f;
    ExpectFollows(Logits(Normal(60, 6, 0.0f, 1.5f)), sampling,
                  SmallOr(kFewDraws, OnGpu() ? 100000000 : kDrawsOnCpu));
  }
};

TEST_P(SamplerStatisticsTest, Acceptance27_PlainDrawsFollowTheSoftmax) {
  for (int64_t vocab : {2, 17, 512}) {
    SCOPED_TRACE(vocab);
    const TestTensor logits =
        Logits(Normal(vocab, static_cast<uint64_t>(vocab), 0.0f, 1.5f));
    SamplingParams sampling;
    sampling.temperature = 0.8f;
    sampling.seed = 1;
    ExpectFollows(logits, sampling,
                  SmallOr(kFewDraws, vocab == 17 ? 1 << 20 : 1 << 17));
  }
}

TEST_P(SamplerStatisticsTest, FilteredDrawsFollowTheKeptDistribution) {
  const TestTensor logits = Logits(Normal(600, 2, 0.0f, 2.0f));
  const auto expect = [&](int32_t top_k, float top_p, float min_p,
                          FilterOrder order) {
    SCOPED_TRACE(StrCat("k ", top_k, " p ", top_p, " min_p ", min_p));
    SamplingParams sampling;
    sampling.top_k = top_k;
    sampling.top_p = top_p;
    sampling.min_p = min_p;
    sampling.filter_order = order;
    sampling.seed = 3;
    ExpectFollows(logits, sampling, SmallOr(kFewDraws, 1 << 15));
  };
  expect(40, 1.0f, 0.0f, FilterOrder::kSequential);
  expect(0, 0.8f, 0.0f, FilterOrder::kSequential);
  expect(0, 1.0f, 0.03f, FilterOrder::kSequential);
  expect(40, 0.7f, 0.02f, FilterOrder::kSequential);
  expect(40, 0.7f, 0.0f, FilterOrder::kJoint);
}

// Every filter, on a GPU 10^8 draws of each, on the CPU 10^6. A test for each,
// as a GPU's host takes seconds for so many.
TEST_P(SamplerStatisticsTest, ManyPlainDrawsFollowTheSoftmax) {
  ExpectManyFollow(0, SamplingParams());
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfTopKFollowItsDistribution) {
  SamplingParams s;
  s.top_k = 12;
  ExpectManyFollow(1, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfTopPFollowItsDistribution) {
  SamplingParams s;
  s.top_p = 0.85f;
  ExpectManyFollow(2, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfMinPFollowItsDistribution) {
  SamplingParams s;
  s.min_p = 0.06f;
  ExpectManyFollow(3, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfTypicalPFollowItsDistribution) {
  SamplingParams s;
  s.typical_p = 0.8f;
  ExpectManyFollow(4, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfTopNSigmaFollowItsDistribution) {
  SamplingParams s;
  s.top_n_sigma = 1.5f;
  ExpectManyFollow(5, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfXtcFollowItsDistribution) {
  SamplingParams s;
  s.xtc_probability = 1.0f;
  s.xtc_threshold = 0.08f;
  ExpectManyFollow(6, s);
}
TEST_P(SamplerStatisticsTest, ManyDrawsOfAChainFollowItsDistribution) {
  SamplingParams s;
  s.filter_order = FilterOrder::kLlamaCpp;
  s.top_k = 30;
  s.top_p = 0.95f;
  s.min_p = 0.01f;
  ExpectManyFollow(7, s);
}

TEST_P(SamplerStatisticsTest, SeedsAndPositionsAreIndependent) {
  // Each of these in turn moves through the draws; the draws stay uniform, and
  // neighbours are uncorrelated.
  const int64_t draws = SmallOr(kFewDraws, int64_t{1} << 15);
  const TestTensor logits = Logits(std::vector<float>(64, 0.5f));
  for (int mode = 0; mode < 3; ++mode) {
    SCOPED_TRACE(mode);
    std::vector<SamplingParams> sampling(draws);
    for (int64_t i = 0; i < draws; ++i) {
      sampling[i].seed = mode == 0 ? 9 : static_cast<uint64_t>(i);
      sampling[i].position = mode == 1 ? 9 : static_cast<uint64_t>(i);
    }
    const Drawn drawn = Draw(Repeat(logits.view(), draws), sampling);
    std::vector<int64_t> counts(64);
    std::vector<int64_t> pairs(64 * 64);
    for (int64_t i = 0; i < draws; ++i) {
      ++counts.at(drawn.tokens[i]);
      if (i > 0) ++pairs.at(drawn.tokens[i - 1] * 64 + drawn.tokens[i]);
    }
    EXPECT_LT(
        ChiSquareDeviation(counts, std::vector<double>(64, 1.0 / 64), draws),
        3.09);
    EXPECT_LT(ChiSquareDeviation(pairs, std::vector<double>(4096, 1.0 / 4096),
                                 draws - 1),
              3.09);
  }
}

// One likely token and many that together have a probability below 2^-24, where
// uniforms of 24 bits have no value left.
TEST_P(SamplerStatisticsTest, TailBeyond24BitUniformsIsReached) {
  constexpr int64_t kTail = 199;
  std::vector<float> row(1 + kTail, -22.0f);
  row[0] = 0.0f;
  const double head = 1.0 / (1.0 + kTail * std::exp(-22.0));
  ASSERT_GT(head, 1.0 - 0x1p-24);
  // All positions up to here whose uniform is in the tail: 12 of an expected
  // 216566838 * 5.55e-8 = 12.0.
  std::vector<SamplingParams> sampling;
  for (uint64_t position :
       {3835299, 26344647, 30666183, 34217792, 43667751, 50727313, 74510031,
        80682922, 85940669, 131868768, 136335512, 216566837}) {
    sampling.emplace_back();
    sampling.back().seed = 4;
    sampling.back().position = position;
  }
  const TestTensor logits = Logits(row);
  const Drawn drawn = Draw(
      Repeat(logits.view(), static_cast<int64_t>(sampling.size())), sampling);
  for (size_t i = 0; i < sampling.size(); ++i) {
    const double share = (Uniform(sampling[i]) - head) / (1.0 - head);
    EXPECT_NEAR(drawn.tokens[i], 1.0 + share * kTail, 1.0);
  }
}

TEST_P(SamplerStatisticsTest, Acceptance27_ImpossibleTokensAreNeverDrawn) {
  constexpr int64_t kVocab = 300;
  std::vector<float> row(kVocab, -std::numeric_limits<float>::infinity());
  // The first, the last and a few between are impossible.
  for (int64_t i = 1; i + 1 < kVocab; i += 2) row[i] = 0.0f;
  const TestTensor logits = Logits(row);
  SamplingParams sampling;
  sampling.seed = 5;
  // 10^9 draws take a GPU a minute or more.
  const bool is_long = OnGpu() && testing::LongTests();
  const std::vector<int64_t> counts = Count(
      logits, sampling, SmallOr(kFewDraws, is_long ? 1000000000 : 1 << 18));
  for (int64_t i = 0; i < kVocab; ++i) {
    if (row[i] != 0.0f) {
      EXPECT_EQ(counts[i], 0) << i;
    } else {
      EXPECT_GT(counts[i], 0) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerStatisticsTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
