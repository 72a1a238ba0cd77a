#include "ops/sampler/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "tests/ops/sampler_test_base.h"
#include "tests/testing/random.h"

namespace tenon {
namespace {

using testing::Drawn;
using testing::Fewer;
using testing::Filters;
using testing::Normal;
using testing::SmallOr;
using testing::TestTensor;

constexpr int64_t kQwenVocab = 151936;

// Natural logarithms, so that a softmax gives the probabilities back.
std::vector<float> LogitsOf(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) {
    logits.push_back(p > 0.0 ? static_cast<float>(std::log(p))
                             : -std::numeric_limits<float>::infinity());
  }
  return logits;
}

std::vector<SamplingParams> ManyFilters() {
  std::vector<SamplingParams> all = {
      Filters(0, 1.0f, 0.0f),    Filters(1, 1.0f, 0.0f),
      Filters(5, 1.0f, 0.0f),    Filters(50, 1.0f, 0.0f),
      Filters(700, 1.0f, 0.0f),  Filters(0, 0.3f, 0.0f),
      Filters(0, 0.9f, 0.0f),    Filters(0, 0.9999999f, 0.0f),
      Filters(0, 1.0f, 0.05f),   Filters(40, 0.8f, 0.0f),
      Filters(40, 0.95f, 0.02f), Filters(900, 0.95f, 0.0f),
      Filters(-1, 0.0f, 0.0f)};
  const size_t sequential = all.size();
  for (size_t i = 0; i < sequential; ++i) {
    if (all[i].top_k > 1 && all[i].top_p < 1.0f) {
      all.push_back(all[i]);
      all.back().filter_order = FilterOrder::kJoint;
    }
  }
  return all;
}

class SamplerTest : public testing::SamplerTestBase {
 protected:
  bool OnGpu() const { return device().type == DeviceType::kCuda; }

