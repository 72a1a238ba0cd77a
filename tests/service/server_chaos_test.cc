// Chaos over real sockets. --steps=1000000 for a long run.

#include <atomic>
#include <cstdio>
#include <future>

#include "tests/service/chaos.h"
#include "tests/service/grpc_fixture.h"

namespace tenon::service {
namespace {

std::atomic<int64_t> lost_connections{0};

// UNAVAILABLE of the server's own says why in its details. Without them the
// connection was lost, with or without an effect of the call, as if it had been
// cancelled.
int CodeOf(const grpc::Status& status) {
  if (status.error_code() != grpc::StatusCode::UNAVAILABLE ||
      !status.error_details().empty()) {
    return status.error_code();
  }
  if (++lost_connections <= 10) {
    std::fprintf(stderr, "%s\n", status.error_message().c_str());
  }
  return grpc::StatusCode::CANCELLED;
}

// Of a call that waits for its connection. Rarely one to 127.0.0.1 cannot be
// made; until gRPC tries again, all calls would fail.
class Context final : public grpc::ClientContext {
 public:
  Context() { set_wait_for_ready(true); }
};

class GrpcTransport final : public ChaosTransport {
 public:
  explicit GrpcTransport(const std::string& address)
      : channel_(Connect(address)), stub_(v1::Decode::NewStub(channel_)) {}
  ~GrpcTransport() override {
    if (stream_ != nullptr) context_->TryCancel();  // without a good-bye
    CloseStream();
    // A channel that goes while it connects leaves the connection open for good
    // (github.com/grpc/grpc/pull/32071), one of those that the server allows.
    channel_->WaitForConnected(std::chrono::system_clock::now() +
                               std::chrono::seconds(10));
  }

  int Create(const v1::CreateSequencesRequest& request,
             v1::CreateSequencesResponse* response, Fault fault) override {
    Context context;
    SetDeadline(fault, &context);
    return CodeOf(stub_->CreateSequences(&context, request, response));
  }

  int Step(const v1::StepRequest& request, v1::StepResponse* response,
           Fault fault) override {
    if (fault.stream) return StreamStep(request, response, fault);
    Context context;
    SetDeadline(fault, &context);
    return CodeOf(stub_->Step(&context, request, response));
  }

  void StepTwice(const v1::StepRequest& request, int codes[2],
                 v1::StepResponse responses[2]) override {
    Context contexts[2];
    std::promise<int> done[2];
    for (int i = 0; i < 2; ++i) {
      stub_->async()->Step(&contexts[i], &request, &responses[i],
                           [&done, i](const grpc::Status& status) {
                             done[i].set_value(CodeOf(status));
                           });
    }
    for (int i = 0; i < 2; ++i) codes[i] = done[i].get_future().get();
  }

  int Fork(const v1::ForkSequencesRequest& request,
           v1::ForkSequencesResponse* response) override {
    Context context;
    return CodeOf(stub_->ForkSequences(&context, request, response));
  }

  int Release(const v1::ReleaseSequencesRequest& request) override {
    Context context;
    v1::ReleaseSequencesResponse response;
    return CodeOf(stub_->ReleaseSequences(&context, request, &response));
  }

  int Generate(const v1::GenerateRequest& request, int cancel_after,
               std::vector<uint32_t>* tokens) override {
    Context context;
    auto reader = stub_->Generate(&context, request);
    v1::GenerateResponse response;
    while (reader->Read(&response)) {
      tokens->insert(tokens->end(), response.token().begin(),
                     response.token().end());
      if (cancel_after >= 0 &&
          static_cast<int>(tokens->size()) >= cancel_after) {
        context.TryCancel();
      }
    }
    return CodeOf(reader->Finish());
  }

 private:
  static void SetDeadline(Fault fault, grpc::ClientContext* context) {
    if (!fault.cancel) return;
    context->set_deadline(std::chrono::system_clock::now() +
                          std::chrono::microseconds(fault.delay_us));
  }

  int CloseStream() {
    if (stream_ == nullptr) return 0;
    const int code = CodeOf(stream_->Finish());
    stream_.reset();
    context_.reset();
    return code;
  }

  int StreamStep(const v1::StepRequest& request, v1::StepResponse* response,
                 Fault fault) {
    if (stream_ == nullptr) {
      context_ = std::make_unique<Context>();
      stream_ = stub_->StepStream(context_.get());
    }
    if (!stream_->Write(request)) return CloseStream();
    if (fault.cancel) {
      if (fault.delay_us % 2 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(fault.delay_us));
      }
      context_->TryCancel();
    }
    if (stream_->Read(response) && !fault.cancel) return 0;
    const int code = CloseStream();
    return code == 0 ? static_cast<int>(StatusCode::kCancelled) : code;
  }

  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::Decode::Stub> stub_;
  std::unique_ptr<Context> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::StepRequest, v1::StepResponse>>
      stream_;
};

TEST(ServerChaosTest, NothingIsLostAndNoTokenIsAnothers) {
  TestServer server(ChaosLimits(), {}, kChaosPages);
  RunChaos(
      [&server] {
        static std::atomic<int> number{0};
        return std::make_unique<GrpcTransport>(
            ++number % 2 == 0 ? server.unix_address() : server.tcp_address());
      },
      8, ChaosStepsWanted(4000));
  EXPECT_LT(lost_connections, 1 + ChaosStepsWanted(4000) / 1000);
  server.ExpectAllFree();
  const Metrics& metrics = server.loop().metrics();
  EXPECT_EQ(metrics.refused_connections, 0u);
  EXPECT_GT(metrics.replayed, 0u);
  EXPECT_GT(metrics.cancelled, 0u);
  EXPECT_GT(metrics.rows, metrics.steps);
}

}  // namespace
}  // namespace tenon::service
