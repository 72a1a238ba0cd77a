#ifndef TENON_ENGINE_JSON_H_
#define TENON_ENGINE_JSON_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "ops/core/status.h"

namespace tenon {

// Parses JSON that nobody vouches for. Refused, beside what is no JSON: keys
// that occur twice in an object (readers disagree on which one counts) and
// nesting deeper than any file of a model has. Errors begin with `source` and
// have the code `code`.
StatusOr<nlohmann::json> ParseJson(std::string_view text,
                                   const std::string& source, StatusCode code);

// Whether `value` is an integer that fits int64_t, which is then stored.
bool JsonToInt64(const nlohmann::json& value, int64_t* out);

}  // namespace tenon

#endif  // TENON_ENGINE_JSON_H_