  // Whatever the filters and the temperature.
  void ExpectNoToken(const TestTensor& logits, SampleStatus status) {
    for (SamplingParams sampling : ManyFilters()) {
      for (float temperature : {0.0f, 1.0f}) {
        sampling.temperature = temperature;
        const Drawn drawn = Draw(logits.view(), {sampling});
        EXPECT_EQ(drawn.tokens[0], -1);
        EXPECT_EQ(drawn.statuses[0], static_cast<int>(status));
        EXPECT_TRUE(std::isnan(drawn.logprobs[0]));
      }
    }
  }
};

TEST_P(SamplerTest, Acceptance27_DrawsTheReferencesTokens) {
  for (int64_t vocab : Fewer<int64_t>({1, 2, 17, 256, 257, 512, 3001}, 3)) {
    for (float spread : Fewer<float>({0.5f, 4.0f}, 1)) {
      const TestTensor logits =
          Logits(Normal(vocab, static_cast<uint64_t>(vocab), -3.0f, spread));
      for (SamplingParams sampling : ManyFilters()) {
        for (float temperature : Fewer<float>({1.0f, 0.3f, 1.7f, 0.0f})) {
          sampling.temperature = temperature;
          SCOPED_TRACE(StrCat(
              "vocab ", vocab, " spread ", spread, " T ", temperature, " k ",
              sampling.top_k, " p ", sampling.top_p, " min_p ", sampling.min_p,
              " order ", static_cast<int>(sampling.filter_order)));
          ExpectReferenceTokens(logits, sampling, 20);
        }
      }
    }
  }
}

TEST_P(SamplerTest, Acceptance27_DrawsTheReferencesTokensOfAFullVocabulary) {
  const int64_t vocab = SmallOr(kOneBlockVocab, kQwenVocab);
  for (float spread : {1.0f, 3.0f}) {
    const TestTensor logits = Logits(Normal(vocab, 5, 0.0f, spread));
    for (SamplingParams sampling :
         {Filters(0, 1.0f, 0.0f), Filters(50, 1.0f, 0.0f),
          Filters(SmallOr(1000, 5000), 0.99f, 0.0f), Filters(0, 0.9f, 0.0f),
          Filters(50, 0.9f, 0.02f), Filters(0, 1.0f, 0.1f)}) {
      if (!OnGpu() && spread == 1.0f && sampling.top_k == 5000) continue;
      sampling.temperature = 0.7f;
      SCOPED_TRACE(StrCat("spread ", spread, " k ", sampling.top_k, " p ",
                          sampling.top_p, " min_p ", sampling.min_p));
      ExpectReferenceTokens(logits, sampling, 24);
    }
  }
}

// Rows that defeat shortcuts: nothing to select by, or all of it in few places.
TEST_P(SamplerTest, AdversarialRows) {
  // Usually enough for guesses on CUDA.
  const int64_t vocab = SmallOr(kOneBlockVocab, 34000);
  const int64_t finite = SmallOr(2345, 12345);
  std::vector<std::vector<float>> rows(6, std::vector<float>(vocab));
  for (int64_t i = 0; i < vocab; ++i) {
    rows[0][i] = 1.25f;                                        // all equal
    rows[1][i] = i == finite ? -7.0f : -kInf;                  // one finite
    rows[2][i] = i % 1000 == 999 ? 0.5f : -kInf;               // 99.9 % masked
    rows[3][i] = -1.1f * std::log(static_cast<float>(i + 1));  // Zipf by id
    rows[4][i] = i % 3 == 0 ? 2.0f : 1.0f;                     // two values
    rows[5][i] = i == 17 ? 30000.0f : -30000.0f;               // far apart
  }
  for (const std::vector<float>& row : rows) {
    const TestTensor logits = Logits(row);
    for (SamplingParams sampling :
         {Filters(0, 1.0f, 0.0f), Filters(50, 1.0f, 0.0f),
          Filters(300, 0.5f, 0.0f), Filters(0, 0.9f, 0.0f),
          Filters(0, 0.01f, 0.01f), Filters(7, 0.7f, 0.0f, FilterOrder::kJoint),
          Filters(static_cast<int32_t>(vocab - 1), 1.0f, 0.0f)}) {
      SCOPED_TRACE(StrCat("row ", &row - rows.data(), " k ", sampling.top_k,
                          " p ", sampling.top_p));
      ExpectReferenceTokens(logits, sampling, 8);
    }
  }
}

TEST_P(SamplerTest, Acceptance27_GreedyInAMixedBatchIsArgmax) {
  constexpr int64_t kVocab = 1000;
  constexpr int64_t kRows = 12;
  const TestTensor logits(device(), dtype(), {kRows, kVocab},
                          Normal(kRows * kVocab, 3, 0.0f, 2.0f));
  std::vector<SamplingParams> sampling = ManyFilters();
  sampling.resize(kRows);
  for (int64_t i = 0; i < kRows; i += 2) sampling[i].temperature = 0.0f;
  const Drawn drawn = Draw(logits.view(), sampling);
  const std::vector<double> x = logits.InitialValues();
  for (int64_t i = 0; i < kRows; i += 2) {
    const auto row = x.begin() + i * kVocab;
    EXPECT_EQ(drawn.tokens[i], std::max_element(row, row + kVocab) - row);
  }
}

TEST_P(SamplerTest, Acceptance28_LogprobIsOfTheWholeRowInEveryPath) {
  const TestTensor logits =
      Logits(Normal(SmallOr(kOneBlockVocab, 5000), 11, 0.0f, 3.0f));
  const double best = [&] {
    const std::vector<double> x = logits.InitialValues();
    return *std::max_element(x.begin(), x.end());
  }();
  for (float temperature : {0.0f, 0.5f, 1.0f, 2.0f}) {
    for (SamplingParams sampling :
         {Filters(0, 1.0f, 0.0f), Filters(3, 1.0f, 0.0f),
          Filters(0, 0.5f, 0.0f), Filters(0, 1.0f, 0.5f)}) {
      sampling.temperature = temperature;
      const double t = temperature == 0.0f ? 1.0 : temperature;
      double sum = 0.0;
      for (double x : logits.InitialValues()) sum += std::exp((x - best) / t);
      const Drawn drawn = DrawMany(logits.view(), sampling, 4);
      for (int i = 0; i < 4; ++i) {
        const double x = logits.InitialValues()[drawn.tokens[i]];
        EXPECT_NEAR(drawn.logprobs[i], (x - best) / t - std::log(sum), 2e-6);
      }
    }
  }
}

TEST_P(SamplerTest, LogprobsAreOptional) {
  const TestTensor logits = Logits(Normal(999, 12));
  for (const SamplingParams& sampling : ManyFilters()) {
    EXPECT_EQ(Draw(logits.view(), {sampling}, false).tokens,
              Draw(logits.view(), {sampling}).tokens);
  }
}

// The set a filter keeps, exactly: every one of it is drawn, nothing else.
TEST_P(SamplerTest, FiltersKeepExactlyTheirSets) {
  const TestTensor logits = Logits(
      LogitsOf({0.05, 0.25, 0.02, 0.0, 0.30, 0.10, 0.03, 0.15, 0.06, 0.04}));
  using Set = std::set<int64_t>;
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(3, 1.0f, 0.0f), 400),
            (Set{4, 1, 7}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 0.6f, 0.0f), 400),
            (Set{4, 1, 7}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 0.75f, 0.0f), 400),
            (Set{4, 1, 7, 5}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 1.0f, 0.3f), 400),
            (Set{4, 1, 7, 5}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(2, 0.9f, 0.9f), 400),
            (Set{4}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 1.0f, 0.0f), 4000),
            (Set{0, 1, 2, 4, 5, 6, 7, 8, 9}));
}

