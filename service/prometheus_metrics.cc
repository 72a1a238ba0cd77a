#include "service/prometheus_metrics.h"

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <limits>
#include <vector>

#include "service/step_loop.h"

namespace tenon::service {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

class LoopMetrics final : public prometheus::Collectable {
 public:
  explicit LoopMetrics(const StepLoop* loop) : loop_(loop) {}

  std::vector<MetricFamily> Collect() const override;

 private:
  const StepLoop* loop_;
};

MetricFamily Family(const char* name, const char* help, MetricType type) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  family.metric.emplace_back();
  return family;
}

MetricFamily Counter(const char* name, const char* help, uint64_t value) {
  MetricFamily family = Family(name, help, MetricType::Counter);
  family.metric[0].counter.value = static_cast<double>(value);
  return family;
}

MetricFamily Gauge(const char* name, const char* help, double value) {
  MetricFamily family = Family(name, help, MetricType::Gauge);
  family.metric[0].gauge.value = value;
  return family;
}

MetricFamily Histogram(const char* name, const char* help,
                       const LatencyHistogram& histogram) {
  MetricFamily family = Family(name, help, MetricType::Histogram);
  ClientMetric::Histogram& out = family.metric[0].histogram;
  uint64_t total = 0;
  for (size_t i = 0; i <= LatencyHistogram::kNumBuckets; ++i) {
    total += histogram.count(i);
    out.bucket.push_back({total, i == LatencyHistogram::kNumBuckets
                                     ? std::numeric_limits<double>::infinity()
                                     : LatencyHistogram::UpperSeconds(i)});
  }
  out.sample_count = total;
  out.sample_sum = histogram.sum_seconds();
  return family;
}

std::vector<MetricFamily> LoopMetrics::Collect() const {
  const Metrics& m = loop_->metrics();
  const double heartbeat_age =
      std::chrono::duration<double>(Clock::now() - loop_->heartbeat()).count();
  return {
      Counter("tenon_steps_total", "Engine steps.", m.steps),
      Counter("tenon_rows_total", "Rows of engine steps.", m.rows),
      Counter("tenon_tokens_total", "Tokens run through the model.", m.tokens),
      Counter("tenon_sampled_tokens_total", "Tokens drawn.", m.sampled_tokens),
      Counter("tenon_requests_total", "Calls that reached the admission gate.",
              m.requests),
      Counter("tenon_rejected_total", "Calls that the gate refused.",
              m.rejected),
      Counter("tenon_cancelled_total", "Calls cancelled before their end.",
              m.cancelled),
      Counter("tenon_replayed_total", "Steps answered from the cache.",
              m.replayed),
      Counter("tenon_expired_sequences_total", "Sequences whose lease ran out.",
              m.expired_sequences),
      Counter("tenon_failed_steps_total", "Engine steps that failed.",
              m.failed_steps),
      Gauge("tenon_active_sequences", "Sequences alive.", m.active_sequences),
      Gauge("tenon_sessions", "Sessions alive.", m.sessions),
      Gauge("tenon_queued_requests", "Calls that wait for the step loop.",
            m.queued_requests),
      Gauge("tenon_queued_rows", "Rows that wait for an engine step.",
            m.queued_rows),
      Gauge("tenon_open_streams", "StepStream calls.", m.open_streams),
      Gauge("tenon_connections", "Clients' connections.", m.connections),
      Counter("tenon_refused_connections_total",
              "Connections closed at once: there were too many.",
              m.refused_connections),
      Gauge("tenon_free_pages", "KV cache pages neither used nor set aside.",
            static_cast<double>(m.free_pages)),
      Gauge("tenon_engine_free_pages", "KV cache pages that are not used.",
            static_cast<double>(m.engine_free_pages)),
      Gauge("tenon_pages", "KV cache pages.",
            static_cast<double>(loop_->engine().options().num_pages)),
      Gauge("tenon_draining", "1 while new sequences are refused.",
            loop_->draining() ? 1 : 0),
      Gauge("tenon_heartbeat_age_seconds",
            "Since the step loop last went round.", heartbeat_age),
      Histogram("tenon_step_seconds", "Duration of an engine step.", m.step),
      Histogram("tenon_queue_seconds", "Arrival of a Step until its launch.",
                m.queue),
      Histogram("tenon_request_seconds", "Arrival of a Step until its reply.",
                m.request),
      Histogram("tenon_first_token_seconds",
                "Arrival of a prompt until its first token.", m.first_token),
  };
}

}  // namespace

std::shared_ptr<prometheus::Collectable> MakeCollectable(const StepLoop* loop) {
  return std::make_shared<LoopMetrics>(loop);
}

}  // namespace tenon::service
