// What every op's launch on CUDA has in common.

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "ops/core/build_config.h"
#include "tests/ops/launch_kernel.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

constexpr size_t kSmall = 36 << 10;
constexpr size_t kLarge = 96 << 10;

class LaunchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device";
  }
};

// Launches with `bytes` of shared memory again and again, in a stream of its
// own. Returns the first error, or one that tells of a wrong result.
Status LaunchAgainAndAgain(size_t bytes, int launches) {
  const Device device{DeviceType::kCuda, 0};
  StatusOr<OwnedStream> stream = OwnedStream::Create(device);
  if (!stream.ok()) return stream.status();
  StatusOr<Buffer> sum = Buffer::Allocate(device, sizeof(int64_t));
  if (!sum.ok()) return sum.status();
  TENON_RETURN_IF_ERROR(
      FillMemory(sum->data(), device, 0, sizeof(int64_t), stream->get()));
  for (int i = 0; i < launches; ++i) {
    TENON_RETURN_IF_ERROR(testing::LaunchWithShared(
        stream->get(), bytes, static_cast<int64_t*>(sum->data())));
  }
  int64_t bytes_seen = 0;
  TENON_RETURN_IF_ERROR(CopyMemory(&bytes_seen, Device{}, sum->data(), device,
                                   sizeof(bytes_seen), stream->get()));
  TENON_RETURN_IF_ERROR(Synchronize(device, stream->get()));
  if (bytes_seen != static_cast<int64_t>(bytes) * launches) {
    return InternalError("shared memory: ", bytes_seen, " bytes");
  }
  return Status();
}

TEST_F(LaunchTest, ALargeLimitStaysWhenLessIsAskedFor) {
  if constexpr (kCudaBuilt) {
    for (const size_t bytes : {kLarge, kSmall}) {
      const Status status = LaunchAgainAndAgain(bytes, 1);
      ASSERT_TRUE(status.ok()) << status.message();
    }
    const StatusOr<size_t> limit = testing::SharedLimit();
    ASSERT_TRUE(limit.ok()) << limit.status().message();
    EXPECT_GE(*limit, kLarge);
  }
}

TEST_F(LaunchTest, ThreadsLaunchWithDifferentSizesOfSharedMemory) {
  if constexpr (kCudaBuilt) {
    std::vector<Status> results(4);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < results.size(); ++i) {
      threads.emplace_back([&result = results[i], i] {
        result = LaunchAgainAndAgain(i % 2 == 0 ? kLarge : kSmall, 300);
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const Status& result : results) {
      EXPECT_TRUE(result.ok()) << result.message();
    }
  }
}

}  // namespace
}  // namespace tenon