TEST_P(SamplerTest, SequentialAndJointOrdersKeepDifferentSets) {
  const TestTensor logits = Logits(LogitsOf({0.30, 0.25, 0.24, 0.11, 0.10}));
  EXPECT_EQ(ExpectReferenceTokens(
                logits, Filters(3, 0.35f, 0.0f, FilterOrder::kSequential), 200),
            (std::set<int64_t>{0}));
  EXPECT_EQ(ExpectReferenceTokens(
                logits, Filters(3, 0.35f, 0.0f, FilterOrder::kJoint), 200),
            (std::set<int64_t>{0, 1}));
}

TEST_P(SamplerTest, OffValuesTurnFiltersOff) {
  const TestTensor logits = Logits(Normal(777, 14));
  const Drawn plain = DrawMany(logits.view(), Filters(0, 1.0f, 0.0f), 50);
  for (int32_t top_k : {-1, 777, 778, std::numeric_limits<int32_t>::max()}) {
    EXPECT_EQ(DrawMany(logits.view(), Filters(top_k, 1.0f, 0.0f), 50), plain);
  }
}

TEST_P(SamplerTest, OneTokenFiltersEqualGreedyWithTies) {
  std::vector<float> row = Normal(3000, 15);
  row[700] = row[701] = row[2900] = 9.0f;
  const TestTensor logits = Logits(row);
  for (const SamplingParams& sampling :
       {Filters(1, 1.0f, 0.0f), Filters(0, 0.0f, 0.0f), Filters(0, 1e-6f, 0.0f),
        Filters(1, 0.5f, 0.5f)}) {
    EXPECT_EQ(DrawMany(logits.view(), sampling, 30).tokens,
              std::vector<int64_t>(30, 700));
  }
  // min_p of 1 keeps all that are as good as the best.
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 1.0f, 1.0f), 60),
            (std::set<int64_t>{700, 701, 2900}));
}

// Peers keep all tokens that equal the k-th best.
TEST_P(SamplerTest, ExactlyKAreKeptOnTies) {
  EXPECT_EQ(ExpectReferenceTokens(Logits(LogitsOf({0.4, 0.3, 0.3})),
                                  Filters(2, 1.0f, 0.0f), 100),
            (std::set<int64_t>{0, 1}));
  EXPECT_EQ(ExpectReferenceTokens(Logits(std::vector<float>(600, -2.0f)),
                                  Filters(3, 1.0f, 0.0f), 100),
            (std::set<int64_t>{0, 1, 2}));
  // Logits as coarse as bfloat16 has them at 20: ties everywhere, also across
  // sub-tiles.
  std::vector<float> row = Normal(2000, 16, 20.0f, 0.5f);
  for (float& x : row) x = std::round(x * 8.0f) / 8.0f;
  const TestTensor logits = Logits(row);
  const std::vector<int64_t> ranked =
      reference::RankTokens(logits.InitialValues());
  // To draw all of many takes many draws.
  const std::vector<int32_t> counts =
      testing::SmallTests() ? std::vector{2, 8} : std::vector{2, 7, 8, 9, 33};
  for (int32_t k : counts) {
    const std::set<int64_t> drawn =
        ExpectReferenceTokens(logits, Filters(k, 1.0f, 0.0f), 60 * k);
    EXPECT_EQ(drawn, std::set<int64_t>(ranked.begin(), ranked.begin() + k));
  }
}

