#include <limits>

#include "ops/sampler/sampler.h"
#include "tests/ops/sampler_call.h"
#include "tests/testing/random.h"

// Edits, masks and outputs of rows.

namespace tenon {
namespace {

using testing::Filters;
using testing::Normal;
using testing::SamplerCall;
using testing::SamplerResult;
using testing::TestTensor;

constexpr int64_t kVocab = 1000;

class SamplerRowsTest : public testing::SamplerCallTest {
 protected:
  // The distribution that a plain row at temperature 1 has, as the logits that
  // count are these.
  static std::vector<double> Softmax(const std::vector<double>& x) {
    return reference::KeptDistribution(x, {}).probability;
  }
  // Expects the row's probabilities, and its logprobs, to be those of `x`.
  void ExpectDistribution(const SamplerResult& result, int64_t row,
                          const std::vector<double>& x) {
    const std::vector<double> expected = Softmax(x);
    const int64_t vocab = static_cast<int64_t>(x.size());
    for (int64_t id = 0; id < vocab; ++id) {
      const double p = result.probabilities[row * vocab + id];
      if (std::abs(p - expected[id]) > 1e-9 + 2e-6 * expected[id]) {
        ADD_FAILURE() << "probability of " << id << " is " << p << ", expected "
                      << expected[id];
        return;
      }
    }
    const int64_t token = result.tokens[row];
    ASSERT_GE(token, 0);
    EXPECT_NEAR(result.logprobs[row], std::log(expected[token]), 1e-5);
    EXPECT_NEAR(result.processed_logprobs[row], std::log(expected[token]),
                1e-5);
  }
};

std::vector<LogitEdit> SomeEdits() {
  std::vector<LogitEdit> edits;
  for (int32_t id = 3; id < kVocab; id += 7) {
    LogitEdit e;
    e.id = id;
    e.state = static_cast<uint32_t>(id % 4);
    if (id % 3 == 0) e.state |= LogitEdit::kInPrompt;
    if (id % 13 == 0) e.state |= LogitEdit::kBan;
    if (id % 5 == 0) e.bias = 0.25f * static_cast<float>(id % 11) - 1.0f;
    if (id % 17 == 0) e.offset = -1.5f;
    edits.push_back(e);
  }
  return edits;
}

std::vector<double> Edited(std::vector<double> x, const SamplingParams& s,
                           const std::vector<LogitEdit>& edits) {
  for (const LogitEdit& e : edits) {
    reference::Penalties p;
    p.masked = (e.state & LogitEdit::kBan) != 0;
    p.bias = e.bias;
    p.count = e.state & LogitEdit::kCountMask;
    const bool occurred = p.count > 0 || (e.state & LogitEdit::kInPrompt) != 0;
    if (occurred && s.repetition_penalty > 0) {
      p.repetition = s.repetition_penalty;
    }
    p.frequency = s.frequency_penalty;
    p.presence = s.presence_penalty;
    p.offset = e.offset;
    x[e.id] = reference::Penalize(x[e.id], p);
  }
  return x;
}

TEST_P(SamplerRowsTest, EditsArePenaltiesBiasesAndBans) {
  const TestTensor logits = Logits(Normal(kVocab, 1, 0.5f, 2.0f));
  std::vector<SamplingParams> params(4);
  params[1].repetition_penalty = 1.3f;
  params[2].frequency_penalty = 0.4f;
  params[2].presence_penalty = -0.7f;
  params[3].repetition_penalty = 0.8f;
  params[3].frequency_penalty = 0.1f;
  params[3].presence_penalty = 0.2f;
  SamplerCall call = CallOf(logits.view(), params);
  std::vector<LogitEdit> edits = SomeEdits();
  SortEdits(&edits, kVocab);
  call.edits.assign(4, edits);
  call.edits[0].resize(edits.size() / 3);  // of the first sub-tiles alone
  call.edits[3].erase(call.edits[3].begin(), call.edits[3].end() - 50);
  call.with_probabilities = true;
  const SamplerResult result = Run(call);
  for (int row = 0; row < 4; ++row) {
    SCOPED_TRACE(row);
    ExpectDistribution(
        result, row,
        Edited(logits.InitialValues(), params[row], call.edits[row]));
    EXPECT_NEAR(result.raw_logprobs[row],
                std::log(Softmax(logits.InitialValues())[result.tokens[row]]),
                1e-5);
  }
  EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
}

// x > 0 is divided, x < 0 multiplied; the bias comes first.
TEST_P(SamplerRowsTest, RepetitionPenaltyGoesBySignAfterTheBias) {
  const TestTensor logits = Logits({2.0f, -2.0f, 1.0f, 0.0f});
  SamplingParams s;
  s.repetition_penalty = 2.0f;
  SamplerCall call = CallOf(logits.view(), {s});
  call.edits = {{{0, LogitEdit::kInPrompt, 0, 0},
                 {1, 1, 0, 0},
                 {2, LogitEdit::kInPrompt, -3.0f, 0}}};
  call.with_probabilities = true;
  ExpectDistribution(Run(call), 0, {1.0, -4.0, -4.0, 0.0});
}

TEST_P(SamplerRowsTest, OnlyAllowedIdsAreDrawn) {
  const TestTensor logits = Logits(Normal(kVocab, 2));
  SamplingParams s;
  s.flags = kOnlyAllowed;
  s.repetition_penalty = 1.5f;
  SamplerCall call = CallOf(logits.view(), {s, s, s});
  std::vector<LogitEdit> edits = {{5, LogitEdit::kAllow, 0, 0},
                                  {6, 1, 0, 0},
                                  {999, LogitEdit::kAllow | 2, 0.5f, 0},
                                  {700, LogitEdit::kAllow, 0, 0}};
  SortEdits(&edits, kVocab);
  call.edits = {edits, {}, {{8, LogitEdit::kAllow, 0, 0}}};
  call.with_probabilities = true;
  const SamplerResult result = Run(call);
  std::vector<double> x(kVocab, -kInf);
  const std::vector<double> all = logits.InitialValues();
  x[5] = all[5];
  x[700] = all[700];
  x[999] = reference::Penalize(all[999], {false, 0.5, 1.5});
  ExpectDistribution(result, 0, x);
  EXPECT_EQ(result.tokens[1], -1);
  EXPECT_EQ(result.statuses[1], static_cast<int>(SampleStatus::kNoSupport));
  EXPECT_EQ(result.tokens[2], 8);
  EXPECT_EQ(result.processed_logprobs[2], 0.0);
}

TEST_P(SamplerRowsTest, OnlyAllowedIdsWithoutEditsAreNone) {
  const TestTensor logits = Logits(Normal(kVocab, 3));
  SamplingParams s;
  s.flags = kOnlyAllowed;
  const SamplerResult result =
      Run(CallOf(logits.view(), {s, SamplingParams()}));
  EXPECT_EQ(result.tokens[0], -1);
  EXPECT_EQ(result.statuses[0], static_cast<int>(SampleStatus::kNoSupport));
  EXPECT_EQ(result.statuses[1], static_cast<int>(SampleStatus::kOk));
}

TEST_P(SamplerRowsTest, BitmaskIsXGrammarsAndPerRow) {
  for (int64_t vocab : {31, 32, 33, 1000}) {
    SCOPED_TRACE(vocab);
    const TestTensor logits =
        Logits(Normal(vocab, static_cast<uint64_t>(vocab)));
    SamplingParams s;
    s.flags = kUseBitmask;
    SamplerCall call = CallOf(logits.view(), {s, SamplingParams(), s});
    call.bitmask_words = (vocab + 31) / 32 + 2;
    call.bitmask.assign(3 * call.bitmask_words, 0);
    std::vector<double> x = logits.InitialValues();
    const std::vector<double> all = x;
    for (int64_t id = 0; id < vocab; ++id) {
      if (id % 3 == 0 || id == vocab - 1) {
        call.bitmask[id / 32] |= 1u << (id % 32);
      } else {
        x[id] = -kInf;
      }
    }
    call.with_probabilities = true;
    const SamplerResult result = Run(call);
    ExpectDistribution(result, 0, x);
    ExpectDistribution(result, 1, all);  // its words are 0 but not used
    EXPECT_EQ(result.tokens[2], -1);
    EXPECT_EQ(result.statuses[2], static_cast<int>(SampleStatus::kNoSupport));
  }
}

// Masks hide whatever the logit is; raw logprobs do not look away.
TEST_P(SamplerRowsTest, MaskedNansAndInfinitiesDoNotCount) {
  std::vector<float> row = Normal(kVocab, 4);
  row[100] = kNan;
  row[200] = kInf;
  const TestTensor logits = Logits(row);
  SamplingParams s;
  s.flags = kUseBitmask;
  SamplerCall call = CallOf(logits.view(), {s});
  call.bitmask_words = (kVocab + 31) / 32;
  call.bitmask.assign(call.bitmask_words, ~0u);
  call.bitmask[100 / 32] &= ~(1u << (100 % 32));
  call.edits = {{{200, LogitEdit::kBan, 0, 0}}};
  const SamplerResult result = Run(call);
  EXPECT_EQ(result.statuses[0], 0);
  EXPECT_GE(result.tokens[0], 0);
  EXPECT_TRUE(std::isnan(result.raw_logprobs[0]));
}

TEST_P(SamplerRowsTest, IdsPastTheValidVocabularyDoNotExist) {
  constexpr int64_t kValid = 937;
  std::vector<float> row = Normal(kVocab, 5);
  std::vector<float> padded = row;
  for (int64_t i = kValid; i < kVocab; ++i) padded[i] = i % 2 ? kNan : 1e30f;
  const TestTensor logits = Logits(padded);
  row.resize(kValid);
  const TestTensor exact = Logits(row);
  for (SamplingParams s : {Filters(0, 1.0f, 0.0f), Filters(50, 0.9f, 0.0f),
                           Filters(0, 0.99f, 0.0f), Filters(936, 1.0f, 0.0f)}) {
    for (float temperature : {0.0f, 1.0f}) {
      s.temperature = temperature;
      SamplerCall call = CallOf(logits.view(), std::vector(20, s));
      for (int i = 0; i < 20; ++i) call.params[i].position = i;
      call.valid_vocab = kValid;
      call.num_top = 20;
      for (auto& p : call.params) p.num_top_logprobs = 20;
      call.with_probabilities = true;
      SamplerCall plain = call;
      plain.logits = Repeat(exact.view(), 20);
      plain.valid_vocab = 0;
      EXPECT_TRUE(Run(call) == Run(plain));
    }
  }
}

TEST_P(SamplerRowsTest, TopLogprobsOfEveryKind) {
  std::vector<float> row = Normal(kVocab, 6, 0.0f, 2.0f);
  row[40] = row[41] = row[900] = 7.0f;  // ties go by id
  const TestTensor logits = Logits(row);
  std::vector<LogitEdit> edits = SomeEdits();
  SortEdits(&edits, kVocab);
  SamplingParams s = Filters(6, 1.0f, 0.0f);
  s.temperature = 0.7f;
  s.num_top_logprobs = 9;
  SamplingParams greedy = s;
  greedy.temperature = 0.0f;
  SamplingParams none = s;
  none.num_top_logprobs = 0;
  const std::vector<double> raw = logits.InitialValues();
  const std::vector<double> x = Edited(raw, s, edits);
  for (LogprobKind kind :
       {LogprobKind::kUnfiltered, LogprobKind::kRaw, LogprobKind::kProcessed}) {
    SCOPED_TRACE(static_cast<int>(kind));
    SamplerCall call = CallOf(logits.view(), {s, greedy, none});
    call.edits.assign(3, edits);
    call.num_top = 12;
    call.top_kind = kind;
    const SamplerResult result = Run(call);
    for (int r = 0; r < 3; ++r) {
      reference::Sampling sampling;
      if (kind != LogprobKind::kRaw && r == 0) sampling.temperature = 0.7;
      if (kind == LogprobKind::kProcessed) sampling.top_k = r == 0 ? 6 : 1;
      const std::vector<double>& from = kind == LogprobKind::kRaw ? raw : x;
      const reference::Distribution d =
          reference::KeptDistribution(from, sampling);
      const std::vector<int64_t> ranked = reference::RankTokens(from);
      int64_t listed = r == 2 ? 0 : 9;
      if (kind == LogprobKind::kProcessed && r < 2) listed = r == 0 ? 6 : 1;
      for (int i = 0; i < 12; ++i) {
        const int64_t token = result.top_tokens[r * 12 + i];
        const double logprob = result.top_logprobs[r * 12 + i];
        if (i >= listed) {
          EXPECT_EQ(token, -1);
          EXPECT_TRUE(std::isnan(logprob));
          continue;
        }
        EXPECT_EQ(token, ranked[i]) << r << " " << i;
        EXPECT_NEAR(logprob, std::log(d.probability[ranked[i]]), 1e-5);
      }
    }
  }
}

// However a row is drawn, its raw top tokens are of the logits as they are.
TEST_P(SamplerRowsTest, RawTopTokensListAnInfinityThatIsBanned) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr int32_t kBanned = 123;
  std::vector<float> row = Normal(kVocab, 11, 0.0f, 1.0f);
  row[kBanned] = std::numeric_limits<float>::infinity();
  const TestTensor logits = Logits(row);
  SamplingParams plain;
  plain.num_top_logprobs = 3;
  SamplingParams few = plain;
  few.top_k = 6;
  SamplingParams many = plain;
  many.typical_p = 0.9f;
  SamplerCall call = CallOf(logits.view(), {plain, few, many});
  LogitEdit ban;
  ban.id = kBanned;
  ban.state = LogitEdit::kBan;
  call.edits.assign(3, {ban});
  call.num_top = 3;
  call.top_kind = LogprobKind::kRaw;
  const SamplerResult result = Run(call);
  for (int r = 0; r < 3; ++r) {
    SCOPED_TRACE(r);
    EXPECT_GE(result.tokens[r], 0);
    EXPECT_NE(result.tokens[r], kBanned);
    EXPECT_EQ(result.raw_logprobs[r], -kInf);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(result.top_tokens[3 * r + i], i == 0 ? kBanned : -1);
    }
    EXPECT_EQ(result.top_logprobs[3 * r], 0.0);
    EXPECT_TRUE(std::isnan(result.top_logprobs[3 * r + 1]));
  }
}

