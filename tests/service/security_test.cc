// TLS, bearer tokens, and what is open to whom.

#include <arpa/inet.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "tests/service/certificates.h"
#include "tests/service/grpc_fixture.h"

namespace tenon::service {
namespace {

using grpc::StatusCode;
using std::chrono::milliseconds;

std::string TemporaryFile(const std::string& name) {
  return SocketPath() + "." + name;
}

class TlsTest : public ::testing::Test {
 protected:
  TlsTest() {
    options_.listen = {"127.0.0.1:0"};  // no name: resolvers leak
    options_.tls_cert = TemporaryFile("cert");
    options_.tls_key = TemporaryFile("key");
    options_.tls_reload = std::chrono::seconds(1);
    SetServerCertificate(server_ca_.Issue("server"));
  }

  void SetServerCertificate(const Certificate& certificate) {
    WriteFile(options_.tls_key, certificate.key);
    WriteFile(options_.tls_cert, certificate.chain);
  }

  void Start(bool mutual) {
    if (mutual) {
      options_.tls_client_ca = TemporaryFile("ca");
      WriteFile(options_.tls_client_ca, client_ca_.pem());
    }
    server_ = std::make_unique<TestServer>(TestLimits(), options_);
  }

  static std::shared_ptr<grpc::ChannelCredentials> Tls(
      const std::string& roots, const Certificate& own = {}) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = roots;
    options.pem_private_key = own.key;
    options.pem_cert_chain = own.chain;
    return grpc::SslCredentials(options);
  }

  // What becomes of a call on a connection of its own.
  StatusCode Call(std::shared_ptr<grpc::ChannelCredentials> credentials) {
    auto stub = v1::Decode::NewStub(
        Connect(server_->unix_address(), std::move(credentials)));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + milliseconds(5000));
    v1::GetCapabilitiesResponse response;
    return stub->GetCapabilities(&context, {}, &response).error_code();
  }

  ServerOptions options_;
  const TestCa server_ca_{"server CA"};
  const TestCa client_ca_{"client CA"};
  const TestCa other_ca_{"other CA"};
  std::unique_ptr<TestServer> server_;
};