TEST_P(SamplerTest, TopPCountsTiesOneByOne) {
  const int64_t half = SmallOr(50, 500);
  const TestTensor logits = Logits(std::vector<float>(2 * half, 3.0f));
  std::set<int64_t> first_half;
  for (int64_t i = 0; i < half; ++i) first_half.insert(i);
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 0.5f, 0.0f), 16 * half),
            first_half);
  // Of top-k's ten, half.
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(10, 0.5f, 0.0f), 200),
            (std::set<int64_t>{0, 1, 2, 3, 4}));
}

TEST_P(SamplerTest, TheTwoZerosTie) {
  const TestTensor logits = Logits({-0.0f, 0.0f, -0.0f, -1.0f});
  SamplingParams greedy;
  greedy.temperature = 0.0f;
  EXPECT_EQ(Draw(logits.view(), {greedy}).tokens[0], 0);
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(2, 1.0f, 0.0f), 60),
            (std::set<int64_t>{0, 1}));
  EXPECT_EQ(ExpectReferenceTokens(logits, Filters(0, 1.0f, 1.0f), 60),
            (std::set<int64_t>{0, 1, 2}));
}

// A search for the top_p-th part of a sum that rounding made smaller must not
// run off the end.
TEST_P(SamplerTest, TopPJustBelowOneStaysInside) {
  for (float top_p : {0.9999999f, std::nextafter(1.0f, 0.0f)}) {
    for (int64_t vocab : {int64_t{3}, SmallOr(kOneBlockVocab, int64_t{5000})}) {
      const TestTensor logits = Logits(Normal(vocab, 17, 0.0f, 0.1f));
      ExpectReferenceTokens(logits, Filters(0, top_p, 0.0f), 50);
      ExpectReferenceTokens(logits, Filters(2, top_p, 0.0f), 50);
    }
  }
}

TEST_P(SamplerTest, MaskedTokensAreNeverDrawn) {
  std::vector<float> row = Normal(4000, 18);
  for (size_t i = 0; i < row.size(); ++i) {
    if (i % 5 != 3) row[i] = -kInf;
  }
  const TestTensor logits = Logits(row);
  // More asked for than there is, too.
  for (const SamplingParams& sampling :
       {Filters(0, 1.0f, 0.0f), Filters(900, 1.0f, 0.0f),
        Filters(3999, 0.99f, 0.0f), Filters(20, 1.0f, 0.0f),
        Filters(0, 0.9999f, 0.0f), Filters(0, 1.0f, 1e-30f)}) {
    for (int64_t token : ExpectReferenceTokens(logits, sampling, 300)) {
      EXPECT_EQ(token % 5, 3);
    }
  }
}

TEST_P(SamplerTest, ARowWithoutSupportHasNoToken) {
  for (int64_t vocab :
       {int64_t{1}, int64_t{300}, SmallOr(kOneBlockVocab, int64_t{5000})}) {
    const TestTensor logits =
        Logits(std::vector<float>(static_cast<size_t>(vocab), -kInf));
    ExpectNoToken(logits, SampleStatus::kNoSupport);
  }
}

TEST_P(SamplerTest, ANanAnywhereGivesNoToken) {
  for (int64_t at : {0, 255, 256, 1000, 2999}) {
    std::vector<float> row = Normal(3000, 19);
    row[at] = kNan;
    row[(at + 1) % 3000] = kInf;  // NaN counts before infinity
    row[(at + 2) % 3000] = -kInf;
    const TestTensor logits = Logits(row);
    ExpectNoToken(logits, SampleStatus::kNonFinite);
  }
}

TEST_P(SamplerTest, InfinityIsOneHot) {
  std::vector<float> row = Normal(3000, 20);
  row[1500] = row[700] = row[701] = kInf;
  row[3] = -kInf;
  const TestTensor logits = Logits(row);
  for (SamplingParams sampling : ManyFilters()) {
    for (float temperature : {0.0f, 1.0f}) {
      sampling.temperature = temperature;
      const Drawn drawn = DrawMany(logits.view(), sampling, 5);
      EXPECT_EQ(drawn.tokens, std::vector<int64_t>(5, 700));
      EXPECT_EQ(drawn.logprobs, std::vector<double>(5, 0.0));
      EXPECT_EQ(drawn.statuses, std::vector<int64_t>(5, 0));
    }
  }
}

