// The service over real sockets.

#include <sys/stat.h>

#include <atomic>
#include <thread>

#include "tests/service/grpc_fixture.h"

namespace tenon::service {
namespace {

using std::chrono::milliseconds;

std::vector<std::vector<uint32_t>> Expected(int32_t count, int32_t first_seed,
                                            int32_t steps) {
  std::vector<std::vector<uint32_t>> expected;
  for (int32_t i = 0; i < count; ++i) {
    expected.push_back(ExpectedTokens(TestClient::PromptSize(first_seed + i),
                                      first_seed + i, steps));
  }
  return expected;
}

TEST(ServerTest, UnaryStepsGiveTheEnginesTokens) {
  TestServer server;
  for (const std::string& address :
       {server.unix_address(), server.tcp_address()}) {
    TestClient client(Connect(address));
    ASSERT_TRUE(client.Create(4, 1).ok());
    for (int i = 0; i < 12; ++i) ASSERT_TRUE(client.Step().ok());
    EXPECT_EQ(client.tokens, Expected(4, 1, 12));
    ASSERT_TRUE(client.End().ok());
  }
  server.ExpectAllFree();
}

TEST(ServerTest, StreamedStepsGiveTheEnginesTokens) {
  TestServer server;
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(4, 1).ok());
  grpc::ClientContext context;
  auto stream = client.stub().StepStream(&context);
  for (int i = 0; i < 12; ++i) {
    ASSERT_TRUE(stream->Write(client.NextStep()));
    v1::StepResponse response;
    ASSERT_TRUE(stream->Read(&response));
    client.Take(response);
    EXPECT_EQ(response.server_epoch(), server.loop().epoch());
    EXPECT_GT(response.timing().step_ns(), 0u);
    EXPECT_GE(response.timing().total_ns(), response.timing().step_ns());
    EXPECT_EQ(response.load().active_sequences(), 4u);
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(client.tokens, Expected(4, 1, 12));
  ASSERT_TRUE(client.End().ok());
  server.ExpectAllFree();
}

// Steps that are sent before the replies of those before them.
TEST(ServerTest, StreamedStepsMayBePipelined) {
  TestServer server;
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(2, 5).ok());
  grpc::ClientContext context;
  auto stream = client.stub().StepStream(&context);
  v1::StepRequest request = client.NextStep();
  for (uint64_t id = 1; id <= 10; ++id) {
    request.set_step_id(id);
    ASSERT_TRUE(stream->Write(request));
  }
  stream->WritesDone();
  v1::StepResponse response;
  while (stream->Read(&response)) client.Take(response);
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(client.tokens, Expected(2, 5, 10));
}

TEST(ServerTest, SixteenClientsAreBatchedAndKeepTheirTokens) {
  Limits limits = TestLimits();
  limits.sequences = 40;
  limits.sessions = 16;
  limits.rows_per_step = 40;
  TestServer server(limits, {}, 400);
  std::vector<std::vector<std::vector<uint32_t>>> tokens(16);
  std::vector<std::thread> threads;
  for (int32_t c = 0; c < 16; ++c) {
    threads.emplace_back([&, c] {
      TestClient client(Connect(server.unix_address()));
      ASSERT_TRUE(client.Create(2, 2 * c).ok());
      grpc::ClientContext context;
      auto stream = client.stub().StepStream(&context);
      for (int i = 0; i < 25; ++i) {
        ASSERT_TRUE(stream->Write(client.NextStep()));
        v1::StepResponse response;
        ASSERT_TRUE(stream->Read(&response));
        client.Take(response);
      }
      tokens[static_cast<size_t>(c)] = client.tokens;
      EXPECT_TRUE(client.End().ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t c = 0; c < 16; ++c) {
    EXPECT_EQ(tokens[static_cast<size_t>(c)], Expected(2, 2 * c, 25)) << c;
  }
  EXPECT_GT(server.loop().metrics().rows, 3 * server.loop().metrics().steps)
      << "rows of several clients in a step";
  server.ExpectAllFree();
}

TEST(ServerTest, GenerateStreamsTheEnginesTokens) {
  TestServer server;
  auto stub = v1::Decode::NewStub(Connect(server.tcp_address()));
  grpc::ClientContext context;
  v1::GenerateRequest request;
  FillNew(11, 3, request.mutable_sequence());
  request.mutable_sequence()->set_max_tokens(20);
  request.set_want(v1::WANT_LOGPROB | v1::WANT_TOP_N);
  request.set_top_n(3);
  auto reader = stub->Generate(&context, request);
  std::vector<uint32_t> tokens;
  v1::GenerateResponse response;
  int logprobs = 0;
  int tops = 0;
  v1::RowStatus last = v1::ROW_STATUS_UNSPECIFIED;
  while (reader->Read(&response)) {
    tokens.insert(tokens.end(), response.token().begin(),
                  response.token().end());
    logprobs += response.logprob_size();
    for (const v1::TopTokens& top : response.top()) {
      EXPECT_EQ(top.token_size(), 3);
      ++tops;
    }
    last = response.row_status();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(tokens, ExpectedTokens(11, 3, 19));
  EXPECT_EQ(logprobs, 20);
  EXPECT_EQ(tops, 20);
  EXPECT_EQ(last, v1::ROW_STATUS_FINISHED_LENGTH);
  server.ExpectAllFree();
}

TEST(ServerTest, ACancelledGenerateFreesItsPages) {
  TestServer server;
  for (int i = 0; i < 10; ++i) {
    auto stub = v1::Decode::NewStub(Connect(server.unix_address()));
    grpc::ClientContext context;
    v1::GenerateRequest request;
    FillNew(11, i, request.mutable_sequence());
    auto reader = stub->Generate(&context, request);
    v1::GenerateResponse response;
    if (i % 2 == 0) {
      EXPECT_TRUE(reader->Read(&response));
    }
    context.TryCancel();
    const grpc::Status status = reader->Finish();
    EXPECT_TRUE(status.ok() ||
                status.error_code() == grpc::StatusCode::CANCELLED);
  }
  server.ExpectAllFree();
}

TEST(ServerTest, ACancelledCreateFreesItsPages) {
  Limits limits = TestLimits();
  limits.prefill_tokens_per_step = 1;
  TestServer server(limits);
  for (int i = 0; i < 20; ++i) {
    auto stub = v1::Decode::NewStub(Connect(server.unix_address()));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + milliseconds(i));
    v1::CreateSequencesRequest request;
    for (int j = 0; j < 4; ++j) {
      FillNew(60, i + j, request.add_sequences());
    }
    request.set_lease_ms(50);  // of those whose reply came too late
    v1::CreateSequencesResponse response;
    const grpc::Status status =
        stub->CreateSequences(&context, request, &response);
    // Leases of those before may still hold the pages.
    EXPECT_TRUE(status.ok() ||
                status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ||
                status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED)
        << status.error_message();
  }
  server.ExpectAllFree();
}

TEST(ServerTest, AReplayIsAnsweredAndAnotherContentAborted) {
  TestServer server;
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(2, 1).ok());
  const v1::StepRequest first = client.NextStep();
  v1::StepResponse reply, again;
  ASSERT_TRUE(client.Step(&reply).ok());
  grpc::ClientContext context;
  ASSERT_TRUE(client.stub().Step(&context, first, &again).ok());
  EXPECT_EQ(reply.SerializeAsString(), again.SerializeAsString());

  v1::StepRequest other = first;
  other.mutable_overrides()->set_seed(9);
  grpc::ClientContext other_context;
  const grpc::Status status = client.stub().Step(&other_context, other, &again);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(HasDetail(status, &info));
  EXPECT_EQ(info.reason(), "STEP_REPLAY_MISMATCH");
  ASSERT_TRUE(client.Step().ok());
  EXPECT_EQ(client.tokens, Expected(2, 1, 2));
}

TEST(ServerTest, ErrorsHaveTheirCodesAndDetails) {
  TestServer server(TestLimits(), {}, 32);
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(1, 1).ok());
  const auto step = [&](const v1::StepRequest& request) {
    grpc::ClientContext context;
    v1::StepResponse response;
    return client.stub().Step(&context, request, &response);
  };
  v1::StepRequest request = client.NextStep();
  request.add_input_token(kTestVocab);
  grpc::Status status = step(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::BadRequest bad;
  ASSERT_TRUE(HasDetail(status, &bad));
  EXPECT_EQ(bad.field_violations(0).field(), "input_token[0]");

  request = client.NextStep();
  request.set_seq(0, client.seqs[0] ^ 5);
  status = step(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  google::rpc::ResourceInfo resource;
  ASSERT_TRUE(HasDetail(status, &resource));
  EXPECT_EQ(resource.resource_type(), "seq");

  request = client.NextStep();
  request.set_step_id(7);
  status = step(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  google::rpc::PreconditionFailure precondition;
  ASSERT_TRUE(HasDetail(status, &precondition));
  EXPECT_EQ(precondition.violations(0).type(), "STEP_ID_GAP");

  request = client.NextStep();
  request.set_want(4);
  EXPECT_EQ(step(request).error_code(), grpc::StatusCode::UNIMPLEMENTED);

  grpc::ClientContext context;
  v1::CreateSequencesRequest create;
  v1::CreateSequencesResponse response;
  FillNew(65, 1, create.add_sequences());
  EXPECT_EQ(
      client.stub().CreateSequences(&context, create, &response).error_code(),
      grpc::StatusCode::OUT_OF_RANGE);

  TestClient greedy(Connect(server.unix_address()));
  status = greedy.Create(16, 1);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  google::rpc::RetryInfo retry;
  google::rpc::QuotaFailure quota;
  EXPECT_TRUE(HasDetail(status, &retry));
  EXPECT_GT(retry.retry_delay().nanos(), 0);
  ASSERT_TRUE(HasDetail(status, &quota));
  EXPECT_EQ(quota.violations(0).subject(), "pages");
}

TEST(ServerTest, AnErrorEndsAStreamWithItsStatus) {
  TestServer server;
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(1, 1).ok());
  grpc::ClientContext context;
  auto stream = client.stub().StepStream(&context);
  v1::StepRequest request = client.NextStep();
  request.set_step_id(3);
  ASSERT_TRUE(stream->Write(request));
  v1::StepResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  ASSERT_TRUE(client.Step().ok());
}

TEST(ServerTest, CapabilitiesSayWhatIsEnforced) {
  TestServer server;
  auto stub = v1::Decode::NewStub(Connect(server.unix_address()));
  grpc::ClientContext context;
  v1::GetCapabilitiesResponse response;
  ASSERT_TRUE(stub->GetCapabilities(&context, {}, &response).ok());
  EXPECT_EQ(response.server_epoch(), server.loop().epoch());
  EXPECT_EQ(response.model().vocab_size(), 131u);
  EXPECT_EQ(response.limits().rows_per_step(), 16u);
  EXPECT_EQ(response.limits().sequences(), 24u);
  EXPECT_EQ(response.limits().context_tokens(), 64u);
  EXPECT_EQ(response.limits().pages(), 128u);
  EXPECT_TRUE(response.batch_invariant());
}

// Messages could be as large as 2 GiB, or no larger than 4 MiB.
TEST(ServerTest, Triton1776AndCve202533201_OversizeMessagesAndMetadata) {
  Limits limits = TestLimits();
  limits.request_bytes = 4096;
  limits.metadata_bytes = 2048;
  TestServer server(limits);
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(1, 1).ok());
  v1::StepRequest request = client.NextStep();
  for (int i = 0; i < 5000; ++i) request.add_input_token(1);
  grpc::ClientContext context;
  v1::StepResponse response;
  EXPECT_EQ(client.stub().Step(&context, request, &response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  grpc::ClientContext big;
  big.AddMetadata("x-large", std::string(8000, 'x'));
  EXPECT_EQ(client.stub().Step(&big, client.NextStep(), &response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  // gRPC may have closed that connection; the session is as it was.
  TestClient again(Connect(server.unix_address()));
  again.session = client.session;
  again.seqs = client.seqs;
  again.tokens = client.tokens;
  EXPECT_TRUE(again.Step().ok());
}

TEST(ServerTest, HealthSaysNotServingBeforeNewWorkIsRefused) {
  ServerOptions options;
  options.drain_grace = milliseconds(1000);
  TestServer server(TestLimits(), options);
  const auto channel = Connect(server.unix_address());
  auto health = grpc::health::v1::Health::NewStub(channel);
  auto control = v1::Control::NewStub(channel);
  const auto check = [&](const std::string& name) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    grpc::health::v1::HealthCheckResponse response;
    request.set_service(name);
    EXPECT_TRUE(health->Check(&context, request, &response).ok());
    return response.status();
  };
  using grpc::health::v1::HealthCheckResponse;
  EXPECT_EQ(check(""), HealthCheckResponse::SERVING);
  EXPECT_EQ(check("tenon.v1.Decode"), HealthCheckResponse::SERVING);
  TestClient client(channel);
  ASSERT_TRUE(client.Create(1, 1).ok());

  grpc::ClientContext context;
  v1::DrainResponse drained;
  ASSERT_TRUE(control->Drain(&context, {}, &drained).ok());
  EXPECT_EQ(check(""), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(check("tenon.v1.Decode"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(check("tenon.v1.Control"), HealthCheckResponse::SERVING);
  TestClient in_time(channel);
  EXPECT_TRUE(in_time.Create(1, 2).ok());
  std::this_thread::sleep_for(milliseconds(1200));
  TestClient late(channel);
  const grpc::Status status = late.Create(1, 3);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  google::rpc::RetryInfo retry;
  EXPECT_TRUE(HasDetail(status, &retry));
  EXPECT_TRUE(client.Step().ok()) << "old sequences go on";

  grpc::ClientContext resume_context;
  v1::ResumeResponse resumed;
  ASSERT_TRUE(control->Resume(&resume_context, {}, &resumed).ok());
  EXPECT_FALSE(resumed.load().draining());
  EXPECT_EQ(check(""), HealthCheckResponse::SERVING);
  EXPECT_TRUE(late.Create(1, 3).ok());
}

TEST(ServerTest, ControlAbortsAndCounts) {
  TestServer server;
  const auto channel = Connect(server.unix_address());
  TestClient client(channel);
  ASSERT_TRUE(client.Create(3, 1).ok());
  ASSERT_TRUE(client.Step().ok());
  auto control = v1::Control::NewStub(channel);
  v1::GetStatsResponse stats;
  grpc::ClientContext stats_context;
  ASSERT_TRUE(control->GetStats(&stats_context, {}, &stats).ok());
  EXPECT_EQ(stats.sampled_tokens(), 6u);
  EXPECT_EQ(stats.load().active_sequences(), 3u);
  EXPECT_LT(stats.heartbeat_age_ms(), 1000u);
  v1::AbortRequest request;
  v1::AbortResponse response;
  request.add_session_id(client.session);
  grpc::ClientContext context;
  ASSERT_TRUE(control->Abort(&context, request, &response).ok());
  EXPECT_EQ(response.sequences(), 3u);
  EXPECT_EQ(client.Step().error_code(), grpc::StatusCode::NOT_FOUND);
  v1::Load load;
  grpc::ClientContext load_context;
  ASSERT_TRUE(control->GetLoad(&load_context, {}, &load).ok());
  EXPECT_EQ(load.active_sequences(), 0u);
  EXPECT_EQ(load.free_pages(), 128u);
}

// A step that takes a while: so many prompts of 60 tokens, all at once.
Limits LimitsOfPrompts(int32_t prompts) {
  Limits limits = TestLimits();
  limits.rows_per_step = prompts;
  limits.sequences = prompts;
  limits.prefill_tokens_per_step = 60 * prompts;
  return limits;
}
grpc::Status CreatePrompts(const TestServer& server, int32_t prompts) {
  auto stub = v1::Decode::NewStub(Connect(server.unix_address()));
  v1::CreateSequencesRequest request;
  for (int32_t i = 0; i < prompts; ++i) {
    FillNew(60, i, request.add_sequences());
    request.mutable_sequences(i)->set_max_tokens(1);
  }
  v1::CreateSequencesResponse response;
  grpc::ClientContext context;
  return stub->CreateSequences(&context, request, &response);
}

// One thread reads from clients, and runs steps as well; there the tail was
// that of calls behind others in the one completion queue.
TEST(ServerTest,
     TensorflowServing2141_CallsAreAnsweredWhileAStepRunsOnTheThreadThatReads) {
  constexpr int32_t kPrompts = 64;
  auto model = Model::Load("examples/models/austen", {DeviceType::kCpu, 0});
  ASSERT_TRUE(model.ok()) << model.status().message();
  TestServer server(LimitsOfPrompts(kPrompts), {}, 16 * kPrompts, *model);
  auto control = v1::Control::NewStub(Connect(server.unix_address()));
  std::atomic<bool> is_over{false};
  std::thread creates([&] {
    const grpc::Status status = CreatePrompts(server, kPrompts);
    EXPECT_TRUE(status.ok()) << status.error_message();
    is_over = true;
  });
  bool answered = false;
  while (!answered && !is_over) {
    grpc::ClientContext context;
    v1::GetStatsResponse stats;
    ASSERT_TRUE(control->GetStats(&context, {}, &stats).ok());
    answered = stats.requests() == 1 && stats.steps() == 0;
  }
  creates.join();
  EXPECT_TRUE(answered);
}

// Longer than gRPC gives to what is left when it shuts down.
TEST(ServerTest, ShutdownWaitsForStepsUnderWayHoweverLongTheyAre) {
  constexpr int32_t kPrompts = 128;
  Limits limits = LimitsOfPrompts(kPrompts);
  limits.sequences = kPrompts + 1;
  limits.default_deadline = std::chrono::minutes(2);  // sanitizers are slow
  auto model = Model::Load("examples/models/austen", {DeviceType::kCpu, 0});
  ASSERT_TRUE(model.ok()) << model.status().message();
  TestServer server(limits, {}, 16 * kPrompts, *model);
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(1, 1).ok());
  std::thread prompts([&] { (void)CreatePrompts(server, kPrompts); });
  const Metrics& metrics = server.loop().metrics();
  const auto wait_for = [](auto condition) {
    for (int i = 0; i < 2000 && !condition(); ++i) {
      std::this_thread::sleep_for(milliseconds(1));
    }
  };
  wait_for([&] { return metrics.requests == 2; });
  grpc::Status status;
  std::thread step([&] { status = client.Step(); });
  wait_for([&] { return metrics.queued_requests != 0; });
  server.server().Shutdown(milliseconds(0));
  step.join();
  prompts.join();
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST(ServerTest, WatchersOfHealthAreToldOfChanges) {
  ServerOptions options;
  options.drain_grace = milliseconds(0);
  TestServer server(TestLimits(), options);
  auto stub = grpc::health::v1::Health::NewStub(Connect(server.unix_address()));
  using grpc::health::v1::HealthCheckResponse;
  grpc::health::v1::HealthCheckRequest request;
  HealthCheckResponse response;
  request.set_service("no.such.Service");
  grpc::ClientContext check_context;
  EXPECT_EQ(stub->Check(&check_context, request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);

  grpc::ClientContext unknown_context;
  auto unknown = stub->Watch(&unknown_context, request);
  ASSERT_TRUE(unknown->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  unknown_context.TryCancel();
  EXPECT_FALSE(unknown->Read(&response));
  EXPECT_EQ(unknown->Finish().error_code(), grpc::StatusCode::CANCELLED);

  request.set_service(std::string(201, 'x'));  // it would be kept
  grpc::ClientContext long_context;
  auto refused = stub->Watch(&long_context, request);
  EXPECT_FALSE(refused->Read(&response));
  EXPECT_EQ(refused->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  request.set_service("tenon.v1.Decode");
  grpc::ClientContext context;
  auto watch = stub->Watch(&context, request);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  server.server().Drain();
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server.Stop();  // with a watcher still there
  EXPECT_FALSE(watch->Read(&response));
  EXPECT_FALSE(watch->Finish().ok());
}

TEST(ServerTest, IdleStreamsAreEnded) {
  Limits limits = TestLimits();
  limits.stream_idle = milliseconds(50);
  TestServer server(limits);
  TestClient client(Connect(server.unix_address()));
  grpc::ClientContext context;
  auto stream = client.stub().StepStream(&context);
  v1::StepResponse response;
  EXPECT_FALSE(stream->Read(&response));  // until the server ends it
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  for (int i = 0; i < 400 && server.loop().metrics().open_streams != 0; ++i) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(server.loop().metrics().open_streams, 0);
}

TEST(ServerTest, UnixSocketsAreTheirOwnersAlone) {
  TestServer server;
  struct stat info;
  ASSERT_EQ(stat(server.unix_address().substr(5).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(ServerTest, RefusesToListenBeyondLoopbackWithoutTls) {
  StepLoop loop(TestEngine(TestEngineOptions(TestLimits())),
                {TestLimits(), true});
  for (const char* address :
       {"0.0.0.0:0", "[::]:0", "10.1.2.3:80", "example.org:1",
        "127.evil.example.org:1", "localhost.example.org:1"}) {
    ServerOptions options;
    options.listen = {address};
    auto server = Server::Start(options, &loop);
    ASSERT_FALSE(server.ok()) << address;
    EXPECT_EQ(server.status().code(), StatusCode::kFailedPrecondition);
  }
  ServerOptions metrics;
  metrics.listen = {"127.0.0.1:0"};
  metrics.metrics_listen = "0.0.0.0:0";
  EXPECT_FALSE(Server::Start(metrics, &loop).ok());
}

TEST(ServerTest, TwoServersCannotHaveOneSocket) {
  TestServer server;
  StepLoop loop(TestEngine(TestEngineOptions(TestLimits())),
                {TestLimits(), true});
  for (const std::string& address :
       {server.unix_address(), server.tcp_address()}) {
    ServerOptions options;
    options.listen = {address};
    EXPECT_FALSE(Server::Start(options, &loop).ok()) << address;
  }
  TestClient client(Connect(server.unix_address()));
  EXPECT_TRUE(client.Create(1, 1).ok());
}

}  // namespace
}  // namespace tenon::service
