#ifndef TENON_SERVICE_TOKENS_H_
#define TENON_SERVICE_TOKENS_H_

#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "ops/core/status.h"

namespace tenon::service {

// Bearer tokens of a file: one a line, lines that begin with # are comments.
// Thread-safe.
class TokenFile {
 public:
  // Without a path everybody has access.
  explicit TokenFile(std::string path) : path_(std::move(path)) {}

  bool enabled() const { return !path_.empty(); }
  // Reads the file again. After an error the tokens are as they were.
  Status Load();
  // Takes the same time for every token of a length.
  bool Contains(std::string_view token) const;

 private:
  std::string path_;
  mutable std::mutex mutex_;
  std::vector<std::string> tokens_;  // guarded by mutex_
};

}  // namespace tenon::service

#endif  // TENON_SERVICE_TOKENS_H_
