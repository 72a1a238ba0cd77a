#include "service/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/service_type.h>
#include <prometheus/exposer.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "service/connections.h"
#include "service/health.h"
#include "service/log.h"
#include "service/poller.h"
#include "service/prometheus_metrics.h"
#include "service/rpc.h"
#include "service/tls_files.h"

namespace tenon::service {
namespace {

using Acceptor = grpc::experimental::ExternalConnectionAcceptor;
using ConnectionType =
    grpc::ServerBuilder::experimental_type::ExternalConnectionType;
using std::chrono::milliseconds;

constexpr char kDecodeName[] = "tenon.v1.Decode";
constexpr char kControlName[] = "tenon.v1.Control";

bool IsLoopback(const std::string& address) {
  const std::string host = address.substr(0, address.rfind(':'));
  if (host == "localhost" || host == "[::1]") return true;
  return host.rfind("127.", 0) == 0 &&
         host.find_first_not_of("0123456789.") == std::string::npos;
}

std::shared_ptr<grpc::ServerCredentials> TlsCredentials(const TlsFiles& files) {
  using grpc::experimental::FileWatcherCertificateProvider;
  constexpr unsigned kSeconds = 1;  // between looks at the copies
  const std::string roots = files.client_ca_path();
  auto provider = std::make_shared<FileWatcherCertificateProvider>(
      files.identity_path(), files.identity_path(), roots, kSeconds);
  grpc::experimental::TlsServerCredentialsOptions tls(provider);
  tls.watch_identity_key_cert_pairs();
  if (!roots.empty()) {
    tls.watch_root_certs();
    tls.set_cert_request_type(
        GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(tls);
}

}  // namespace

struct Server::Impl : DrainControl {
  Impl(const ServerOptions& o, StepLoop* l)
      : options(o),
        loop(l),
        validator(l->engine().model().config, l->engine().options().max_context,
                  o.limits),
        decode_tokens(o.decode_tokens),
        control_tokens(o.control_tokens),
        tls_files(o.tls_cert, o.tls_key, o.tls_client_ca),
        streams(&l->mutable_metrics()->open_streams),
        connections(o.limits.connections, l->mutable_metrics()) {}
  ~Impl();

  Status Start();
  Status StartMetrics();
  void Configure(grpc::ServerBuilder* builder);
  Status Listen(grpc::ServerBuilder* builder);
  std::vector<RpcService*> Services() {
    return {decode.get(), control.get(), &health};
  }
  void Monitor();
  void UpdateHealth();

  void BeginDrain(milliseconds grace) override;
  void EndDrain() override;
  milliseconds default_grace() const override { return options.drain_grace; }

  ServerOptions options;
  StepLoop* loop;
  Validator validator;
  TokenFile decode_tokens;
  TokenFile control_tokens;
  TlsFiles tls_files;
  OpenStreams streams;
  HealthService health;
  std::unique_ptr<RpcService> decode;
  std::unique_ptr<RpcService> control;
  std::vector<std::unique_ptr<Acceptor>> acceptors;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Poller> poller;
  Connections connections;
  std::unique_ptr<prometheus::Exposer> exposer;
  std::shared_ptr<prometheus::Collectable> collectable;
  std::vector<std::string> addresses;

  std::mutex mutex;
  std::condition_variable wake;
  bool stopping = false;  // guarded by mutex, as all that follows
  bool drain = false;
  Time drain_at;
  bool serving = false;
  std::thread monitor;
};

Server::Impl::~Impl() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    stopping = true;
  }
  wake.notify_all();
  if (monitor.joinable()) monitor.join();
  connections.Stop();
  if (server != nullptr) server->Shutdown(std::chrono::system_clock::now());
  poller.reset();
}

void Server::Impl::Configure(grpc::ServerBuilder* builder) {
  const Limits& limits = options.limits;
  for (RpcService* service : Services()) {
    builder->RegisterService(service->service());
  }
  poller = std::make_unique<Poller>(builder->AddCompletionQueue());
  builder->SetMaxReceiveMessageSize(limits.request_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE,
                              limits.metadata_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                              limits.streams_per_connection);
  builder->AddChannelArgument(
      GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
      static_cast<int>(options.handshake_timeout.count()));
  builder->AddChannelArgument(
      GRPC_ARG_MAX_CONNECTION_IDLE_MS,
      static_cast<int>(options.max_connection_idle.count()));
  if (options.max_connection_age.count() > 0) {
    builder->AddChannelArgument(
        GRPC_ARG_MAX_CONNECTION_AGE_MS,
        static_cast<int>(options.max_connection_age.count()));
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, 30000);
  }
}

