#include "service/log.h"

#include <chrono>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

namespace tenon::service {

void Log(const char* event,
         const std::vector<std::pair<const char*, std::string>>& fields) {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                      now.time_since_epoch())
                      .count() %
                  1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &utc);
  char time[48];
  std::snprintf(time, sizeof(time), "%s.%03dZ", date, static_cast<int>(ms));
  nlohmann::ordered_json line;
  line["time"] = time;
  line["event"] = event;
  for (const auto& field : fields) line[field.first] = field.second;
  const std::string text =
      line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) +
      "\n";
  std::fwrite(text.data(), 1, text.size(), stderr);
}

}  // namespace tenon::service
