#ifndef TENON_OPS_CORE_STATUS_H_
#define TENON_OPS_CORE_STATUS_H_

#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

namespace tenon {

// Values equal absl::StatusCode and never change: they cross the C ABI.
enum class StatusCode : int {
  kOk = 0,
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
};

// OK costs one null pointer; an error owns its message.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message)
      : error_(std::make_unique<Error>(Error{code, std::move(message)})) {}
  Status(const Status& other)
      : error_(other.error_ ? std::make_unique<Error>(*other.error_)
                            : nullptr) {}
  Status& operator=(const Status& other) {
    error_ = other.error_ ? std::make_unique<Error>(*other.error_) : nullptr;
    return *this;
  }
  Status(Status&&) = default;
  Status& operator=(Status&&) = default;

  bool ok() const { return error_ == nullptr; }
  StatusCode code() const { return ok() ? StatusCode::kOk : error_->code; }
  // Empty when ok().
  const char* message() const { return ok() ? "" : error_->message.c_str(); }

 private:
  struct Error {
    StatusCode code;
    std::string message;
  };
  std::unique_ptr<Error> error_;
};

// Concatenates anything that streams; for messages and names, not for hot
// paths.
template <class... Args>
std::string StrCat(const Args&... args) {
  std::ostringstream out;
  // Without memory it throws, as all else does, and does not return a part.
  out.exceptions(std::ios_base::badbit);
  (out << ... << args);
  return out.str();
}

template <class... Args>
Status InvalidArgumentError(const Args&... args) {
  return Status(StatusCode::kInvalidArgument, StrCat(args...));
}
template <class... Args>
Status CancelledError(const Args&... args) {
  return Status(StatusCode::kCancelled, StrCat(args...));
}
template <class... Args>
Status NotFoundError(const Args&... args) {
  return Status(StatusCode::kNotFound, StrCat(args...));
}
template <class... Args>
Status ResourceExhaustedError(const Args&... args) {
  return Status(StatusCode::kResourceExhausted, StrCat(args...));
}
template <class... Args>
Status FailedPreconditionError(const Args&... args) {
  return Status(StatusCode::kFailedPrecondition, StrCat(args...));
}
template <class... Args>
Status UnimplementedError(const Args&... args) {
  return Status(StatusCode::kUnimplemented, StrCat(args...));
}
template <class... Args>
Status InternalError(const Args&... args) {
  return Status(StatusCode::kInternal, StrCat(args...));
}
template <class... Args>
Status UnavailableError(const Args&... args) {
  return Status(StatusCode::kUnavailable, StrCat(args...));
}
template <class... Args>
Status DataLossError(const Args&... args) {
  return Status(StatusCode::kDataLoss, StrCat(args...));
}

// Either a value or a non-OK Status.
template <class T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(Status status)  // NOLINT: implicit
      : status_(status.ok() ? InternalError("StatusOr made from OK")
                            : std::move(status)) {}
  StatusOr(T value) : value_(std::move(value)) {}  // NOLINT: implicit

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  // Precondition of the accessors: ok().
  T& operator*() & { return *value_; }
  const T& operator*() const& { return *value_; }
  T&& operator*() && { return *std::move(value_); }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace tenon

#define TENON_RETURN_IF_ERROR(expr)                                  \
  do {                                                               \
    if (::tenon::Status tenon_error_ = (expr); !tenon_error_.ok()) { \
      return tenon_error_;                                           \
    }                                                                \
  } while (false)

#endif  // TENON_OPS_CORE_STATUS_H_
