#include "engine/json.h"

#include <limits>
#include <unordered_set>
#include <vector>

namespace tenon {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 32;

}  // namespace

StatusOr<json> ParseJson(std::string_view text, const std::string& source,
                         StatusCode code) {
  std::vector<std::unordered_set<std::string>> open_objects;
  std::string duplicate;
  bool too_deep = false;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
        open_objects.emplace_back();
        break;
      case json::parse_event_t::object_end:
        open_objects.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!open_objects.back().insert(key).second) duplicate = key;
        break;
      }
      default:
        break;
    }
    if (depth > kMaxDepth) too_deep = true;
    return !too_deep;
  };
  json value = json::parse(text.begin(), text.end(), watch, false);
  if (too_deep) {
    return Status(code, StrCat(source, ": JSON nested deeper than ", kMaxDepth,
                               " levels"));
  }
  if (value.is_discarded()) {
    return Status(code, StrCat(source, ": not valid JSON"));
  }
  if (!duplicate.empty()) {
    return Status(code, StrCat(source, ": \"", duplicate, "\" occurs twice"));
  }
  return value;
}

bool JsonToInt64(const json& value, int64_t* out) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() >
          static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return false;
  }
  *out = value.get<int64_t>();
  return true;
}

}  // namespace tenon