TEST_P(SamplerTest, ExtremeTemperaturesAreSafe) {
  const TestTensor logits = Logits(Normal(700, 21, 0.0f, 30.0f));
  const std::vector<double> x = logits.InitialValues();
  const int64_t best = std::max_element(x.begin(), x.end()) - x.begin();
  for (float temperature : {1e-45f, 1e-38f, 1e-10f, 1e-4f}) {
    for (SamplingParams sampling : ManyFilters()) {
      sampling.temperature = temperature;
      const Drawn drawn = DrawMany(logits.view(), sampling, 3);
      EXPECT_EQ(drawn.tokens, std::vector<int64_t>(3, best));
      EXPECT_EQ(drawn.logprobs, std::vector<double>(3, 0.0));
    }
  }
  for (float temperature : {1e6f, 1e30f, 3e38f}) {
    SamplingParams sampling = Filters(0, 1.0f, 0.0f);
    sampling.temperature = temperature;
    ExpectReferenceTokens(logits, sampling, 40);
    sampling.top_k = 20;
    sampling.min_p = 0.5f;
    ExpectReferenceTokens(logits, sampling, 40);
  }
}

// Parameters that only the host check can reject: any token, but a token.
TEST_P(SamplerTest, InvalidRowParametersStillGiveATokenOfTheRow) {
  const TestTensor logits = Logits(Normal(600, 22));
  for (float bad : {kNan, kInf, -kInf, -1.0f, 2.0f}) {
    for (int field = 0; field < 3; ++field) {
      SamplingParams sampling = Filters(-7, 0.9f, 0.1f);
      (field == 0   ? sampling.temperature
       : field == 1 ? sampling.top_p
                    : sampling.min_p) = bad;
      for (int64_t token : DrawMany(logits.view(), sampling, 10).tokens) {
        EXPECT_TRUE(token >= 0 && token < 600) << token;
      }
    }
  }
}

// A token depends on its own row, parameters, seed and position alone.
TEST_P(SamplerTest, Acceptance29_BatchOrderAndNeighboursDoNotMatter) {
  constexpr int64_t kVocab = 1300;
  std::vector<SamplingParams> sampling = ManyFilters();
  const int64_t rows = static_cast<int64_t>(sampling.size());
  for (int64_t i = 0; i < rows; ++i) {
    sampling[i].seed = 77 + i / 2;
    sampling[i].position = (uint64_t{1} << 33) + i;
    sampling[i].temperature = 0.5f + 0.1f * i;
  }
  const TestTensor logits(device(), dtype(), {rows, kVocab},
                          Normal(rows * kVocab, 23));
  const Drawn all = Draw(logits.view(), sampling);
  EXPECT_EQ(Draw(logits.view(), sampling), all);
  for (int64_t i = 0; i < rows; ++i) {
    const Drawn one = Draw(Rows(logits.view(), i, 1), {sampling[i]});
    EXPECT_EQ(one.tokens[0], all.tokens[i]);
    EXPECT_EQ(one.logprobs[0], all.logprobs[i]);
  }
  // The same row in every place of a batch, among others.
  std::vector<SamplingParams> swapped = sampling;
  std::reverse(swapped.begin(), swapped.end());
  std::vector<float> values(static_cast<size_t>(rows * kVocab));
  const std::vector<double> x = logits.InitialValues();
  for (int64_t i = 0; i < rows * kVocab; ++i) {
    values[i] =
        static_cast<float>(x[(rows - 1 - i / kVocab) * kVocab + i % kVocab]);
  }
  const TestTensor other(device(), dtype(), {rows, kVocab}, values);
  Drawn back = Draw(other.view(), swapped);
  std::reverse(back.tokens.begin(), back.tokens.end());
  std::reverse(back.logprobs.begin(), back.logprobs.end());
  EXPECT_EQ(back, all);
}

