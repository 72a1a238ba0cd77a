#ifndef TENON_SERVICE_FAILURE_H_
#define TENON_SERVICE_FAILURE_H_

#include <cstdint>
#include <string>
#include <utility>

#include "ops/core/status.h"

namespace tenon::service {

// Why a call failed, as a client is told: a status and what its google.rpc
// details need. Default-constructed: it did not fail.
struct Failure {
  StatusCode code = StatusCode::kOk;
  std::string message;
  std::string reason;   // of a program: UPPER_SNAKE_CASE
  std::string subject;  // the field, handle or limit
  int32_t retry_ms = 0;

  bool ok() const { return code == StatusCode::kOk; }
};

inline Failure BadField(std::string field, std::string message) {
  return {StatusCode::kInvalidArgument, field + ": " + message, "BAD_FIELD",
          std::move(field), 0};
}

inline Failure OverLimit(std::string limit, std::string message,
                         int32_t retry_ms = 100) {
  return {StatusCode::kResourceExhausted, std::move(message), "LIMIT",
          std::move(limit), retry_ms};
}

inline Failure Unavailable(std::string reason, std::string message,
                           int32_t retry_ms = 1000) {
  return {StatusCode::kUnavailable, std::move(message), std::move(reason), "",
          retry_ms};
}

}  // namespace tenon::service

#endif  // TENON_SERVICE_FAILURE_H_
