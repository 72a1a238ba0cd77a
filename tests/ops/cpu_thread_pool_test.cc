#include "ops/core/cpu_thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "ops/core/device_info.h"

namespace tenon {
namespace {

TEST(CpuThreadPoolTest, RunsEveryPieceOnce) {
  for (int threads : {1, 2, 3, 8}) {
    CpuThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t count : {0, 1, 2, 13, 111, 1000}) {
      for (int64_t grain : {1, 2, 7, 64, 111, 2000}) {
        std::vector<int> visits(static_cast<size_t>(count), 0);
        std::atomic<int64_t> bad_pieces{0};
        auto body = [&](int64_t begin, int64_t end) {
          const bool good = begin % grain == 0 && begin < end &&
                            end == std::min(begin + grain, count);
          bad_pieces += !good;
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        };
        using Body = decltype(body);
        pool.Run(
            count, grain,
            [](void* context, int64_t begin, int64_t end) {
              (*static_cast<Body*>(context))(begin, end);
            },
            &body);
        EXPECT_EQ(bad_pieces, 0) << count << " by " << grain;
        EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), count);
      }
    }
  }
}

TEST(CpuThreadPoolTest, ParallelForCoversTheRange) {
  CpuThreadPool pool(2);
  for (CpuThreadPool* cpu : {static_cast<CpuThreadPool*>(nullptr), &pool}) {
    const Stream stream = {nullptr, cpu};
    EXPECT_EQ(NumThreads(stream), cpu == nullptr ? 1 : 2);
    for (int64_t count : {-3, 0, 1, 5, 100}) {
      for (int64_t grain : {-1, 0, 1, 3, 1000}) {
        std::vector<int> visits(
            static_cast<size_t>(std::max<int64_t>(count, 0)));
        ParallelFor(stream, count, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        EXPECT_EQ(std::count(visits.begin(), visits.end(), 1),
                  static_cast<int64_t>(visits.size()));
      }
    }
  }
}

TEST(CpuThreadPoolTest, ManyShortLoops) {
  CpuThreadPool pool(3);
  const Stream stream = {nullptr, &pool};
  std::vector<int64_t> sums(7, 0);
  for (int64_t loop = 0; loop < 20000; ++loop) {
    // Each loop reads what the one before wrote, maybe on another thread.
    ParallelFor(stream, 7, 1,
                [&](int64_t begin, int64_t) { sums[begin] += loop; });
  }
  for (int64_t sum : sums) EXPECT_EQ(sum, 20000LL * 19999 / 2);
}

TEST(CpuThreadPoolTest, WakesAfterSleeping) {
  CpuThreadPool pool(2);
  const Stream stream = {nullptr, &pool};
  for (int loop = 0; loop < 5; ++loop) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> pieces{0};
    ParallelFor(stream, 10, 1, [&](int64_t, int64_t) { ++pieces; });
    EXPECT_EQ(pieces, 10);
  }
}

TEST(CpuThreadPoolTest, ConcurrentCallersTakeTurns) {
  CpuThreadPool pool(2);
  const Stream stream = {nullptr, &pool};
  std::atomic<int> inside{0};  // callers whose loop is under way
  std::atomic<int> mixed{0};
  std::vector<std::thread> callers;
  std::vector<int64_t> totals(4, 0);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int loop = 0; loop < 500; ++loop) {
        std::vector<int> visits(17, 0);
        ParallelFor(stream, 17, 2, [&](int64_t begin, int64_t end) {
          if (begin == 0) mixed += inside.fetch_add(1) != 0;
          for (int64_t i = begin; i < end; ++i) ++visits[i];
          if (begin == 0) inside.fetch_sub(1);
        });
        for (int v : visits) totals[caller] += v == 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(mixed, 0);
  for (int64_t total : totals) EXPECT_EQ(total, 500 * 17);
}

TEST(CpuThreadPoolTest, CanBeDestroyedAtAnyTime) {
  for (int i = 0; i < 50; ++i) {
    CpuThreadPool pool(4);  // never used: threads may not have started
  }
  for (int i = 0; i < 20; ++i) {
    CpuThreadPool pool(4);
    std::atomic<int> pieces{0};
    ParallelFor({nullptr, &pool}, 8, 1, [&](int64_t, int64_t) { ++pieces; });
    EXPECT_EQ(pieces, 8);
    // Even rounds find the workers spinning, odd ones asleep.
    if (i % 2 == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

TEST(CpuThreadPoolTest, DefaultsToTheUsableCpus) {
  CpuThreadPool pool(0);
  EXPECT_EQ(pool.num_threads(), GetDeviceInfo(Device{})->num_cores);
}

}  // namespace
}  // namespace tenon
