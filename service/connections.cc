#include "service/connections.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "service/log.h"

namespace tenon::service {
namespace {

constexpr char kUnix[] = "unix:";
// For files, threads' pipes, and what else is not a connection.
constexpr rlim_t kOtherDescriptors = 256;
// How long to wait for a descriptor to become free.
constexpr int kPauseMs = 100;

// What an event is of: listeners are numbered from 0.
constexpr uint64_t kConnection = uint64_t{1} << 32;  // + its descriptor
constexpr uint64_t kStop = uint64_t{2} << 32;

Status SystemError(const std::string& address, const char* what) {
  return UnavailableError(address, ": ", what, ": ", strerror(errno));
}

// Each connection has gRPC's descriptor and ours.
Status HaveDescriptors(int32_t connections) {
  const rlim_t needed =
      2 * static_cast<rlim_t>(connections) + kOtherDescriptors;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= needed) {
    return Status();
  }
  if (limit.rlim_max < needed) {
    return FailedPreconditionError(
        "--connections: ", connections, " connections need ", needed,
        " file descriptors, the process may have ", limit.rlim_max);
  }
  limit.rlim_cur = needed;
  setrlimit(RLIMIT_NOFILE, &limit);
  return Status();
}

StatusOr<sockaddr_un> UnixAddress(const std::string& path) {
  // Without one it would be a name that the kernel makes up, open to all.
  if (path.empty()) return InvalidArgumentError("unix: without a path");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return InvalidArgumentError(path, ": too long for a Unix socket");
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

// Removes a socket that no server listens on any more.
Status RemoveStaleSocket(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return Status();
  if (!S_ISSOCK(info.st_mode)) {
    return FailedPreconditionError(path, ": exists and is not a socket");
  }
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool answered = connect(fd, reinterpret_cast<const sockaddr*>(&address),
                                sizeof(address)) == 0;
  close(fd);
  if (answered) {
    return FailedPreconditionError(path, ": another server listens there");
  }
  unlink(path.c_str());
  return Status();
}

StatusOr<int> ListenOnUnix(const std::string& path) {
  const StatusOr<sockaddr_un> address = UnixAddress(path);
  TENON_RETURN_IF_ERROR(address.status());
  TENON_RETURN_IF_ERROR(RemoveStaleSocket(path, *address));
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const mode_t mask = umask(0177);  // its owner's alone
  const bool bound = bind(fd, reinterpret_cast<const sockaddr*>(&*address),
                          sizeof(*address)) == 0;
  umask(mask);
  if (bound && listen(fd, SOMAXCONN) == 0) return fd;
  const Status status = SystemError(path, "cannot listen");
  close(fd);
  return status;
}

// getaddrinfo takes 65536 for 0.
bool IsPort(const std::string& text) {
  return !text.empty() && text.size() <= 5 &&
         text.find_first_not_of("0123456789") == std::string::npos &&
         std::stoi(text) <= 65535;
}

StatusOr<int> ListenOnTcp(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || !IsPort(address.substr(colon + 1))) {
    return InvalidArgumentError(address, " is not host:port or unix:/path");
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found);
  if (error != 0) {
    return InvalidArgumentError(address, ": ", gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owned(found,
                                                                 freeaddrinfo);
  const int fd =
      socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int on = 1, off = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // inherited
  if (found->ai_family == AF_INET6) {
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
  }
  if (bind(fd, found->ai_addr, found->ai_addrlen) == 0 &&
      listen(fd, SOMAXCONN) == 0) {
    return fd;
  }
  const Status status = SystemError(address, "cannot listen");
  close(fd);
  return status;
}

int PortOf(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                   : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

bool Add(int epoll, int fd, uint32_t events, uint64_t data) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = data;
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

}  // namespace

bool IsUnix(const std::string& address) { return address.rfind(kUnix, 0) == 0; }

Connections::Connections(int32_t limit, Metrics* metrics)
    : limit_(limit), metrics_(metrics) {}

Connections::~Connections() {
  Stop();
  for (const int fd : connections_) close(fd);
}

StatusOr<std::string> Connections::Listen(const std::string& address,
                                          Handler handler) {
  const bool is_unix = IsUnix(address);
  const std::string path = is_unix ? address.substr(sizeof(kUnix) - 1) : "";
  const StatusOr<int> fd = is_unix ? ListenOnUnix(path) : ListenOnTcp(address);
  TENON_RETURN_IF_ERROR(fd.status());
  listeners_.push_back({*fd, path, std::move(handler)});
  if (is_unix) return address;
  return address.substr(0, address.rfind(':') + 1) +
         std::to_string(PortOf(*fd));
}

Status Connections::Start() {
  TENON_RETURN_IF_ERROR(HaveDescriptors(limit_));
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  stop_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  bool added = epoll_ >= 0 && stop_ >= 0 && Add(epoll_, stop_, EPOLLIN, kStop);
  for (size_t i = 0; i < listeners_.size(); ++i) {
    added = added && Add(epoll_, listeners_[i].fd, EPOLLIN, i);
  }
  if (!added) return SystemError("epoll", "no descriptor");
  thread_ = std::thread(&Connections::Run, this);
  return Status();
}

void Connections::Stop() {
  if (thread_.joinable()) {
    eventfd_write(stop_, 1);
    thread_.join();
  }
  for (const Listener& listener : listeners_) {
    close(listener.fd);
    if (!listener.path.empty()) unlink(listener.path.c_str());
  }
  listeners_.clear();
  for (int* fd : {&epoll_, &stop_}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

void Connections::Run() {
  epoll_event events[64];
  for (;;) {
    const int count =
        epoll_wait(epoll_, events, 64, is_paused_ ? kPauseMs : -1);
    if (is_paused_) Pause(false);
    for (int i = 0; i < count; ++i) {
      const uint64_t data = events[i].data.u64;
      if (data == kStop) return;
      if (data < listeners_.size()) {
        Accept(listeners_[data]);
        continue;
      }
      // A connection has ended. Closing our descriptor would not end its
      // watch: gRPC may have the other one still.
      const int fd = static_cast<int>(data - kConnection);
      epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
      connections_.erase(
          std::find(connections_.begin(), connections_.end(), fd));
      close(fd);
      metrics_->connections = static_cast<int32_t>(connections_.size());
    }
  }
}

void Connections::Accept(const Listener& listener) {
  for (;;) {
    const int fd =
        accept4(listener.fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno != EAGAIN) Pause(true);  // nearly always for descriptors
      return;
    }
    if (static_cast<int32_t>(connections_.size()) >= limit_ || !Watch(fd)) {
      metrics_->refused_connections.fetch_add(1, std::memory_order_relaxed);
      close(fd);
      continue;
    }
    metrics_->connections = static_cast<int32_t>(connections_.size());
    listener.handler(listener.fd, fd);
  }
}

// gRPC says nobody when it closes its descriptor, but it shuts the socket down
// then, which a second descriptor of it notices. So it does when the client
// goes.
bool Connections::Watch(int connection) {
  const int own = fcntl(connection, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return false;
  if (!Add(epoll_, own, EPOLLRDHUP, kConnection + static_cast<uint64_t>(own))) {
    close(own);
    return false;
  }
  connections_.push_back(own);
  return true;
}

void Connections::Pause(bool paused) {
  if (paused && !is_paused_) {
    Log("connections", {{"error", strerror(errno)}});
  }
  is_paused_ = paused;
  for (size_t i = 0; i < listeners_.size(); ++i) {
    epoll_event event{};
    event.events = paused ? 0u : static_cast<uint32_t>(EPOLLIN);
    event.data.u64 = i;
    epoll_ctl(epoll_, EPOLL_CTL_MOD, listeners_[i].fd, &event);
  }
}

}  // namespace tenon::service
