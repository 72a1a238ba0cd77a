#ifndef TENON_SERVICE_VERSION_H_
#define TENON_SERVICE_VERSION_H_

#include <cstdint>

namespace tenon::service {

// Of tenon.v1: raised with every addition to decode.proto.
constexpr uint32_t kProtocolMinor = 3;
constexpr char kServerVersion[] = TENON_SERVER_VERSION;

}  // namespace tenon::service

#endif  // TENON_SERVICE_VERSION_H_