TEST_P(SamplerRowsTest, DraftsAndTargetsAreIndependentDraws) {
  const TestTensor logits = Logits(std::vector<float>(kVocab, 0.0f));
  std::vector<SamplingParams> params(testing::SmallOr(500, 3000));
  for (size_t i = 0; i < params.size(); ++i) params[i].position = i;
  SamplerCall call = CallOf(logits.view(), params);
  const std::vector<int64_t> target = Run(call).tokens;
  call.stream = RandomStream::kDraft;
  const std::vector<int64_t> draft = Run(call).tokens;
  int equal = 0;
  for (size_t i = 0; i < params.size(); ++i) equal += target[i] == draft[i];
  EXPECT_LT(equal, 14);  // 3 expected
}

// Many logits at once are read in another way.
TEST_P(SamplerRowsTest, ManyRowsDrawWhatFewDo) {
  constexpr int64_t kLogits = int64_t{4} << 20;
  const int64_t pieces = testing::SmallOr(2, int64_t{3});
  for (int64_t vocab : testing::Fewer<int64_t>({30011, 5001, 331}, 1)) {
    SCOPED_TRACE(vocab);
    const TestTensor logits = Logits(Normal(vocab, 12, 0.0f, 3.0f));
    const int64_t rows = (kLogits / vocab / pieces + 1) * pieces;
    std::vector<SamplingParams> params(rows);
    for (int64_t i = 0; i < rows; ++i) {
      SamplingParams& s = params[i];
      s.position = static_cast<uint64_t>(i);
      if (i % 5 == 0) s.temperature = 0.0f;
      if (i % 5 == 1) s.top_k = 20;
      if (i % 5 == 2) s.top_p = 0.6f;
      if (i % 5 == 3) s.top_n_sigma = 1.5f;
    }
    testing::Drawn all;
    for (auto begin = params.begin(); begin != params.end();
         begin += rows / pieces) {
      const testing::Drawn piece = Draw(Repeat(logits.view(), rows / pieces),
                                        {begin, begin + rows / pieces});
      all.tokens.insert(all.tokens.end(), piece.tokens.begin(),
                        piece.tokens.end());
      all.logprobs.insert(all.logprobs.end(), piece.logprobs.begin(),
                          piece.logprobs.end());
      all.statuses.insert(all.statuses.end(), piece.statuses.begin(),
                          piece.statuses.end());
    }
    EXPECT_TRUE(Draw(Repeat(logits.view(), rows), params) == all);
  }
}

