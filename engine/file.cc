#include "engine/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

namespace tenon {
namespace {

Status FileError(const std::string& path, int error) {
  const std::string text = std::generic_category().message(error);
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return NotFoundError(path, ": ", text);
    case EACCES:
    case EPERM:
      return Status(StatusCode::kPermissionDenied, StrCat(path, ": ", text));
    case ENOMEM:
      return ResourceExhaustedError(path, ": ", text);
    default:
      return UnavailableError(path, ": ", text);
  }
}

// An open regular file and its size.
class OpenFile {
 public:
  ~OpenFile() {
    if (fd_ >= 0) close(fd_);
  }
  Status Open(const std::string& path) {
    // Non-blocking, so that a named pipe is refused below instead of waited on.
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd_ < 0) return FileError(path, errno);
    struct stat info = {};
    if (fstat(fd_, &info) != 0) return FileError(path, errno);
    if (!S_ISREG(info.st_mode)) {
      return InvalidArgumentError(path, ": not a regular file");
    }
    size_ = static_cast<size_t>(info.st_size);
    return Status();
  }
  int fd() const { return fd_; }
  size_t size() const { return size_; }

 private:
  int fd_ = -1;
  size_t size_ = 0;
};

}  // namespace

StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  OpenFile file;
  TENON_RETURN_IF_ERROR(file.Open(path));
  MappedFile mapped;
  mapped.path_ = path;
  if (file.size() == 0) return mapped;  // which mmap would refuse
  void* data = mmap(nullptr, file.size(), PROT_READ, MAP_PRIVATE, file.fd(), 0);
  if (data == MAP_FAILED) return FileError(path, errno);
  mapped.data_ = static_cast<const char*>(data);
  mapped.size_ = file.size();
  return mapped;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

void Prefetch(const void* data, size_t bytes) {
  if (bytes == 0) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  // Advice: where it fails, the pages are read on first use.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  OpenFile file;
  TENON_RETURN_IF_ERROR(file.Open(path));
  if (file.size() > max_bytes) {
    return InvalidArgumentError(path, ": has ", file.size(),
                                " bytes, expected at most ", max_bytes);
  }
  std::string contents(file.size(), '\0');
  size_t done = 0;
  while (done < contents.size()) {
    const ssize_t n =
        read(file.fd(), contents.data() + done, contents.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(path, errno);
    if (n == 0) break;  // it shrank meanwhile
    done += static_cast<size_t>(n);
  }
  contents.resize(done);
  return contents;
}

bool FileExists(const std::string& path) {
  return access(path.c_str(), F_OK) == 0;
}

}  // namespace tenon
