#include "abi/tenon.h"
#include "ops/core/status.h"

#define TENON_SAME_CODE(c, cc) \
  static_assert(c == static_cast<int>(tenon::StatusCode::cc))
TENON_SAME_CODE(TENON_OK, kOk);
TENON_SAME_CODE(TENON_CANCELLED, kCancelled);
TENON_SAME_CODE(TENON_INVALID_ARGUMENT, kInvalidArgument);
TENON_SAME_CODE(TENON_DEADLINE_EXCEEDED, kDeadlineExceeded);
TENON_SAME_CODE(TENON_NOT_FOUND, kNotFound);
TENON_SAME_CODE(TENON_ALREADY_EXISTS, kAlreadyExists);
TENON_SAME_CODE(TENON_PERMISSION_DENIED, kPermissionDenied);
TENON_SAME_CODE(TENON_RESOURCE_EXHAUSTED, kResourceExhausted);
TENON_SAME_CODE(TENON_FAILED_PRECONDITION, kFailedPrecondition);
TENON_SAME_CODE(TENON_ABORTED, kAborted);
TENON_SAME_CODE(TENON_OUT_OF_RANGE, kOutOfRange);
TENON_SAME_CODE(TENON_UNIMPLEMENTED, kUnimplemented);
TENON_SAME_CODE(TENON_INTERNAL, kInternal);
TENON_SAME_CODE(TENON_UNAVAILABLE, kUnavailable);
TENON_SAME_CODE(TENON_DATA_LOSS, kDataLoss);
#undef TENON_SAME_CODE

uint32_t tenon_abi_version(void) {
  return uint32_t{TENON_ABI_MAJOR} << 16 | TENON_ABI_MINOR;
}

const char* tenon_version_string(void) { return "0.1.0"; }

const char* tenon_status_name(int32_t code) {
  constexpr const char* kNames[] = {
      "OK",
      "CANCELLED",
      "UNKNOWN",
      "INVALID_ARGUMENT",
      "DEADLINE_EXCEEDED",
      "NOT_FOUND",
      "ALREADY_EXISTS",
      "PERMISSION_DENIED",
      "RESOURCE_EXHAUSTED",
      "FAILED_PRECONDITION",
      "ABORTED",
      "OUT_OF_RANGE",
      "UNIMPLEMENTED",
      "INTERNAL",
      "UNAVAILABLE",
      "DATA_LOSS",
      "UNAUTHENTICATED",
  };
  constexpr int32_t kCount = sizeof(kNames) / sizeof(kNames[0]);
  static_assert(kCount == TENON_UNAUTHENTICATED + 1);
  return kNames[code >= 0 && code < kCount ? code : TENON_UNKNOWN];
}
