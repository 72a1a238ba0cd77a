#ifndef TENON_TESTS_SERVICE_GRPC_FIXTURE_H_
#define TENON_TESTS_SERVICE_GRPC_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "service/proto/decode.grpc.pb.h"
#include "service/proto/google/rpc/error_details.pb.h"
#include "service/proto/google/rpc/status.pb.h"
#include "service/proto/grpc/health/v1/health.grpc.pb.h"
#include "service/server.h"
#include "tests/service/loop_fixture.h"

namespace tenon::service {

// For sockets and small files; goes with the process.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    // A path that a sockaddr_un has room for; Bazel's may be too long.
    char path[] = "/tmp/tenon-test-XXXXXX";
    if (mkdtemp(path) != nullptr) path_ = path;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A path that nothing has yet.
inline std::string SocketPath() {
  static const TemporaryFolder folder;
  static int number = 0;
  return folder.path() + "/" + std::to_string(number++) + ".sock";
}

// A server in this process, on a Unix socket and on TCP.
class TestServer {
 public:
  explicit TestServer(const Limits& limits = TestLimits(),
                      ServerOptions options = {}, int64_t num_pages = 128,
                      const std::shared_ptr<const Model>& model = TestModel())
      : num_pages_(num_pages) {
    SessionOptions engine = TestEngineOptions(limits);
    engine.num_pages = num_pages;
    loop_ = std::make_unique<StepLoop>(TestEngine(engine, model),
                                       StepLoopOptions{limits, true});
    options.limits = limits;
    if (options.listen.empty()) {
      options.listen = {"unix:" + SocketPath(), "127.0.0.1:0"};
    }
    auto server = Server::Start(options, loop_.get());
    EXPECT_TRUE(server.ok()) << server.status().message();
    if (server.ok()) server_ = *std::move(server);
  }

  StepLoop& loop() { return *loop_; }
  Server& server() { return *server_; }
  const std::string& unix_address() const { return server_->addresses()[0]; }
  const std::string& tcp_address() const { return server_->addresses()[1]; }
  void Stop() { server_.reset(); }

  // Waits, a while, until everything is given back.
  void ExpectAllFree() {
    const Metrics& metrics = loop_->metrics();
    for (int i = 0; i < 400; ++i) {
      if (metrics.active_sequences == 0 && metrics.queued_requests == 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(metrics.active_sequences, 0);
    EXPECT_EQ(metrics.free_pages, num_pages_);
    EXPECT_EQ(metrics.engine_free_pages, num_pages_);
    EXPECT_EQ(metrics.queued_requests, 0);
    EXPECT_EQ(metrics.queued_rows, 0);
  }

 private:
  int64_t num_pages_;
  std::unique_ptr<StepLoop> loop_;
  std::unique_ptr<Server> server_;
};

// A connection of its own, not one that gRPC shares.
inline std::shared_ptr<grpc::Channel> Connect(
    const std::string& address,
    std::shared_ptr<grpc::ChannelCredentials> credentials =
        grpc::InsecureChannelCredentials()) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  return grpc::CreateCustomChannel(address, std::move(credentials), arguments);
}

inline google::rpc::Status DetailsOf(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), static_cast<int>(status.error_code()));
  return details;
}

template <class Detail>
bool HasDetail(const grpc::Status& status, Detail* detail) {
  const google::rpc::Status details = DetailsOf(status);
  for (const auto& any : details.details()) {
    if (any.UnpackTo(detail)) return true;
  }
  return false;
}

// What one client does, with a session of its own.
class TestClient {
 public:
  explicit TestClient(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(v1::Decode::NewStub(channel)) {}

  v1::Decode::Stub& stub() { return *stub_; }

  // Sequences with the prompts and seeds first_seed, first_seed + 1, ...
  grpc::Status Create(int32_t count, int32_t first_seed,
                      uint32_t max_tokens = 30) {
    v1::CreateSequencesRequest request;
    for (int32_t i = 0; i < count; ++i) {
      v1::NewSequence* sequence = request.add_sequences();
      FillNew(PromptSize(first_seed + i), first_seed + i, sequence);
      sequence->set_max_tokens(max_tokens);
    }
    grpc::ClientContext context;
    v1::CreateSequencesResponse response;
    const grpc::Status status =
        stub_->CreateSequences(&context, request, &response);
    if (!status.ok()) return status;
    session = response.session_id();
    step = 0;
    seqs.assign(response.seq().begin(), response.seq().end());
    tokens.clear();
    for (uint32_t token : response.token()) tokens.push_back({token});
    return status;
  }

  static int32_t PromptSize(int32_t seed) { return 3 + seed * 5 % 23; }

  v1::StepRequest NextStep() const {
    v1::StepRequest request;
    request.set_session_id(session);
    request.set_step_id(step + 1);
    for (uint64_t seq : seqs) request.add_seq(seq);
    return request;
  }

  void Take(const v1::StepResponse& response) {
    ++step;
    EXPECT_EQ(response.step_id(), step);
    ASSERT_EQ(response.token_size(), static_cast<int>(seqs.size()));
    for (int i = 0; i < response.token_size(); ++i) {
      tokens[static_cast<size_t>(i)].push_back(response.token(i));
    }
  }

  grpc::Status Step(v1::StepResponse* out = nullptr) {
    grpc::ClientContext context;
    v1::StepResponse response;
    const grpc::Status status = stub_->Step(&context, NextStep(), &response);
    if (status.ok()) Take(response);
    if (out != nullptr) *out = response;
    return status;
  }

  grpc::Status End() {
    grpc::ClientContext context;
    v1::ReleaseSequencesRequest request;
    v1::ReleaseSequencesResponse response;
    request.set_session_id(session);
    request.set_end_session(true);
    return stub_->ReleaseSequences(&context, request, &response);
  }

  uint64_t session = 0;
  uint64_t step = 0;
  std::vector<uint64_t> seqs;
  std::vector<std::vector<uint32_t>> tokens;

 private:
  std::unique_ptr<v1::Decode::Stub> stub_;
};

}  // namespace tenon::service

#endif  // TENON_TESTS_SERVICE_GRPC_FIXTURE_H_