TEST_F(TlsTest, Matrix) {
  Start(false);
  EXPECT_EQ(Call(Tls(server_ca_.pem())), StatusCode::OK);
  EXPECT_EQ(Call(Tls(other_ca_.pem())), StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(grpc::InsecureChannelCredentials()), StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, AnExpiredServerCertificateIsRefused) {
  SetServerCertificate(server_ca_.Issue("server", 60));  // for a minute
  Start(false);
  EXPECT_EQ(Call(Tls(server_ca_.pem())), StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, MutualMatrix) {
  Start(true);
  const std::string roots = server_ca_.pem();
  EXPECT_EQ(Call(Tls(roots, client_ca_.Issue("client"))), StatusCode::OK);
  EXPECT_EQ(Call(Tls(roots)), StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(Tls(roots, other_ca_.Issue("client"))),
            StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(Tls(roots, client_ca_.Issue("client", 60))),
            StatusCode::UNAVAILABLE)
      << "expired";
  EXPECT_EQ(Call(Tls(other_ca_.pem(), client_ca_.Issue("client"))),
            StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(grpc::InsecureChannelCredentials()), StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, ARotatedCertificateIsUsedAndOpenStreamsGoOn) {
  Start(false);
  TestClient client(Connect(server_->unix_address(), Tls(server_ca_.pem())));
  ASSERT_TRUE(client.Create(1, 1).ok());
  grpc::ClientContext context;
  auto stream = client.stub().StepStream(&context);
  const auto step = [&] {
    v1::StepResponse response;
    ASSERT_TRUE(stream->Write(client.NextStep()));
    ASSERT_TRUE(stream->Read(&response));
    client.Take(response);
  };
  step();
  SetServerCertificate(other_ca_.Issue("server, rotated"));
  StatusCode code = StatusCode::UNAVAILABLE;
  for (int i = 0; i < 100 && code != StatusCode::OK; ++i) {
    std::this_thread::sleep_for(milliseconds(100));
    code = Call(Tls(other_ca_.pem()));
  }
  EXPECT_EQ(code, StatusCode::OK);
  EXPECT_EQ(Call(Tls(server_ca_.pem())), StatusCode::UNAVAILABLE);
  step();
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

// gRPC would abort, or refuse every client.
TEST_F(TlsTest, FilesThatAreWrongAreNotUsed) {
  Start(true);
  const Certificate client = client_ca_.Issue("client");
  const auto expect_ok = [&] {
    std::this_thread::sleep_for(milliseconds(3100));
    EXPECT_EQ(Call(Tls(server_ca_.pem(), client)), StatusCode::OK);
  };
  WriteFile(options_.tls_cert, "");
  expect_ok();
  SetServerCertificate({server_ca_.Issue("one").key,  // as half a renewal
                        server_ca_.Issue("another").chain});
  expect_ok();
  WriteFile(options_.tls_client_ca, "no PEM");
  expect_ok();
  SetServerCertificate(other_ca_.Issue("server, renewed"));
  WriteFile(options_.tls_client_ca, client_ca_.pem());
  StatusCode code = StatusCode::UNAVAILABLE;
  for (int i = 0; i < 100 && code != StatusCode::OK; ++i) {
    std::this_thread::sleep_for(milliseconds(100));
    code = Call(Tls(other_ca_.pem(), client));
  }
  EXPECT_EQ(code, StatusCode::OK);
}

TEST_F(TlsTest, FilesThatAreWrongAreRefusedAtTheStart) {
  const Certificate good = server_ca_.Issue("server");
  const std::string cut = good.chain.substr(0, good.chain.size() / 2);
  options_.tls_client_ca = TemporaryFile("ca");
  const auto check = [&](const std::string& key, const std::string& chain,
                         const std::string& roots) {
    SetServerCertificate({key, chain});
    WriteFile(options_.tls_client_ca, roots);
    return Server::Check(options_);
  };
  EXPECT_TRUE(check(good.key, good.chain, client_ca_.pem()).ok());
  EXPECT_TRUE(
      check(good.key, good.chain + server_ca_.pem(), client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.key, "", client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.key, cut, client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.key, good.chain + cut, client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.key, good.key, client_ca_.pem()).ok());
  EXPECT_FALSE(check("", good.chain, client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.chain, good.chain, client_ca_.pem()).ok());
  EXPECT_FALSE(check(good.key, good.chain, "").ok());
  const Status other =
      check(client_ca_.Issue("other").key, good.chain, client_ca_.pem());
  EXPECT_NE(std::string(other.message()).find("is not the key of"),
            std::string::npos)
      << other.message();
  options_.tls_key = "/";
  EXPECT_EQ(Server::Check(options_).code(), tenon::StatusCode::kNotFound);
}

TEST_F(TlsTest, BeyondLoopbackWithTls) {
  options_.listen = {"0.0.0.0:0"};
  Start(true);
  EXPECT_NE(server_->unix_address(), "0.0.0.0:0");
}

// Administration was open to whoever reached the port, while inference asked
// for a token.
TEST_F(TlsTest, Vllm56364AndCve202624207_ControlIsNotLeftOpen) {
  options_.decode_tokens = options_.control_tokens = options_.tls_key;
  EXPECT_TRUE(Server::Check(options_).ok());
  options_.control_tokens = "";
  EXPECT_EQ(Server::Check(options_).code(),
            tenon::StatusCode::kFailedPrecondition);
  options_.decode_tokens = "";
  EXPECT_TRUE(Server::Check(options_).ok());
  options_.listen.push_back("0.0.0.0:0");
  EXPECT_EQ(Server::Check(options_).code(),
            tenon::StatusCode::kFailedPrecondition);
  options_.control_tokens = options_.tls_key;
  EXPECT_TRUE(Server::Check(options_).ok());
  options_.control_tokens = "";
  options_.tls_client_ca = options_.tls_cert;
  EXPECT_TRUE(Server::Check(options_).ok());
}

class TokenTest : public ::testing::Test {
 protected:
  TokenTest() {
    options_.decode_tokens = TemporaryFile("decode");
    options_.control_tokens = TemporaryFile("control");
    WriteFile(options_.decode_tokens, "# clients\nalpha\nbeta\n");
    WriteFile(options_.control_tokens, "gamma\n");
    server_ = std::make_unique<TestServer>(TestLimits(), options_);
    channel_ = Connect(server_->unix_address());
  }

  static void Authorize(const std::string& value,
                        grpc::ClientContext* context) {
    if (!value.empty()) context->AddMetadata("authorization", value);
  }
  StatusCode Decode(const std::string& value) {
    grpc::ClientContext context;
    Authorize(value, &context);
    v1::GetCapabilitiesResponse response;
    return v1::Decode::NewStub(channel_)
        ->GetCapabilities(&context, {}, &response)
        .error_code();
  }
  StatusCode Control(const std::string& value) {
    grpc::ClientContext context;
    Authorize(value, &context);
    v1::Load response;
    return v1::Control::NewStub(channel_)
        ->GetLoad(&context, {}, &response)
        .error_code();
  }

  ServerOptions options_;
  std::unique_ptr<TestServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(TokenTest, OnlyTheRightOneHasAccess) {
  EXPECT_EQ(Decode("Bearer alpha"), StatusCode::OK);
  EXPECT_EQ(Decode("Bearer beta"), StatusCode::OK);
  EXPECT_EQ(Control("Bearer gamma"), StatusCode::OK);
  for (const char* value : {"", "Bearer ", "Bearer alph", "Bearer alphaa",
                            "bearer alpha", "alpha", "Bearer # clients"}) {
    EXPECT_EQ(Decode(value), StatusCode::UNAUTHENTICATED) << value;
    EXPECT_EQ(Control(value), StatusCode::UNAUTHENTICATED) << value;
  }
}

TEST_F(TokenTest, ATokenOfTheOtherServiceIsNotAllowed) {
  EXPECT_EQ(Control("Bearer alpha"), StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(Decode("Bearer gamma"), StatusCode::PERMISSION_DENIED);
}

TEST_F(TokenTest, EveryCallNeedsOne) {
  auto decode = v1::Decode::NewStub(channel_);
  auto control = v1::Control::NewStub(channel_);
  const auto expect = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), StatusCode::UNAUTHENTICATED);
  };
  const auto call = [&](auto method) {
    grpc::ClientContext context;
    expect(method(&context));
  };
  v1::CreateSequencesResponse created;
  v1::StepResponse stepped;
  v1::ForkSequencesResponse forked;
  v1::ReleaseSequencesResponse released;
  v1::DrainResponse drained;
  v1::ResumeResponse resumed;
  v1::AbortResponse aborted;
  v1::GetStatsResponse stats;
  call([&](auto* c) { return decode->CreateSequences(c, {}, &created); });
  call([&](auto* c) { return decode->Step(c, {}, &stepped); });
  call([&](auto* c) { return decode->ForkSequences(c, {}, &forked); });
  call([&](auto* c) { return decode->ReleaseSequences(c, {}, &released); });
  call([&](auto* c) { return decode->StepStream(c)->Finish(); });
  call([&](auto* c) { return decode->Generate(c, {})->Finish(); });
  call([&](auto* c) { return control->Drain(c, {}, &drained); });
  call([&](auto* c) { return control->Resume(c, {}, &resumed); });
  call([&](auto* c) { return control->Abort(c, {}, &aborted); });
  call([&](auto* c) { return control->GetStats(c, {}, &stats); });
}

TEST_F(TokenTest, AChangedFileCounts) {
  WriteFile(options_.decode_tokens, "delta\n");
  StatusCode code = StatusCode::UNAUTHENTICATED;
  for (int i = 0; i < 100 && code != StatusCode::OK; ++i) {
    std::this_thread::sleep_for(milliseconds(50));
    code = Decode("Bearer delta");
  }
  EXPECT_EQ(code, StatusCode::OK);
  EXPECT_EQ(Decode("Bearer alpha"), StatusCode::UNAUTHENTICATED);
  WriteFile(options_.decode_tokens, "\n");  // a slip locks nobody out
  std::this_thread::sleep_for(milliseconds(1200));
  EXPECT_EQ(Decode("Bearer delta"), StatusCode::OK);
}

TEST_F(TokenTest, ReflectionIsRefusedBesideTokens) {
  StepLoop loop(TestEngine(TestEngineOptions(TestLimits())),
                {TestLimits(), true});
  ServerOptions options = options_;
  options.listen = {"127.0.0.1:0"};
  options.reflection = true;
  EXPECT_FALSE(Server::Start(options, &loop).ok());
}

// A GET of /metrics, as Prometheus makes it.
std::string Get(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
            0);
  const std::string request =
      "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(send(fd, request.data(), request.size(), 0),
            static_cast<ssize_t>(request.size()));
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return text;
}

TEST(MetricsTest, PrometheusCanReadThem) {
  ServerOptions options;
  options.metrics_listen = "127.0.0.1:0";
  TestServer server(TestLimits(), options);
  TestClient client(Connect(server.unix_address()));
  ASSERT_TRUE(client.Create(3, 1).ok());
  ASSERT_TRUE(client.Step().ok());
  const std::string text = Get(server.server().metrics_port());
  for (const char* line :
       {"tenon_active_sequences 3\n", "tenon_sampled_tokens_total 6\n",
        "tenon_pages 128\n", "tenon_request_seconds_count 1\n",
        "tenon_step_seconds_bucket{le=\"+Inf\"}",
        "# TYPE tenon_queue_seconds histogram"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "\n" << text;
  }
}

// Services by name, over reflection: ServerReflectionRequest{list_services} is
// field 7, a string.
TEST(ReflectionTest, ListsTheServices) {
  ServerOptions options;
  options.reflection = true;
  TestServer server(TestLimits(), options);
  grpc::GenericStub stub(Connect(server.unix_address()));
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto call = stub.PrepareCall(
      &context,
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  call->StartCall(nullptr);
  ASSERT_TRUE(next());
  grpc::Slice slice(std::string("\x3a\x01*"));
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  ASSERT_TRUE(next());
  grpc::ByteBuffer reply;
  call->Read(&reply, nullptr);
  ASSERT_TRUE(next());
  ASSERT_TRUE(reply.DumpToSingleSlice(&slice).ok());
  const std::string text(reinterpret_cast<const char*>(slice.begin()),
                         slice.size());
  EXPECT_NE(text.find("tenon.v1.Decode"), std::string::npos);
  EXPECT_NE(text.find("tenon.v1.Control"), std::string::npos);
  call->WritesDone(nullptr);
  ASSERT_TRUE(next());
  grpc::Status status;
  call->Finish(&status, nullptr);
  ASSERT_TRUE(next());
  queue.Shutdown();
}

}  // namespace
}  // namespace tenon::service
