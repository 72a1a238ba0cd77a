// What rows of a step are sampled with: edits, masks, and the best tokens.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/session.h"
#include "ops/sampler/logit_edits.h"
#include "tests/engine/session_fixture.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

class SessionSamplingTest : public testing::SessionTestBase {
 protected:
  static constexpr int32_t kWords = (kVocab + 31) / 32;

  void SetUp() override {
    SessionTestBase::SetUp();
    options_.max_sequences = 5;
    options_.max_tokens = 48;
    options_.max_context = 64;
    options_.batch_invariant = true;
    options_.num_threads = 2;
    options_.max_logit_edits = 300;
    options_.logit_bitmasks = true;
    options_.max_top_logprobs = 5;
  }

  void CreateSession() {
    session_ = SessionWith(options_);
    ASSERT_NE(session_, nullptr);
  }

  StepRow NewRow() {
    StatusOr<SequenceId> sequence = session_->CreateSequence();
    EXPECT_TRUE(sequence.ok());
    return Row(*sequence, prompt_);
  }

  std::vector<StepRowResult> Step(const std::vector<StepRow>& rows) {
    std::vector<StepRowResult> results;
    const Status status = session_->Step(rows, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
  }

  SessionOptions options_;
  std::unique_ptr<Session> session_;
  std::vector<int32_t> prompt_ = {5, 77, 12, 100, 3};
};

TEST_P(SessionSamplingTest, EveryRowHasItsEditsItsMaskAndItsTopTokens) {
  CreateSession();
  StepRow plain = NewRow();
  plain.sampling.num_top_logprobs = 5;
  std::vector<float> logits(kVocab);
  plain.logits = logits.data();
  plain.logits_mode = LogitsMode::kLast;
  StepRow banned = NewRow();
  StepRow masked = NewRow();
  StepRow quiet = NewRow();
  quiet.sample = false;
  const std::vector<StepRowResult> first = Step({plain});
  ASSERT_EQ(first[0].num_top, 5);
  std::vector<int32_t> ranked(kVocab);
  for (int32_t i = 0; i < kVocab; ++i) ranked[i] = i;
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  double sum = 0.0;
  for (float x : logits) sum += std::exp(double{x} - logits[ranked[0]]);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(first[0].top_tokens[i], ranked[i]);
    EXPECT_NEAR(first[0].top_logprobs[i],
                logits[ranked[i]] - logits[ranked[0]] - std::log(sum), 1e-5);
  }

  // The same prompt: ban the two best, allow just one token.
  std::vector<LogitEdit> edits = {{ranked[0], LogitEdit::kBan, 0, 0},
                                  {ranked[1], 0, -1e30f, 0}};
  std::sort(edits.begin(), edits.end(), [](const auto& a, const auto& b) {
    return DrawOrder(a.id, kVocab) < DrawOrder(b.id, kVocab);
  });
  banned.edits = edits.data();
  banned.num_edits = 2;
  std::vector<uint32_t> bitmask(kWords);
  bitmask[99 / 32] = 1u << (99 % 32);
  masked.bitmask = bitmask.data();
  const StepRow again = NewRow();
  const std::vector<StepRowResult> mixed = Step({quiet, banned, masked});
  EXPECT_EQ(mixed[1].token, ranked[2]);
  EXPECT_EQ(mixed[1].num_top, 0);
  EXPECT_EQ(mixed[2].token, 99);
  EXPECT_EQ(mixed[2].logprob, 0.0f);
  // Edits and masks are of one step alone.
  EXPECT_EQ(Step({again})[0].token, ranked[0]);
}

