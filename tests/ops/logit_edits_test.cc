#include "ops/sampler/logit_edits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using Source = LogitEdits::Source;

constexpr int64_t kVocab = 700;

LogitEdits Make(const LogitRules& rules, int32_t max_tokens = 400) {
  StatusOr<LogitEdits> edits = LogitEdits::Create(kVocab, max_tokens, rules);
  EXPECT_TRUE(edits.ok()) << edits.status().message();
  return *std::move(edits);
}

void Append(LogitEdits* edits, std::vector<int32_t> tokens, Source source) {
  const Status status =
      edits->Append(tokens.data(), static_cast<int32_t>(tokens.size()), source);
  ASSERT_TRUE(status.ok()) << status.message();
}

// The edits by id, checked to be in draw order and within max_edits.
std::map<int32_t, LogitEdit> Build(LogitEdits* edits,
                                   const SamplingParams& params) {
  std::vector<LogitEdit> out(static_cast<size_t>(edits->max_edits()));
  const int64_t count = edits->Build(params, out.data());
  EXPECT_LE(count, edits->max_edits());
  std::map<int32_t, LogitEdit> by_id;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0) {
      EXPECT_LT(DrawOrder(out[i - 1].id, kVocab), DrawOrder(out[i].id, kVocab));
    }
    by_id[out[i].id] = out[i];
  }
  return by_id;
}

SamplingParams Penalties() {
  SamplingParams params;
  params.repetition_penalty = 1.1f;
  return params;
}

TEST(LogitEditsTest, CountsPromptAndOutputApart) {
  LogitEdits edits = Make({});
  Append(&edits, {5, 600, 5}, Source::kPrompt);
  Append(&edits, {5, 7}, Source::kOutput);
  Append(&edits, {7}, Source::kOutput);
  EXPECT_TRUE(Build(&edits, SamplingParams()).empty());  // no penalties
  const auto by_id = Build(&edits, Penalties());
  ASSERT_EQ(by_id.size(), 3u);
  EXPECT_EQ(by_id.at(5).state, LogitEdit::kInPrompt | 1);
  EXPECT_EQ(by_id.at(600).state, LogitEdit::kInPrompt);
  EXPECT_EQ(by_id.at(7).state, 2u);
}

TEST(LogitEditsTest, CountsAfterAppendingAndTruncatingAreThoseOfTheTokens) {
  LogitEdits edits = Make({});
  std::vector<std::pair<int32_t, Source>> tokens;
  std::mt19937 random(3);
  for (int step = 0; step < 300; ++step) {
    if (random() % 6 == 0) {
      const size_t length = tokens.empty() ? 0 : random() % tokens.size();
      tokens.resize(length);
      edits.Truncate(static_cast<int32_t>(length));
    } else {
      const size_t count = random() % 4 == 0 ? 40 : 1 + random() % 3;
      if (tokens.size() + count > 400) continue;
      const Source source =
          random() % 3 == 0 ? Source::kPrompt : Source::kOutput;
      std::vector<int32_t> more;
      for (size_t i = 0; i < count; ++i) {
        more.push_back(static_cast<int32_t>(random() % kVocab));
        tokens.emplace_back(more.back(), source);
      }
      Append(&edits, more, source);
    }
    std::map<int32_t, uint32_t> expected;
    for (const auto& [id, source] : tokens) {
      uint32_t& state = expected[id];
      state =
          source == Source::kPrompt ? state | LogitEdit::kInPrompt : state + 1;
    }
    const auto by_id = Build(&edits, Penalties());
    ASSERT_EQ(by_id.size(), expected.size());
    for (const auto& [id, state] : expected) {
      ASSERT_EQ(by_id.at(id).state, state);
    }
    ASSERT_EQ(edits.length(), static_cast<int32_t>(tokens.size()));
  }
}