// On CUDA few rows are shared by the blocks of a cluster, of which some have
// one sub-tile more than others, and many have a block each.
TEST_P(SamplerRowsTest, RowsInUnevenSharesDrawWhatRowsOfABlockDo) {
  if (testing::SmallTests()) GTEST_SKIP() << "clusters are not for small tests";
  struct Size {
    int64_t vocab;
    int64_t rows;
  };
  for (const Size size : {Size{65600, 1}, Size{33000, 17}, Size{16500, 34}}) {
    SCOPED_TRACE(size.vocab);
    const TestTensor logits = Logits(Normal(size.vocab, 13));
    std::vector<SamplingParams> params(70);
    for (size_t i = 0; i < params.size(); ++i) {
      params[i].position = i;
      params[i].top_p = 0.9f;
    }
    const testing::Drawn all = Draw(
        Repeat(logits.view(), static_cast<int64_t>(params.size())), params);
    params.resize(static_cast<size_t>(size.rows));
    const testing::Drawn few = Draw(Repeat(logits.view(), size.rows), params);
    for (int64_t i = 0; i < size.rows; ++i) {
      EXPECT_EQ(few.tokens[i], all.tokens[i]) << "row " << i;
      EXPECT_EQ(few.statuses[i], all.statuses[i]) << "row " << i;
    }
  }
}

