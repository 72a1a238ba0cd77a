#ifndef TENON_ENGINE_FILE_H_
#define TENON_ENGINE_FILE_H_

#include <cstddef>
#include <string>

#include "ops/core/status.h"

// Files of a model directory. Every error names the path.

namespace tenon {

// A whole regular file, mapped read-only. The file must not be truncated while
// it is mapped: the kernel answers a read past the end with a signal.
class MappedFile {
 public:
  MappedFile() = default;
  // NotFound where there is no such file.
  static StatusOr<MappedFile> Open(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(path_, other.path_);
    return *this;
  }

  const char* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
  std::string path_;
};

// Has the system start to read a range of a mapped file, and returns at once.
void Prefetch(const void* data, size_t bytes);

// The contents of a regular file of at most max_bytes.
StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes);

bool FileExists(const std::string& path);

}  // namespace tenon

#endif  // TENON_ENGINE_FILE_H_
