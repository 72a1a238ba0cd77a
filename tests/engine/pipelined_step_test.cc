// Steps that are enqueued before the tokens of the last one are read, and steps
// in any company.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/session.h"
#include "tests/engine/session_fixture.h"
#include "tests/engine/traffic.h"

namespace tenon {
namespace {

using testing::ExpectSameTraffic;
using testing::Traffic;

class PipelinedStepTest : public testing::SessionTestBase {
 protected:
  void SetUp() override {
    SessionTestBase::SetUp();
    if (model_ != nullptr) session_ = MakeSession();
  }

  std::unique_ptr<Session> MakeSession(bool batch_invariant = true) {
    return SessionWith(testing::TrafficOptions(batch_invariant));
  }

  SequenceId Create() { return *session_->CreateSequence(); }

  static StepRow Next(SequenceId sequence) {
    StepRow row;
    row.sequence = sequence;
    row.num_tokens = 1;
    row.continues = true;
    row.sampling.temperature = 0.0f;
    return row;
  }

  void Enqueue(const std::vector<StepRow>& rows) {
    const Status status = session_->EnqueueStep(rows);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  std::vector<int32_t> Wait() {
    std::vector<StepRowResult> results;
    const Status status = session_->WaitStep(&results);
    EXPECT_TRUE(status.ok()) << status.message();
    std::vector<int32_t> tokens;
    for (const StepRowResult& result : results) tokens.push_back(result.token);
    return tokens;
  }

  // Greedy tokens after the prompt, step by step.
  std::vector<int32_t> Alone(const std::vector<int32_t>& prompt, int count) {
    const std::unique_ptr<Session> session = MakeSession();
    const SequenceId sequence = *session->CreateSequence();
    std::vector<int32_t> next = prompt;
    std::vector<int32_t> tokens;
    std::vector<StepRowResult> results;
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(session->Step({Row(sequence, next)}, &results).ok());
      tokens.push_back(results[0].token);
      next = {results[0].token};
    }
    return tokens;
  }

  // Each of the sequences again on its own.
  static void ExpectTheSameAlone(const Traffic& traffic, Session* alone);

