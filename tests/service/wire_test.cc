// Bytes that no gRPC client sends: more connections than there may be, and
// HTTP/2 that is malformed, cut off, too much, or too slow. The server goes on
// for everybody else, and its memory stays bounded.

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>
#include <functional>
#include <random>

#include "tests/service/grpc_fixture.h"
#include "tests/testing/memory_use.h"

namespace tenon::service {
namespace {

using tenon::testing::ResidentBytes;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kIsSanitized = true;  // what is freed stays for a while
#else
constexpr bool kIsSanitized = false;
#endif

using std::chrono::milliseconds;
using Random = std::mt19937;

// A connection that speaks no protocol by itself.
class Raw {
 public:
  explicit Raw(const std::string& address) {
    if (IsUnixAddress(address)) {
      sockaddr_un to{};
      to.sun_family = AF_UNIX;
      std::strcpy(to.sun_path, address.c_str() + 5);
      Open(AF_UNIX, &to, sizeof(to));
    } else {
      sockaddr_in to{};
      to.sin_family = AF_INET;
      to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      to.sin_port = htons(static_cast<uint16_t>(
          std::atoi(address.c_str() + address.rfind(':') + 1)));
      Open(AF_INET, &to, sizeof(to));
    }
  }
  Raw(Raw&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Raw() {
    if (fd_ >= 0) close(fd_);
  }

  bool is_connected() const { return fd_ >= 0; }

  // As much as the server takes within a while.
  void Send(const std::string& bytes) {
    size_t sent = 0;
    while (sent < bytes.size() && Wait(POLLOUT, milliseconds(200))) {
      const ssize_t n = send(fd_, bytes.data() + sent, bytes.size() - sent,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n <= 0) return;
      sent += static_cast<size_t>(n);
    }
  }

  // Whether the server closes the connection within a while.
  bool IsClosedWithin(milliseconds time) {
    const Time end = Clock::now() + time;
    char buffer[4096];
    while (Clock::now() < end) {
      if (!Wait(POLLIN, milliseconds(20))) continue;
      if (recv(fd_, buffer, sizeof(buffer), MSG_DONTWAIT) <= 0) return true;
    }
    return false;
  }

 private:
  static bool IsUnixAddress(const std::string& address) {
    return address.rfind("unix:", 0) == 0;
  }
  void Open(int family, const void* to, socklen_t size) {
    fd_ = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd_, static_cast<const sockaddr*>(to), size) == 0) return;
    close(fd_);
    fd_ = -1;
  }
  bool Wait(int16_t events, milliseconds time) {
    pollfd p{fd_, events, 0};
    return poll(&p, 1, static_cast<int>(time.count())) > 0;
  }

