// Calls whose events come while they begin. gRPC hands these to another thread
// only where the one that reads is held up, which a test cannot wait for.

#include "service/rpc_call.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <thread>

#include "service/proto/grpc/health/v1/health.grpc.pb.h"

namespace tenon::service {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

// When the client goes, as the thread that handles the call's arrival sees it.
enum class Moment { kBeforeBegin, kInBegin };

struct Seen {
  std::promise<void> arrived;
  std::promise<void> cancelled;
  std::promise<void> deleted;
  bool outlived_its_beginning = false;
};

// Finishes as soon as its client is gone.
class HeldUpCall final : public RpcCall {
 public:
  HeldUpCall(Poller* poller, Health::AsyncService* service, Moment moment,
             Seen* seen)
      : RpcCall(poller),
        service_(service),
        moment_(moment),
        seen_(seen),
        writer_(context()) {}
  ~HeldUpCall() override {
    if (has_arrived_) seen_->deleted.set_value();
  }

  void Wait() override {
    service_->RequestCheck(context(), &request_, &writer_, poller()->queue(),
                           poller()->queue(), arrival_tag());
  }

 private:
  void Renew() override {
    (new HeldUpCall(poller(), service_, moment_, seen_))->Wait();
    if (moment_ == Moment::kBeforeBegin) BeHeldUp();
  }
  void Begin() override {
    if (moment_ == Moment::kInBegin) BeHeldUp();
  }
  void Cancel() override {
    writer_.Finish(HealthCheckResponse(),
                   grpc::Status(grpc::StatusCode::CANCELLED, ""), finish_tag());
    seen_->cancelled.set_value();
  }

  // Until the other thread has handled all that comes.
  void BeHeldUp() {
    Seen* const seen = seen_;
    std::future<void> deleted = seen->deleted.get_future();
    has_arrived_ = true;
    poller()->StandIn();
    seen->arrived.set_value();
    seen->cancelled.get_future().wait();
    seen->outlived_its_beginning =
        deleted.wait_for(std::chrono::milliseconds(300)) ==
        std::future_status::timeout;
  }

  Health::AsyncService* const service_;
  const Moment moment_;
  Seen* const seen_;
  bool has_arrived_ = false;
  HealthCheckRequest request_;
  grpc::ServerAsyncResponseWriter<HealthCheckResponse> writer_;
};

void ExpectItOutlivesItsBeginning(Moment moment) {
  Health::AsyncService service;
  grpc::ServerBuilder builder;
  builder.RegisterService(&service);
  auto poller = std::make_unique<Poller>(builder.AddCompletionQueue());
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  Seen seen;
  (new HeldUpCall(poller.get(), &service, moment, &seen))->Wait();
  poller->Start();

  grpc::ClientContext context;
  std::thread canceller([&] {
    seen.arrived.get_future().wait();
    context.TryCancel();
  });
  HealthCheckResponse response;
  auto stub = Health::NewStub(server->InProcessChannel({}));
  EXPECT_EQ(stub->Check(&context, {}, &response).error_code(),
            grpc::StatusCode::CANCELLED);
  canceller.join();
  server->Shutdown();
  poller.reset();  // waits for the call's end
  EXPECT_TRUE(seen.outlived_its_beginning);
}

TEST(RpcCallTest, OneThatEndsBeforeItBeginsIsThereToBegin) {
  ExpectItOutlivesItsBeginning(Moment::kBeforeBegin);
}

TEST(RpcCallTest, OneThatEndsWhileItBeginsIsThereToTheEndOfThat) {
  ExpectItOutlivesItsBeginning(Moment::kInBegin);
}

}  // namespace
}  // namespace tenon::service
