#include "service/grpc_status.h"

#include <algorithm>
#include <string>

#include "service/proto/google/rpc/error_details.pb.h"
#include "service/proto/google/rpc/status.pb.h"

namespace tenon::service {
namespace {

constexpr char kDomain[] = "tenon.v1";
// Trailers have about 8 KiB: a message that goes there twice stays well below.
constexpr size_t kMaxText = 1024;

template <class Detail>
void Pack(const Detail& detail, google::rpc::Status* status) {
  status->add_details()->PackFrom(detail);
}

void PackErrorInfo(const Failure& failure, google::rpc::Status* status) {
  google::rpc::ErrorInfo info;
  info.set_reason(failure.reason);
  info.set_domain(kDomain);
  if (!failure.subject.empty()) {
    (*info.mutable_metadata())["subject"] = failure.subject.substr(0, kMaxText);
  }
  Pack(info, status);
}

void PackRetry(const Failure& failure, google::rpc::Status* status) {
  if (failure.retry_ms <= 0) return;
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(failure.retry_ms / 1000);
  retry.mutable_retry_delay()->set_nanos(failure.retry_ms % 1000 * 1000000);
  Pack(retry, status);
}

void PackDetails(const Failure& failure, const std::string& message,
                 google::rpc::Status* status) {
  switch (failure.code) {
    case StatusCode::kInvalidArgument: {
      google::rpc::BadRequest bad;
      auto* violation = bad.add_field_violations();
      violation->set_field(failure.subject);
      violation->set_description(message);
      return Pack(bad, status);
    }
    case StatusCode::kNotFound: {
      google::rpc::ResourceInfo resource;
      resource.set_resource_type(
          failure.subject.substr(0, failure.subject.find(' ')));
      resource.set_resource_name(failure.subject);
      return Pack(resource, status);
    }
    case StatusCode::kFailedPrecondition: {
      google::rpc::PreconditionFailure precondition;
      auto* violation = precondition.add_violations();
      violation->set_type(failure.reason);
      violation->set_subject(failure.subject);
      violation->set_description(message);
      return Pack(precondition, status);
    }
    case StatusCode::kResourceExhausted: {
      PackRetry(failure, status);
      google::rpc::QuotaFailure quota;
      auto* violation = quota.add_violations();
      violation->set_subject(failure.subject);
      violation->set_description(message);
      return Pack(quota, status);
    }
    case StatusCode::kUnavailable:
      PackRetry(failure, status);
      return PackErrorInfo(failure, status);
    default:
      if (!failure.reason.empty()) PackErrorInfo(failure, status);
  }
}

}  // namespace

grpc::Status ToGrpcStatus(const Failure& failure) {
  if (failure.ok()) return grpc::Status::OK;
  const std::string message = failure.message.substr(0, kMaxText);
  google::rpc::Status status;
  status.set_code(static_cast<int>(failure.code));
  status.set_message(message);
  PackDetails(failure, message, &status);
  // The values of the two enumerations are the same.
  return grpc::Status(static_cast<grpc::StatusCode>(failure.code), message,
                      status.SerializeAsString());
}

}  // namespace tenon::service