// Decode steps have padding and places that stay: as above, for one token each.
TEST_P(SessionSamplingTest, DecodeStepsHaveThemToo) {
  CreateSession();
  std::vector<StepRow> rows = {NewRow(), NewRow(), NewRow()};
  const int32_t token = Step(rows)[0].token;
  for (StepRow& row : rows) {
    row.tokens = &token;
    row.num_tokens = 1;
  }
  std::vector<StepRow> other = rows;
  for (size_t i = 0; i < rows.size(); ++i) {
    StatusOr<SequenceId> fork = session_->ForkSequence(rows[i].sequence);
    ASSERT_TRUE(fork.ok());
    other[i].sequence = *fork;
    if (i == 1) break;  // five sequences fit
  }
  const int32_t best = Step({rows[0], rows[1], rows[2]})[2].token;
  const LogitEdit ban = {best, LogitEdit::kBan, 0, 0};
  other[0].edits = &ban;
  other[0].num_edits = 1;
  EXPECT_NE(Step({other[0]})[0].token, best);
}

TEST_P(SessionSamplingTest, LogitEditsKeepASequenceFromRepeating) {
  CreateSession();
  StepRow row = NewRow();
  row.sampling.frequency_penalty = 1e6f;
  StatusOr<LogitEdits> history = LogitEdits::Create(kVocab, 64, {});
  ASSERT_TRUE(history.ok());
  ASSERT_TRUE(history
                  ->Append(prompt_.data(), static_cast<int32_t>(prompt_.size()),
                           LogitEdits::Source::kPrompt)
                  .ok());
  std::vector<LogitEdit> edits(static_cast<size_t>(history->max_edits()));
  std::vector<int32_t> tokens;
  for (int i = 0; i < 30; ++i) {
    row.edits = edits.data();
    row.num_edits =
        static_cast<int32_t>(history->Build(row.sampling, edits.data()));
    const int32_t token = Step({row})[0].token;
    EXPECT_EQ(std::count(tokens.begin(), tokens.end(), token), 0);
    tokens.push_back(token);
    row.tokens = &tokens.back();
    row.num_tokens = 1;
    ASSERT_TRUE(
        history->Append(row.tokens, 1, LogitEdits::Source::kOutput).ok());
    tokens.reserve(31);
    row.tokens = &tokens.back();
  }
}

TEST_P(SessionSamplingTest, RejectsWhatItCannotDo) {
  CreateSession();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    StepRow row = NewRow();
    change(row);
    std::vector<StepRowResult> results;
    testing::ExpectInvalid(session_->Step({row}, &results), parts);
    EXPECT_TRUE(session_->ReleaseSequence(row.sequence).ok());
  };
  expect({"rows[0]", "mirostat_tau"},
         [](StepRow& r) { r.sampling.mirostat_tau = 3.0f; });
  // Never without effect.
  expect({"penalties", "edits"},
         [](StepRow& r) { r.sampling.repetition_penalty = 1.1f; });
  expect({"edits"}, [](StepRow& r) { r.sampling.presence_penalty = -0.1f; });
  expect({"DRY", "edits"},
         [](StepRow& r) { r.sampling.dry_multiplier = 0.8f; });
  expect({"bitmask is null"},
         [](StepRow& r) { r.sampling.flags = kUseBitmask; });
  expect({"num_edits", "3", "null"}, [](StepRow& r) { r.num_edits = 3; });
  expect({"num_top_logprobs", "6", "5"},
         [](StepRow& r) { r.sampling.num_top_logprobs = 6; });
  const std::vector<LogitEdit> many(301);
  StepRow row = NewRow();
  row.edits = many.data();
  row.num_edits = 301;
  std::vector<StepRowResult> results;
  const Status status = session_->Step({row}, &results);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(status.message()).find("max_logit_edits 300"),
            std::string::npos);

  options_.logit_bitmasks = false;
  CreateSession();
  const std::vector<uint32_t> bitmask(kWords);
  expect({"bitmask", "logit_bitmasks"},
         [&](StepRow& r) { r.bitmask = bitmask.data(); });
  options_.max_top_logprobs = 21;
  testing::ExpectInvalid(Session::Create(model_, options_).status(),
                         {"max_top_logprobs", "21"});
}

INSTANTIATE_TEST_SUITE_P(Devices, SessionSamplingTest,
                         testing::SessionDevices(), testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
