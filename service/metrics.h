#ifndef TENON_SERVICE_METRICS_H_
#define TENON_SERVICE_METRICS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tenon::service {

// Counts of durations in buckets that double from 1 microsecond to 33 seconds.
class LatencyHistogram {
 public:
  static constexpr size_t kNumBuckets = 26;  // and one for what is longer

  static double UpperSeconds(size_t bucket) {
    return 1e-6 * static_cast<double>(uint64_t{1} << bucket);
  }
  void Add(int64_t ns) {
    const uint64_t us = ns <= 0 ? 0 : (static_cast<uint64_t>(ns) + 999) / 1000;
    size_t bucket = 0;
    while (bucket < kNumBuckets && us > uint64_t{1} << bucket) ++bucket;
    counts_[bucket].fetch_add(1, std::memory_order_relaxed);
    sum_ns_.fetch_add(ns <= 0 ? 0 : static_cast<uint64_t>(ns),
                      std::memory_order_relaxed);
  }
  uint64_t count(size_t bucket) const {
    return counts_[bucket].load(std::memory_order_relaxed);
  }
  double sum_seconds() const {
    return 1e-9 * static_cast<double>(sum_ns_.load(std::memory_order_relaxed));
  }

 private:
  std::array<std::atomic<uint64_t>, kNumBuckets + 1> counts_{};
  std::atomic<uint64_t> sum_ns_{0};
};

// Written by whoever runs the loop, read by anybody.
struct Metrics {
  using Counter = std::atomic<uint64_t>;

  Counter steps{0};  // of the engine
  Counter rows{0};
  Counter tokens{0};
  Counter sampled_tokens{0};
  Counter requests{0};
  Counter rejected{0};  // at the admission gate
  Counter cancelled{0};
  Counter replayed{0};
  Counter expired_sequences{0};
  Counter failed_steps{0};
  Counter refused_connections{0};

  // How it is now.
  std::atomic<int32_t> active_sequences{0};
  std::atomic<int32_t> sessions{0};
  std::atomic<int32_t> queued_requests{0};
  std::atomic<int32_t> queued_rows{0};
  std::atomic<int32_t> open_streams{0};
  std::atomic<int32_t> connections{0};
  std::atomic<int64_t> free_pages{0};         // not set aside
  std::atomic<int64_t> engine_free_pages{0};  // not used

  LatencyHistogram step;     // of the engine
  LatencyHistogram queue;    // arrival of a Step to its launch
  LatencyHistogram request;  // arrival of a Step to its reply
  LatencyHistogram first_token;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_METRICS_H_