  std::unique_ptr<Session> session_;
  const std::vector<int32_t> prompt_ = {3, 14, 15, 92, 65, 35};
  const std::vector<int32_t> other_ = {27, 18, 28};
};

TEST_P(PipelinedStepTest, GivesTheTokensOfStepByStep) {
  const int num_steps = on_cuda() ? 400 : 80;
  for (const bool batch_invariant : {false, true}) {
    const std::unique_ptr<Session> one = MakeSession(batch_invariant);
    const std::unique_ptr<Session> two = MakeSession(batch_invariant);
    Traffic stepwise(one.get());
    Traffic pipelined(two.get());
    stepwise.Run(num_steps, false);
    pipelined.Run(num_steps, true);
    ExpectSameTraffic(stepwise, pipelined);
    EXPECT_EQ(one->num_free_pages(), two->num_free_pages());
    EXPECT_EQ(two->num_steps_in_flight(), 0);
  }
}

// The sequences of a long run, joining and leaving, each again on its own.
TEST_P(PipelinedStepTest, CompanyChangesNoToken) {
  Traffic traffic(session_.get());
  traffic.Run(on_cuda() ? 2000 : 120, true);
  const std::unique_ptr<Session> alone = MakeSession();
  ExpectTheSameAlone(traffic, alone.get());
}

// Where contexts may be much longer than they are, the columns of the block
// table that are used go to the device alone; those of one row go as they are.
TEST_P(PipelinedStepTest, LongBlockTables) {
  SessionOptions options = session_->options();
  options.page_size = 1;
  options.max_context = 1024;
  options.num_pages = testing::kTrafficSequences * testing::kTrafficContext +
                      options.max_context;
  for (const bool graphs : {false, true}) {
    options.cuda_graphs = graphs;
    const std::unique_ptr<Session> company = SessionWith(options);
    const std::unique_ptr<Session> alone = SessionWith(options);
    ASSERT_TRUE(company != nullptr && alone != nullptr);
    Traffic traffic(company.get());
    traffic.Run(60, true);
    ExpectTheSameAlone(traffic, alone.get());
  }
}

void PipelinedStepTest::ExpectTheSameAlone(const Traffic& traffic,
                                           Session* alone) {
  for (const Traffic::Record& record : traffic.records()) {
    const SequenceId sequence = *alone->CreateSequence();
    std::vector<StepRowResult> results;
    StepRow row = Row(sequence, record.prompt);
    row.sampling = Traffic::Sampling(record.seed);
    for (size_t i = 0; i < record.tokens.size(); ++i) {
      ASSERT_TRUE(alone->Step({row}, &results).ok());
      ASSERT_EQ(results[0].token, record.tokens[i]) << "token " << i;
      ASSERT_EQ(results[0].logprob, record.logprobs[i]) << "token " << i;
      ASSERT_EQ(results[0].mirostat_mu, record.mirostat_mus[i]) << i;
      row.tokens = &record.tokens[i];
      row.num_tokens = 1;
    }
    ASSERT_TRUE(alone->ReleaseSequence(sequence).ok());
  }
}

TEST_P(PipelinedStepTest, RowsFindTheirTokensWhereverTheyWere) {
  const SequenceId a = Create();
  const SequenceId b = Create();
  Enqueue({Row(a, prompt_), Row(b, other_)});
  Enqueue({Next(b), Next(a)});  // in another order
  std::vector<std::vector<int32_t>> tokens(2);
  const std::vector<int32_t> first = Wait();
  Enqueue({Next(a)});  // b rests
  const std::vector<int32_t> second = Wait();
  const std::vector<int32_t> third = Wait();
  EXPECT_EQ((std::vector<int32_t>{first[0], second[1], third[0]}),
            Alone(prompt_, 3));
  EXPECT_EQ((std::vector<int32_t>{first[1], second[0]}), Alone(other_, 2));

  // After all was read, and after a Step.
  const std::vector<int32_t> more = Alone(prompt_, 6);
  Enqueue({Next(a)});
  EXPECT_EQ(Wait()[0], more[3]);
  std::vector<StepRowResult> results;
  ASSERT_TRUE(session_->Step({Next(a)}, &results).ok());
  EXPECT_EQ(results[0].token, more[4]);
  Enqueue({Next(a)});
  EXPECT_EQ(Wait()[0], more[5]);
}

TEST_P(PipelinedStepTest, SequencesMayChangeMeanwhile) {
  const SequenceId a = Create();
  const SequenceId b = Create();
  const int64_t free_pages = session_->num_free_pages();
  Enqueue({Row(a, prompt_), Row(b, other_)});
  Enqueue({Next(a), Next(b)});
  EXPECT_EQ(*session_->SequenceLength(a), 7);
  // b has ended, and its pages go to a newcomer.
  ASSERT_TRUE(session_->ReleaseSequence(b).ok());
  const SequenceId c = Create();
  StatusOr<SequenceId> fork = session_->ForkSequence(a);
  ASSERT_TRUE(fork.ok());
  const int32_t first = Wait()[0];
  Enqueue({Next(a), Row(c, other_)});
  const int32_t second = Wait()[0];
  const std::vector<int32_t> third = Wait();
  EXPECT_EQ((std::vector<int32_t>{first, second, third[0]}), Alone(prompt_, 3));
  EXPECT_EQ(third[1], Alone(other_, 1)[0]);
  const std::vector<int32_t> again = {second};
  Enqueue({Row(*fork, again)});
  EXPECT_EQ(Wait()[0], third[0]);
  for (const SequenceId sequence : {a, c, *fork}) {
    ASSERT_TRUE(session_->ReleaseSequence(sequence).ok());
  }
  EXPECT_EQ(session_->num_free_pages(), free_pages);
}

TEST_P(PipelinedStepTest, RefusedStepsChangeNothing) {
  const SequenceId a = Create();
  const SequenceId b = Create();
  std::vector<StepRowResult> results;
  EXPECT_EQ(session_->WaitStep(&results).code(),
            StatusCode::kFailedPrecondition);
  const auto refuse = [&](const std::vector<StepRow>& rows, StatusCode code,
                          const char* part) {
    const int64_t free_pages = session_->num_free_pages();
    const int32_t length = *session_->SequenceLength(a);
    const Status status = session_->EnqueueStep(rows);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
        << status.message();
    EXPECT_EQ(session_->num_free_pages(), free_pages);
    EXPECT_EQ(*session_->SequenceLength(a), length);
  };
  refuse({Next(a)}, StatusCode::kInvalidArgument, "drew no token");
  Enqueue({Row(a, prompt_)});
  refuse({Next(b)}, StatusCode::kInvalidArgument, "drew no token");
  StepRow both = Next(a);
  both.tokens = prompt_.data();
  refuse({both}, StatusCode::kInvalidArgument, "rows[0] continues");
  StepRow two = Next(a);
  two.num_tokens = 2;
  refuse({two}, StatusCode::kInvalidArgument, "num_tokens is 2");
  refuse({Next(a), Next(a)}, StatusCode::kInvalidArgument, "sequence");
  const std::vector<int32_t> outside = {kVocab};
  refuse({Next(a), Row(b, outside)}, StatusCode::kInvalidArgument,
         "rows[1].tokens[0] is 131");
  EXPECT_EQ(session_->Step({Next(a)}, &results).code(),
            StatusCode::kFailedPrecondition);
  Enqueue({Next(a)});
  refuse({Next(a)}, StatusCode::kFailedPrecondition, "2 steps");
  EXPECT_EQ((std::vector<int32_t>{Wait()[0], Wait()[0]}), Alone(prompt_, 2));

  // A row that is not sampled leaves no token.
  StepRow silent = Row(b, other_);
  silent.sample = false;
  Enqueue({silent});
  refuse({Next(b)}, StatusCode::kInvalidArgument, "drew no token");
  Wait();
}

// What is under way when a session ends may write nowhere any more.
TEST_P(PipelinedStepTest, SessionEndsWithStepsInFlight) {
  const SequenceId a = Create();
  Enqueue({Row(a, prompt_)});
  Enqueue({Next(a)});
  session_.reset();
}

TEST_P(PipelinedStepTest, StepOfNoRows) {
  Enqueue({});
  Enqueue({});
  EXPECT_TRUE(Wait().empty());
  EXPECT_TRUE(Wait().empty());
}

INSTANTIATE_TEST_SUITE_P(Devices, PipelinedStepTest, testing::SessionDevices(),
                         testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
