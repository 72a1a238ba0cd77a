// Steps that are enqueued before the tokens of the last one are read, and the
// state that rows leave for the next step.

#include <cmath>
#include <string>
#include <vector>

#include "tests/abi/engine_fixture.h"

namespace tenon::testing {
namespace {

class PipelineTest : public SessionTest {
 protected:
  // A row that goes on with what the step before drew.
  static tenon_step_row Next(tenon_sequence sequence,
                             const tenon_sampling_params* sampling) {
    auto row = Make<tenon_step_row>();
    row.sequence = sequence;
    row.num_tokens = 1;
    row.flags = TENON_ROW_CONTINUES;
    row.sampling = sampling;
    return row;
  }

  static tenon_step_args Enqueued(const std::vector<tenon_step_row>& rows) {
    auto args = Make<tenon_step_args>();
    args.num_rows = static_cast<int32_t>(rows.size());
    args.rows = rows.data();
    return args;
  }

  void Enqueue(const std::vector<tenon_step_row>& rows) {
    const tenon_step_args args = Enqueued(rows);
    ExpectOk([&](tenon_error* e) {
      return tenon_session_enqueue_step(session_, &args, e);
    });
  }

  void ExpectEnqueueFails(const tenon_step_args& args, int32_t code,
                          std::initializer_list<const char*> why) {
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_session_enqueue_step(session_, &args, e);
    });
  }

  tenon_step_results Results(int32_t num_rows) {
    tokens_.assign(static_cast<size_t>(num_rows), -7);
    auto results = Make<tenon_step_results>();
    results.num_rows = num_rows;
    results.tokens = tokens_.data();
    return results;
  }

  std::vector<int32_t> Wait(int32_t num_rows) {
    const tenon_step_results results = Results(num_rows);
    ExpectOk([&](tenon_error* e) {
      return tenon_session_wait_step(session_, &results, e);
    });
    return tokens_;
  }

  void ExpectWaitFails(const tenon_step_results& results, int32_t code,
                       std::initializer_list<const char*> why) {
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_session_wait_step(session_, &results, e);
    });
  }

  std::vector<int32_t> Alone(const std::vector<int32_t>& prompt, int32_t count,
                             const tenon_sampling_params& sampling) {
    const Owned session = NewSession(model_);
    return Generate(session, NewSequence(session), prompt, count, sampling);
  }

  std::vector<int32_t> tokens_;
  const std::vector<int32_t> prompt_ = Prompt(9, 1);
  const std::vector<int32_t> other_ = Prompt(4, 2);
  const tenon_sampling_params seeded_ = Seeded(5);
  const tenon_sampling_params greedy_ = Greedy();
};

TEST_P(PipelineTest, TwoStepsInFlightGiveTheTokensOfStepByStep) {
  const tenon_sequence a = NewSequence(session_);
  const tenon_sequence b = NewSequence(session_);
  std::vector<std::vector<int32_t>> drawn(2);
  const auto wait = [&] {
    const std::vector<int32_t> tokens = Wait(2);
    for (size_t i = 0; i < 2; ++i) drawn[i].push_back(tokens[i]);
  };
  Enqueue({Row(a, prompt_, &seeded_), Row(b, other_, &greedy_)});
  for (int i = 0; i < 20; ++i) {
    Enqueue({Next(a, &seeded_), Next(b, &greedy_)});
    EXPECT_EQ(Info().num_steps_in_flight, 2);
    wait();
  }
  wait();
  EXPECT_EQ(drawn[0], Alone(prompt_, 21, seeded_));
  EXPECT_EQ(drawn[1], Alone(other_, 21, greedy_));
  EXPECT_EQ(Info().num_steps_in_flight, 0);
  EXPECT_EQ(Info().num_steps, 21u);
  EXPECT_EQ(Info().num_tokens, 9u + 4 + 40);

  // A step that is waited for at once may continue as well.
  EXPECT_EQ(Step(session_, {Next(a, &seeded_)})[0],
            Alone(prompt_, 22, seeded_)[21]);
}

