// Sessions: sequences, ragged steps, errors that change nothing.

#include "engine/session.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/engine/session_fixture.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

constexpr int32_t kMaxContext = 64;
constexpr int32_t kPageSize = 8;
constexpr int32_t kMaxSequences = 4;

class SessionTest : public testing::SessionTestBase {
 protected:
  std::unique_ptr<Session> MakeSession(int64_t num_pages = 0,
                                       bool batch_invariant = true) {
    SessionOptions options;
    options.max_sequences = kMaxSequences;
    options.max_tokens = 48;
    options.max_context = kMaxContext;
    options.page_size = kPageSize;
    options.num_pages = num_pages;
    options.batch_invariant = batch_invariant;
    options.count_experts = true;
    options.num_threads = 2;
    return SessionWith(options);
  }

  static std::vector<int32_t> Tokens(int32_t count, int32_t seed) {
    std::vector<int32_t> tokens(count);
    for (int32_t i = 0; i < count; ++i) {
      tokens[i] = (seed * 53 + i * 29 + i * i * 7) % kVocab;
    }
    return tokens;
  }

  static SequenceId Create(Session* session) {
    StatusOr<SequenceId> sequence = session->CreateSequence();
    EXPECT_TRUE(sequence.ok()) << sequence.status().message();
    return *sequence;
  }

  static int32_t Length(Session* session, SequenceId sequence) {
    StatusOr<int32_t> length = session->SequenceLength(sequence);
    EXPECT_TRUE(length.ok()) << length.status().message();
    return *length;
  }

