// Chaos without gRPC, where ThreadSanitizer sees all of it.

#include <condition_variable>
#include <deque>
#include <mutex>

#include "tests/service/chaos.h"

namespace tenon::service {
namespace {

class LoopTransport final : public ChaosTransport {
 public:
  explicit LoopTransport(StepLoop* loop) : loop_(loop) {}

  int Create(const v1::CreateSequencesRequest& request,
             v1::CreateSequencesResponse* response, Fault fault) override {
    WaitingCreate call;
    return Run(&call, request, response, fault);
  }
  int Step(const v1::StepRequest& request, v1::StepResponse* response,
           Fault fault) override {
    WaitingStep call;
    return Run(&call, request, response, fault);
  }
  void StepTwice(const v1::StepRequest& request, int codes[2],
                 v1::StepResponse responses[2]) override {
    WaitingStep calls[2];
    std::thread other([&] { Submit(&calls[1], request); });
    Submit(&calls[0], request);
    other.join();
    for (int i = 0; i < 2; ++i) {
      codes[i] = static_cast<int>(calls[i].Wait().code);
      responses[i] = calls[i].own_response;
    }
  }
  int Fork(const v1::ForkSequencesRequest& request,
           v1::ForkSequencesResponse* response) override {
    WaitingFork call;
    return Run(&call, request, response, Fault());
  }
  int Release(const v1::ReleaseSequencesRequest& request) override {
    WaitingRelease call;
    v1::ReleaseSequencesResponse response;
    return Run(&call, request, &response, Fault());
  }
  int Generate(const v1::GenerateRequest& request, int cancel_after,
               std::vector<uint32_t>* tokens) override {
    WaitingGenerate call;
    call.own_request = request;
    call.cancel_after = cancel_after;
    loop_->Submit(static_cast<GenerateCall*>(&call));
    const Failure failure = call.Wait();
    *tokens = call.tokens;
    return static_cast<int>(failure.code);
  }

 private:
  void Submit(WaitingStep* call, const v1::StepRequest& request) {
    call->own_request = request;
    loop_->Submit(static_cast<StepCall*>(call));
  }

  template <class Base, class Request, class Response>
  int Run(WaitingCall<Base, Request, Response>* call, const Request& request,
          Response* response, Fault fault) {
    call->own_request = request;
    std::thread canceller;
    if (fault.cancel) {
      canceller = std::thread([call, fault] {
        std::this_thread::sleep_for(std::chrono::microseconds(fault.delay_us));
        call->cancelled = true;
      });
    }
    loop_->Submit(static_cast<Base*>(call));
    const Failure failure = call->Wait();
    if (canceller.joinable()) canceller.join();
    *response = call->own_response;
    // A client that cancelled does not see the reply, if there is one.
    if (fault.cancel && failure.ok() && fault.stream) {
      return static_cast<int>(StatusCode::kCancelled);
    }
    return static_cast<int>(failure.code);
  }

  StepLoop* loop_;
};

class LoopChaosTest : public ::testing::TestWithParam<bool> {};

TEST_P(LoopChaosTest, NothingIsLostAndNoTokenIsAnothers) {
  StepLoopOptions options;
  options.limits = ChaosLimits();
  options.run_inline = GetParam();
  SessionOptions engine = TestEngineOptions(options.limits);
  engine.num_pages = kChaosPages;
  StepLoop loop(TestEngine(engine), options);
  RunChaos([&loop] { return std::make_unique<LoopTransport>(&loop); }, 8,
           ChaosStepsWanted(2000));
  const Metrics& metrics = loop.metrics();
  for (int i = 0; i < 1000 && metrics.active_sequences != 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(metrics.active_sequences, 0);
  EXPECT_EQ(metrics.free_pages, engine.num_pages);
  EXPECT_EQ(metrics.engine_free_pages, engine.num_pages);
  EXPECT_EQ(metrics.queued_requests, 0);
  EXPECT_EQ(metrics.queued_rows, 0);
  EXPECT_GT(metrics.replayed, 0u);
  EXPECT_GT(metrics.cancelled, 0u);
  EXPECT_GT(metrics.rows, metrics.steps);
}

INSTANTIATE_TEST_SUITE_P(RunInline, LoopChaosTest, ::testing::Bool());

}  // namespace
}  // namespace tenon::service