// Rows of every kind at once, in any order and number, give what each gives
// alone.
TEST_P(SamplerRowsTest, AnyMixInOneBatchGivesWhatEachRowGivesAlone) {
  constexpr int64_t kRows = 48;
  const TestTensor logits(device(), dtype(), {kRows, kVocab},
                          Normal(kRows * kVocab, 7, 0.0f, 3.0f));
  SamplerCall all;
  all.logits = logits.view();
  all.bitmask_words = (kVocab + 31) / 32;
  all.num_top = 4;
  all.with_probabilities = true;
  for (int64_t i = 0; i < kRows; ++i) {
    SamplingParams s;
    s.seed = 100 + i;
    s.position = uint64_t{1} << (i % 40);
    s.temperature = i % 5 == 0 ? 0.0f : 0.4f + 0.1f * (i % 9);
    s.filter_order = static_cast<FilterOrder>(i % 3);
    if (i % 2) s.top_k = static_cast<int32_t>(3 + 11 * i);
    if (i % 3 == 1) s.top_p = 0.9f;
    if (i % 4 == 1) s.min_p = 0.02f;
    if (i % 7 == 2) s.typical_p = 0.8f;
    if (i % 6 == 3) s.top_n_sigma = 1.2f;
    if (i % 8 == 4) s.xtc_probability = 0.5f, s.xtc_threshold = 0.1f;
    if (i % 9 == 5) s.mirostat_tau = 3.0f, s.mirostat_eta = 0.2f;
    if (i % 3 == 2) s.repetition_penalty = 1.2f;
    if (i % 4 == 2) s.flags = kUseBitmask;
    s.num_top_logprobs = static_cast<int32_t>(i % 5);
    all.params.push_back(s);
    std::vector<LogitEdit> edits;
    if (i % 3 == 2) edits = SomeEdits();
    SortEdits(&edits, kVocab);
    all.edits.push_back(edits);
    for (int64_t w = 0; w < all.bitmask_words; ++w) {
      all.bitmask.push_back(0x9e3779b9u * static_cast<uint32_t>(i * 37 + w));
    }
    all.mirostat_mu.push_back(6.0f);
  }
  const SamplerResult together = Run(all);
  EXPECT_TRUE(Run(all) == together) << "the same call twice";
  const auto part = [&](const auto& v, int64_t i, int64_t size) {
    return std::decay_t<decltype(v)>(v.begin() + i * size,
                                     v.begin() + (i + 1) * size);
  };
  for (int64_t i = kRows - 1; i >= 0; --i) {
    SamplerCall one = all;
    one.logits = Rows(logits.view(), i, 1);
    one.params = {all.params[i]};
    one.edits = {all.edits[i]};
    one.bitmask = part(all.bitmask, i, all.bitmask_words);
    one.mirostat_mu = {6.0f};
    const SamplerResult alone = Run(one);
    const SamplerResult expected = {part(together.tokens, i, 1),
                                    part(together.statuses, i, 1),
                                    part(together.logprobs, i, 1),
                                    part(together.raw_logprobs, i, 1),
                                    part(together.processed_logprobs, i, 1),
                                    part(together.top_tokens, i, 4),
                                    part(together.top_logprobs, i, 4),
                                    part(together.probabilities, i, kVocab),
                                    part(together.mirostat_mu, i, 1)};
    EXPECT_TRUE(alone == expected) << "row " << i;
    // Strict: the bits of the CPU, whatever the device.
    if (device().type == DeviceType::kCuda) {
      const TestTensor host(Device(), dtype(), {1, kVocab}, [&] {
        const std::vector<double> x = logits.InitialValues();
        return std::vector<float>(x.begin() + i * kVocab,
                                  x.begin() + (i + 1) * kVocab);
      }());
      one.logits = host.view();
      EXPECT_TRUE(RunOn(one, Device()) == expected) << "row " << i;
    }
  }
}