TEST_P(PipelineTest, ResultsAreThoseOfAStep) {
  tenon_session_options options = SmallSession();
  options.max_top_logprobs = 4;
  session_ = NewSession(model_, options);
  tenon_sampling_params sampling = seeded_;
  sampling.num_top_logprobs = 3;
  std::vector<float> logits(kTinyVocab), expected_logits(kTinyVocab);
  tenon_step_row row = Row(NewSequence(session_), prompt_, &sampling);
  row.logits_mode = TENON_LOGITS_LAST;
  row.logits = expected_logits.data();
  int32_t token, status, experts[8], top[3];
  float logprob, top_logprobs[3];
  row.top_tokens = top;
  row.top_logprobs = top_logprobs;
  auto args = Make<tenon_step_args>();
  args.num_rows = 1;
  args.rows = &row;
  args.tokens = &token;
  args.logprobs = &logprob;
  args.distinct_experts = experts;
  ExpectOk(
      [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });

  row.sequence = NewSequence(session_);
  row.top_tokens = nullptr;
  row.top_logprobs = nullptr;
  row.logits = logits.data();
  const tenon_step_row silent = Row(NewSequence(session_), other_, nullptr);
  Enqueue({row});
  Enqueue({silent, Next(row.sequence, &sampling)});
  tenon_step_results results = Results(1);
  float got_logprob = 7.0f, got_top_logprobs[4];
  int32_t got_experts[8], got_top[4];
  double microseconds = 0.0;
  results.logprobs = &got_logprob;
  results.statuses = &status;
  results.distinct_experts = got_experts;
  results.top_tokens = got_top;
  results.top_logprobs = got_top_logprobs;
  results.top_columns = 4;
  results.microseconds = &microseconds;
  ExpectOk([&](tenon_error* e) {
    return tenon_session_wait_step(session_, &results, e);
  });
  EXPECT_EQ(tokens_[0], token);
  EXPECT_EQ(got_logprob, logprob);
  EXPECT_EQ(status, TENON_SAMPLE_OK);
  EXPECT_EQ(logits, expected_logits);
  EXPECT_GT(microseconds, 0.0);
  auto model = Make<tenon_model_info>();
  ASSERT_EQ(tenon_model_query(model_, &model, nullptr), TENON_OK);
  for (int i = 0; i < model.num_layers; ++i) {
    EXPECT_EQ(got_experts[i], experts[i]);
  }
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(got_top[i], top[i]);
    EXPECT_EQ(got_top_logprobs[i], top_logprobs[i]);
  }
  EXPECT_EQ(got_top[3], -1);
  EXPECT_TRUE(std::isnan(got_top_logprobs[3]));

  // One of the two lists alone, of fewer columns, for several rows.
  results = Results(2);
  results.top_tokens = got_top;
  results.top_columns = 2;
  ExpectOk([&](tenon_error* e) {
    return tenon_session_wait_step(session_, &results, e);
  });
  EXPECT_EQ(tokens_[0], -1);
  EXPECT_EQ(got_top[0], -1);
  EXPECT_EQ(got_top[1], -1);
  EXPECT_GE(got_top[2], 0);
  EXPECT_GE(got_top[3], 0);
}

TEST_P(PipelineTest, SequencesMayComeAndGoMeanwhile) {
  const tenon_sequence a = NewSequence(session_);
  const tenon_sequence b = NewSequence(session_);
  const int64_t free_pages = Info().num_free_pages;
  Enqueue({Row(a, prompt_, &greedy_), Row(b, other_, &greedy_)});
  Enqueue({Next(a, &greedy_), Next(b, &greedy_)});
  EXPECT_EQ(LengthOf(session_, a), 10);
  // Its last token was one too many.
  ExpectOk(
      [&](tenon_error* e) { return tenon_sequence_release(session_, b, e); });
  const tenon_sequence c = NewSequence(session_);
  Wait(2);
  Enqueue({Next(a, &greedy_), Row(c, other_, &greedy_)});
  Wait(2);
  EXPECT_EQ(Wait(2), (std::vector<int32_t>{Alone(prompt_, 3, greedy_)[2],
                                           Alone(other_, 1, greedy_)[0]}));
  // b is no more.
  const std::vector<tenon_step_row> gone = {Next(b, &greedy_)};
  ExpectEnqueueFails(Enqueued(gone), TENON_NOT_FOUND, {"rows[0].sequence is"});
  for (const tenon_sequence sequence : {a, c}) {
    EXPECT_EQ(tenon_sequence_release(session_, sequence, nullptr), TENON_OK);
  }
  EXPECT_EQ(Info().num_free_pages, free_pages);
}

