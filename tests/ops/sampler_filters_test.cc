#include <set>

#include "ops/sampler/sampler.h"
#include "tests/ops/sampler_call.h"
#include "tests/testing/random.h"

// Every filter against float64, at uniforms that the test chooses.

namespace tenon {
namespace {

using testing::Fewer;
using testing::Filters;
using testing::Normal;
using testing::SamplerCall;
using testing::SamplerResult;
using testing::SmallOr;
using testing::TestTensor;

class SamplerFiltersTest : public testing::SamplerCallTest {
 protected:
  // Uniforms all over [0, 1], its ends, and the edges between tokens of the
  // expected distribution, from both sides.
  static std::vector<uint64_t> InterestingBits(
      const reference::Distribution& expected, const reference::Cdf& cdf) {
    std::vector<uint64_t> bits = {0, ~uint64_t{0}};
    for (int i = 0; i < 14; ++i) bits.push_back(BitsOf((i + 0.37) / 14.0));
    int edges = 0;
    for (size_t id = 0; id < expected.probability.size() && edges < 8; ++id) {
      if (expected.probability[id] < 1e-4) continue;
      ++edges;
      const double low = cdf.low(static_cast<int64_t>(id));
      bits.push_back(BitsOf(low - 2e-6));
      bits.push_back(BitsOf(low + 2e-6));
    }
    return bits;
  }

  // True where float64 was sure enough of what is kept to compare.
  bool ExpectReference(const TestTensor& logits, const SamplingParams& sampling,
                       float mu = kInf) {
    reference::Sampling filters = ReferenceOf(sampling);
    if (sampling.mirostat_tau > 0.0f) filters.mirostat_mu = mu;
    const reference::Distribution expected =
        reference::KeptDistribution(logits.InitialValues(), filters);
    if (expected.margin < 1e-5) return false;
    const reference::Cdf cdf(expected.probability);
    const std::vector<uint64_t> bits = InterestingBits(expected, cdf);
    SamplerCall call = CallOf(
        logits.view(), std::vector<SamplingParams>(bits.size(), sampling));
    call.random_bits = bits;
    call.with_probabilities = true;
    call.num_top = 5;
    call.top_kind = LogprobKind::kProcessed;
    for (SamplingParams& params : call.params) params.num_top_logprobs = 5;
    if (sampling.mirostat_tau > 0.0f) call.mirostat_mu.assign(bits.size(), mu);
    const SamplerResult result = Run(call);
    const int64_t vocab = static_cast<int64_t>(expected.probability.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      const double uniform = UniformFromBits(bits[i]);
      const int64_t token = result.tokens[i];
      if (token < 0 || token >= vocab) {
        ADD_FAILURE() << "token " << token;
        return true;
      }
      EXPECT_GT(expected.probability[token], 0.0) << "token " << token;
      if (token != cdf.Invert(uniform)) {
        EXPECT_LT(cdf.Distance(token, uniform), 1e-6)
            << "token " << token << " instead of " << cdf.Invert(uniform);
      }
      EXPECT_NEAR(result.logprobs[i], expected.logprob[token], 1e-5);
      EXPECT_NEAR(result.processed_logprobs[i],
                  std::log(expected.probability[token]), 1e-5);
      // All rows are of one distribution.
      for (int64_t id = 0; i == 0 && id < vocab; ++id) {
        const double p = result.probabilities[id];
        if (std::abs(p - expected.probability[id]) >
            1e-9 + 1e-5 * expected.probability[id]) {
          ADD_FAILURE() << "probability of " << id << " is " << p
                        << ", expected " << expected.probability[id];
          return true;
        }
      }
      ExpectTop(result, i, expected);
    }
    if (sampling.mirostat_tau > 0.0f) {
      for (size_t i = 0; i < bits.size(); ++i) {
        const double surprise =
            -std::log2(expected.probability[result.tokens[i]]);
        EXPECT_NEAR(
            result.mirostat_mu[i],
            mu - sampling.mirostat_eta * (surprise - sampling.mirostat_tau),
            1e-4);
      }
    }
    EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
    return true;
  }