// Unix sockets, and all without a certificate, are plain.
Status Server::Impl::Listen(grpc::ServerBuilder* builder) {
  Acceptor* plain = nullptr;
  Acceptor* tls = nullptr;
  for (const std::string& address : options.listen) {
    const bool is_plain = IsUnix(address) || options.tls_cert.empty();
    Acceptor*& acceptor = is_plain ? plain : tls;
    if (acceptor == nullptr) {
      acceptors.push_back(builder->experimental().AddExternalConnectionAcceptor(
          ConnectionType::FROM_FD, is_plain ? grpc::InsecureServerCredentials()
                                            : TlsCredentials(tls_files)));
      acceptor = acceptors.back().get();
    }
    StatusOr<std::string> listening =
        connections.Listen(address, [acceptor](int listener, int connection) {
          Acceptor::NewConnectionParameters parameters;
          parameters.listener_fd = listener;
          parameters.fd = connection;
          acceptor->HandleNewConnection(&parameters);
        });
    TENON_RETURN_IF_ERROR(listening.status());
    addresses.push_back(*std::move(listening));
  }
  return Status();
}

Status Server::Impl::Start() {
  TENON_RETURN_IF_ERROR(decode_tokens.Load());
  TENON_RETURN_IF_ERROR(control_tokens.Load());
  if (!options.tls_cert.empty()) {
    TENON_RETURN_IF_ERROR(tls_files.Load());
  }
  const RpcContext context{loop,           &validator,      &options.limits,
                           &decode_tokens, &control_tokens, &streams,
                           this,           Clock::now()};
  decode = MakeDecodeService(context);
  control = MakeControlService(context);

  grpc::ServerBuilder builder;
  if (options.reflection) {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  }
  Configure(&builder);
  TENON_RETURN_IF_ERROR(Listen(&builder));
  server = builder.BuildAndStart();
  if (server == nullptr) return UnavailableError("gRPC does not start");
  UpdateHealth();
  for (RpcService* service : Services()) service->Start(poller.get());
  poller->Start();
  TENON_RETURN_IF_ERROR(connections.Start());
  TENON_RETURN_IF_ERROR(StartMetrics());
  monitor = std::thread(&Impl::Monitor, this);
  return Status();
}

Status Server::Impl::StartMetrics() {
  if (options.metrics_listen.empty()) return Status();
  collectable = MakeCollectable(loop);
  try {
    exposer = std::make_unique<prometheus::Exposer>(options.metrics_listen, 1);
    exposer->RegisterCollectable(collectable);
  } catch (const std::exception& error) {
    return UnavailableError("metrics on ", options.metrics_listen, ": ",
                            error.what());
  }
  return Status();
}

// Health follows the loop's heartbeat, and not a trial step: that would wait in
// the queue, and take part in the load.
void Server::Impl::UpdateHealth() {
  const bool alive =
      !loop->is_broken() && Clock::now() - loop->heartbeat() < options.stall;
  // Held to the end: what another thread found earlier is not set later.
  std::lock_guard<std::mutex> lock(mutex);
  const bool is_serving = alive && !drain;
  const bool changed = is_serving != serving;
  serving = is_serving;
  health.Set("", is_serving);
  health.Set(kDecodeName, is_serving);
  health.Set(kControlName, true);
  if (changed) Log("health", {{"serving", is_serving ? "true" : "false"}});
}