TEST_P(PipelineTest, ErrorsSayWhatIsOutOfOrder) {
  const tenon_sequence a = NewSequence(session_);
  const std::vector<tenon_step_row> first = {Row(a, prompt_, &greedy_)};
  const std::vector<tenon_step_row> next = {Next(a, &greedy_)};
  ExpectWaitFails(Results(1), TENON_FAILED_PRECONDITION,
                  {"num_steps_in_flight is 0: there is none to wait for"});
  ExpectEnqueueFails(Enqueued(next), TENON_INVALID_ARGUMENT,
                     {"rows[0] continues, but the last step drew no token"});
  Enqueue(first);
  std::vector<int32_t> tokens;
  ExpectStepFails(StepArgs(next, &tokens), TENON_FAILED_PRECONDITION,
                  {"num_steps_in_flight is 1, expected 0"});
  Enqueue(next);
  ExpectEnqueueFails(Enqueued(next), TENON_FAILED_PRECONDITION,
                     {"num_steps_in_flight is 2, the most there can be"});
  ExpectWaitFails(Results(2), TENON_INVALID_ARGUMENT,
                  {"results.num_rows is 2, expected 1, the rows of the step"});
  tenon_step_results results = Results(1);
  results.tokens = nullptr;
  ExpectWaitFails(results, TENON_INVALID_ARGUMENT, {"results.tokens is null"});
  results = Results(1);
  results.reserved = 1;
  ExpectWaitFails(results, TENON_INVALID_ARGUMENT, {"results.reserved is 1"});
  results = Results(1);
  results.top_columns = 1;
  ExpectWaitFails(results, TENON_INVALID_ARGUMENT,
                  {"results.top_columns is 1, expected 0 without top_tokens"});
  results.top_tokens = tokens.data();
  results.top_columns = 21;
  int32_t top[21];
  results.top_tokens = top;
  ExpectWaitFails(results, TENON_INVALID_ARGUMENT,
                  {"results.top_columns is 21, expected 1 to 20"});
  // All of which took nothing away.
  std::vector<int32_t> drawn = Wait(1);
  drawn.push_back(Wait(1)[0]);
  EXPECT_EQ(drawn, Alone(prompt_, 2, greedy_));

  tenon_session_options options = SmallSession();
  options.flags = TENON_SESSION_BATCH_INVARIANT;
  session_ = NewSession(model_, options);
  const std::vector<tenon_step_row> rows = {
      Row(NewSequence(session_), prompt_, &greedy_)};
  Enqueue(rows);
  int32_t experts[8];
  results = Results(1);
  results.distinct_experts = experts;
  ExpectWaitFails(results, TENON_INVALID_ARGUMENT,
                  {"distinct_experts is given", "COUNT_EXPERTS"});
}

TEST_P(PipelineTest, EnqueuedStepsTakeRowsAlone) {
  const std::vector<tenon_step_row> rows = {
      Row(NewSequence(session_), prompt_, &greedy_)};
  int32_t integers[8];
  float floats[8];
  double real;
  const auto refuses = [&](const char* name, auto&& set) {
    tenon_step_args args = Enqueued(rows);
    set(&args);
    const std::string why =
        std::string(name) +
        " is given, but tenon_session_wait_step has the results";
    ExpectEnqueueFails(args, TENON_INVALID_ARGUMENT, {why.c_str()});
  };
  using Args = tenon_step_args;
  refuses("tokens", [&](Args* args) { args->tokens = integers; });
  refuses("logprobs", [&](Args* args) { args->logprobs = floats; });
  refuses("statuses", [&](Args* args) { args->statuses = integers; });
  refuses("distinct_experts",
          [&](Args* args) { args->distinct_experts = integers; });
  refuses("microseconds", [&](Args* args) { args->microseconds = &real; });
  refuses("mirostat_mu", [&](Args* args) { args->mirostat_mu = floats; });
  tenon_step_row row = rows[0];
  row.top_tokens = integers;
  refuses("rows[0].top_tokens", [&](Args* args) { args->rows = &row; });
  row = rows[0];
  row.top_logprobs = floats;
  refuses("rows[0].top_logprobs", [&](Args* args) { args->rows = &row; });
  row = rows[0];
  row.flags = 2;
  tenon_step_args args = Enqueued({});
  args.num_rows = 1;
  args.rows = &row;
  ExpectEnqueueFails(args, TENON_INVALID_ARGUMENT, {"rows[0].flags is 2"});
  row = rows[0];
  row.flags = TENON_ROW_CONTINUES;
  ExpectEnqueueFails(args, TENON_INVALID_ARGUMENT,
                     {"rows[0] continues and has tokens"});
  EXPECT_EQ(Info().num_steps_in_flight, 0);
}