  static void ExpectTop(const SamplerResult& result, size_t row,
                        const reference::Distribution& expected) {
    const std::vector<int64_t> ranked =
        reference::RankTokens(expected.probability);
    for (size_t i = 0; i < 5; ++i) {
      const int64_t token = result.top_tokens[row * 5 + i];
      if (i >= ranked.size() || expected.probability[ranked[i]] == 0.0) {
        EXPECT_EQ(token, -1);
        EXPECT_TRUE(std::isnan(result.top_logprobs[row * 5 + i]));
      } else {
        EXPECT_EQ(token, ranked[i]);
        EXPECT_NEAR(result.top_logprobs[row * 5 + i],
                    std::log(expected.probability[ranked[i]]), 1e-5);
      }
    }
  }
};

std::vector<FilterOrder> Orders() {
  return {FilterOrder::kSequential, FilterOrder::kJoint,
          FilterOrder::kLlamaCpp};
}

// Each filter off or on, in all combinations, orders and temperatures.
TEST_P(SamplerFiltersTest,
       AllCombinationsDrawWhatFloat64DrawsAtTheSameUniform) {
  int compared = 0;
  int cases = 0;
  for (int64_t vocab : {600, 23}) {
    const TestTensor logits =
        Logits(Normal(vocab, static_cast<uint64_t>(vocab), 1.0f, 2.0f));
    for (FilterOrder order : Orders()) {
      for (int mask = 0; mask < 64; mask += SmallOr(21, 1)) {
        for (float temperature : Fewer<float>({1.0f, 0.6f, 1.8f})) {
          if (vocab == 23 && temperature != 1.8f) continue;
          SamplingParams s = Filters(mask & 1 ? 17 : 0, mask & 2 ? 0.83f : 1.0f,
                                     mask & 4 ? 0.04f : 0.0f, order);
          s.temperature = temperature;
          if (mask & 8) s.typical_p = 0.77f;
          if (mask & 16) s.top_n_sigma = 1.6f;
          if (mask & 32) {
            s.xtc_probability = 1.0f;
            s.xtc_threshold = 0.09f;
          }
          SCOPED_TRACE(StrCat("vocab ", vocab, " order ",
                              static_cast<int>(order), " filters ", mask, " T ",
                              temperature));
          ++cases;
          compared += ExpectReference(logits, s);
        }
      }
    }
  }
  EXPECT_GT(compared, cases * 9 / 10);
}

TEST_P(SamplerFiltersTest, MirostatKeepsAndLearns) {
  const TestTensor logits = Logits(Normal(700, 3, 0.0f, 2.5f));
  int compared = 0;
  int cases = 0;
  for (FilterOrder order : Orders()) {
    for (float mu : Fewer<float>({0.1f, 3.0f, 6.0f, 11.0f, 40.0f}, 3)) {
      for (int32_t top_k : {0, 30}) {
        SamplingParams s = Filters(top_k, 1.0f, 0.0f, order);
        s.temperature = 0.9f;
        s.mirostat_tau = 5.0f;
        s.mirostat_eta = 0.1f;
        SCOPED_TRACE(StrCat("mu ", mu, " k ", top_k));
        ++cases;
        compared += ExpectReference(logits, s, mu);
      }
    }
  }
  EXPECT_GT(compared, cases * 4 / 5);
}

TEST_P(SamplerFiltersTest, MirostatNeedsItsState) {
  const TestTensor logits = Logits(Normal(700, 3));
  SamplingParams s;
  s.seed = 8;
  SamplingParams with = s;
  with.mirostat_tau = 0.1f;
  EXPECT_EQ(Run(CallOf(logits.view(), {with})).tokens,
            Run(CallOf(logits.view(), {s})).tokens);
  // Greedy rows and rows without it leave theirs alone.
  with.temperature = 0.0f;
  SamplerCall call = CallOf(logits.view(), {with, s});
  call.mirostat_mu = {2.5f, 7.5f};
  EXPECT_EQ(Run(call).mirostat_mu, (std::vector<double>{2.5, 7.5}));
}

// State that outlives a batch: read in one place, left in another.
TEST_P(SamplerFiltersTest, MirostatReadsAndLeavesItsStateWhereItIsTold) {
  const TestTensor logits = Logits(Normal(700, 3, 0.0f, 2.5f));
  SamplingParams s;
  s.seed = 8;
  s.mirostat_tau = 5.0f;
  s.mirostat_eta = 0.1f;
  const auto next = [&](float mu) {
    SamplerCall call = CallOf(logits.view(), {s});
    call.mirostat_mu = {mu};
    return Run(call).mirostat_mu[0];
  };
  SamplingParams set = s;
  set.flags = kSetMirostatMu;
  set.mirostat_mu = 4.0f;
  SamplingParams greedy = s;
  greedy.temperature = 0.0f;
  SamplingParams without;
  without.seed = 8;
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
  SamplerCall call =
      CallOf(logits.view(), {s, set, greedy, s, s, set, without, s});
  call.mirostat_mu = {1, 2, 3, 6, 7, 50, 60, 70, 80};
  call.mirostat_places = {3, 4,  9, 0,  5,    2,    -1, 1,
                          9, -1, 3, -1, kMin, kMax, 8,  9};
  EXPECT_EQ(
      Run(call).mirostat_mu,
      (std::vector<double>{next(4), next(10), 50, 6, next(6), 50, 60, 70, 80}));
  EXPECT_NE(next(4), 4);

  // The flag counts without places too.
  call = CallOf(logits.view(), {set});
  call.mirostat_mu = {9};
  EXPECT_EQ(Run(call).mirostat_mu[0], next(4));
}

// The examples of the papers and programs.
TEST_P(SamplerFiltersTest, LlamaCppsTestVectors) {
  const auto kept = [&](std::vector<double> probabilities, SamplingParams s) {
    std::vector<float> row;
    for (double p : probabilities) {
      row.push_back(static_cast<float>(std::log(p)));
    }
    const TestTensor logits = Logits(row);
    SamplerCall call = CallOf(logits.view(), {s});
    call.with_probabilities = true;
    std::vector<double> rounded;
    for (double p : Run(call).probabilities) {
      rounded.push_back(std::round(p * 1e3) / 1e3);
    }
    return rounded;
  };
  const std::vector<double> p = {0.1, 0.2, 0.3, 0.4};
  SamplingParams s;
  s.filter_order = FilterOrder::kLlamaCpp;
  SamplingParams xtc = s;
  xtc.xtc_probability = 1.0f;
  const auto with = [&](auto&& change) {
    SamplingParams copy = s;
    change(copy);
    return copy;
  };
  // test_top_n_sigma
  EXPECT_EQ(kept(p, with([](auto& x) { x.top_n_sigma = 1.0f; })),
            (std::vector<double>{0, 0, 0.429, 0.571}));
  EXPECT_EQ(kept(p, with([](auto& x) { x.top_n_sigma = 3.0f; })), p);
  // test_xtc: thresholds 0.09, 0.19, 0.29 and 0.39.
  const auto threshold = [&](float value) {
    SamplingParams copy = xtc;
    copy.xtc_threshold = value;
    return copy;
  };
  EXPECT_EQ(kept(p, threshold(0.09f)), (std::vector<double>{1, 0, 0, 0}));
  EXPECT_EQ(kept(p, threshold(0.19f)),
            (std::vector<double>{0.333, 0.667, 0, 0}));
  EXPECT_EQ(kept(p, threshold(0.29f)),
            (std::vector<double>{0.167, 0.333, 0.5, 0}));
  EXPECT_EQ(kept(p, threshold(0.39f)), p);
  EXPECT_EQ(kept(p, threshold(0.51f)), p);
  // test_typical
  EXPECT_EQ(
      kept({0.97, 0.01, 0.01, 0.01}, with([](auto& x) { x.typical_p = 0.5f; })),
      (std::vector<double>{1, 0, 0, 0}));
  EXPECT_EQ(
      kept({0.4, 0.2, 0.2, 0.2}, with([](auto& x) { x.typical_p = 0.5f; })),
      (std::vector<double>{0, 0.333, 0.333, 0.333}));
  // test_min_p and test_top_p
  EXPECT_EQ(kept(p, with([](auto& x) { x.min_p = 0.26f; })),
            (std::vector<double>{0, 0.222, 0.333, 0.444}));
  EXPECT_EQ(kept(p, with([](auto& x) { x.top_p = 0.7f; })),
            (std::vector<double>{0, 0, 0.429, 0.571}));
}

TEST_P(SamplerFiltersTest, LlamaCppsOrderHasTemperatureLast) {
  std::vector<float> row;
  for (double p : {0.5, 0.3, 0.15, 0.05}) {
    row.push_back(static_cast<float>(std::log(p)));
  }
  const TestTensor logits = Logits(row);
  SamplingParams s = Filters(0, 0.75f, 0.0f, FilterOrder::kLlamaCpp);
  s.temperature = 100.0f;
  // At temperature 100 top-p would keep three.
  EXPECT_EQ(ExpectReferenceTokens(logits, s, 100), (std::set<int64_t>{0, 1}));
  s.filter_order = FilterOrder::kSequential;
  EXPECT_EQ(ExpectReferenceTokens(logits, s, 100),
            (std::set<int64_t>{0, 1, 2}));
}

TEST_P(SamplerFiltersTest, XtcActsWithItsProbability) {
  // Two top choices and a coin: the best is drawn only where XTC did not act.
  std::vector<float> row(40, -30.0f);
  row[3] = 10.0f;
  row[4] = 0.0f;
  const TestTensor logits = Logits(row);
  SamplingParams s;
  s.xtc_probability = 0.3f;
  s.xtc_threshold = 1e-5f;
  s.seed = 12;
  constexpr int kDraws = 4000;
  std::vector<SamplingParams> params(kDraws, s);
  int expected = 0;
  for (int i = 0; i < kDraws; ++i) {
    params[i].position = static_cast<uint64_t>(i);
    expected += UniformAt(s.seed, i, RandomStream::kXtc) < s.xtc_probability;
  }
  const std::vector<int64_t> tokens = Run(CallOf(logits.view(), params)).tokens;
  const auto acted = std::count(tokens.begin(), tokens.end(), 4);
  EXPECT_NEAR(acted, 0.3 * kDraws, 4 * std::sqrt(0.21 * kDraws));
  EXPECT_NEAR(acted, expected, 3);  // the best is not certain without it
}

TEST_P(SamplerFiltersTest, XtcLeavesTheLastOfEqualTopChoices) {
  const TestTensor logits = Logits(std::vector<float>{2, 2, 2, -1, -1, 2, -9});
  SamplingParams s;
  s.xtc_probability = 1.0f;
  s.xtc_threshold = 0.2f;
  EXPECT_EQ(ExpectReferenceTokens(logits, s, 3000),
            (std::set<int64_t>{3, 4, 5}));
}

TEST_P(SamplerFiltersTest, AFullVocabularyOfEveryKind) {
  const int64_t vocab = SmallOr(kOneBlockVocab, 32000);
  std::vector<std::vector<float>> rows = {Normal(vocab, 5, 0.0f, 1.0f),
                                          Normal(vocab, 6, 0.0f, 4.0f),
                                          std::vector<float>(vocab, 0.75f)};
  for (int64_t i = 0; i < vocab; i += 3) rows[2][i] = 1.75f;
  int compared = 0;
  for (const std::vector<float>& row : rows) {
    const TestTensor logits = Logits(row);
    for (int filter = 0; filter < 6; ++filter) {
      SamplingParams s;
      s.seed = 3;
      if (filter == 0) s.typical_p = 0.9f;
      if (filter == 1) s.top_n_sigma = 1.0f;
      if (filter == 2) s.xtc_probability = 1.0f, s.xtc_threshold = 1e-3f;
      if (filter == 3) s.min_p = 0.1f, s.top_p = 0.6f;
      if (filter == 4) s.filter_order = FilterOrder::kLlamaCpp;
      if (filter == 4) s.temperature = 0.5f, s.typical_p = 0.4f;
      if (filter == 5) s.top_k = 3000, s.top_p = 0.97f;
      SCOPED_TRACE(StrCat("row ", &row - rows.data(), " filter ", filter));
      const reference::Distribution expected =
          reference::KeptDistribution(logits.InitialValues(), ReferenceOf(s));
      if (expected.margin < 1e-7) continue;
      ++compared;
      SamplerCall call = CallOf(logits.view(), {s});
      call.with_probabilities = true;
      const SamplerResult result = Run(call);
      double sum = 0.0;
      double difference = 0.0;
      for (int64_t id = 0; id < vocab; ++id) {
        sum += result.probabilities[id];
        difference +=
            std::abs(result.probabilities[id] - expected.probability[id]);
      }
      EXPECT_NEAR(sum, 1.0, 1e-5);
      EXPECT_LT(difference, 1e-3);  // a token or two at an edge
    }
  }
  EXPECT_GE(compared, 9);
}

// Top-k of hundreds of thousands with ties of every size, against a sort.
TEST_P(SamplerFiltersTest, SelectionSurvivesRowsMadeToDefeatIt) {
  const int32_t vocab = SmallOr(3811, 20011);
  const int32_t step = SmallOr(1000, 5000);
  std::vector<std::vector<float>> rows(5, std::vector<float>(vocab));
  for (int64_t i = 0; i < vocab; ++i) {
    // Values of every magnitude; nearly all equal; steps; alternating; a ramp.
    rows[0][i] = -std::exp2(static_cast<float>(i % 120) - 60.0f);
    rows[1][i] = i % step == 0 ? 1.0f : i % (step - 1) == 0 ? -1.0f : 0.0f;
    rows[2][i] = static_cast<float>(i * 5 / (7 * step));
    rows[3][i] = i % 2 == 0 ? 3.0f : 3.0f - 1e-6f;
    rows[4][i] = -static_cast<float>(i);
  }
  for (const std::vector<float>& row : rows) {
    const TestTensor logits = Logits(row);
    const std::vector<int64_t> ranked =
        reference::RankTokens(logits.InitialValues());
    for (int32_t k : {2, 100, 129, step, 3 * step, vocab - 1}) {
      SCOPED_TRACE(StrCat("row ", &row - rows.data(), " k ", k));
      SamplingParams s = Filters(k, 1.0f, 0.0f);
      s.temperature = 1e4f;
      SamplerCall call = CallOf(logits.view(), {s});
      call.with_probabilities = true;
      const SamplerResult result = Run(call);
      int64_t wrong = 0;
      for (int64_t rank = 0; rank < vocab; ++rank) {
        // Rows of huge spread have tokens that weigh nothing even so.
        const bool kept = result.probabilities[ranked[rank]] > 0.0;
        if (rank >= k) wrong += kept;
        if (rank < k && row[ranked[rank]] > -1e5f) wrong += !kept;
      }
      EXPECT_EQ(wrong, 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerFiltersTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