void Server::Impl::Monitor() {
  constexpr milliseconds kPeriod{20};
  Time next_second = Clock::now();
  Time next_reload = Clock::now() + options.tls_reload;
  std::unique_lock<std::mutex> lock(mutex);
  while (!stopping) {
    wake.wait_for(lock, kPeriod);
    const Time now = Clock::now();
    if (drain && now >= drain_at && !loop->draining()) {
      loop->set_draining(true);
      Log("draining");
    }
    lock.unlock();
    UpdateHealth();
    if (now >= next_second) {
      next_second = now + std::chrono::seconds(1);
      streams.CancelIdle(options.limits.stream_idle);
      for (TokenFile* tokens : {&decode_tokens, &control_tokens}) {
        const Status status = tokens->Load();
        if (!status.ok()) Log("tokens", {{"error", status.message()}});
      }
    }
    if (!options.tls_cert.empty() && now >= next_reload) {
      next_reload = now + options.tls_reload;
      const Status status = tls_files.Load();
      if (!status.ok()) Log("tls", {{"error", status.message()}});
    }
    lock.lock();
  }
}

void Server::Impl::BeginDrain(milliseconds grace) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!drain) drain_at = Clock::now() + grace;
    drain = true;
  }
  UpdateHealth();
  wake.notify_all();
}

void Server::Impl::EndDrain() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    drain = false;
    loop->set_draining(false);
  }
  UpdateHealth();
}

Status Server::Check(const ServerOptions& o) {
  const bool tls = !o.tls_cert.empty();
  if (tls != !o.tls_key.empty() || (!tls && !o.tls_client_ca.empty())) {
    return InvalidArgumentError(
        "TLS needs a certificate and its key, and a client CA needs both");
  }
  if (o.listen.empty()) return InvalidArgumentError("no address to listen on");
  for (const std::string& address : o.listen) {
    if (IsUnix(address) || IsLoopback(address)) continue;
    if (!tls) {
      return FailedPreconditionError(
          address, ": listening beyond loopback needs TLS (--tls-cert)");
    }
    if (o.tls_client_ca.empty() && o.control_tokens.empty()) {
      return FailedPreconditionError(
          address,
          ": beyond loopback Control would be everybody's: it needs "
          "--control-tokens or --tls-client-ca");
    }
  }
  if (!o.decode_tokens.empty() && o.control_tokens.empty()) {
    return FailedPreconditionError(
        "--decode-tokens without --control-tokens: Control would be "
        "everybody's");
  }
  if (!o.metrics_listen.empty() && !IsLoopback(o.metrics_listen)) {
    return FailedPreconditionError(
        o.metrics_listen,
        ": metrics are for loopback; forward them from there");
  }
  if (o.reflection && !(o.decode_tokens.empty() && o.control_tokens.empty())) {
    return FailedPreconditionError("no reflection with bearer tokens");
  }
  return tls ? TlsFiles(o.tls_cert, o.tls_key, o.tls_client_ca).Load()
             : Status();
}

StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                StepLoop* loop) {
  TENON_RETURN_IF_ERROR(Check(options));
  auto impl = std::make_unique<Impl>(options, loop);
  TENON_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() = default;

const std::vector<std::string>& Server::addresses() const {
  return impl_->addresses;
}

int Server::metrics_port() const {
  return impl_->exposer == nullptr ? 0 : impl_->exposer->GetListeningPorts()[0];
}

void Server::Drain() { impl_->BeginDrain(impl_->options.drain_grace); }

void Server::Shutdown(milliseconds deadline) {
  const Metrics& metrics = impl_->loop->metrics();
  const Time end = Clock::now() + deadline;
  Drain();
  while (Clock::now() < end &&
         !(impl_->loop->draining() && metrics.active_sequences == 0 &&
           metrics.queued_requests == 0)) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  impl_->loop->RefuseAll();
  // Not for gRPC to cancel.
  while (metrics.queued_requests != 0) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  Log("shutdown", {{"sequences", std::to_string(metrics.active_sequences)}});
  // For the last replies; what is left after that are streams.
  impl_->server->Shutdown(std::chrono::system_clock::now() + milliseconds(500));
}

}  // namespace tenon::service
