#include "ops/core/cpu_thread_pool.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace tenon {
namespace {

// About 50 us: longer than the gap between two ops, short beside a step.
constexpr int kSpinRounds = 2000;

void RelaxCpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int UsableCpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

struct CpuThreadPool::State {
  // The loop under way; written before `generation` moves on, read after.
  int64_t count = 0;
  int64_t grain = 1;
  void (*body)(void*, int64_t, int64_t) = nullptr;
  void* context = nullptr;
  std::atomic<int64_t> next{0};

  std::atomic<uint64_t> generation{0};
  std::atomic<int> running{0};  // workers that have not finished this loop
  std::atomic<bool> stop{false};

  std::mutex caller_mutex;  // one loop at a time
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;

  void Work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + grain, count));
    }
  }

  void WorkerMain() {
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      while (generation.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpinRounds) {
          RelaxCpu();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_mutex);
        wake.wait(lock, [&] {
          return generation.load(std::memory_order_acquire) != seen;
        });
      }
      ++seen;
      if (stop.load(std::memory_order_acquire)) return;
      Work();
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  void StartGeneration() {
    {
      // The lock orders the change before a worker's check-then-sleep.
      std::lock_guard<std::mutex> lock(sleep_mutex);
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }
};

CpuThreadPool::CpuThreadPool(int num_threads)
    : state_(std::make_unique<State>()) {
  if (num_threads <= 0) num_threads = UsableCpus();
  state_->workers.reserve(static_cast<size_t>(num_threads) - 1);
  try {
    for (int i = 1; i < num_threads; ++i) {
      state_->workers.emplace_back(
          [state = state_.get()] { state->WorkerMain(); });
    }
  } catch (const std::exception&) {
    // A limit on threads or memory: fewer do the same work. (And nothing may
    // leave while there are threads that nobody would join.)
  }
}

CpuThreadPool::~CpuThreadPool() {
  state_->stop.store(true, std::memory_order_release);
  state_->StartGeneration();
  for (std::thread& worker : state_->workers) worker.join();
}

int CpuThreadPool::num_threads() const {
  return static_cast<int>(state_->workers.size()) + 1;
}

void CpuThreadPool::Run(int64_t count, int64_t grain,
                        void (*body)(void*, int64_t, int64_t), void* context) {
  State& state = *state_;
  std::lock_guard<std::mutex> lock(state.caller_mutex);
  state.count = count;
  state.grain = grain;
  state.body = body;
  state.context = context;
  state.next.store(0, std::memory_order_relaxed);
  state.running.store(static_cast<int>(state.workers.size()),
                      std::memory_order_relaxed);
  state.StartGeneration();
  state.Work();
  int spins = 0;
  while (state.running.load(std::memory_order_acquire) != 0) {
    // A worker may have lost its CPU to another process: let it have this one.
    if (++spins < kSpinRounds) {
      RelaxCpu();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace tenon
