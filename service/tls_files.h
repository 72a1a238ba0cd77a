#ifndef TENON_SERVICE_TLS_FILES_H_
#define TENON_SERVICE_TLS_FILES_H_

#include <string>
#include <utility>

#include "ops/core/status.h"

namespace tenon::service {

// A file in memory, with a path that only this process can open.
class MemoryFile {
 public:
  MemoryFile() = default;
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  // Whoever opens the path finds the old content or the new one.
  Status Set(const std::string& content);
  // After Set; always the same.
  std::string path() const;

 private:
  int fd_ = -1;
};

// PEM files as gRPC may see them. gRPC (1.51) would read them itself, but takes
// what it finds: with a key that is not the certificate's, as between the
// renewal of one and of the other, it refuses all new connections, and where a
// file is empty it aborts.
class TlsFiles {
 public:
  // Without a client CA its path is empty.
  TlsFiles(std::string cert, std::string key, std::string client_ca)
      : cert_(std::move(cert)),
        key_(std::move(key)),
        client_ca_(std::move(client_ca)) {}

  // Reads the files again. After an error the copies are as they were.
  Status Load();

  // Copies of what was good, after Load: the key and its certificates together,
  // and the CA's.
  std::string identity_path() const { return identity_.path(); }
  std::string client_ca_path() const {
    return client_ca_.empty() ? "" : roots_.path();
  }

 private:
  const std::string cert_;
  const std::string key_;
  const std::string client_ca_;
  MemoryFile identity_;
  MemoryFile roots_;
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_TLS_FILES_H_
