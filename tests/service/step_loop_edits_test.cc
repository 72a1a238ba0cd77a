// Penalties, biases, bans and the best tokens of a row, as the engine has them.

#include <string>
#include <thread>
#include <vector>

#include "tests/service/step_loop_fixture.h"

namespace tenon::service {
namespace {

class StepLoopEditsTest : public StepLoopTest {};

// What acts on the tokens of a sequence, for the service and for the engine.
struct EditCase {
  const char* name;
  void (*of_wire)(v1::NewSequence* sequence);
  void (*of_engine)(SamplingParams* sampling, LogitRules* rules);
};

const EditCase kEditCases[] = {
    {"repetition",
     [](v1::NewSequence* s) {
       s->mutable_sampling()->set_repetition_penalty(3.0f);
     },
     [](SamplingParams* s, LogitRules*) { s->repetition_penalty = 3.0f; }},
    {"frequency",
     [](v1::NewSequence* s) {
       s->mutable_sampling()->set_frequency_penalty(-4.0f);
     },
     [](SamplingParams* s, LogitRules*) { s->frequency_penalty = -4.0f; }},
    {"presence",
     [](v1::NewSequence* s) {
       s->mutable_sampling()->set_presence_penalty(-5.0f);
     },
     [](SamplingParams* s, LogitRules*) { s->presence_penalty = -5.0f; }},
    {"dry",
     [](v1::NewSequence* s) {
       v1::Sampling* sampling = s->mutable_sampling();
       sampling->set_presence_penalty(-4.0f);  // for repeats
       sampling->set_dry_multiplier(3.0f);
       sampling->set_dry_base(2.0f);
       sampling->set_dry_allowed_length(1);
       sampling->set_dry_range(30);
       sampling->mutable_rules()->add_dry_breaker(5);
     },
     [](SamplingParams* s, LogitRules* rules) {
       s->presence_penalty = -4.0f;
       s->dry_multiplier = 3.0f;
       s->dry_base = 2.0f;
       s->dry_allowed_length = 1;
       s->dry_range = 30;
       rules->dry_breakers = {5};
     }},
    {"bias",
     [](v1::NewSequence* s) {
       v1::LogitBias* bias = s->mutable_sampling()->mutable_rules()->add_bias();
       bias->set_token(17);
       bias->set_bias(4.0f);
     },
     [](SamplingParams*, LogitRules* rules) {
       rules->biases = {{17, 4.0f}};
     }},
    {"allowed and bad words",
     [](v1::NewSequence* s) {
       v1::LogitRules* rules = s->mutable_sampling()->mutable_rules();
       for (uint32_t token : {3u, 17u, 99u}) rules->add_allowed_token(token);
       v1::BadWord* word = rules->add_bad_word();
       word->add_token(3);
       word->add_token(17);
     },
     [](SamplingParams* s, LogitRules* rules) {
       s->flags = SamplingFlags::kOnlyAllowed;
       rules->allowed_ids = {3, 17, 99};
       rules->bad_words = {{3, 17}};
     }},
    {"minimum tokens",
     [](v1::NewSequence* s) {
       for (uint32_t token = 0; token < 60; ++token) s->add_stop_token(token);
       s->mutable_sampling()->mutable_rules()->set_min_tokens(14);
     },
     [](SamplingParams*, LogitRules* rules) {
       for (int32_t id = 0; id < 60; ++id) rules->stop_ids.push_back(id);
       rules->min_tokens = 14;
     }},
};

constexpr int32_t kTopN = 5;

// As ExpectedTokens, with edits and the best tokens.
std::vector<StepRowResult> ExpectedEdited(const EditCase& edit_case,
                                          int32_t prompt_tokens, int32_t seed,
                                          int32_t steps) {
  Limits limits = TestLimits();
  limits.prefill_tokens_per_step = 64;
  const std::unique_ptr<Session> engine = TestEngine(TestEngineOptions(limits));
  StepRow row;
  row.sequence = *engine->CreateSequence();
  row.sampling.seed = static_cast<uint64_t>(seed);
  row.sampling.num_top_logprobs = kTopN;
  LogitRules rules;
  edit_case.of_engine(&row.sampling, &rules);
  LogitEdits edits = *LogitEdits::Create(kTestVocab, 64, rules);
  std::vector<LogitEdit> made(kTestVocab);
  std::vector<int32_t> input;
  for (uint32_t token : TestPrompt(prompt_tokens, seed)) {
    input.push_back(static_cast<int32_t>(token));
  }
  std::vector<StepRowResult> all, results;
  for (int32_t i = 0; i <= steps; ++i) {
    row.tokens = input.data();
    row.num_tokens = static_cast<int32_t>(input.size());
    EXPECT_TRUE(edits
                    .Append(row.tokens, row.num_tokens,
                            i == 0 ? LogitEdits::Source::kPrompt
                                   : LogitEdits::Source::kOutput)
                    .ok());
    row.edits = made.data();
    row.num_edits =
        static_cast<int32_t>(edits.Build(row.sampling, made.data()));
    const Status status = engine->Step({row}, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    all.push_back(results[0]);
    input.assign(1, results[0].token);
  }
  return all;
}

void ExpectRow(const StepRowResult& expected, uint32_t token, float logprob,
               const v1::TopTokens& top) {
  EXPECT_EQ(token, static_cast<uint32_t>(expected.token));
  EXPECT_EQ(logprob, expected.logprob);
  ASSERT_EQ(top.token_size(), expected.num_top);
  ASSERT_EQ(top.logprob_size(), expected.num_top);
  for (int i = 0; i < expected.num_top; ++i) {
    EXPECT_EQ(top.token(i), static_cast<uint32_t>(expected.top_tokens[i]));
    EXPECT_EQ(top.logprob(i), expected.top_logprobs[i]);
  }
}

TEST_P(StepLoopEditsTest, EditsAndTopTokensAreTheEngines) {
  constexpr int32_t kPrompt = 21;  // in two chunks
  constexpr int32_t kSteps = 13;
  constexpr uint32_t kWant = v1::WANT_LOGPROB | v1::WANT_TOP_N;
  for (const EditCase& edit_case : kEditCases) {
    SCOPED_TRACE(edit_case.name);
    const std::vector<StepRowResult> expected =
        ExpectedEdited(edit_case, kPrompt, 4, kSteps);
    std::vector<uint32_t> tokens;
    for (const StepRowResult& result : expected) {
      EXPECT_GT(result.num_top, 0);
      tokens.push_back(static_cast<uint32_t>(result.token));
    }
    EXPECT_NE(tokens, ExpectedTokens(kPrompt, 4, kSteps));

    WaitingGenerate generate;
    FillNew(kPrompt, 4, generate.own_request.mutable_sequence());
    edit_case.of_wire(generate.own_request.mutable_sequence());
    generate.own_request.mutable_sequence()->set_max_tokens(kSteps + 1);
    loop_->Submit(&generate);
    EXPECT_TRUE(generate.Wait().ok());
    EXPECT_EQ(generate.tokens, tokens);

    WaitingCreate create;
    create.own_request.set_want(kWant);
    create.own_request.set_top_n(kTopN);
    v1::NewSequence* sequence = create.own_request.add_sequences();
    FillNew(kPrompt, 4, sequence);
    edit_case.of_wire(sequence);
    sequence->set_max_tokens(kSteps + 2);
    loop_->Submit(&create);
    ASSERT_TRUE(create.Wait().ok());
    const v1::CreateSequencesResponse& made = create.own_response;
    ExpectRow(expected[0], made.token(0), made.logprob(0), made.top(0));
    Client client{made.session_id(), 0, {made.seq(0)}, {}};
    for (int32_t i = 1; i <= kSteps; ++i) {
      if (i == 5) {  // a fork counts what its origin has counted
        WaitingFork fork;
        fork.own_request.set_session_id(client.session);
        fork.own_request.add_seq(client.seqs[0]);
        loop_->Submit(&fork);
        ASSERT_TRUE(fork.Wait().ok());
        client.seqs.push_back(fork.own_response.seq(0));
      }
      v1::StepRequest request;
      FillStep(client, static_cast<uint64_t>(i), &request);
      request.set_want(kWant);
      request.set_top_n(kTopN);
      v1::StepResponse response, again;
      ASSERT_TRUE(Send(request, &response).ok());
      ASSERT_TRUE(Send(request, &again).ok());
      EXPECT_EQ(response.SerializeAsString(), again.SerializeAsString());
      ASSERT_EQ(response.top_size(), request.seq_size());
      for (int j = 0; j < response.top_size(); ++j) {
        ExpectRow(expected[static_cast<size_t>(i)], response.token(j),
                  response.logprob(j), response.top(j));
      }
    }
    Release(client);
    ExpectAllFree();
  }
}

TEST_P(StepLoopEditsTest, TokensAreCountedOnlyWhereAskedFor) {
  Client client = MakeClient(1, 4);
  v1::StepRequest request;
  FillStep(client, 1, &request);
  request.mutable_overrides()->set_frequency_penalty(1.0f);
  const Failure failure = Send(request);
  EXPECT_EQ(failure.code, StatusCode::kInvalidArgument);
  EXPECT_EQ(failure.subject, "overrides");
  request.mutable_overrides()->set_frequency_penalty(0.0f);
  v1::StepResponse response;
  EXPECT_TRUE(Send(request, &response).ok());
  EXPECT_EQ(response.top_size(), 0);
}

// An engine with less room than the service knows of fails a step, which then
// has counted nothing; a step beyond the service's room is refused.
TEST_P(StepLoopEditsTest, StepsThatFailCountNothing) {
  const EditCase& repetition = kEditCases[0];
  constexpr int32_t kPrompt = 9;
  for (const int32_t room : {1000, 24}) {
    SCOPED_TRACE(room);
    Limits limits = TestLimits();
    limits.logit_edits = room;
    loop_.reset();
    SessionOptions engine = TestEngineOptions(limits);
    engine.max_logit_edits = 16;
    StepLoopOptions options{limits, GetParam()};
    loop_ = std::make_unique<StepLoop>(TestEngine(engine), options);
    Client client;
    for (int32_t i = 0; i < 3; ++i) {
      WaitingCreate create;
      if (i != 0) create.own_request.set_session_id(client.session);
      v1::NewSequence* sequence = create.own_request.add_sequences();
      FillNew(kPrompt, 4, sequence);
      repetition.of_wire(sequence);
      sequence->set_max_tokens(6);
      loop_->Submit(&create);
      ASSERT_TRUE(create.Wait().ok());
      client.session = create.own_response.session_id();
      client.seqs.push_back(create.own_response.seq(0));
    }
    const std::vector<StepRowResult> expected =
        ExpectedEdited(repetition, kPrompt, 4, 3);
    v1::StepRequest request, one;
    for (uint64_t step = 1; step <= 3; ++step) {
      request.Clear();
      FillStep(client, step, &request);
      const Failure failure = Send(request);
      EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
      EXPECT_EQ(failure.subject, room == 24 ? "logit_edits" : "");
      one = request;
      one.clear_seq();
      one.add_seq(client.seqs[0]);
      v1::StepResponse response;
      ASSERT_TRUE(Send(one, &response).ok());
      EXPECT_EQ(response.token(0), static_cast<uint32_t>(expected[step].token));
    }
    if (room == 24) {  // for a whole context
      WaitingCreate create;
      create.own_request.set_session_id(client.session);
      FillNew(kPrompt, 4, create.own_request.add_sequences());
      repetition.of_wire(create.own_request.mutable_sequences(0));
      loop_->Submit(&create);
      const Failure failure = create.Wait();
      EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
      EXPECT_EQ(failure.subject, "logit_edits");
    }
    Release(client);
    ExpectAllFree();
  }
}

// What does not fit into the room for edits together is run in several steps.
TEST_P(StepLoopEditsTest, RowsWaitForRoomForTheirEdits) {
  Limits limits = TestLimits();
  limits.logit_edits = 40;
  Start(limits);
  constexpr int32_t kCalls = 6;
  std::vector<WaitingGenerate> calls(kCalls);
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < kCalls; ++i) {
    WaitingGenerate& call = calls[static_cast<size_t>(i)];
    FillNew(9, i, call.own_request.mutable_sequence());
    call.own_request.mutable_sequence()->set_max_tokens(20);
    kEditCases[i % 3].of_wire(call.own_request.mutable_sequence());
    threads.emplace_back([this, &call] { loop_->Submit(&call); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t i = 0; i < kCalls; ++i) {
    WaitingGenerate& call = calls[static_cast<size_t>(i)];
    EXPECT_TRUE(call.Wait().ok());
    std::vector<uint32_t> expected;
    for (const auto& result : ExpectedEdited(kEditCases[i % 3], 9, i, 19)) {
      expected.push_back(static_cast<uint32_t>(result.token));
    }
    EXPECT_EQ(call.tokens, expected) << i;
  }
  ExpectAllFree();
}

INSTANTIATE_TEST_SUITE_P(RunInline, StepLoopEditsTest, ::testing::Bool());

}  // namespace
}  // namespace tenon::service