TEST_P(SamplerTest, Acceptance29_EveryRowHasItsOwnSeedAndPosition) {
  const int64_t vocab = SmallOr(34000, kQwenVocab);
  const int64_t rows = SmallOr(kOneBlockRows, 64);
  const TestTensor logits =
      Logits(std::vector<float>(vocab, 0.0f));  // all equal
  std::vector<SamplingParams> sampling(rows, Filters(0, 1.0f, 0.0f));
  for (int64_t i = 0; i < rows; ++i) {
    sampling[i].seed = i % 2 == 0 ? 5 : uint64_t{5} << 32;
    sampling[i].position = uint64_t(i / 2) << (i % 4 < 2 ? 0 : 32);
  }
  const Drawn drawn = Draw(Repeat(logits.view(), rows), sampling);
  EXPECT_GE(std::set<int64_t>(drawn.tokens.begin(), drawn.tokens.end()).size(),
            static_cast<size_t>(rows - 1));
  for (int64_t i = 0; i < rows; ++i) {
    // Its place among all: the vocabulary ends inside the last sub-tiles.
    EXPECT_NEAR(DrawOrder(static_cast<int32_t>(drawn.tokens[i]), vocab),
                Uniform(sampling[i]) * static_cast<double>(vocab), 129.0);
  }
}

TEST_P(SamplerTest, TheLargestVocabularyOfEqualLogits) {
  const int32_t vocab = SmallOr(int32_t{kOneBlockVocab}, 1 << 20);
  const TestTensor logits = Logits(std::vector<float>(vocab, 0.0f));
  const auto expect = [&](SamplingParams sampling, int64_t kept) {
    // The first `kept` ids are kept; draw order deals them out.
    std::vector<int32_t> order;
    for (int32_t id = 0; id < kept; ++id) {
      order.push_back(DrawOrder(id, vocab));
    }
    std::sort(order.begin(), order.end());
    for (int64_t token : DrawMany(logits.view(), sampling, 3).tokens) {
      const auto index =
          static_cast<int64_t>(Uniform(sampling) * static_cast<double>(kept));
      EXPECT_EQ(DrawOrder(static_cast<int32_t>(token), vocab), order[index]);
      ++sampling.position;
    }
  };
  expect(Filters(0, 1.0f, 0.0f), vocab);
  expect(Filters(5, 1.0f, 0.0f), 5);
  expect(Filters(vocab / 2, 1.0f, 0.0f), vocab / 2);
  expect(Filters(0, 0.25f, 0.0f), vocab / 4);
  expect(Filters(0, 1.0f, 0.5f), vocab);
}

TEST_P(SamplerTest, StridedAndUnalignedRows) {
  constexpr int64_t kRows = 5;
  for (int64_t vocab : Fewer<int64_t>({100, 1024, SmallOr(3003, 5003)})) {
    for (int64_t padding : Fewer<int64_t>({1, 8, 61})) {
      const std::vector<float> values = Normal(kRows * vocab, 24);
      const TestTensor packed(device(), dtype(), {kRows, vocab}, values);
      const TestTensor strided(device(), dtype(), {kRows, vocab},
                               {vocab + padding, 1}, values);
      for (SamplingParams sampling : ManyFilters()) {
        const std::vector<SamplingParams> all(kRows, sampling);
        EXPECT_EQ(Draw(strided.view(), all), Draw(packed.view(), all));
      }
      EXPECT_EQ(strided.Bytes(), strided.InitialBytes());
    }
  }
  // Columns of a wider matrix: what is beside them must not matter.
  const TestTensor wide(device(), dtype(), {kRows, 700},
                        Normal(kRows * 700, 25, 0.0f, 3.0f));
  const TensorView narrow = Columns(wide.view(), 3, 600);
  std::vector<float> values;
  for (int64_t i = 0; i < kRows * 600; ++i) {
    values.push_back(
        static_cast<float>(wide.InitialValues()[i / 600 * 700 + 3 + i % 600]));
  }
  const TestTensor packed(device(), dtype(), {kRows, 600}, values);
  const std::vector<SamplingParams> all(kRows, Filters(9, 0.9f, 0.0f));
  EXPECT_EQ(Draw(narrow, all), Draw(packed.view(), all));
}

TEST_P(SamplerTest, ZeroRowsIsOk) {
  const TestTensor logits(device(), dtype(), {0, 100});
  TestTensor tokens(device(), DType::kInt32, {0});
  SamplerParams p;
  p.logits = logits.view();
  p.tokens = p.statuses = tokens.view();
  EXPECT_EQ(SamplerWorkspaceBytes(p), 0u);
  EXPECT_TRUE(Sampler(p, stream()).ok());
}

