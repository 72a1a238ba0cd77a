#ifndef TENON_SERVICE_PROMETHEUS_METRICS_H_
#define TENON_SERVICE_PROMETHEUS_METRICS_H_

#include <memory>

namespace prometheus {
class Collectable;
}

namespace tenon::service {

class StepLoop;

// The loop's metrics as /metrics shows them; read when asked for.
std::shared_ptr<prometheus::Collectable> MakeCollectable(const StepLoop* loop);

}  // namespace tenon::service

#endif  // TENON_SERVICE_PROMETHEUS_METRICS_H_