TEST(LogitEditsTest, BadWordsAreNeverCompleted) {
  LogitRules rules;
  rules.bad_words = {{9}, {1, 2, 3}, {2, 4}, {1, 2, 1, 2, 5}};
  LogitEdits edits = Make(rules);
  const auto banned = [&] {
    std::vector<int32_t> ids;
    for (const auto& [id, edit] : Build(&edits, SamplingParams())) {
      if ((edit.state & LogitEdit::kBan) != 0) ids.push_back(id);
    }
    return ids;
  };
  EXPECT_EQ(banned(), (std::vector<int32_t>{9}));
  Append(&edits, {1, 2}, Source::kPrompt);
  EXPECT_EQ(banned(), (std::vector<int32_t>{3, 4, 9}));
  Append(&edits, {1, 2}, Source::kOutput);
  EXPECT_EQ(banned(), (std::vector<int32_t>{3, 4, 5, 9}));
  Append(&edits, {6}, Source::kOutput);
  EXPECT_EQ(banned(), (std::vector<int32_t>{9}));
}

TEST(LogitEditsTest, StopIdsAreBannedUntilThereIsOutputEnough) {
  LogitRules rules;
  rules.stop_ids = {2, 650};
  rules.min_tokens = 2;
  rules.biases = {{650, 1.5f}};
  LogitEdits edits = Make(rules);
  Append(&edits, {2, 3, 4}, Source::kPrompt);
  for (int output = 0; output < 4; ++output) {
    const auto by_id = Build(&edits, SamplingParams());
    const uint32_t ban = output < 2 ? LogitEdit::kBan : 0;
    EXPECT_EQ(by_id.count(2), output < 2 ? 1u : 0u);
    EXPECT_EQ(by_id.at(650).state, ban);
    EXPECT_EQ(by_id.at(650).bias, 1.5f);
    Append(&edits, {3}, Source::kOutput);
  }
  edits.Truncate(4);
  EXPECT_EQ(Build(&edits, SamplingParams()).at(650).state, LogitEdit::kBan);
}

TEST(LogitEditsTest, AllRulesOfAnIdAreOneEdit) {
  LogitRules rules;
  rules.biases = {{10, -2.0f}};
  rules.allowed_ids = {10, 11};
  rules.bad_words = {{10}};
  LogitEdits edits = Make(rules);
  Append(&edits, {10, 12}, Source::kOutput);
  const auto by_id = Build(&edits, Penalties());
  ASSERT_EQ(by_id.size(), 3u);
  EXPECT_EQ(by_id.at(10).state, LogitEdit::kBan | LogitEdit::kAllow | 1);
  EXPECT_EQ(by_id.at(10).bias, -2.0f);
  EXPECT_EQ(by_id.at(11).state, LogitEdit::kAllow);
  EXPECT_EQ(by_id.at(12).state, 1u);
}

// The longest repeat ending at each earlier place, one by one.
std::map<int32_t, int> SlowDry(const std::vector<int32_t>& tokens, int allowed,
                               int range,
                               const std::vector<int32_t>& breakers) {
  const auto breaks = [&](int32_t id) {
    return std::count(breakers.begin(), breakers.end(), id) > 0;
  };
  const int size = static_cast<int>(tokens.size());
  const int first = std::max(0, size - range);
  std::map<int32_t, int> longest;
  for (int end = first + 1; end < size; ++end) {  // repeats end before `end`
    int n = 0;
    while (end - 1 - n >= first &&
           tokens[end - 1 - n] == tokens[size - 1 - n] &&
           !breaks(tokens[size - 1 - n])) {
      ++n;
    }
    if (n < allowed || breaks(tokens[end])) continue;
    longest[tokens[end]] = std::max(longest[tokens[end]], n);
  }
  return longest;
}

TEST(LogitEditsTest, DryPenalisesWhatWouldExtendARepeat) {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    LogitRules rules;
    if (round % 3 == 0) rules.dry_breakers = {0};
    LogitEdits edits = Make(rules);
    std::vector<int32_t> tokens;
    const size_t size = random() % 120;
    for (size_t i = 0; i < size; ++i) {
      tokens.push_back(static_cast<int32_t>(random() % (2 + round % 4)));
    }
    Append(&edits, tokens, Source::kPrompt);
    SamplingParams params;
    params.dry_multiplier = 0.8f;
    params.dry_allowed_length = 1 + round % 5;
    if (round % 2 == 0) params.dry_range = 1 + static_cast<int>(random() % 60);
    const int range = params.dry_range > 0 ? params.dry_range : 1000;
    const auto expected =
        SlowDry(tokens, params.dry_allowed_length, range, rules.dry_breakers);
    const auto by_id = Build(&edits, params);
    ASSERT_EQ(by_id.size(), expected.size()) << round;
    for (const auto& [id, n] : expected) {
      const double penalty =
          0.8f * std::pow(1.75, n - params.dry_allowed_length);
      ASSERT_NEAR(by_id.at(id).offset, -penalty, 1e-5 * penalty) << round;
    }
  }
}

