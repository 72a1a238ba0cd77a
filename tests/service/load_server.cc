// A server over a model with random weights, for tenon_load on machines without
// a checkpoint:
//
//   load_server [--device cpu|cuda] [--layers N] [--edits N] ADDRESS...
//
// --layers 0, the default, is the smallest model; more are as many layers of
// Qwen3-30B-A3B, of its full width, in bfloat16. --edits N: limits.logit_edits.
// Serves until it is killed.

#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "service/server.h"
#include "tests/testing/bench_model.h"

namespace tenon::service {
namespace {

struct Flags {
  Device device{DeviceType::kCpu, 0};
  int32_t layers = 0;
  ServerOptions server;
};

// False for what it does not know.
bool ParseFlags(int argc, char** argv, Flags* flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag.rfind("--", 0) != 0) {
      flags->server.listen.push_back(flag);
      continue;
    }
    if (i + 1 >= argc) return false;
    const std::string value = argv[++i];
    if (flag == "--device") {
      flags->device.type =
          value == "cuda" ? DeviceType::kCuda : DeviceType::kCpu;
    } else if (flag == "--layers") {
      flags->layers = std::atoi(value.c_str());
    } else if (flag == "--edits") {
      flags->server.limits.logit_edits = std::atoi(value.c_str());
    } else {
      return false;
    }
  }
  return !flags->server.listen.empty();
}

Status Run(const Flags& flags) {
  const bool is_small = flags.layers == 0;
  StatusOr<std::shared_ptr<const Model>> model = Model::Random(
      is_small ? testing::SmallestModel() : testing::Qwen3Moe30B(flags.layers),
      is_small ? DType::kFloat32 : DType::kBFloat16, flags.device, 1);
  TENON_RETURN_IF_ERROR(model.status());
  SessionOptions options;
  StepLoop::SetEngineLimits(flags.server.limits, &options);
  options.max_context = 2048;
  options.num_threads = 1;
  options.num_pages = int64_t{flags.server.limits.rows_per_step} *
                      (options.max_context / options.page_size);
  auto engine = Session::Create(*model, options);
  TENON_RETURN_IF_ERROR(engine.status());
  StepLoop loop(*std::move(engine), {flags.server.limits, true});
  auto server = Server::Start(flags.server, &loop);
  TENON_RETURN_IF_ERROR(server.status());
  for (const std::string& address : (*server)->addresses()) {
    std::printf("listening on %s\n", address.c_str());
  }
  std::fflush(stdout);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  int signal = 0;
  sigwait(&signals, &signal);
  return Status();
}

}  // namespace
}  // namespace tenon::service

int main(int argc, char** argv) {
  using namespace tenon;
  service::Flags flags;
  if (!service::ParseFlags(argc, argv, &flags)) {
    std::fprintf(stderr, "load_server: bad arguments, see its source\n");
    return 2;
  }
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const Status status = service::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "load_server: %s\n", status.message());
  return 1;
}