// What is under way writes to the caller's logits until the session is gone.
TEST_P(PipelineTest, ASessionMayEndWithStepsInFlight) {
  std::vector<float> logits(kTinyVocab);
  const tenon_sequence a = NewSequence(session_);
  tenon_step_row row = Row(a, prompt_, &greedy_);
  row.logits_mode = TENON_LOGITS_LAST;
  row.logits = logits.data();
  Enqueue({row});
  Enqueue({Next(a, &greedy_)});
  session_ = Owned();
}

TEST_P(PipelineTest, MirostatGoesOnFromStepToStep) {
  tenon_sampling_params sampling = seeded_;
  sampling.mirostat_tau = 3.0f;
  sampling.mirostat_eta = 0.3f;
  float mu = 0.0f;
  // Steps one row alone; tells mu afterwards.
  const auto step = [&](tenon_step_row row) {
    auto args = Make<tenon_step_args>();
    int32_t token = -7;
    args.num_rows = 1;
    args.rows = &row;
    args.tokens = &token;
    args.mirostat_mu = &mu;
    ExpectOk(
        [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
    return token;
  };
  const tenon_sequence a = NewSequence(session_);
  std::vector<int32_t> tokens = {step(Row(a, prompt_, &sampling))};
  std::vector<float> mus = {mu};
  for (int i = 0; i < 8; ++i) {
    tokens.push_back(step(Next(a, &sampling)));
    mus.push_back(mu);
  }
  EXPECT_NE(mus[0], 6.0f);
  EXPECT_NE(mus[0], mus[1]);

  // The same with two steps in flight.
  const tenon_sequence b = NewSequence(session_);
  Enqueue({Row(b, prompt_, &sampling)});
  for (size_t i = 0; i < 8; ++i) {
    Enqueue({Next(b, &sampling)});
    tenon_step_results results = Results(1);
    results.mirostat_mu = &mu;
    ExpectOk([&](tenon_error* e) {
      return tenon_session_wait_step(session_, &results, e);
    });
    EXPECT_EQ(tokens_[0], tokens[i]);
    EXPECT_EQ(mu, mus[i]);
  }
  EXPECT_EQ(Wait(1)[0], tokens[8]);

  // Back to where three tokens had been drawn.
  ASSERT_EQ(tenon_sequence_truncate(session_, a, 11, nullptr), TENON_OK);
  tenon_sampling_params set = sampling;
  set.flags = TENON_SAMPLING_SET_MIROSTAT_MU;
  set.mirostat_mu = mus[2];
  const std::vector<int32_t> third = {tokens[2]};
  EXPECT_EQ(step(Row(a, third, &set)), tokens[3]);
  EXPECT_EQ(mu, mus[3]);
  EXPECT_EQ(step(Next(a, &sampling)), tokens[4]);
  EXPECT_EQ(mu, mus[4]);
  step(Next(a, &seeded_));
  EXPECT_EQ(mu, 0.0f);

  set.mirostat_tau = 0.0f;
  const std::vector<tenon_step_row> rows = {Next(a, &set)};
  ExpectStepFails(StepArgs(rows, &tokens), TENON_INVALID_ARGUMENT,
                  {"rows[0].sampling", "mirostat_tau is 0"});
}

TENON_FOR_EACH_DEVICE(PipelineTest);

}  // namespace
}  // namespace tenon::testing
