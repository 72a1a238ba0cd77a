#ifndef TENON_SERVICE_CONNECTIONS_H_
#define TENON_SERVICE_CONNECTIONS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "ops/core/status.h"
#include "service/metrics.h"

namespace tenon::service {

bool IsUnix(const std::string& address);

// The sockets that clients connect to, and a limit on how many do. gRPC would
// listen by itself, but has no such limit, and (1.51) stops listening for good
// when the process is out of file descriptors once.
class Connections {
 public:
  // Takes a connection, and closes it some time.
  using Handler = std::function<void(int listener, int connection)>;

  Connections(int32_t limit, Metrics* metrics);
  // What is connected stays so.
  ~Connections();

  // "unix:/path", which its owner alone may open, or host:port, port 0 being
  // any. The address with the port. Before Start.
  StatusOr<std::string> Listen(const std::string& address, Handler handler);
  Status Start();
  // No more handlers are called. Unix sockets are removed.
  void Stop();

 private:
  struct Listener {
    int fd = -1;
    std::string path;  // of a Unix socket
    Handler handler;
  };

  void Run();
  void Accept(const Listener& listener);
  bool Watch(int connection);
  void Pause(bool paused);

  const int32_t limit_;
  Metrics* const metrics_;
  std::vector<Listener> listeners_;
  int epoll_ = -1;
  int stop_ = -1;                 // an eventfd
  bool is_paused_ = false;        // no descriptors are left
  std::vector<int> connections_;  // a descriptor of our own for each
  std::thread thread_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_CONNECTIONS_H_
