// tenon_server: a model behind gRPC. SIGTERM and SIGINT drain it; a second one
// ends it at once.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "service/flags.h"
#include "service/log.h"
#include "service/server.h"
#include "service/step_loop.h"

namespace tenon::service {
namespace {

constexpr char kShippedModel[] = "examples/models/austen";

// Under `bazel run` the working directory is not the caller's.
std::string CallersPath(const std::string& path) {
  const char* folder = std::getenv("BUILD_WORKING_DIRECTORY");
  if (folder == nullptr || path.empty() || path[0] == '/') return path;
  return std::string(folder) + "/" + path;
}

StatusOr<std::unique_ptr<Session>> LoadEngine(const Flags& flags) {
  const std::string directory =
      flags.model.empty() ? kShippedModel : CallersPath(flags.model);
  StatusOr<std::shared_ptr<const Model>> model =
      Model::Load(directory, flags.device);
  TENON_RETURN_IF_ERROR(model.status());
  SessionOptions options = flags.engine;
  if (options.max_context == 0) {
    options.max_context =
        std::min((*model)->config.max_position_embeddings, 2048);
  }
  StepLoop::SetEngineLimits(flags.server.limits, &options);
  Log("loaded",
      {{"model", directory},
       {"architecture", ArchitectureName((*model)->config.architecture)}});
  return Session::Create(*model, options);
}

Status Run(const Flags& flags, const sigset_t& signals) {
  TENON_RETURN_IF_ERROR(Server::Check(flags.server));  // a model takes long
  StatusOr<std::unique_ptr<Session>> engine = LoadEngine(flags);
  TENON_RETURN_IF_ERROR(engine.status());
  StepLoop loop(*std::move(engine), {flags.server.limits, flags.run_inline});
  StatusOr<std::unique_ptr<Server>> server = Server::Start(flags.server, &loop);
  TENON_RETURN_IF_ERROR(server.status());
  for (const std::string& address : (*server)->addresses()) {
    Log("listening", {{"address", address}});
  }
  if ((*server)->metrics_port() != 0) {
    Log("metrics", {{"port", std::to_string((*server)->metrics_port())}});
  }
  Log("ready", {{"epoch", std::to_string(loop.epoch())}});

  int signal = 0;
  sigwait(&signals, &signal);
  Log("signal", {{"number", std::to_string(signal)}});
  std::thread impatient([&signals] {
    int again = 0;
    sigwait(&signals, &again);
    _exit(1);
  });
  impatient.detach();
  (*server)->Shutdown(flags.drain_deadline);
  return Status();
}

}  // namespace
}  // namespace tenon::service

int main(int argc, char** argv) {
  using namespace tenon;
  StatusOr<service::Flags> flags = service::ParseFlags(argc, argv);
  Status status = flags.status();
  if (flags.ok() && flags->help) {
    std::printf("%s", service::kUsage);
    return 0;
  }
  // Before any thread: all of them inherit it.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  if (status.ok()) status = service::Run(*flags, signals);
  if (status.ok()) {
    service::Log("stopped");
    return 0;
  }
  std::fprintf(stderr, "tenon_server: %s\n", status.message());
  return 2;
}