  int fd_ = -1;
};

// What gRPC may hold on to after a flood; more floods do not make it more.
constexpr int64_t kFloodKb = 256 << 10;

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

enum FrameType : uint8_t {
  kData,
  kHeaders,
  kPriority,
  kRstStream,
  kSettings,
  kPushPromise,
  kPing,
  kGoAway,
  kWindowUpdate,
  kContinuation,
};

// `length` is what the frame says of its payload, if that is not the truth.
std::string Frame(uint8_t type, uint8_t flags, uint32_t stream,
                  const std::string& payload, int64_t length = -1) {
  const auto n = static_cast<uint32_t>(
      length < 0 ? static_cast<int64_t>(payload.size()) : length);
  std::string frame;
  for (const int shift : {16, 8, 0}) frame += static_cast<char>(n >> shift);
  frame += static_cast<char>(type);
  frame += static_cast<char>(flags);
  for (const int shift : {24, 16, 8, 0}) {
    frame += static_cast<char>(stream >> shift);
  }
  return frame + payload;
}

std::string Hello() { return kPreface + Frame(kSettings, 0, 0, ""); }

std::string Text(const std::string& text) {  // of HPACK, below 127 bytes
  return std::string(1, static_cast<char>(text.size())) + text;
}

std::string HeaderBlock(const std::string& path) {
  return std::string("\x83\x86\x04") + Text(path) + "\x01" + Text("x") +
         "\x0f\x10" + Text("application/grpc") + std::string(1, '\0') +
         Text("te") + Text("trailers");
}

std::string Bytes(Random& random, size_t count) {
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

std::string RandomFrame(Random& random) {
  const auto pick = [&random](uint32_t n) { return random() % n; };
  const uint32_t stream = pick(3) == 0 ? random() : 2 * pick(8) + pick(2);
  const auto flags = static_cast<uint8_t>(pick(2) == 0 ? 0x4 | pick(2)  // whole
                                                       : random());
  switch (pick(12)) {
    case 0:
      return Frame(kHeaders, flags, stream,
                   HeaderBlock("/tenon.v1.Decode/Step"));
    case 1:
      return Frame(kHeaders, flags, stream, Bytes(random, pick(300)));
    case 2:  // a table larger than allowed, integers without end
      return Frame(kHeaders, flags, stream, "\x3f\xff\xff\xff\xff\xff\xff\xff");
    case 3:
      return Frame(kContinuation, flags, stream, Bytes(random, pick(2000)));
    case 4:  // a message that is longer than it says, or shorter
      return Frame(kData, flags, stream,
                   std::string(1, static_cast<char>(pick(3))) +
                       Bytes(random, 4 + pick(100)));
    case 5:
      return Frame(kSettings, 0, pick(2), Bytes(random, 6 * pick(9) + pick(2)));
    case 6:
      return Frame(kWindowUpdate, 0, stream, "\x7f\xff\xff\xff");
    case 7:
      return Frame(kRstStream, 0, stream, Bytes(random, 3 + pick(3)));
    case 8:
      return Frame(kPing, 0, pick(2), Bytes(random, 7 + pick(3)));
    case 9:  // more than there will be
      return Frame(static_cast<uint8_t>(pick(12)), flags, stream,
                   Bytes(random, pick(50)), pick(1 << 24));
    case 10:
      return Frame(kPushPromise, flags, stream, Bytes(random, pick(50)));
    default:
      return Frame(static_cast<uint8_t>(random()), flags, stream,
                   Bytes(random, pick(100)));
  }
}

class WireTest : public ::testing::Test {
 protected:
  void Start(const std::function<void(Limits*, ServerOptions*)>& change) {
    Limits limits = TestLimits();
    ServerOptions options;
    change(&limits, &options);
    server_ = std::make_unique<TestServer>(limits, options);
    client_ = std::make_unique<TestClient>(Connect(server_->tcp_address()));
    ASSERT_TRUE(client_->Create(1, 1).ok());
  }
  void Start() {
    Start([](Limits*, ServerOptions*) {});
  }

  const std::string& Address(uint32_t i) {
    return i % 2 == 0 ? server_->unix_address() : server_->tcp_address();
  }
  void ExpectServes() {
    if (client_->step == 25) {
      ASSERT_TRUE(client_->End().ok());
      ASSERT_TRUE(client_->Create(1, 1).ok());
    }
    const grpc::Status status = client_->Step();
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  void ExpectConnections(int32_t count) {
    const Metrics& metrics = server_->loop().metrics();
    for (int i = 0; i < 500 && metrics.connections != count; ++i) {
      std::this_thread::sleep_for(milliseconds(10));
    }
    EXPECT_EQ(metrics.connections, count);
  }
  void ExpectMemoryBelow(int64_t kb) {
    if (kIsSanitized) return;
    EXPECT_LE(ResidentBytes() / 1024, kb);
  }
  void ExpectAllFree() {
    ASSERT_TRUE(client_->End().ok());
    server_->ExpectAllFree();
  }

  std::unique_ptr<TestServer> server_;
  std::unique_ptr<TestClient> client_;
};

TEST_F(WireTest, MoreConnectionsThanTheLimitAreClosedAtOnce) {
  Start([](Limits* limits, ServerOptions*) { limits->connections = 5; });
  std::vector<Raw> open;
  for (uint32_t i = 0; i < 4; ++i) {
    open.emplace_back(Address(i)).Send(Hello());
  }
  ExpectConnections(5);
  for (uint32_t i = 0; i < 20; ++i) {
    EXPECT_TRUE(Raw(Address(i)).IsClosedWithin(milliseconds(2000)));
  }
  EXPECT_EQ(server_->loop().metrics().refused_connections, 20u);
  ExpectServes();
  for (Raw& raw : open) EXPECT_FALSE(raw.IsClosedWithin(milliseconds(1)));
  open.clear();
  ExpectConnections(1);
  TestClient another(Connect(server_->unix_address()));
  EXPECT_TRUE(another.Create(1, 2).ok());
  EXPECT_TRUE(another.End().ok());
  ExpectAllFree();
}

// gRPC's own listener would never listen again.
TEST_F(WireTest, ListensAgainWhenDescriptorsAreFree) {
  Start();
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit few = before;
  few.rlim_cur = 200;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<Raw> open;
  for (uint32_t i = 0; i < 200; ++i) {
    open.emplace_back(Address(i));
    if (!open.back().is_connected()) break;
  }
  EXPECT_LT(open.size(), 200u);
  std::this_thread::sleep_for(milliseconds(300));
  ExpectServes();
  open.clear();
  setrlimit(RLIMIT_NOFILE, &before);
  TestClient another(Connect(server_->unix_address()));
  EXPECT_TRUE(another.Create(1, 2).ok());
  EXPECT_TRUE(another.End().ok());
  ExpectAllFree();
}

TEST_F(WireTest, WhoeverSaysNothingIsDisconnected) {
  Start([](Limits*, ServerOptions* options) {
    options->handshake_timeout = milliseconds(200);
  });
  std::vector<Raw> open;
  for (uint32_t i = 0; i < 8; ++i) {
    open.emplace_back(Address(i)).Send(std::string(kPreface, i));
  }
  for (Raw& raw : open) EXPECT_TRUE(raw.IsClosedWithin(milliseconds(5000)));
  ExpectServes();
  ExpectConnections(1);
  ExpectAllFree();
}

TEST_F(WireTest, AnyFramesLeaveTheServerAsItWas) {
  Start();
  Random random(7);
  const int64_t memory = ResidentBytes() / 1024 + (64 << 10);
  for (uint32_t i = 0; i < 600; ++i) {
    Raw raw(Address(i));
    ASSERT_TRUE(raw.is_connected());
    std::string bytes = random() % 16 == 0 ? Bytes(random, 30) : Hello();
    for (uint32_t n = random() % 20; n > 0; --n) bytes += RandomFrame(random);
    if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 1));
    raw.Send(bytes);
    if (random() % 4 == 0) raw.IsClosedWithin(milliseconds(1));
    if (i % 50 == 0) ExpectServes();
  }
  ExpectConnections(1);
  ExpectMemoryBelow(memory);
  ExpectAllFree();
}

TEST_F(WireTest, FloodsOfCallsThatAreResetAtOnce) {
  Start();
  const int64_t memory = ResidentBytes() / 1024 + kFloodKb;
  for (uint32_t i = 0; i < 4; ++i) {
    Raw raw(Address(i));
    std::string bytes = Hello();
    for (uint32_t stream = 1; stream < 4000; stream += 2) {
      bytes +=
          Frame(kHeaders, 0x4, stream,
                HeaderBlock(stream % 4 == 1 ? "/tenon.v1.Decode/StepStream"
                                            : "/tenon.v1.Decode/Generate"));
      bytes += Frame(kRstStream, 0, stream, std::string("\0\0\0\x8", 4));
    }
    raw.Send(bytes);
    ExpectServes();
  }
  ExpectConnections(1);
  ExpectMemoryBelow(memory);
  ExpectAllFree();
}

// Each asks for an answer that nobody reads.
TEST_F(WireTest, FloodsOfPingsAndSettings) {
  Start();
  const int64_t memory = ResidentBytes() / 1024 + kFloodKb;
  const std::string ping = Frame(kPing, 0, 0, "12345678");
  const std::string settings = Frame(kSettings, 0, 0, "");
  const std::string empty = Frame(kData, 0, 1, "");
  for (const std::string& frame : {ping, settings, empty}) {
    Raw raw(server_->unix_address());
    std::string bytes =
        Hello() +
        Frame(kHeaders, 0x4, 1, HeaderBlock("/tenon.v1.Decode/StepStream"));
    for (int i = 0; i < 50000; ++i) bytes += frame;
    raw.Send(bytes);
    ExpectServes();
  }
  ExpectConnections(1);
  ExpectMemoryBelow(memory);
  ExpectAllFree();
}

// Header blocks without an end: CONTINUATION after CONTINUATION.
TEST_F(WireTest, HeadersWithoutEnd) {
  Start();
  const int64_t memory = ResidentBytes() / 1024 + kFloodKb;
  Raw raw(server_->unix_address());
  std::string bytes = Hello() + Frame(kHeaders, 0, 1, "\x83\x86");
  const std::string header =
      "\x40" + Text("x-header") + Text(std::string(100, 'x'));
  for (int i = 0; i < 20000; ++i) bytes += Frame(kContinuation, 0, 1, header);
  raw.Send(bytes);
  ExpectServes();
  ExpectMemoryBelow(memory);
  ExpectAllFree();
}

TEST_F(WireTest, SlowClientsDelayNobody) {
  Start();
  const std::string request =
      Hello() + Frame(kHeaders, 0x4, 1, HeaderBlock("/tenon.v1.Decode/Step")) +
      Frame(kData, 0x1, 1, std::string("\0\0\0\x3\xe8", 5) + "slow");
  std::vector<Raw> slow;
  for (uint32_t i = 0; i < 32; ++i) slow.emplace_back(Address(i));
  for (size_t at = 0; at < request.size(); at += 2) {
    for (Raw& raw : slow) raw.Send(request.substr(at, 2));
    if (at % 20 == 0) ExpectServes();
  }
  slow.clear();
  ExpectConnections(1);
  ExpectAllFree();
}

}  // namespace
}  // namespace tenon::service
