#ifndef TENON_SERVICE_FLAGS_H_
#define TENON_SERVICE_FLAGS_H_

#include <chrono>
#include <string>

#include "engine/session.h"
#include "ops/core/status.h"
#include "service/server.h"
#include "service/step_loop.h"

namespace tenon::service {

extern const char kUsage[];

struct Flags {
  std::string model;
  Device device{DeviceType::kCpu, 0};
  SessionOptions engine;
  ServerOptions server;
  bool run_inline = true;
  std::chrono::milliseconds drain_deadline{30000};
  bool help = false;
};

StatusOr<Flags> ParseFlags(int argc, char** argv);

}  // namespace tenon::service

#endif  // TENON_SERVICE_FLAGS_H_
