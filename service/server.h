#ifndef TENON_SERVICE_SERVER_H_
#define TENON_SERVICE_SERVER_H_

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "ops/core/status.h"
#include "service/limits.h"
#include "service/step_loop.h"

namespace tenon::service {

struct ServerOptions {
  // "unix:/path", or host:port; port 0 is any. Beyond loopback only with TLS.
  std::vector<std::string> listen;

  // PEM files, read again when they change. With client_ca clients must have a
  // certificate of it. Unix sockets, which only their owner may open, are
  // without TLS always.
  std::string tls_cert;
  std::string tls_key;
  std::string tls_client_ca;
  std::chrono::seconds tls_reload{60};

  // Files of bearer tokens; one for Control need not be one for Decode. Without
  // a file everybody has access: so Decode's needs Control's beside it, and
  // listening beyond loopback needs Control's or a client CA.
  std::string decode_tokens;
  std::string control_tokens;

  bool reflection = false;     // not with tokens
  std::string metrics_listen;  // host:port for /metrics; empty: none

  // A loop that has not gone round for so long is not serving.
  std::chrono::milliseconds stall{10000};
  // Between health's NOT_SERVING and the refusal of new sequences, for load
  // balancers to notice.
  std::chrono::milliseconds drain_grace{2000};
  std::chrono::milliseconds max_connection_age{0};  // 0: for ever
  // One that has not said by then that it is HTTP/2 is closed.
  std::chrono::milliseconds handshake_timeout{10000};
  // A connection without a call for so long is closed.
  std::chrono::milliseconds max_connection_idle{600000};
  Limits limits;
};

// gRPC around a StepLoop.
class Server {
 public:
  // Whether the options go together; Start checks that, too.
  static Status Check(const ServerOptions& options);
  static StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                 StepLoop* loop);
  // Calls under way are cancelled.
  ~Server();

  // What became of the listen addresses, with ports that were chosen.
  const std::vector<std::string>& addresses() const;
  // Of /metrics; 0: none.
  int metrics_port() const;

  // Health is NOT_SERVING at once; new sequences are refused a grace later.
  void Drain();
  // Drains, waits until no sequences are left or the deadline, and lets the
  // steps under way end. The server is of no use after it.
  void Shutdown(std::chrono::milliseconds deadline);

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_SERVER_H_