// Batches of 1 to 512 rows, one row in every place.
TEST_P(SamplerRowsTest, TokensDoNotDependOnBatchSizeOrPlace) {
  const TestTensor logits = Logits(Normal(3000, 8, 0.0f, 1.5f));
  for (SamplingParams s : {Filters(0, 1.0f, 0.0f), Filters(40, 0.9f, 0.01f),
                           Filters(0, 0.8f, 0.0f)}) {
    const int64_t token = Run(CallOf(logits.view(), {s})).tokens[0];
    for (size_t rows : testing::Fewer<size_t>({2, 7, 16, 17, 64, 512}, 3)) {
      const SamplerResult result =
          Run(CallOf(logits.view(), std::vector<SamplingParams>(rows, s)));
      EXPECT_EQ(result.tokens, std::vector<int64_t>(rows, token)) << rows;
    }
  }
}

// Bad device data: a token of the row or none, and no stray access.
TEST_P(SamplerRowsTest, BadEditsAndOffsetsAreHarmless) {
  const TestTensor logits = Logits(Normal(kVocab, 9));
  SamplerCall call = CallOf(logits.view(), std::vector<SamplingParams>(2));
  call.edits = {{{-5, LogitEdit::kBan, 0, 0},
                 {std::numeric_limits<int32_t>::max(), 1, kNan, 0},
                 {3, LogitEdit::kCountMask, 1.0f, 0},
                 {2, 0, 0, -kInf}},
                {}};
  for (int64_t token : Run(call).tokens) {
    EXPECT_GE(token, -1);
    EXPECT_LT(token, kVocab);
  }
}

