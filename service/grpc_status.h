#ifndef TENON_SERVICE_GRPC_STATUS_H_
#define TENON_SERVICE_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "service/failure.h"

namespace tenon::service {

// The one place where failures become gRPC statuses, with the google.rpc
// details of their code.
grpc::Status ToGrpcStatus(const Failure& failure);

}  // namespace tenon::service

#endif  // TENON_SERVICE_GRPC_STATUS_H_