  // Runs the rows; returns the token of each.
  static std::vector<int32_t> Step(Session* session,
                                   const std::vector<StepRow>& rows) {
    std::vector<StepRowResult> results;
    const Status status = session->Step(rows, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    std::vector<int32_t> tokens;
    for (const StepRowResult& result : results) {
      EXPECT_EQ(result.status, SampleStatus::kOk);
      tokens.push_back(result.token);
    }
    return tokens;
  }

  // Greedy continuation of a sequence whose next input is `token`.
  static std::vector<int32_t> Continue(Session* session, SequenceId sequence,
                                       int32_t token, int32_t count) {
    std::vector<int32_t> tokens = {token};
    for (int32_t i = 0; i < count; ++i) {
      tokens.push_back(Step(session, {Row(sequence, {tokens.back()})})[0]);
    }
    return tokens;
  }
};

TEST_P(SessionTest, MixedStepEqualsSeparateOnes) {
  const std::unique_ptr<Session> alone = MakeSession();
  const std::unique_ptr<Session> mixed = MakeSession();
  std::vector<std::vector<int32_t>> expected;
  for (int32_t i = 0; i < 3; ++i) {
    const std::vector<int32_t> prompt = Tokens(5 + 9 * i, i);
    const SequenceId sequence = Create(alone.get());
    const int32_t token = Step(alone.get(), {Row(sequence, prompt)})[0];
    expected.push_back(Continue(alone.get(), sequence, token, 6));
  }
  // The same three, joining one step after the other: prefill beside decode.
  std::vector<SequenceId> sequences;
  std::vector<std::vector<int32_t>> actual(3);
  for (int32_t step = 0; step < 9; ++step) {
    std::vector<std::vector<int32_t>> inputs;
    std::vector<size_t> which;
    for (int32_t i = 0; i < 3; ++i) {
      if (step < i || actual[i].size() == 7) continue;
      if (step == i) sequences.push_back(Create(mixed.get()));
      inputs.push_back(step == i ? Tokens(5 + 9 * i, i)
                                 : std::vector<int32_t>{actual[i].back()});
      which.push_back(i);
    }
    std::vector<StepRow> rows;
    for (size_t i = 0; i < inputs.size(); ++i) {
      rows.push_back(Row(sequences[which[i]], inputs[i]));
    }
    const std::vector<int32_t> tokens = Step(mixed.get(), rows);
    for (size_t i = 0; i < which.size(); ++i) {
      actual[which[i]].push_back(tokens[i]);
    }
  }
  EXPECT_EQ(actual, expected);
}

// As the results of the last step are the tokens of the next, also where that
// one has more rows.
TEST_P(SessionTest, TokensMayBeInTheResults) {
  const std::unique_ptr<Session> session = MakeSession();
  const std::unique_ptr<Session> other = MakeSession();
  std::vector<SequenceId> sequences;
  std::vector<SequenceId> others;
  std::vector<StepRowResult> results;
  std::vector<int32_t> expected;
  for (int32_t i = 0; i < 4; ++i) {
    const std::vector<int32_t> prompt = Tokens(5, i);
    sequences.push_back(Create(session.get()));
    others.push_back(Create(other.get()));
    std::vector<StepRow> rows;
    std::vector<StepRow> copied;
    for (int32_t j = 0; j < i; ++j) {
      rows.push_back(Row(sequences[j], {}));
      rows.back().tokens = &results[j].token;
      rows.back().num_tokens = 1;
      copied.push_back(Row(others[j], {}));
      copied.back().tokens = &expected[j];
      copied.back().num_tokens = 1;
    }
    rows.push_back(Row(sequences[i], prompt));
    copied.push_back(Row(others[i], prompt));
    const Status status = session->Step(rows, &results);
    ASSERT_TRUE(status.ok()) << status.message();
    expected = Step(other.get(), copied);
    ASSERT_EQ(results.size(), expected.size());
    for (size_t j = 0; j < expected.size(); ++j) {
      EXPECT_EQ(results[j].token, expected[j]) << i << " " << j;
    }
  }
}

TEST_P(SessionTest, ForkSharesThePastAndThenParts) {
  const std::unique_ptr<Session> session = MakeSession();
  const std::vector<int32_t> prompt = Tokens(13, 1);  // ends inside a page
  const SequenceId first = Create(session.get());
  const int32_t token = Step(session.get(), {Row(first, prompt)})[0];
  const int64_t free_pages = session->num_free_pages();
  StatusOr<SequenceId> second = session->ForkSequence(first);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(session->num_free_pages(), free_pages) << "pages are shared";
  EXPECT_EQ(Length(session.get(), *second), 13);

  const std::vector<int32_t> other =
      Continue(session.get(), *second, (token + 1) % kVocab, 5);
  const std::vector<int32_t> original =
      Continue(session.get(), first, token, 5);

  // Each as if the other had never been.
  const std::unique_ptr<Session> fresh = MakeSession();
  for (const std::vector<int32_t>* expected : {&original, &other}) {
    const SequenceId sequence = Create(fresh.get());
    Step(fresh.get(), {Row(sequence, prompt)});
    EXPECT_EQ(Continue(fresh.get(), sequence, (*expected)[0], 5), *expected);
  }
}

TEST_P(SessionTest, TruncatedSequenceRepeatsItself) {
  const std::unique_ptr<Session> session = MakeSession();
  const SequenceId sequence = Create(session.get());
  const int32_t token = Step(session.get(), {Row(sequence, Tokens(20, 2))})[0];
  const std::vector<int32_t> once = Continue(session.get(), sequence, token, 9);
  ASSERT_TRUE(session->TruncateSequence(sequence, 20).ok());
  EXPECT_EQ(Continue(session.get(), sequence, token, 9), once);
  testing::ExpectInvalid(session->TruncateSequence(sequence, 1000), {"1000"});
}

TEST_P(SessionTest, ReleaseReturnsEveryPage) {
  const std::unique_ptr<Session> session = MakeSession();
  const int64_t all = session->num_free_pages();
  const SequenceId sequence = Create(session.get());
  Step(session.get(), {Row(sequence, Tokens(17, 3))});
  EXPECT_EQ(session->num_free_pages(), all - 3);
  StatusOr<SequenceId> fork = session->ForkSequence(sequence);
  ASSERT_TRUE(fork.ok());
  EXPECT_TRUE(session->ReleaseSequence(sequence).ok());
  EXPECT_EQ(session->num_free_pages(), all - 3);
  EXPECT_TRUE(session->ReleaseSequence(*fork).ok());
  EXPECT_EQ(session->num_free_pages(), all);
}

TEST_P(SessionTest, ReleasedSequenceIsNotFound) {
  const std::unique_ptr<Session> session = MakeSession();
  const SequenceId stale = Create(session.get());
  ASSERT_TRUE(session->ReleaseSequence(stale).ok());
  const SequenceId reused = Create(session.get());  // has the same slot
  EXPECT_NE(stale, reused);
  std::vector<StepRowResult> results;
  const std::vector<int32_t> tokens = {1};
  EXPECT_EQ(session->Step({Row(stale, tokens)}, &results).code(),
            StatusCode::kNotFound);
  EXPECT_EQ(session->ForkSequence(stale).status().code(),
            StatusCode::kNotFound);
  EXPECT_EQ(session->TruncateSequence(stale, 0).code(), StatusCode::kNotFound);
  EXPECT_EQ(session->ReleaseSequence(stale).code(), StatusCode::kNotFound);
  EXPECT_EQ(session->SequenceLength(stale).status().code(),
            StatusCode::kNotFound);
}

// After each refused step, a good one goes on as if nothing had happened.
TEST_P(SessionTest, FailedStepLeavesEverySequenceAsItWas) {
  const std::unique_ptr<Session> session = MakeSession(/*num_pages=*/6);
  const std::unique_ptr<Session> undisturbed = MakeSession(/*num_pages=*/6);
  const std::vector<int32_t> prompt = Tokens(13, 4);
  const SequenceId a = Create(session.get());
  const SequenceId b = Create(session.get());
  const SequenceId expected = Create(undisturbed.get());
  int32_t token = Step(session.get(), {Row(a, prompt)})[0];
  ASSERT_EQ(Step(undisturbed.get(), {Row(expected, prompt)})[0], token);

  const std::vector<int32_t> good = {7};
  const std::vector<int32_t> outside = {3, kVocab};
  const std::vector<int32_t> negative = {-1};
  const std::vector<int32_t> many = Tokens(40, 5);
  const std::vector<int32_t> too_many = Tokens(49, 5);
  const auto with = [&](auto change) {
    StepRow row = Row(b, good);
    change(row);
    return row;
  };
  struct Refused {
    StepRow row;  // beside a good row for `a`
    StatusCode code;
    std::vector<std::string> parts;
  };
  const std::vector<Refused> cases = {
      {Row(b, outside),
       StatusCode::kInvalidArgument,
       {"rows[1].tokens[1] is 131"}},
      {Row(b, negative), StatusCode::kInvalidArgument, {"tokens[0] is -1"}},
      {Row(a, good), StatusCode::kInvalidArgument, {"sequence"}},
      {with([](StepRow& r) { r.num_tokens = 0; }),
       StatusCode::kInvalidArgument,
       {"rows[1] has no tokens"}},
      {with([](StepRow& r) { r.tokens = nullptr; }),
       StatusCode::kInvalidArgument,
       {"rows[1] has no tokens"}},
      {with([](StepRow& r) { r.sampling.temperature = -1.0f; }),
       StatusCode::kInvalidArgument,
       {"rows[1].sampling", "temperature"}},
      {with([](StepRow& r) { r.sampling.top_p = 2.0f; }),
       StatusCode::kInvalidArgument,
       {"rows[1].sampling", "top_p"}},
      {with([](StepRow& r) { r.logits_mode = LogitsMode::kLast; }),
       StatusCode::kInvalidArgument,
       {"rows[1].logits"}},
      {with([](StepRow& r) { r.sequence.generation += 77; }),
       StatusCode::kNotFound,
       {"sequence"}},
      {Row(b, many), StatusCode::kResourceExhausted, {"page"}},
      {Row(b, too_many),
       StatusCode::kResourceExhausted,
       {"50 tokens, more than max_tokens 48"}},
  };
  for (const Refused& refused : cases) {
    SCOPED_TRACE(refused.parts[0]);
    const int64_t free_pages = session->num_free_pages();
    std::vector<StepRowResult> results = {{42, 0.0f, SampleStatus::kOk}};
    const std::vector<int32_t> next = {token};
    const Status status = session->Step({Row(a, next), refused.row}, &results);
    EXPECT_EQ(status.code(), refused.code) << status.message();
    for (const std::string& part : refused.parts) {
      EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
          << status.message();
    }
    ASSERT_EQ(results.size(), 1u);
    EXPECT_EQ(results[0].token, 42);
    EXPECT_EQ(session->num_free_pages(), free_pages);
    EXPECT_EQ(Length(session.get(), b), 0);
    const int32_t following = Step(session.get(), {Row(a, next)})[0];
    EXPECT_EQ(Step(undisturbed.get(), {Row(expected, next)})[0], following);
    token = following;
  }
}

TEST_P(SessionTest, ContextAndRowsAreLimited) {
  const std::unique_ptr<Session> session = MakeSession();
  const SequenceId sequence = Create(session.get());
  const std::vector<int32_t> half = Tokens(33, 6);
  Step(session.get(), {Row(sequence, half)});
  std::vector<StepRowResult> results;
  const Status status = session->Step({Row(sequence, half)}, &results);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(status.message()).find("max_context"),
            std::string::npos)
      << status.message();
  for (int32_t i = 1; i < kMaxSequences; ++i) Create(session.get());
  EXPECT_EQ(session->CreateSequence().status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_TRUE(session->Step({}, &results).ok());
  EXPECT_TRUE(results.empty());
}

TEST_P(SessionTest, LogitsArriveInTheRightPlaces) {
  SessionOptions options;
  options.max_logit_rows = 32;
  options.max_context = kMaxContext;
  options.batch_invariant = true;
  StatusOr<std::unique_ptr<Session>> session = Session::Create(model_, options);
  ASSERT_TRUE(session.ok()) << session.status().message();
  const auto run = [&](LogitsMode mode, bool sample, SequenceId other) {
    const std::vector<int32_t> tokens = Tokens(9, 7);
    const std::vector<int32_t> noise = Tokens(4, 8);
    std::vector<float> logits(9 * kVocab, -1.0f);
    const SequenceId sequence = Create(session->get());
    StepRow row = Row(sequence, tokens);
    row.sample = sample;
    row.logits_mode = mode;
    row.logits = logits.data();
    std::vector<StepRowResult> results;
    const Status status = (*session)->Step({Row(other, noise), row}, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(results[1].token >= 0, sample);
    EXPECT_TRUE((*session)->ReleaseSequence(sequence).ok());
    EXPECT_TRUE((*session)->TruncateSequence(other, 0).ok());
    return logits;
  };
  const SequenceId other = Create(session->get());
  const std::vector<float> all = run(LogitsMode::kAll, true, other);
  EXPECT_EQ(run(LogitsMode::kAll, false, other), all);
  const std::vector<float> last_row(all.end() - kVocab, all.end());
  for (bool sample : {true, false}) {
    const std::vector<float> last = run(LogitsMode::kLast, sample, other);
    EXPECT_EQ(std::vector<float>(last.begin(), last.begin() + kVocab),
              last_row);
    EXPECT_EQ(last[kVocab], -1.0f);
  }
}

TEST_P(SessionTest, SampledTokensDependOnSeedAndPositionAlone) {
  const std::unique_ptr<Session> session = MakeSession();
  const std::vector<int32_t> prompt = Tokens(11, 9);
  const auto generate = [&](uint64_t seed, bool company) {
    const SequenceId sequence = Create(session.get());
    const SequenceId other = Create(session.get());
    std::vector<int32_t> tokens = prompt;
    std::vector<int32_t> generated;
    for (int i = 0; i < 8; ++i) {
      StepRow row = Row(sequence, tokens);
      row.sampling.temperature = 1.0f;
      row.sampling.seed = seed;
      const std::vector<int32_t> noise = {i};
      std::vector<StepRow> rows = {row};
      if (company) rows.insert(rows.begin(), Row(other, noise));
      generated.push_back(Step(session.get(), rows).back());
      tokens = {generated.back()};
    }
    EXPECT_TRUE(session->ReleaseSequence(sequence).ok());
    EXPECT_TRUE(session->ReleaseSequence(other).ok());
    return generated;
  };
  EXPECT_EQ(generate(1, false), generate(1, true));
  EXPECT_NE(generate(1, false), generate(2, false));
}

// Each draw is the sampler's own, with the sequence's length as the position.
TEST_P(SessionTest, DrawsAtThePositionOfTheToken) {
  if (GetParam() != DeviceType::kCpu) GTEST_SKIP() << "compares with the CPU";
  const std::unique_ptr<Session> session = MakeSession();
  const SequenceId sequence = Create(session.get());
  std::vector<int32_t> tokens = Tokens(9, 11);
  for (int step = 0; step < 20; ++step) {
    std::vector<float> logits(kVocab);
    StepRow row = Row(sequence, tokens);
    row.sampling.temperature = 4.0f;  // nearly flat: a wrong draw shows
    row.sampling.seed = 12;
    row.logits_mode = LogitsMode::kLast;
    row.logits = logits.data();
    const int32_t token = Step(session.get(), {row})[0];

    SamplingParams params = row.sampling;
    params.position = static_cast<uint64_t>(Length(session.get(), sequence));
    int32_t expected = -1;
    int32_t status = -1;
    SamplerParams p;
    p.logits =
        MakeTensor(logits.data(), DType::kFloat32, Device(), {1, kVocab});
    p.params = &params;
    p.tokens = MakeTensor(&expected, DType::kInt32, Device(), {1});
    p.statuses = MakeTensor(&status, DType::kInt32, Device(), {1});
    StatusOr<Buffer> workspace =
        Buffer::Allocate(Device(), SamplerWorkspaceBytes(p));
    ASSERT_TRUE(workspace.ok());
    p.workspace = workspace->data();
    p.workspace_size = workspace->size();
    const Status sampled = Sampler(p, Stream());
    ASSERT_TRUE(sampled.ok()) << sampled.message();
    EXPECT_EQ(token, expected) << "step " << step;
    tokens = {token};
  }
}

TEST_P(SessionTest, StatsCountRowsTokensAndExperts) {
  const std::unique_ptr<Session> session = MakeSession();
  const SequenceId a = Create(session.get());
  const SequenceId b = Create(session.get());
  const std::vector<int32_t> one = {5};
  std::vector<StepRowResult> results;
  StepStats stats;
  ASSERT_TRUE(session->Step({Row(a, one)}, &results, &stats).ok());
  EXPECT_EQ(stats.rows, 1);
  EXPECT_EQ(stats.tokens, 1);
  EXPECT_GT(stats.microseconds, 0.0);
  EXPECT_EQ(stats.distinct_experts, (std::vector<int32_t>{2, 2}));
  const std::vector<int32_t> prompt = Tokens(40, 10);
  ASSERT_TRUE(
      session->Step({Row(b, prompt), Row(a, one)}, &results, &stats).ok());
  EXPECT_EQ(stats.rows, 2);
  EXPECT_EQ(stats.tokens, 41);
  EXPECT_GT(stats.distinct_experts[0], 2);
  // Nothing is left of the steps before.
  ASSERT_TRUE(session->Step({}, &results, &stats).ok());
  EXPECT_TRUE(results.empty());
  EXPECT_EQ(stats.rows, 0);
  EXPECT_EQ(stats.tokens, 0);
  EXPECT_EQ(stats.distinct_experts, (std::vector<int32_t>{0, 0}));
}

TEST_P(SessionTest, FillsAGivenNumberOfBytesWithPages) {
  SessionOptions options;
  options.max_context = kMaxContext;
  options.page_size = kPageSize;
  options.num_pages = 5;
  StatusOr<std::unique_ptr<Session>> session = Session::Create(model_, options);
  ASSERT_TRUE(session.ok()) << session.status().message();
  const int64_t bytes = (*session)->kv_cache_bytes();
  options.num_pages = 0;
  for (int64_t change : {-1, 0, 1}) {
    options.kv_cache_bytes = bytes + change;
    session = Session::Create(model_, options);
    ASSERT_TRUE(session.ok()) << session.status().message();
    EXPECT_EQ((*session)->options().num_pages, change < 0 ? 4 : 5);
    EXPECT_LE((*session)->kv_cache_bytes(), options.kv_cache_bytes);
  }
}

TEST_P(SessionTest, RejectsBadOptions) {
  const auto expect = [&](std::vector<std::string> parts, auto change) {
    SessionOptions options;
    options.max_context = kMaxContext;
    change(options);
    testing::ExpectInvalid(Session::Create(model_, options).status(), parts);
  };
  using Options = SessionOptions;
  expect({"max_sequences"}, [](Options& o) { o.max_sequences = 0; });
  expect({"max_tokens"}, [](Options& o) { o.max_tokens = -1; });
  expect({"max_context"}, [](Options& o) { o.max_context = 1 << 30; });
  expect({"page_size"}, [](Options& o) { o.page_size = 0; });
  expect({"num_pages"}, [](Options& o) { o.num_pages = -5; });
  expect({"kv_cache_bytes", "-1"}, [](Options& o) { o.kv_cache_bytes = -1; });
  expect({"kv_cache_bytes", "100"}, [](Options& o) { o.kv_cache_bytes = 100; });
  expect({"num_pages", "kv_cache_bytes"}, [](Options& o) {
    o.num_pages = 4;
    o.kv_cache_bytes = 1 << 20;
  });
  expect({"max_logit_rows"}, [](Options& o) { o.max_logit_rows = -2; });
  expect({"num_threads"}, [](Options& o) { o.num_threads = -1; });
  testing::ExpectInvalid(Session::Create(nullptr, SessionOptions()).status(),
                         {"model"});
}

// What a config may have, steps of one token and of several can run.
TEST_P(SessionTest, RunsTheLargestConfigs) {
  ModelConfig config = model_->config;
  config.num_experts = 40;
  config.num_experts_per_tok = 32;
  ModelConfig wide = model_->config;
  wide.vocab_size = 1 << 20;
  for (const ModelConfig& c : {config, wide}) {
    SCOPED_TRACE(StrCat("vocabulary of ", c.vocab_size));
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Random(c, DType::kBFloat16, {GetParam(), 0}, 3);
    ASSERT_TRUE(model.ok()) << model.status().message();
    SessionOptions options;
    options.max_sequences = 2;
    options.max_tokens = 8;
    options.max_context = kMaxContext;
    options.num_threads = 2;
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(*model, options);
    ASSERT_TRUE(session.ok()) << session.status().message();
    const SequenceId sequence = Create(session->get());
    for (const int32_t count : {5, 1}) {
      const std::vector<int32_t> tokens = Tokens(count, 6);
      const std::vector<int32_t> drawn =
          Step(session->get(), {Row(sequence, tokens)});
      ASSERT_EQ(drawn.size(), 1u);
      EXPECT_GE(drawn[0], 0);
    }
  }
}

// Its tokens would be those of partial sums.
TEST_P(SessionTest, RejectsOneRankOfAModel) {
  LoadOptions load;
  load.shard = {1, 2};
  StatusOr<std::shared_ptr<const Model>> model =
      Model::Load("tests/golden/qwen3_moe_tiny", {GetParam(), 0}, load);
  ASSERT_TRUE(model.ok()) << model.status().message();
  SessionOptions options;
  options.max_context = kMaxContext;
  const StatusOr<std::unique_ptr<Session>> session =
      Session::Create(*model, options);
  EXPECT_EQ(session.status().code(), StatusCode::kUnimplemented);
  EXPECT_NE(
      std::string(session.status().message()).find("rank 1 of world_size 2"),
      std::string::npos)
      << session.status().message();
}

TEST_P(SessionTest, TakesMeasuredKernelSizes) {
  SessionOptions options;
  options.max_sequences = kMaxSequences;
  options.max_context = kMaxContext;
  options.num_threads = 2;
  StatusOr<std::unique_ptr<Session>> built_in =
      Session::Create(model_, options);
  ASSERT_TRUE(built_in.ok()) << built_in.status().message();
  MoeKernelFile file;
  file.float16.resize(1);
  file.float16[0].config = {{32, 2, 1}, {8, 1, 1}, 128};
  options.moe_kernels = std::make_shared<MoeKernelFile>(file);
  StatusOr<std::unique_ptr<Session>> tuned = Session::Create(model_, options);
  ASSERT_TRUE(tuned.ok()) << tuned.status().message();
  const std::vector<int32_t> prompt = Tokens(9, 4);
  std::vector<int32_t> tokens[2];
  for (Session* session : {tuned->get(), built_in->get()}) {
    const SequenceId sequence = Create(session);
    const int32_t first = Step(session, {Row(sequence, prompt)})[0];
    tokens[session == tuned->get()] = Continue(session, sequence, first, 10);
  }
  EXPECT_EQ(tokens[0], tokens[1]);

  file.float16[0].config.gate_up.token_tile = 33;
  options.moe_kernels = std::make_shared<MoeKernelFile>(file);
  testing::ExpectInvalid(Session::Create(model_, options).status(),
                         {"moe_kernels", "33"});
}

INSTANTIATE_TEST_SUITE_P(Devices, SessionTest, testing::SessionDevices(),
                         testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
