#ifndef TENON_SERVICE_LOG_H_
#define TENON_SERVICE_LOG_H_

#include <string>
#include <utility>
#include <vector>

namespace tenon::service {

// Writes one line of JSON to stderr: time, event and the fields, all as
// strings.
void Log(const char* event,
         const std::vector<std::pair<const char*, std::string>>& fields = {});

}  // namespace tenon::service

#endif  // TENON_SERVICE_LOG_H_
