// The server as a process: signals, restarts, clients that are killed.

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <atomic>
#include <fstream>

#include "tests/service/grpc_fixture.h"

namespace tenon::service {
namespace {

using std::chrono::milliseconds;

// A process with its stderr in a file.
pid_t Spawn(std::vector<std::string> arguments, const std::string& log) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 2, log.c_str(),
                                   O_CREAT | O_TRUNC | O_WRONLY, 0600);
  pid_t pid = -1;
  EXPECT_EQ(posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ),
            0)
      << argv[0];
  posix_spawn_file_actions_destroy(&actions);
  return pid;
}

// tenon_server with the tiny model; killed at the end.
class ServerProcess {
 public:
  explicit ServerProcess(const std::string& socket,
                         std::vector<std::string> more = {}) {
    address_ = "unix:" + socket;
    log_ = socket + ".log";
    std::vector<std::string> arguments = {"service/tenon_server",
                                          "--model",
                                          "tests/golden/qwen3_moe_tiny",
                                          "--listen",
                                          address_,
                                          "--threads",
                                          "1",
                                          "--kv-cache-mib",
                                          "4",
                                          "--max-context",
                                          "64"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    pid_ = Spawn(arguments, log_);
  }
  ~ServerProcess() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }

  const std::string& address() const { return address_; }
  void Signal(int signal) { kill(pid_, signal); }
  // Its exit status.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }
  std::string Log() const {
    std::ifstream file(log_);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
  std::shared_ptr<grpc::Channel> Channel() const {
    auto channel = Connect(address_);
    EXPECT_TRUE(channel->WaitForConnected(std::chrono::system_clock::now() +
                                          milliseconds(30000)))
        << Log();
    return channel;
  }

 private:
  std::string address_;
  std::string log_;
  pid_t pid_ = -1;
};

grpc::health::v1::HealthCheckResponse::ServingStatus Health(
    const std::shared_ptr<grpc::Channel>& channel) {
  auto stub = grpc::health::v1::Health::NewStub(channel);
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckResponse response;
  (void)stub->Check(&context, {}, &response);
  return response.status();
}

TEST(ProcessTest, SigtermUnderLoadFailsNoStep) {
  ServerProcess server(SocketPath(), {"--drain-grace-ms", "300"});
  const auto channel = server.Channel();
  std::atomic<int> failures{0};
  std::atomic<int> steps_after{0};
  std::atomic<bool> sent{false};
  std::vector<std::thread> threads;
  for (int32_t c = 0; c < 4; ++c) {
    threads.emplace_back([&, c] {
      TestClient client(Connect(server.address()));
      if (!client.Create(2, 2 * c, 31).ok()) ++failures;
      for (int i = 0; i < 30; ++i) {
        std::this_thread::sleep_for(milliseconds(20));
        const bool after = sent;
        const grpc::Status status = client.Step();
        if (!status.ok()) ++failures;
        if (after) ++steps_after;
      }
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t seed = 2 * c + i;
        EXPECT_EQ(client.tokens[static_cast<size_t>(i)],
                  ExpectedTokens(TestClient::PromptSize(seed), seed, 30));
      }
      if (!client.End().ok()) ++failures;
    });
  }
  std::this_thread::sleep_for(milliseconds(150));
  server.Signal(SIGTERM);
  sent = true;
  // Not serving is seen before new work is refused.
  bool not_serving_seen = false;
  for (int i = 0; i < 1000; ++i) {
    not_serving_seen =
        not_serving_seen ||
        Health(channel) == grpc::health::v1::HealthCheckResponse::NOT_SERVING;
    TestClient late(channel);
    const grpc::Status status = late.Create(1, 1);
    if (status.ok()) {
      EXPECT_TRUE(late.End().ok());
      std::this_thread::sleep_for(milliseconds(5));
      continue;
    }
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    break;
  }
  EXPECT_TRUE(not_serving_seen);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0) << server.Log();
  EXPECT_GT(steps_after, 0);
  const int status = server.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(ProcessTest, AfterARestartOldHandlesAreOfAnotherEpoch) {
  const std::string socket = SocketPath();
  auto server = std::make_unique<ServerProcess>(socket);
  TestClient client(server->Channel());
  ASSERT_TRUE(client.Create(2, 1).ok());
  ASSERT_TRUE(client.Step().ok());
  server->Signal(SIGKILL);
  server->Wait();
  server = std::make_unique<ServerProcess>(socket);  // over a stale socket
  const auto channel = server->Channel();
  TestClient other(channel);
  ASSERT_TRUE(other.Create(2, 1).ok());  // in the same slots

  TestClient old(channel);
  old.session = client.session;
  old.step = client.step;
  old.seqs = client.seqs;
  grpc::Status status = old.Step();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  google::rpc::PreconditionFailure precondition;
  ASSERT_TRUE(HasDetail(status, &precondition));
  EXPECT_EQ(precondition.violations(0).type(), "EPOCH_CHANGED");
  old.session = other.session;  // and so are handles alone
  old.step = 0;
  status = old.Step();
  ASSERT_TRUE(HasDetail(status, &precondition));
  EXPECT_EQ(precondition.violations(0).type(), "EPOCH_CHANGED");
  EXPECT_EQ(old.End().error_code(), grpc::StatusCode::OK);
}

TEST(ProcessTest, KilledClientsGiveTheirPagesBack) {
  TestServer server;
  const std::string address = server.unix_address();
  std::vector<pid_t> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(
        Spawn({"tests/service/killed_client", address}, "/dev/null"));
  }
  for (int i = 0; i < 2000 && server.loop().metrics().sampled_tokens < 60;
       ++i) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_GE(server.loop().metrics().sampled_tokens, 60u);
  for (pid_t pid : clients) kill(pid, SIGKILL);
  for (pid_t pid : clients) waitpid(pid, nullptr, 0);
  server.ExpectAllFree();
}

TEST(ProcessTest, ASecondSignalEndsItAtOnce) {
  ServerProcess server(SocketPath());
  TestClient client(server.Channel());
  ASSERT_TRUE(client.Create(1, 1).ok());
  server.Signal(SIGTERM);
  std::this_thread::sleep_for(milliseconds(200));
  server.Signal(SIGTERM);
  const int status = server.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1) << status;
}

TEST(ProcessTest, BadFlagsAreRefused) {
  for (const std::vector<std::string>& flags :
       std::vector<std::vector<std::string>>{{"--rows", "5000"},
                                             {"--nonsense", "1"},
                                             {"--listen", "0.0.0.0:0"},
                                             {"--listen", "127.0.0.1:65536"},
                                             {"--listen", "127.0.0.1:-1"},
                                             {"--listen", "unix:"},
                                             {"--tls-cert", "nowhere"},
                                             {"--moe-kernels", "nowhere"},
                                             {"--model", "nowhere"}}) {
    ServerProcess server(SocketPath(), flags);
    const int status = server.Wait();
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 2) << flags[0];
    EXPECT_NE(server.Log().find("tenon_server: "), std::string::npos);
  }
}

}  // namespace
}  // namespace tenon::service