TEST(LogitEditsTest, DryOfEndlessRepeatsStaysFinite) {
  LogitEdits edits = Make({});
  Append(&edits, std::vector<int32_t>(400, 8), Source::kOutput);
  SamplingParams params;
  params.dry_multiplier = 2.0f;
  params.dry_base = 10.0f;
  const auto by_id = Build(&edits, params);
  ASSERT_EQ(by_id.size(), 1u);
  EXPECT_EQ(by_id.at(8).offset, -std::numeric_limits<float>::max());
}

TEST(LogitEditsTest, AForkIsACopy) {
  LogitRules rules;
  rules.bad_words = {{3, 4}};
  LogitEdits one = Make(rules);
  Append(&one, {1, 2, 3}, Source::kPrompt);
  LogitEdits other = Make(rules);
  other = one;
  Append(&one, {5}, Source::kOutput);
  EXPECT_EQ(Build(&other, SamplingParams()).count(4), 1u);
  EXPECT_EQ(Build(&one, SamplingParams()).count(4), 0u);
}

TEST(LogitEditsTest, NeedsEditsOnlyWhereSomethingAsks) {
  EXPECT_FALSE(NeedsLogitEdits(SamplingParams(), {}));
  EXPECT_TRUE(NeedsLogitEdits(Penalties(), {}));
  SamplingParams off;
  off.repetition_penalty = 1.0f;
  EXPECT_FALSE(NeedsLogitEdits(off, {}));
  LogitRules rules;
  rules.stop_ids = {1};
  EXPECT_FALSE(NeedsLogitEdits(off, rules));
  rules.min_tokens = 1;
  EXPECT_TRUE(NeedsLogitEdits(off, rules));
}

TEST(LogitEditsTest, RejectsBadRulesAndTokens) {
  const auto expect = [](std::vector<std::string> parts, auto&& change) {
    LogitRules rules;
    change(rules);
    testing::ExpectInvalid(LogitEdits::Create(kVocab, 10, rules).status(),
                           parts);
  };
  expect({"bad_words", "700"}, [](LogitRules& r) { r.bad_words = {{1, 700}}; });
  expect({"bad word", "no tokens"}, [](LogitRules& r) { r.bad_words = {{}}; });
  expect({"biases", "-1"}, [](LogitRules& r) { r.biases = {{-1, 1.0f}}; });
  expect({"bias", "inf"}, [](LogitRules& r) {
    r.biases = {{1, std::numeric_limits<float>::infinity()}};
  });
  expect({"two biases", "4"}, [](LogitRules& r) {
    r.biases = {{4, 1.0f}, {4, 2.0f}};
  });
  expect({"allowed_ids", "701"}, [](LogitRules& r) { r.allowed_ids = {701}; });
  expect({"stop_ids", "-2"}, [](LogitRules& r) { r.stop_ids = {-2}; });
  expect({"dry_breakers", "900"},
         [](LogitRules& r) { r.dry_breakers = {900}; });
  LogitEdits edits = Make({}, 3);
  const std::vector<int32_t> tokens = {1, 2, 3, 4};
  testing::ExpectInvalid(edits.Append(tokens.data(), 4, Source::kPrompt),
                         {"4 tokens", "max_tokens 3"});
  const int32_t outside = 700;
  testing::ExpectInvalid(edits.Append(&outside, 1, Source::kPrompt),
                         {"token", "700"});
  EXPECT_EQ(edits.length(), 0);
}

}  // namespace
}  // namespace tenon
