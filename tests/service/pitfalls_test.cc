// One test for each known bug of other servers that this one could have, named
// after it. The threads that are named say what went wrong there.

#include <ctime>
#include <limits>
#include <thread>

#include "service/validator.h"
#include "tests/service/loop_fixture.h"

namespace tenon::service {
namespace {

class PitfallTest : public ::testing::Test {
 protected:
  void SetUp() override {
    StepLoopOptions options;
    options.limits = TestLimits();
    loop_ = std::make_unique<StepLoop>(
        TestEngine(TestEngineOptions(options.limits)), options);
    validator_ =
        std::make_unique<Validator>(TestModel()->config, 64, options.limits);
  }

  uint64_t Create(v1::CreateSequencesResponse* response, int32_t seed = 1,
                  uint32_t lease_ms = 30000) {
    WaitingCreate call;
    FillNew(6, seed, call.own_request.add_sequences());
    call.own_request.set_lease_ms(lease_ms);
    loop_->Submit(&call);
    EXPECT_TRUE(call.Wait().ok());
    *response = call.own_response;
    return response->session_id();
  }

  Failure Step(uint64_t session, uint64_t step_id, uint64_t seq,
               v1::StepResponse* response = nullptr) {
    WaitingStep call;
    call.own_request.set_session_id(session);
    call.own_request.set_step_id(step_id);
    call.own_request.add_seq(seq);
    const Failure failure = validator_->Check(call.own_request);
    if (!failure.ok()) return failure;
    loop_->Submit(&call);
    const Failure result = call.Wait();
    if (response != nullptr) *response = call.own_response;
    return result;
  }

  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<Validator> validator_;
};

// A client's timeout in the middle of a step crashed the server.
TEST_F(PitfallTest, TritonServer7368_CancelRacesWithCompletion) {
  v1::CreateSequencesResponse created;
  const uint64_t session = Create(&created);
  const std::vector<uint32_t> expected = ExpectedTokens(6, 1, 40);
  for (uint64_t id = 1; id <= 40; ++id) {
    WaitingStep call;
    call.own_request.set_session_id(session);
    call.own_request.set_step_id(id);
    call.own_request.add_seq(created.seq(0));
    std::thread canceller([&] { call.cancelled = true; });
    loop_->Submit(&call);
    const Failure failure = call.Wait();
    canceller.join();
    v1::StepResponse response = call.own_response;
    if (!failure.ok()) {  // it had no effect: once more
      EXPECT_EQ(failure.code, StatusCode::kCancelled);
      ASSERT_TRUE(Step(session, id, created.seq(0), &response).ok());
    }
    EXPECT_EQ(response.token(0), expected[id]);
  }
}

// A slot that was given back twice had two owners, and one user's state went
// to another.
TEST_F(PitfallTest, TritonCore341_ASlotIsReleasedOnce) {
  v1::CreateSequencesResponse created;
  const uint64_t session = Create(&created);
  WaitingRelease release;
  release.own_request.set_session_id(session);
  for (int i = 0; i < 3; ++i) release.own_request.add_seq(created.seq(0));
  loop_->Submit(&release);
  ASSERT_TRUE(release.Wait().ok());
  EXPECT_EQ(release.own_response.released(), 1u);
  v1::CreateSequencesResponse first, second;
  Create(&first, 2);
  Create(&second, 3);
  EXPECT_NE(first.seq(0), second.seq(0));
  EXPECT_EQ(loop_->metrics().active_sequences, 2);
  v1::StepResponse response;
  ASSERT_TRUE(Step(first.session_id(), 1, first.seq(0), &response).ok());
  EXPECT_EQ(response.token(0), ExpectedTokens(6, 2, 1)[1]);
}

// State of sequences that timed out was never given back.
TEST_F(PitfallTest, TritonServer8078_AbandonedSequencesAreGivenBack) {
  const int64_t free = loop_->metrics().free_pages;
  for (int i = 0; i < 6; ++i) {
    v1::CreateSequencesResponse created;
    Create(&created, i, 30);
  }
  for (int i = 0; i < 400 && loop_->metrics().free_pages != free; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(loop_->metrics().free_pages, free);
  EXPECT_EQ(loop_->metrics().engine_free_pages, free);
}

// The reaper of idle sequences went round for ever.
TEST_F(PitfallTest, TritonServer8449_TheReaperDoesNotSpin) {
  timespec before{};
  timespec after{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double seconds = static_cast<double>(after.tv_sec - before.tv_sec) +
                         1e-9 * static_cast<double>(after.tv_nsec) -
                         1e-9 * static_cast<double>(before.tv_nsec);
  EXPECT_LT(seconds, 0.1) << "an idle loop sleeps";
}

// A client that was gone left its generation running.
TEST_F(PitfallTest, SglangPr11399_ADisconnectEndsAGeneration) {
  WaitingGenerate call;
  FillNew(6, 1, call.own_request.mutable_sequence());
  call.cancel_after = 2;
  loop_->Submit(&call);
  EXPECT_EQ(call.Wait().code, StatusCode::kCancelled);
  EXPECT_EQ(call.tokens.size(), 2u);
  EXPECT_EQ(loop_->metrics().active_sequences, 0);
}

// Health by a real generation hung behind the load, or starved it.
TEST_F(PitfallTest, Sglang11353_HealthRunsNoStep) {
  const uint64_t steps = loop_->metrics().steps;
  const Time first = loop_->heartbeat();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_GT(loop_->heartbeat(), first);
  EXPECT_EQ(loop_->metrics().steps, steps);
}

// proto3's zero was taken for "unset", or the other way round.
TEST_F(PitfallTest, VllmRouter283_ZeroAndUnsetDiffer) {
  v1::Sampling sampling;
  EXPECT_EQ(MergeSampling(SamplingParams(), sampling).temperature, 1.0f);
  sampling.set_temperature(0.0f);
  EXPECT_EQ(MergeSampling(SamplingParams(), sampling).temperature, 0.0f);
  sampling.set_top_k(-1);
  v1::GenerateRequest request;
  FillNew(3, 1, request.mutable_sequence());
  *request.mutable_sequence()->mutable_sampling() = sampling;
  EXPECT_TRUE(validator_->Check(request).ok());
  EXPECT_EQ(v1::ROW_STATUS_UNSPECIFIED, 0);
}

// An id in a tensor of indices was used before it was checked; the check was an
// assert, which a release build has not.
TEST_F(PitfallTest, LlamaCpp25765And26912_EveryIdIsCheckedByValue) {
  for (uint32_t token : {131u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    v1::GenerateRequest generate;
    generate.mutable_sequence()->add_prompt(token);
    EXPECT_EQ(validator_->Check(generate).code, StatusCode::kInvalidArgument);
    v1::StepRequest step;
    step.set_step_id(1);
    step.add_seq(1);
    step.add_input_token(token);
    EXPECT_EQ(validator_->Check(step).code, StatusCode::kInvalidArgument);
  }
}

// A value of an enumeration that nobody knew crashed the server.
TEST_F(PitfallTest, GgmlRpc13067_UnknownEnumValuesAreRefused) {
  v1::GenerateRequest request;
  FillNew(3, 1, request.mutable_sequence());
  for (int value : {4, 77, -1, std::numeric_limits<int>::max()}) {
    request.mutable_sequence()->mutable_sampling()->set_filter_order(
        static_cast<v1::FilterOrder>(value));
    EXPECT_EQ(validator_->Check(request).code, StatusCode::kInvalidArgument);
  }
}

// A product of sizes overflowed.
TEST_F(PitfallTest, GgmlRpc27203_SizesDoNotOverflow) {
  v1::CreateSequencesRequest request;
  FillNew(60, 1, request.add_sequences());
  for (uint32_t max_tokens : {6u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    request.mutable_sequences(0)->set_max_tokens(max_tokens);
    EXPECT_EQ(validator_->Check(request).code, StatusCode::kOutOfRange);
  }
}

// A handle was a pointer, and any would do.
TEST_F(PitfallTest, GgmlRpc25542_HandlesAreNotGuessed) {
  v1::CreateSequencesResponse created;
  const uint64_t session = Create(&created);
  for (int bit = 0; bit < 64; ++bit) {
    const StatusCode code =
        Step(session, 1, created.seq(0) ^ (uint64_t{1} << bit)).code;
    EXPECT_TRUE(code == StatusCode::kNotFound ||
                code == StatusCode::kFailedPrecondition);
    const StatusCode other =
        Step(session ^ (uint64_t{1} << bit), 1, created.seq(0)).code;
    EXPECT_TRUE(other == StatusCode::kNotFound ||
                other == StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(Step(session, 1, created.seq(0)).ok());
}

// Errors reached clients as data in a reply, or all as one code.
TEST_F(PitfallTest, Ray58851AndSglang19972_CodesArriveAsTheyAre) {
  v1::CreateSequencesResponse created;
  const uint64_t session = Create(&created);
  EXPECT_EQ(Step(session, 9, created.seq(0)).code,
            StatusCode::kFailedPrecondition);
  EXPECT_EQ(Step(session, 1, created.seq(0) ^ 1).code, StatusCode::kNotFound);
  EXPECT_EQ(Step(session, 0, created.seq(0)).code,
            StatusCode::kInvalidArgument);
}

// Draining ended what was running after five seconds.
TEST_F(PitfallTest, Dynamo13559_DrainingEndsNoSequence) {
  v1::CreateSequencesResponse created;
  const uint64_t session = Create(&created);
  loop_->set_draining(true);
  for (uint64_t id = 1; id <= 30; ++id) {
    ASSERT_TRUE(Step(session, id, created.seq(0)).ok());
  }
}

// What a server had no room for was "unavailable", which clients try again at
// once, elsewhere or there.
TEST_F(PitfallTest, TensorflowServing1795_NoRoomHasACodeOfItsOwnAndADelay) {
  WaitingCreate call;
  for (int i = 0; i < 40; ++i) FillNew(2, i, call.own_request.add_sequences());
  loop_->Submit(&call);
  const Failure failure = call.Wait();
  EXPECT_EQ(failure.code, StatusCode::kResourceExhausted);
  EXPECT_GT(failure.retry_ms, 0);
  EXPECT_FALSE(failure.subject.empty());
}

}  // namespace
}  // namespace tenon::service