TEST_P(SamplerRowsTest, RejectsBadArguments) {
  const TestTensor logits(device(), dtype(), {4, 64}, Normal(256, 26));
  const TestTensor ints(device(), DType::kInt32, {4});
  const TestTensor more_ints(device(), DType::kInt32, {4});
  const TestTensor floats(device(), DType::kFloat32, {4});
  const TestTensor offsets =
      TestTensor::FromIntegers(device(), DType::kInt32, {5}, {0, 0, 0, 0, 0});
  const TestTensor mask(device(), DType::kInt32, {4, 2});
  const TestTensor top(device(), DType::kInt32, {4, 3});
  const TestTensor top_values(device(), DType::kFloat32, {4, 3});
  const TestTensor wide(device(), DType::kFloat32, {4, 64});
  const std::vector<char> bytes(1 << 17);
  const Buffer memory = OnDevice(bytes.data(), bytes.size());
  SamplerParams good;
  good.logits = logits.view();
  good.params = static_cast<const SamplingParams*>(memory.data());
  good.tokens = ints.view();
  good.statuses = more_ints.view();
  good.workspace = static_cast<char*>(memory.data()) + (1 << 16);
  good.workspace_size = 1 << 16;
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    SamplerParams p = good;
    change(p);
    testing::ExpectInvalid(Sampler(p, stream()), parts);
  };
  expect({"valid_vocab", "65"}, [](SamplerParams& p) { p.valid_vocab = 65; });
  expect({"valid_vocab", "-1"}, [](SamplerParams& p) { p.valid_vocab = -1; });
  expect({"stream", "3"},
         [](SamplerParams& p) { p.stream = RandomStream::kResidual; });
  expect({"edits", "without edit_offsets"}, [&](SamplerParams& p) {
    p.edits = static_cast<const LogitEdit*>(memory.data());
  });
  expect({"edit_offsets", "without edits"},
         [&](SamplerParams& p) { p.edit_offsets = offsets.view(); });
  expect({"edit_offsets", "[4]", "[5]"}, [&](SamplerParams& p) {
    p.edits = static_cast<const LogitEdit*>(memory.data());
    p.edit_offsets = offsets.view();
    p.edit_offsets.shape[0] = 4;
  });
  expect({"num_edits", "-1"}, [&](SamplerParams& p) {
    p.edits = static_cast<const LogitEdit*>(memory.data());
    p.edit_offsets = offsets.view();
    p.num_edits = -1;
  });
  expect({"edits", "aligned to 16"}, [&](SamplerParams& p) {
    p.edits = reinterpret_cast<const LogitEdit*>(
        static_cast<const char*>(memory.data()) + 8);
    p.edit_offsets = offsets.view();
  });
  expect({"bitmask", "1", "2"}, [&](SamplerParams& p) {
    p.bitmask = mask.view();
    p.bitmask.shape[1] = 1;
  });
  expect({"bitmask", "[3, "}, [&](SamplerParams& p) {
    p.bitmask = mask.view();
    p.bitmask.shape[0] = 3;
  });
  expect({"random_bits", "int32"},
         [&](SamplerParams& p) { p.random_bits = offsets.view(); });
  expect({"mirostat_mu", "int32"},
         [&](SamplerParams& p) { p.mirostat_mu = ints.view(); });
  expect({"mirostat_places", "without mirostat_mu"},
         [&](SamplerParams& p) { p.mirostat_places = offsets.view(); });
  expect({"mirostat_places"}, [&](SamplerParams& p) {
    p.mirostat_mu = floats.view();
    p.mirostat_places = offsets.view();
  });
  expect({"raw_logprobs", "int32"},
         [&](SamplerParams& p) { p.raw_logprobs = ints.view(); });
  expect({"processed_logprobs", "[3]"}, [&](SamplerParams& p) {
    p.processed_logprobs = floats.view();
    p.processed_logprobs.shape[0] = 3;
  });
  expect({"top_tokens", "without top_logprobs"},
         [&](SamplerParams& p) { p.top_tokens = top.view(); });
  expect({"top_logprobs", "[4, 2]", "[4, 3]"}, [&](SamplerParams& p) {
    p.top_tokens = top.view();
    p.top_logprobs = top_values.view();
    p.top_logprobs.shape[1] = 2;
  });
  expect({"top_tokens", "21", "20"}, [&](SamplerParams& p) {
    p.top_tokens = wide.view();
    p.top_tokens.dtype = DType::kInt32;
    p.top_tokens.shape[1] = 21;
    p.top_logprobs = top_values.view();
  });
  expect({"top_logprobs_kind", "3"}, [&](SamplerParams& p) {
    p.top_tokens = top.view();
    p.top_logprobs = top_values.view();
    p.top_logprobs_kind = static_cast<LogprobKind>(3);
  });
  expect({"probabilities", "[4, 3]", "[4, 64]"},
         [&](SamplerParams& p) { p.probabilities = top_values.view(); });
  expect({"tokens overlaps mirostat_mu"}, [&](SamplerParams& p) {
    p.mirostat_mu = floats.view();
    p.mirostat_mu.data = p.tokens.data;
  });
  expect({"raw_logprobs overlaps logits"}, [&](SamplerParams& p) {
    p.raw_logprobs = floats.view();
    p.raw_logprobs.data = p.logits.data;
  });
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerRowsTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