TEST_P(SamplerTest, RejectsBadArguments) {
  const TestTensor logits(device(), dtype(), {4, 64}, Normal(256, 26));
  TestTensor tokens(device(), DType::kInt32, {4});
  TestTensor statuses(device(), DType::kInt32, {4});
  TestTensor logprobs(device(), DType::kFloat32, {4});
  const std::vector<SamplingParams> sampling(4);
  const Buffer params =
      OnDevice(sampling.data(), sampling.size() * sizeof(SamplingParams));
  const std::vector<char> scratch(1 << 16);
  const Buffer workspace = OnDevice(scratch.data(), scratch.size());
  SamplerParams good;
  good.logits = logits.view();
  good.params = static_cast<const SamplingParams*>(params.data());
  good.tokens = tokens.view();
  good.logprobs = logprobs.view();
  good.statuses = statuses.view();
  good.workspace = workspace.data();
  good.workspace_size = SamplerWorkspaceBytes(good);
  ASSERT_LE(good.workspace_size, scratch.size());
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    SamplerParams p = good;
    change(p);
    testing::ExpectInvalid(Sampler(p, stream()), parts);
  };
  expect({"Sampler", "logits is missing"},
         [](SamplerParams& p) { p.logits = TensorView(); });
  expect({"logits", "int32"},
         [](SamplerParams& p) { p.logits.dtype = DType::kInt32; });
  expect({"logits", "stride"},
         [](SamplerParams& p) { p.logits.stride[1] = 2; });
  expect({"vocab", "0"}, [](SamplerParams& p) { p.logits.shape[1] = 0; });
  expect({"vocab", "1048577"}, [](SamplerParams& p) {
    p.logits.shape[1] = p.logits.stride[0] = (1 << 20) + 1;
  });
  expect({"rows", "1048577"},
         [](SamplerParams& p) { p.logits.shape[0] = (1 << 20) + 1; });
  expect({"tokens", "[3]", "[4]"},
         [](SamplerParams& p) { p.tokens.shape[0] = 3; });
  expect({"tokens", "int64"},
         [](SamplerParams& p) { p.tokens.dtype = DType::kInt64; });
  expect({"tokens is missing"},
         [](SamplerParams& p) { p.tokens = TensorView(); });
  expect({"statuses is missing"},
         [](SamplerParams& p) { p.statuses = TensorView(); });
  expect({"statuses", "float32"},
         [](SamplerParams& p) { p.statuses.dtype = DType::kFloat32; });
  expect({"logprobs", "float16"},
         [](SamplerParams& p) { p.logprobs.dtype = DType::kFloat16; });
  expect({"logprobs", "[5]"},
         [](SamplerParams& p) { p.logprobs.shape[0] = 5; });
  expect({"statuses", "cuda:7"}, [](SamplerParams& p) {
    p.statuses.device = {DeviceType::kCuda, 7};
  });
  expect({"tokens overlaps logits"},
         [](SamplerParams& p) { p.tokens.data = p.logits.data; });
  expect({"statuses overlaps tokens"},
         [](SamplerParams& p) { p.statuses.data = p.tokens.data; });
  expect({"logprobs overlaps tokens"},
         [](SamplerParams& p) { p.logprobs.data = p.tokens.data; });
  expect({"statuses overlaps logprobs"},
         [](SamplerParams& p) { p.statuses.data = p.logprobs.data; });
  expect({"tokens overlaps params"}, [](SamplerParams& p) {
    p.tokens.data = const_cast<SamplingParams*>(p.params);
  });
  expect({"params is null"}, [](SamplerParams& p) { p.params = nullptr; });
  expect({"params", "aligned"}, [](SamplerParams& p) {
    p.params = reinterpret_cast<const SamplingParams*>(
        reinterpret_cast<const char*>(p.params) + 4);
  });
  expect({"workspace"}, [](SamplerParams& p) { p.workspace = nullptr; });
  expect({"workspace"}, [](SamplerParams& p) { --p.workspace_size; });
  EXPECT_EQ(tokens.Bytes(), tokens.InitialBytes());
  EXPECT_EQ(statuses.Bytes(), statuses.InitialBytes());
  EXPECT_EQ(logprobs.Bytes(), logprobs.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
