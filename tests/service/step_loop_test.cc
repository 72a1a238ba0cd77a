// The service without gRPC: sessions, exactly-once steps, batches, leases.

#include "service/step_loop.h"

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/service/step_loop_fixture.h"

namespace tenon::service {
namespace {

using std::chrono::milliseconds;

TEST_P(StepLoopTest, TokensAreTheEngines) {
  Client client = MakeClient(5, 1);
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(Step(&client).ok());
  for (int32_t i = 0; i < 5; ++i) {
    EXPECT_EQ(client.tokens[static_cast<size_t>(i)],
              ExpectedTokens(PromptSize(1 + i), 1 + i, 10));
  }
  Release(client);
  ExpectAllFree();
}

TEST_P(StepLoopTest, ClientsAreBatchedAndKeepTheirTokens) {
  std::vector<std::thread> threads;
  std::vector<Client> clients(8);
  for (int32_t c = 0; c < 8; ++c) {
    threads.emplace_back([this, c, &clients] {
      Client& client = clients[static_cast<size_t>(c)];
      client = MakeClient(3, 3 * c);
      for (int i = 0; i < 19; ++i) ASSERT_TRUE(Step(&client).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t c = 0; c < 8; ++c) {
    for (int32_t i = 0; i < 3; ++i) {
      EXPECT_EQ(clients[static_cast<size_t>(c)].tokens[static_cast<size_t>(i)],
                ExpectedTokens(PromptSize(3 * c + i), 3 * c + i, 19));
    }
    EXPECT_EQ(Release(clients[static_cast<size_t>(c)]), 3u);
  }
  ExpectAllFree();
  EXPECT_GT(loop_->metrics().rows, loop_->metrics().steps);
}

// Rows that stay the same from step to step are not made again: not so after
// overrides, another order, other rows, or another sequence in the place.
TEST_P(StepLoopTest, RowsFollowTheirSequencesFromStepToStep) {
  constexpr int32_t kSteps = 16;
  const auto is_greedy = [](int32_t step) { return step % 4 == 2; };
  const auto expected = [&](int32_t seed) {
    SessionOptions options = TestEngineOptions(TestLimits());
    options.max_tokens = 64;
    const std::unique_ptr<Session> engine = TestEngine(options);
    std::vector<int32_t> input;
    for (uint32_t token : TestPrompt(PromptSize(seed), seed)) {
      input.push_back(static_cast<int32_t>(token));
    }
    StepRow row;
    row.sequence = *engine->CreateSequence();
    row.sampling.seed = static_cast<uint64_t>(seed);
    std::vector<uint32_t> tokens;
    std::vector<StepRowResult> results;
    for (int32_t step = 0; step <= kSteps; ++step) {
      row.tokens = input.data();
      row.num_tokens = static_cast<int32_t>(input.size());
      row.sampling.temperature = is_greedy(step) ? 0.0f : 1.0f;
      EXPECT_TRUE(engine->Step({row}, &results).ok());
      tokens.push_back(static_cast<uint32_t>(results[0].token));
      input.assign(1, results[0].token);
    }
    return tokens;
  };
  Client one = MakeClient(3, 1), other = MakeClient(1, 8);
  std::vector<size_t> order = {0, 1, 2};
  for (int32_t step = 1; step <= kSteps; ++step) {
    v1::StepRequest request;
    request.set_session_id(one.session);
    request.set_step_id(static_cast<uint64_t>(step));
    if (is_greedy(step)) request.mutable_overrides()->set_temperature(0.0f);
    if (step % 5 == 0) std::swap(order[0], order[2]);
    for (size_t i : order) request.add_seq(one.seqs[i]);
    v1::StepResponse response;
    ASSERT_TRUE(Send(request, &response).ok());
    for (size_t i = 0; i < order.size(); ++i) {
      one.tokens[order[i]].push_back(response.token(static_cast<int>(i)));
    }
    if (step % 7 == 0) {  // its row is where the first one was
      ASSERT_TRUE(Step(&other).ok());
      Release(other);
      other = MakeClient(1, 8 + step);
    }
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(one.tokens[i], expected(1 + static_cast<int32_t>(i)));
  }
}

TEST_P(StepLoopTest, AStepTakesEffectOnce) {
  Client client = MakeClient(2, 4);
  v1::StepRequest request;
  FillStep(client, 1, &request);
  v1::StepResponse first, again;
  ASSERT_TRUE(Send(request, &first).ok());
  ASSERT_TRUE(Send(request, &again).ok());
  EXPECT_EQ(first.SerializeAsString(), again.SerializeAsString());
  EXPECT_EQ(loop_->metrics().replayed, 1u);

  v1::StepRequest other = request;
  other.mutable_overrides()->set_temperature(0.0f);
  EXPECT_EQ(Send(other).code, StatusCode::kAborted);
  using Set = void (v1::Sampling::*)(float);
  for (const Set set :
       {Set(&v1::Sampling::set_typical_p), Set(&v1::Sampling::set_top_n_sigma),
        Set(&v1::Sampling::set_xtc_probability),
        Set(&v1::Sampling::set_xtc_threshold),
        Set(&v1::Sampling::set_repetition_penalty),
        Set(&v1::Sampling::set_frequency_penalty),
        Set(&v1::Sampling::set_presence_penalty),
        Set(&v1::Sampling::set_dry_multiplier),
        Set(&v1::Sampling::set_mirostat_tau),
        Set(&v1::Sampling::set_mirostat_eta)}) {
    other = request;
    (other.mutable_overrides()->*set)(0.25f);
    EXPECT_EQ(Send(other).code, StatusCode::kAborted);
  }
  other = request;
  other.mutable_overrides()->set_dry_range(3);
  EXPECT_EQ(Send(other).code, StatusCode::kAborted);
  other = request;
  other.set_want(v1::WANT_TOP_N);
  other.set_top_n(2);
  EXPECT_EQ(Send(other).code, StatusCode::kAborted);
  other = request;
  other.add_input_token(1);
  other.add_input_token(2);
  EXPECT_EQ(Send(other).code, StatusCode::kAborted);

  request.set_step_id(3);
  const Failure gap = Send(request);
  EXPECT_EQ(gap.code, StatusCode::kFailedPrecondition);
  EXPECT_EQ(gap.reason, "STEP_ID_GAP");
  for (uint64_t id = 2; id < 8; ++id) {
    request.set_step_id(id);
    ASSERT_TRUE(Send(request).ok());
  }
  request.set_step_id(1);
  EXPECT_EQ(Send(request).reason, "STEP_ID_EXPIRED");
}

TEST_P(StepLoopTest, DuplicatesThatWaitTogetherRunOnce) {
  Client client = MakeClient(1, 4);
  std::vector<WaitingStep> steps(12);
  std::vector<std::thread> threads;
  for (WaitingStep& step : steps) {
    FillStep(client, 1, &step.own_request);
    threads.emplace_back([this, &step] { loop_->Submit(&step); });
  }
  for (std::thread& thread : threads) thread.join();
  const uint32_t expected = ExpectedTokens(PromptSize(4), 4, 1)[1];
  for (WaitingStep& step : steps) {
    ASSERT_TRUE(step.Wait().ok());
    EXPECT_EQ(step.own_response.token(0), expected);
  }
  EXPECT_EQ(loop_->metrics().replayed, 11u);
}

TEST_P(StepLoopTest, OneBadRowRefusesTheWholeStepAndChangesNothing) {
  Client client = MakeClient(2, 6);
  v1::StepRequest request;
  FillStep(client, 1, &request);
  v1::StepRequest bad = request;
  bad.add_seq(request.seq(0));
  EXPECT_EQ(Send(bad).code, StatusCode::kInvalidArgument);
  bad = request;
  bad.set_seq(1, request.seq(1) ^ 1);
  EXPECT_EQ(Send(bad).code, StatusCode::kNotFound);
  bad.set_seq(1, request.seq(1) ^ (uint64_t{1} << 50));
  EXPECT_EQ(Send(bad).reason, "EPOCH_CHANGED");
  bad = request;
  bad.set_session_id(request.session_id() ^ 1);
  EXPECT_EQ(Send(bad).code, StatusCode::kNotFound);
  ASSERT_TRUE(Step(&client).ok());
  EXPECT_EQ(client.tokens[1], ExpectedTokens(PromptSize(7), 7, 1));
}

TEST_P(StepLoopTest, ASessionCannotStepAnothersSequence) {
  Client first = MakeClient(1, 1);
  const Client second = MakeClient(1, 2);
  first.seqs = second.seqs;
  EXPECT_EQ(Step(&first).code, StatusCode::kNotFound);
}

TEST_P(StepLoopTest, HandlesOfReleasedSequencesAreNeverUsedAgain) {
  Client old = MakeClient(1, 1);
  Client keeper = MakeClient(1, 2);  // keeps nothing of the first alive
  for (int i = 0; i < 100; ++i) {
    WaitingRelease release;
    release.own_request.set_session_id(old.session);
    release.own_request.add_seq(old.seqs[0]);
    loop_->Submit(&release);
    ASSERT_TRUE(release.Wait().ok());
    EXPECT_EQ(release.own_response.released(), i == 0 ? 1u : 0u);
    WaitingCreate create;
    create.own_request.set_session_id(old.session);
    FillNew(2, i, create.own_request.add_sequences());
    loop_->Submit(&create);
    ASSERT_TRUE(create.Wait().ok());
    EXPECT_NE(create.own_response.seq(0), old.seqs[0]);
    EXPECT_EQ(Step(&old).code, StatusCode::kNotFound);
    WaitingRelease again;
    again.own_request.set_session_id(old.session);
    again.own_request.add_seq(create.own_response.seq(0));
    loop_->Submit(&again);
    ASSERT_TRUE(again.Wait().ok());
  }
}

TEST_P(StepLoopTest, FinishesAtLengthEosAndStop) {
  const std::vector<uint32_t> expected = ExpectedTokens(PromptSize(3), 3, 4);
  WaitingGenerate length;
  FillNew(PromptSize(3), 3, length.own_request.mutable_sequence());
  length.own_request.mutable_sequence()->set_max_tokens(5);
  loop_->Submit(&length);
  ASSERT_TRUE(length.Wait().ok());
  EXPECT_EQ(length.tokens, expected);
  EXPECT_EQ(length.status, v1::ROW_STATUS_FINISHED_LENGTH);

  WaitingGenerate stop;
  FillNew(PromptSize(3), 3, stop.own_request.mutable_sequence());
  stop.own_request.mutable_sequence()->add_stop_token(expected[2]);
  loop_->Submit(&stop);
  ASSERT_TRUE(stop.Wait().ok());
  EXPECT_EQ(stop.status, v1::ROW_STATUS_FINISHED_STOP);
  EXPECT_EQ(stop.tokens.back(), expected[2]);

  Client client = MakeClient(1, 3, 2);
  ASSERT_TRUE(Step(&client).ok());
  EXPECT_EQ(Step(&client).reason, "FINISHED");
  Release(client);
  ExpectAllFree();
}

TEST_P(StepLoopTest, GenerateRunsToTheEndOfTheContext) {
  WaitingGenerate call;
  FillNew(10, 3, call.own_request.mutable_sequence());
  loop_->Submit(&call);
  ASSERT_TRUE(call.Wait().ok());
  EXPECT_EQ(call.tokens.size(), 64u - 10 + 1);
  ExpectAllFree();
}

TEST_P(StepLoopTest, CancelledGenerateFreesItsPages) {
  WaitingGenerate call;
  FillNew(10, 3, call.own_request.mutable_sequence());
  call.cancel_after = 4;
  loop_->Submit(&call);
  EXPECT_EQ(call.Wait().code, StatusCode::kCancelled);
  EXPECT_EQ(call.tokens.size(), 4u);
  ExpectAllFree();
}

TEST_P(StepLoopTest, ACallCancelledBeforeItsLaunchHasNoEffect) {
  WaitingCreate create;
  create.cancelled = true;
  FillNew(9, 1, create.own_request.add_sequences());
  loop_->Submit(&create);
  EXPECT_EQ(create.Wait().code, StatusCode::kCancelled);
  ExpectAllFree();
  EXPECT_EQ(loop_->metrics().sessions, 0);

  Client client = MakeClient(1, 5);
  WaitingStep step;
  FillStep(client, 1, &step.own_request);
  step.cancelled = true;
  loop_->Submit(&step);
  EXPECT_EQ(step.Wait().code, StatusCode::kCancelled);
  WaitingStep late;
  FillStep(client, 1, &late.own_request);
  late.deadline = Clock::now() - milliseconds(1);
  loop_->Submit(&late);
  EXPECT_EQ(late.Wait().code, StatusCode::kDeadlineExceeded);
  ASSERT_TRUE(Step(&client).ok());
  EXPECT_EQ(client.tokens[0], ExpectedTokens(PromptSize(5), 5, 1));
}

TEST_P(StepLoopTest, ForksShareThePastAndGiveAllPagesBack) {
  Client client = MakeClient(1, 9, 30);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Step(&client).ok());
  WaitingFork fork;
  fork.own_request.set_session_id(client.session);
  for (int i = 0; i < 4; ++i) fork.own_request.add_seq(client.seqs[0]);
  loop_->Submit(&fork);
  ASSERT_TRUE(fork.Wait().ok());
  for (uint64_t seq : fork.own_response.seq()) {
    client.seqs.push_back(seq);
    client.tokens.push_back(client.tokens[0]);
  }
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Step(&client).ok());
  const std::vector<uint32_t> expected = ExpectedTokens(PromptSize(9), 9, 23);
  for (const std::vector<uint32_t>& tokens : client.tokens) {
    EXPECT_EQ(tokens, expected);
  }
  EXPECT_EQ(Release(client), 5u);
  ExpectAllFree();
}

TEST_P(StepLoopTest, PagesAreSetAsideSoThatNoStepRunsOut) {
  Start(TestLimits(), 10);
  WaitingCreate create;
  for (int i = 0; i < 3; ++i) {
    FillNew(8, i, create.own_request.add_sequences());
    create.own_request.mutable_sequences(i)->set_max_tokens(17);  // 3 pages
  }
  loop_->Submit(&create);
  ASSERT_TRUE(create.Wait().ok());
  Client client{create.own_response.session_id(), 0, {}, {}};
  for (uint64_t seq : create.own_response.seq()) {
    client.seqs.push_back(seq);
    client.tokens.emplace_back();
  }
  WaitingCreate more;
  FillNew(8, 1, more.own_request.add_sequences());
  more.own_request.mutable_sequences(0)->set_max_tokens(2);
  loop_->Submit(&more);
  const Failure failure = more.Wait();
  EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
  EXPECT_EQ(failure.subject, "pages");
  EXPECT_GT(failure.retry_ms, 0);
  for (int i = 0; i < 16; ++i) ASSERT_TRUE(Step(&client).ok());
  Release(client);
  ExpectAllFree();
}

TEST_P(StepLoopTest, ForksHavePagesSetAsideToo) {
  Start(TestLimits(), 10);
  WaitingCreate create;
  FillNew(8, 1, create.own_request.add_sequences());
  create.own_request.mutable_sequences(0)->set_max_tokens(17);  // 3 pages
  loop_->Submit(&create);
  ASSERT_TRUE(create.Wait().ok());
  Client client{create.own_response.session_id(),
                0,
                {create.own_response.seq(0)},
                {{create.own_response.token(0)}}};
  // The first page is shared: each fork needs two.
  for (int i = 0; i < 2; ++i) {
    WaitingFork fork;
    fork.own_request.set_session_id(client.session);
    for (int j = 0; j < 3; ++j) fork.own_request.add_seq(client.seqs[0]);
    loop_->Submit(&fork);
    const Failure failure = fork.Wait();
    if (i == 1) {
      EXPECT_EQ(failure.subject, "pages");
      EXPECT_EQ(loop_->metrics().active_sequences, 4) << "all or none";
      break;
    }
    ASSERT_TRUE(failure.ok()) << failure.message;
    EXPECT_EQ(loop_->metrics().free_pages, 1);
    for (uint64_t seq : fork.own_response.seq()) {
      client.seqs.push_back(seq);
      client.tokens.push_back(client.tokens[0]);
    }
  }
  for (int i = 0; i < 16; ++i) ASSERT_TRUE(Step(&client).ok());
  for (const auto& tokens : client.tokens) {
    EXPECT_EQ(tokens, ExpectedTokens(8, 1, 16));
  }
  Release(client);
  ExpectAllFree();
}

TEST_P(StepLoopTest, CreateIsAllOrNothing) {
  WaitingCreate create;
  for (int i = 0; i < 25; ++i) {  // 24 sequences fit
    FillNew(2, i, create.own_request.add_sequences());
    create.own_request.mutable_sequences(i)->set_max_tokens(2);
  }
  loop_->Submit(&create);
  const Failure failure = create.Wait();
  EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
  EXPECT_EQ(failure.subject, "sequences");
  ExpectAllFree();
  EXPECT_EQ(loop_->metrics().sessions, 0);
}

TEST_P(StepLoopTest, LeasesRunOutUnlessUsed) {
  Client kept = MakeClient(1, 1, 50);
  WaitingCreate create;
  create.own_request.set_lease_ms(600);
  FillNew(5, 2, create.own_request.add_sequences());
  loop_->Submit(&create);
  ASSERT_TRUE(create.Wait().ok());
  EXPECT_EQ(create.own_response.lease_ms(), 600u);
  Client client{create.own_response.session_id(),
                0,
                {create.own_response.seq(0)},
                {{create.own_response.token(0)}}};
  for (int i = 0; i < 6; ++i) {
    std::this_thread::sleep_for(milliseconds(150));
    ASSERT_TRUE(Step(&client).ok()) << i;
  }
  std::this_thread::sleep_for(milliseconds(900));
  EXPECT_EQ(Step(&client).code, StatusCode::kNotFound);
  EXPECT_EQ(loop_->metrics().expired_sequences, 1u);
  ASSERT_TRUE(Step(&kept).ok());
  Release(kept);
  ExpectAllFree();
}

TEST_P(StepLoopTest, TheGateRefusesWhatItCannotQueue) {
  Limits limits = TestLimits();
  limits.queued_rows = 3;
  Start(limits);
  const Client client = MakeClient(4, 1);
  WaitingStep step;
  FillStep(client, 1, &step.own_request);
  loop_->Submit(&step);
  const Failure failure = step.Wait();
  EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
  EXPECT_EQ(failure.subject, "queued_rows");
  EXPECT_GT(failure.retry_ms, 0);
  EXPECT_EQ(loop_->metrics().rejected, 1u);
  Release(client);
  ExpectAllFree();
}

// Its first token holds the loop up.
class HeldGenerate final : public WaitingGenerate {
 public:
  void Emit(uint32_t token, const StepRowResult& result,
            v1::RowStatus status) override {
    if (tokens.empty()) {
      held.set_value();
      go_on.get_future().wait();
    }
    WaitingGenerate::Emit(token, result, status);
  }
  std::promise<void> held;
  std::promise<void> go_on;
};

TEST_P(StepLoopTest, AFullQueueStillLetsSequencesBeReleased) {
  Limits limits = TestLimits();
  limits.queued_requests = 1;
  Start(limits);
  const Client client = MakeClient(2, 1);
  HeldGenerate held;
  FillNew(5, 1, held.own_request.mutable_sequence());
  held.own_request.mutable_sequence()->set_max_tokens(2);
  std::thread holder([&] { loop_->Submit(&held); });
  held.held.get_future().wait();
  WaitingStep first, second;
  FillStep(client, 1, &first.own_request);
  FillStep(client, 2, &second.own_request);
  WaitingRelease release;
  release.own_request.set_session_id(client.session);
  release.own_request.set_end_session(true);
  loop_->Submit(&first);
  loop_->Submit(&second);
  loop_->Submit(&release);
  EXPECT_EQ(second.Wait().subject, "queued_requests");
  held.go_on.set_value();
  holder.join();
  EXPECT_TRUE(held.Wait().ok());
  EXPECT_TRUE(release.Wait().ok());
  EXPECT_EQ(release.own_response.released(), 2u);
  EXPECT_EQ(first.Wait().code, StatusCode::kNotFound) << "released before it";
  ExpectAllFree();
}

TEST_P(StepLoopTest, DrainingRefusesNewSequencesAndStepsTheOldOnes) {
  Client client = MakeClient(1, 1);
  loop_->set_draining(true);
  WaitingCreate create;
  FillNew(5, 2, create.own_request.add_sequences());
  loop_->Submit(&create);
  const Failure failure = create.Wait();
  EXPECT_EQ(failure.code, StatusCode::kUnavailable);
  EXPECT_EQ(failure.reason, "DRAINING");
  EXPECT_TRUE(Step(&client).ok());
  loop_->set_draining(false);
  MakeClient(1, 3);
}

TEST_P(StepLoopTest, AbortEndsSessionsAndGenerates) {
  const Client first = MakeClient(2, 1);
  Client second = MakeClient(1, 4);
  WaitingAbort abort;
  abort.own_request.add_session_id(first.session);
  loop_->Submit(&abort);
  ASSERT_TRUE(abort.Wait().ok());
  EXPECT_EQ(abort.own_response.sessions(), 1u);
  EXPECT_EQ(abort.own_response.sequences(), 2u);
  ASSERT_TRUE(Step(&second).ok());
  WaitingAbort all;
  all.own_request.set_all_sessions(true);
  loop_->Submit(&all);
  ASSERT_TRUE(all.Wait().ok());
  ExpectAllFree();
}

TEST_P(StepLoopTest, ALongPromptDoesNotHoldUpDecoding) {
  Client client = MakeClient(1, 1, 40);
  WaitingGenerate prompt;  // 60 tokens, 16 a step
  FillNew(60, 2, prompt.own_request.mutable_sequence());
  prompt.own_request.mutable_sequence()->set_max_tokens(1);
  loop_->Submit(&prompt);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Step(&client).ok());
  ASSERT_TRUE(prompt.Wait().ok());
  EXPECT_EQ(prompt.tokens, ExpectedTokens(60, 2, 0));
  EXPECT_EQ(client.tokens[0], ExpectedTokens(PromptSize(1), 1, 3));
}

TEST_P(StepLoopTest, PromptsRunBesideABatchThatIsFull) {
  Client client = MakeClient(TestLimits().rows_per_step, 1);
  HeldGenerate held;
  FillNew(5, 1, held.own_request.mutable_sequence());
  held.own_request.mutable_sequence()->set_max_tokens(1);
  std::thread holder([&] { loop_->Submit(&held); });
  held.held.get_future().wait();
  WaitingCreate create;
  for (int i = 0; i < 4; ++i) {
    FillNew(10, i, create.own_request.add_sequences());
  }
  WaitingStep step;
  FillStep(client, 1, &step.own_request);
  loop_->Submit(&create);
  loop_->Submit(&step);
  held.go_on.set_value();
  holder.join();
  ASSERT_TRUE(step.Wait().ok());
  ASSERT_TRUE(create.Wait().ok());
  // 16 rows that decode, a prompt to its end, and the beginning of the next.
  EXPECT_EQ(step.own_response.timing().batch_rows(), 18u);
  EXPECT_EQ(step.own_response.timing().batch_tokens(), 32u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(create.own_response.token(i), ExpectedTokens(10, i, 0)[0]);
  }
  EXPECT_EQ(step.own_response.token(2), ExpectedTokens(PromptSize(3), 3, 1)[1]);
}

TEST_P(StepLoopTest, ShutdownFinishesEveryCall) {
  std::vector<WaitingGenerate> calls(6);
  for (WaitingGenerate& call : calls) {
    FillNew(20, 2, call.own_request.mutable_sequence());
    loop_->Submit(&call);
  }
  loop_.reset();
  for (WaitingGenerate& call : calls) {
    const Failure failure = call.Wait();
    EXPECT_TRUE(failure.ok() || failure.code == StatusCode::kUnavailable);
  }
}

INSTANTIATE_TEST_SUITE_P(RunInline, StepLoopTest, ::testing::Bool());

}  // namespace
}  // namespace tenon::service
