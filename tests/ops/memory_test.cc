#include "ops/core/memory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "ops/core/cpu_thread_pool.h"
#include "ops/core/device_info.h"
#include "tests/testing/op_test.h"
#include "tests/testing/test_tensor.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace tenon {
namespace {

class MemoryTest : public testing::OpTest {
 protected:
  Buffer Allocate(size_t bytes, MemoryKind kind = MemoryKind::kDevice) {
    StatusOr<Buffer> buffer = Buffer::Allocate(device(), bytes, kind);
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    return buffer.ok() ? *std::move(buffer) : Buffer();
  }
};

TEST_P(MemoryTest, BufferIsAlignedAndMoves) {
  for (size_t bytes : {size_t{1}, size_t{1000}, size_t{9} << 20}) {
    Buffer buffer = Allocate(bytes);
    ASSERT_NE(buffer.data(), nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 256, 0u);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(buffer.device(), device());
    void* const data = buffer.data();
    Buffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), data);
    EXPECT_EQ(buffer.data(), nullptr);  // NOLINT: what a move leaves
    Buffer assigned = Allocate(64);
    assigned = std::move(moved);
    EXPECT_EQ(assigned.data(), data);
    EXPECT_EQ(assigned.size(), bytes);
  }
  const Buffer empty = Allocate(0);
  EXPECT_EQ(empty.data(), nullptr);
  EXPECT_EQ(empty.size(), 0u);
}

TEST_P(MemoryTest, TooLargeABufferIsAnError) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers abort on an allocation that fails";
#endif
  const StatusOr<Buffer> buffer = Buffer::Allocate(device(), size_t{1} << 60);
  ASSERT_FALSE(buffer.ok());
  EXPECT_EQ(buffer.status().code(), StatusCode::kResourceExhausted);
  // The failure leaves nothing behind that a later call would report.
  EXPECT_NE(Allocate(16).data(), nullptr);
  EXPECT_TRUE(Synchronize(device(), stream()).ok());
}

TEST_P(MemoryTest, CopiesAndFills) {
  constexpr size_t kBytes = 100003;
  std::vector<uint8_t> source(kBytes);
  for (size_t i = 0; i < kBytes; ++i) source[i] = static_cast<uint8_t>(i * 31);
  const Buffer first = Allocate(kBytes);
  const Buffer second = Allocate(kBytes);
  const Buffer pinned = Allocate(kBytes, MemoryKind::kPinned);
  std::vector<uint8_t> result(kBytes);
  ASSERT_TRUE(CopyMemory(first.data(), device(), source.data(), Device{},
                         kBytes, stream())
                  .ok());
  ASSERT_TRUE(CopyMemory(second.data(), device(), first.data(), device(),
                         kBytes, stream())
                  .ok());
  ASSERT_TRUE(CopyMemory(pinned.data(), Device{}, second.data(), device(),
                         kBytes, stream())
                  .ok());
  Finish();
  std::memcpy(result.data(), pinned.data(), kBytes);
  EXPECT_EQ(result, source);
  ASSERT_TRUE(
      FillMemory(first.data(), device(), 0xa5, kBytes - 1, stream()).ok());
  ASSERT_TRUE(CopyMemory(result.data(), Device{}, first.data(), device(),
                         kBytes, stream())
                  .ok());
  Finish();
  EXPECT_EQ(std::count(result.begin(), result.end(), 0xa5),
            static_cast<int64_t>(kBytes - 1) + (source.back() == 0xa5));
  EXPECT_EQ(result.back(), source.back());
  // Nothing to do, whatever the pointers.
  EXPECT_TRUE(
      CopyMemory(nullptr, device(), nullptr, Device{}, 0, stream()).ok());
  EXPECT_TRUE(FillMemory(nullptr, device(), 0, 0, stream()).ok());
}

// There and back, by the kernel and by the copy engine, without a byte beyond.
TEST_P(MemoryTest, CopiesPinned) {
  constexpr size_t kRoom = 100000;
  constexpr uint8_t kGuard = 0x5a;
  const Buffer there = Allocate(kRoom);
  const Buffer from = Allocate(kRoom, HostMemoryKind(device()));
  const Buffer back = Allocate(kRoom, HostMemoryKind(device()));
  auto* const source = static_cast<uint8_t*>(from.data());
  auto* const result = static_cast<uint8_t*>(back.data());
  auto* const middle = static_cast<uint8_t*>(there.data());
  for (const size_t offset : {0, 4}) {
    for (const size_t bytes : {0, 1, 15, 16, 17, 4099, 65536, 65537, 90001}) {
      for (size_t i = 0; i < kRoom; ++i) {
        source[i] = static_cast<uint8_t>(i * 31 + bytes);
        result[i] = kGuard;
      }
      ASSERT_TRUE(FillMemory(middle, device(), kGuard, kRoom, stream()).ok());
      ASSERT_TRUE(CopyPinned(middle + offset, source + offset, device(), bytes,
                             stream())
                      .ok());
      // With what follows, which is to be as it was.
      ASSERT_TRUE(CopyPinned(result + offset, middle + offset, device(),
                             bytes + 16, stream())
                      .ok());
      Finish();
      for (size_t i = offset; i < offset + bytes; ++i) {
        ASSERT_EQ(result[i], source[i]) << "byte " << i << " of " << bytes;
      }
      for (size_t i = offset + bytes; i < offset + bytes + 32; ++i) {
        ASSERT_EQ(result[i], kGuard) << "byte " << i << " beyond " << bytes;
      }
    }
  }
}

