// Ten times more steps than the server can run.

#include <algorithm>
#include <mutex>

#include "tests/service/grpc_fixture.h"
#include "tests/testing/memory_use.h"

namespace tenon::service {
namespace {

using tenon::testing::ResidentBytes;

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int32_t kRows = 16;

double P99(std::vector<double> values) {
  EXPECT_FALSE(values.empty());
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[values.size() * 99 / 100];
}

// Of steps in milliseconds, by one client after the other.
class Timed {
 public:
  explicit Timed(const std::string& address) : client_(Connect(address)) {
    EXPECT_TRUE(client_.Create(kRows, 0, 35).ok());
  }
  ~Timed() { EXPECT_TRUE(client_.End().ok()); }

  grpc::Status Step(double* ms, v1::Timing* timing = nullptr) {
    if (client_.step == 34) {
      EXPECT_TRUE(client_.End().ok());
      EXPECT_TRUE(client_.Create(kRows, 0, 35).ok());
    }
    const Time begin = Clock::now();
    v1::StepResponse response;
    const grpc::Status status = client_.Step(&response);
    if (timing != nullptr) *timing = response.timing();
    *ms =
        std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
    return status;
  }

 private:
  TestClient client_;
};

TEST(OverloadTest, AcceptedStepsStayFastAndTheRestIsRefusedAtOnce) {
  Limits limits = TestLimits();
  limits.rows_per_step = kRows;
  limits.sequences = 16 * kRows;
  limits.sessions = 16;
  limits.queued_rows = 2 * kRows;  // a batch that runs, and one that waits
  // A step long enough that ten times as many calls are little work for gRPC.
  auto model = Model::Load("examples/models/austen", {DeviceType::kCpu, 0});
  ASSERT_TRUE(model.ok()) << model.status().message();
  TestServer server(limits, {}, 16 * kRows * 8, *model);
  std::vector<double> unloaded;
  {
    Timed timed(server.unix_address());
    for (int i = 0; i < 100; ++i) {
      double ms = 0.0;
      ASSERT_TRUE(timed.Step(&ms).ok());
      unloaded.push_back(ms);
    }
  }
  std::sort(unloaded.begin(), unloaded.end());
  const double capacity = 1000.0 / unloaded[unloaded.size() / 2];
  const int num_clients = 16;
  const auto period =
      microseconds(static_cast<int64_t>(1e6 * num_clients / (10.0 * capacity)));

  std::mutex mutex;
  std::vector<double> accepted, rejected, waited, engine;
  int without_retry = 0;
  int failed = 0;
  std::atomic<int64_t> memory_before{0};
  std::vector<std::unique_ptr<Timed>> clients;
  for (int c = 0; c < num_clients; ++c) {
    clients.push_back(std::make_unique<Timed>(server.unix_address()));
  }
  std::vector<std::thread> threads;
  const Time begin = Clock::now();
  const Time end = begin + milliseconds(2500);
  for (int c = 0; c < num_clients; ++c) {
    threads.emplace_back([&, c] {
      Timed& timed = *clients[static_cast<size_t>(c)];
      for (Time due = Clock::now(); due < end; due += period) {
        std::this_thread::sleep_until(due);
        double ms = 0.0;
        v1::Timing timing;
        const grpc::Status status = timed.Step(&ms, &timing);
        std::lock_guard<std::mutex> lock(mutex);
        if (memory_before == 0 && Clock::now() - begin > milliseconds(1000)) {
          memory_before = ResidentBytes() / 1024;
        }
        if (status.ok()) {
          accepted.push_back(ms);
          waited.push_back(1e-6 * static_cast<double>(timing.queue_ns()));
          engine.push_back(1e-6 * static_cast<double>(timing.step_ns()));
        } else if (status.error_code() ==
                   grpc::StatusCode::RESOURCE_EXHAUSTED) {
          google::rpc::RetryInfo retry;
          without_retry += !HasDetail(status, &retry);
          rejected.push_back(ms);
        } else {
          ++failed;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  clients.clear();
  const int64_t memory_after = ResidentBytes() / 1024;
  std::printf(
      "unloaded p99 %.2f ms; %zu accepted, p99 %.2f ms (%.2f in the queue, "
      "%.2f in the engine); %zu rejected, p99 %.2f ms; resident %lld -> %lld "
      "kB\n",
      P99(unloaded), accepted.size(), P99(accepted), P99(waited), P99(engine),
      rejected.size(), P99(rejected), static_cast<long long>(memory_before),
      static_cast<long long>(memory_after));
  ASSERT_FALSE(accepted.empty());
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(without_retry, 0);
  EXPECT_GT(rejected.size(), accepted.size());
  // At most one engine step before one's own. Not what the clients saw: they
  // share this machine with the engine, and with whoever else is on it.
  EXPECT_LE(P99(waited),
            3.0 * *std::max_element(engine.begin(), engine.end()) + 20.0);
  EXPECT_LE(static_cast<double>(memory_after),
            1.05 * static_cast<double>(memory_before) + 8192.0);
  server.ExpectAllFree();
}

}  // namespace
}  // namespace tenon::service
