// What rows of a step are sampled with: edits, masks, and the best tokens.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
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

// They come back from those steps alone that have a row that asks: each step in
// flight has its own, and those of an earlier one are nobody's.
TEST_P(SessionSamplingTest, EveryStepInFlightHasItsTopTokens) {
  CreateSession();
  const std::vector<std::pair<int32_t, int32_t>> asked = {
      {5, 0}, {0, 0}, {0, 3}, {0, 0}, {0, 0}, {2, 1}, {4, 4}, {0, 0}};
  const auto rows_of = [&](StepRow a, StepRow b, size_t step) {
    for (StepRow* row : {&a, &b}) {
      row->continues = step > 0;
      if (step == 0) continue;
      row->tokens = nullptr;
      row->num_tokens = 1;
    }
    a.sampling.num_top_logprobs = asked[step].first;
    b.sampling.num_top_logprobs = asked[step].second;
    return std::vector<StepRow>{a, b};
  };
  const StepRow a = NewRow(), b = NewRow();
  std::vector<std::vector<StepRowResult>> expected;
  for (size_t step = 0; step < asked.size(); ++step) {
    expected.push_back(Step(rows_of(a, b, step)));
  }
  const StepRow c = NewRow(), d = NewRow();
  ASSERT_TRUE(session_->EnqueueStep(rows_of(c, d, 0)).ok());
  for (size_t step = 0; step < asked.size(); ++step) {
    SCOPED_TRACE(step);
    if (step + 1 < asked.size()) {
      ASSERT_TRUE(session_->EnqueueStep(rows_of(c, d, step + 1)).ok());
    }
    std::vector<StepRowResult> results;
    ASSERT_TRUE(session_->WaitStep(&results).ok());
    ASSERT_EQ(results.size(), 2u);
    EXPECT_EQ(results[0].num_top, asked[step].first);
    EXPECT_EQ(results[1].num_top, asked[step].second);
    for (size_t i = 0; i < 2; ++i) {
      const StepRowResult& same = expected[step][i];
      EXPECT_EQ(results[i].token, same.token);
      EXPECT_EQ(results[i].num_top, same.num_top);
      for (int32_t j = 0; j < same.num_top; ++j) {
        EXPECT_EQ(results[i].top_tokens[j], same.top_tokens[j]);
        EXPECT_EQ(results[i].top_logprobs[j], same.top_logprobs[j]);
      }
      if (same.num_top > 0) {  // greedy
        EXPECT_EQ(same.top_tokens[0], same.token);
      }
    }
  }
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

// What the sampler draws of a row's logits, and the mu that it leaves.
StepRowResult DrawByHand(const StepRow& row, uint64_t position, float mu) {
  SamplingParams sampling = row.sampling;
  sampling.position = position;
  StepRowResult result;
  int32_t status;
  const auto tensor = [](const void* data, DType dtype) {
    return MakeTensor(data, dtype, Device(), {1});
  };
  SamplerParams p;
  p.logits = MakeTensor(row.logits, DType::kFloat32, Device(), {1, 131});
  p.params = &sampling;
  p.mirostat_mu = tensor(&mu, DType::kFloat32);
  p.tokens = tensor(&result.token, DType::kInt32);
  p.statuses = tensor(&status, DType::kInt32);
  p.logprobs = tensor(&result.logprob, DType::kFloat32);
  StatusOr<Buffer> workspace =
      Buffer::Allocate(Device(), SamplerWorkspaceBytes(p));
  EXPECT_TRUE(workspace.ok());
  p.workspace = workspace->data();
  p.workspace_size = workspace->size();
  const Status drawn = Sampler(p, Stream());
  EXPECT_TRUE(drawn.ok()) << drawn.message();
  result.mirostat_mu = mu;
  return result;
}

// Rows of which each has its logits in memory of its own.
class SessionMirostatTest : public SessionSamplingTest {
 protected:
  struct Sequence {
    StepRow row;
    std::vector<float> logits = std::vector<float>(kVocab);
    int32_t token = 0;
    float mu = 6.0f;  // 2 * tau
  };

  StepRow& MirostatRow(Sequence* s) {
    s->row.logits_mode = LogitsMode::kLast;
    s->row.logits = s->logits.data();
    s->row.sampling.temperature = 1.3f;
    s->row.sampling.mirostat_tau = 3.0f;
    s->row.sampling.mirostat_eta = 0.3f;
    return s->row;
  }

  // Steps the sequences, each by what it drew before.
  void Go(const std::vector<Sequence*>& sequences) {
    std::vector<StepRow> rows;
    for (Sequence* s : sequences) rows.push_back(s->row);
    const std::vector<StepRowResult> results = Step(rows);
    ASSERT_EQ(results.size(), rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      Sequence& s = *sequences[i];
      const int32_t length = *session_->SequenceLength(s.row.sequence);
      const StepRowResult expected =
          DrawByHand(s.row, static_cast<uint64_t>(length), s.mu);
      EXPECT_EQ(results[i].token, expected.token) << "row " << i;
      EXPECT_EQ(results[i].logprob, expected.logprob) << "row " << i;
      EXPECT_EQ(results[i].mirostat_mu, expected.mirostat_mu) << "row " << i;
      EXPECT_NE(results[i].mirostat_mu, s.mu) << "row " << i;
      s.mu = results[i].mirostat_mu;
      s.token = results[i].token;
      s.row.tokens = &s.token;
      s.row.num_tokens = 1;
    }
  }
};

TEST_P(SessionMirostatTest, GoesOnWithItsStateInWhateverSteps) {
  CreateSession();
  Sequence a, b;
  for (Sequence* s : {&a, &b}) {
    s->row = NewRow();
    s->row.sampling.seed = s == &a ? 11 : 12;
    MirostatRow(s);
  }
  StepRow other = NewRow();  // without
  Go({&a, &b});
  Go({&b, &a});
  Go({&a});
  for (int i = 0; i < 9; ++i) Go({&a, &b});
  EXPECT_EQ(Step({other})[0].mirostat_mu, 0.0f);
  // Greedy steps and those that are not sampled leave it alone.
  a.row.sampling.temperature = 0.0f;
  EXPECT_EQ(Step({a.row})[0].mirostat_mu, a.mu);
  a.row.sample = false;
  EXPECT_EQ(Step({a.row})[0].mirostat_mu, 0.0f);
  a.row.sample = true;
  a.row.sampling.temperature = 1.3f;
  Go({&b, &a});
}

TEST_P(SessionMirostatTest, ForksTruncationAndSetting) {
  CreateSession();
  Sequence a;
  a.row = NewRow();
  MirostatRow(&a);
  Go({&a});
  Go({&a});
  const float at_7 = a.mu;  // after the draw that follows 6 tokens
  const int32_t token_7 = a.token;
  Sequence fork = a;
  fork.row.logits = fork.logits.data();
  fork.row.tokens = &fork.token;
  fork.row.sequence = *session_->ForkSequence(a.row.sequence);
  fork.row.sampling.seed = 5;
  Go({&a, &fork});
  Go({&a});
  Go({&fork, &a});

  // Truncation leaves it alone, but to nothing.
  ASSERT_TRUE(session_->TruncateSequence(a.row.sequence, 6).ok());
  a.token = token_7;
  Go({&a});
  ASSERT_TRUE(session_->TruncateSequence(a.row.sequence, 6).ok());
  a.token = token_7;
  a.row.sampling.flags = kSetMirostatMu;
  a.row.sampling.mirostat_mu = a.mu = at_7;
  Go({&a});
  a.row.sampling.flags = 0;
  Go({&a});
  ASSERT_TRUE(session_->TruncateSequence(a.row.sequence, 0).ok());
  a.mu = 6.0f;
  Go({&a});

  // So does a sequence that gets a slot after another one.
  ASSERT_TRUE(session_->ReleaseSequence(a.row.sequence).ok());
  ASSERT_TRUE(session_->ReleaseSequence(fork.row.sequence).ok());
  for (Sequence* s : {&a, &fork}) {
    s->row = NewRow();
    MirostatRow(s);
    s->mu = 6.0f;
  }
  Go({&a, &fork});
}

// A fork begins with what its parent has after all steps in flight; who gets
// the parent's slot, while a step still writes there, begins anew.
TEST_P(SessionMirostatTest, SequencesComeAndGoWithStepsInFlight) {
  CreateSession();
  const auto first = [&] {
    StepRow row = NewRow();
    row.sampling.temperature = 1.3f;
    row.sampling.mirostat_tau = 3.0f;
    row.sampling.mirostat_eta = 0.3f;
    return row;
  };
  const auto next = [](StepRow row, const int32_t* token) {
    row.tokens = token;
    row.num_tokens = 1;
    row.continues = token == nullptr;
    return row;
  };
  const auto fork = [&](StepRow row) {
    row.sequence = *session_->ForkSequence(row.sequence);
    return row;
  };
  const StepRow a = first();
  std::vector<StepRowResult> expected = Step({a});
  expected.push_back(Step({next(a, nullptr)})[0]);
  expected.push_back(Step({next(fork(a), &expected[1].token)})[0]);
  EXPECT_NE(expected[1].mirostat_mu, expected[2].mirostat_mu);

  const auto enqueue = [&](const std::vector<StepRow>& rows) {
    ASSERT_TRUE(session_->EnqueueStep(rows).ok());
  };
  const auto expect = [&](const std::vector<size_t>& steps) {
    std::vector<StepRowResult> results;
    ASSERT_TRUE(session_->WaitStep(&results).ok());
    ASSERT_EQ(results.size(), steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT_EQ(results[i].token, expected[steps[i]].token) << steps[i];
      EXPECT_EQ(results[i].mirostat_mu, expected[steps[i]].mirostat_mu);
    }
  };
  const StepRow parent = first();
  enqueue({parent});
  enqueue({next(parent, nullptr)});
  const StepRow forked = fork(parent);
  ASSERT_TRUE(session_->ReleaseSequence(parent.sequence).ok());
  const StepRow heir = first();
  ASSERT_EQ(heir.sequence.slot, parent.sequence.slot);
  expect({0});
  enqueue({heir});
  expect({1});
  enqueue({next(forked, &expected[1].token), next(heir, nullptr)});
  expect({0});
  expect({2, 1});
}

TEST_P(SessionMirostatTest, AStepThatIsRefusedLeavesIt) {
  CreateSession();
  Sequence a;
  a.row = NewRow();
  MirostatRow(&a);
  Go({&a});
  StepRow bad = NewRow();
  bad.num_tokens = 0;
  std::vector<StepRowResult> results;
  EXPECT_FALSE(session_->Step({a.row, bad}, &results).ok());
  Go({&a});
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
         [](StepRow& r) { r.sampling.mirostat_tau = -3.0f; });
  expect({"kSetMirostatMu", "mirostat_tau is 0"},
         [](StepRow& r) { r.sampling.flags = kSetMirostatMu; });
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

INSTANTIATE_TEST_SUITE_P(Devices, SessionMirostatTest,
                         testing::SessionDevices(), testing::SessionDeviceName);
INSTANTIATE_TEST_SUITE_P(Devices, SessionSamplingTest,
                         testing::SessionDevices(), testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