TEST_P(MemoryTest, PinnedRowsAreCopiedAsFarAsTheyAreAsked) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kStride = 700;
  constexpr size_t kBytes = kRows * kStride * sizeof(int32_t);
  StatusOr<Buffer> from =
      Buffer::Allocate(device(), kBytes, HostMemoryKind(device()));
  StatusOr<Buffer> to =
      Buffer::Allocate(device(), kBytes, HostMemoryKind(device()));
  StatusOr<Buffer> between = Buffer::Allocate(device(), kBytes);
  ASSERT_TRUE(from.ok() && to.ok() && between.ok());
  auto* source = static_cast<int32_t*>(from->data());
  auto* result = static_cast<int32_t*>(to->data());
  for (int64_t i = 0; i < kRows * kStride; ++i) {
    source[i] = static_cast<int32_t>(i);
  }
  for (const int64_t words : {0, 1, 255, 256, 257, 700}) {
    SCOPED_TRACE(words);
    ASSERT_TRUE(
        FillMemory(between->data(), device(), 0xff, kBytes, stream()).ok());
    ASSERT_TRUE(CopyPinnedRows(between->data(), source, device(), kRows, words,
                               kStride, stream())
                    .ok());
    ASSERT_TRUE(
        CopyPinned(result, between->data(), device(), kBytes, stream()).ok());
    Finish();
    for (int64_t i = 0; i < kRows * kStride; ++i) {
      ASSERT_EQ(result[i], i % kStride < words ? source[i] : -1) << i;
    }
  }
}

TEST_P(MemoryTest, StreamsMove) {
  StatusOr<OwnedStream> created = OwnedStream::Create(device(), 3);
  ASSERT_TRUE(created.ok());
  OwnedStream stream = *std::move(created);
  OwnedStream assigned;
  assigned = std::move(stream);
  EXPECT_EQ(NumThreads(assigned.get()),
            device().type == DeviceType::kCpu ? 3 : 1);
  EXPECT_TRUE(Synchronize(device(), assigned.get()).ok());
}

TEST_P(MemoryTest, DeviceInfo) {
  const StatusOr<DeviceInfo> info = GetDeviceInfo(device());
  ASSERT_TRUE(info.ok()) << info.status().message();
  EXPECT_EQ(info->device, device());
  EXPECT_FALSE(info->name.empty());
  EXPECT_GE(info->num_cores, 1);
  EXPECT_GE(info->l2_bytes, 0);
  EXPECT_GT(info->total_memory_bytes, int64_t{1} << 20);
  if (device().type == DeviceType::kCuda) {
    EXPECT_GE(info->compute_capability, 80);
  } else {
    EXPECT_EQ(info->compute_capability, 0);
    EXPECT_NE(info->name.find(CpuIsaName(DetectCpuIsa())), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MemoryTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

#ifdef __SANITIZE_ADDRESS__
// What reads past the end of a test's tensor does not get away with it.
TEST(TestTensorTest, EndsWhereItsMemoryDoes) {
  for (const int64_t count : {0, 1, 13, 4096}) {
    const testing::TestTensor tensor(Device(), DType::kBFloat16, {count});
    const auto* const begin = static_cast<const char*>(tensor.view().data);
    const char* const end = begin + count * 2;
    EXPECT_NE(__asan_address_is_poisoned(end), 0) << count;
    EXPECT_EQ(__asan_address_is_poisoned(end - 1), 0) << count;
    EXPECT_EQ(tensor.NumStrayWrites(), 0);
  }
}
#endif

// A device that no host has: an error from every entry, in every build.
TEST(NoDeviceTest, IsAnError) {
  for (int32_t index : {-1, 1000}) {
    const Device device = {DeviceType::kCuda, index};
    for (const Status& status :
         {GetDeviceInfo(device).status(), Buffer::Allocate(device, 16).status(),
          OwnedStream::Create(device).status()}) {
      EXPECT_TRUE(status.code() == StatusCode::kUnavailable ||
                  status.code() == StatusCode::kUnimplemented)
          << status.message();
      EXPECT_STRNE(status.message(), "");
    }
  }
}

}  // namespace
}  // namespace tenon
