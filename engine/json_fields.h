#ifndef TENON_ENGINE_JSON_FIELDS_H_
#define TENON_ENGINE_JSON_FIELDS_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "engine/json.h"
#include "ops/core/status.h"

// Private to the engine.

namespace tenon {

// The fields of one object of the file. A reader stores the value where the key
// is there and not null, and leaves the default otherwise.
class JsonFields {
 public:
  JsonFields(const JsonValue& object, const std::string& source)
      : object_(object), source_(source) {}

  const JsonValue* Find(const char* key) const {
    const JsonValue* value = object_.Find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  Status Require(const char* key) const {
    if (Find(key) != nullptr) return Status();
    return InvalidArgumentError(source_, ": ", key, " is missing");
  }

  Status Get(const char* key, int32_t* out) const {
    const JsonValue* value = Find(key);
    return value == nullptr ? Status() : ToInt32(key, *value, out);
  }
  Status Get(const char* key, bool* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    const bool* boolean = value->boolean();
    if (boolean == nullptr) return WrongType(key, "true or false");
    *out = *boolean;
    return Status();
  }
  Status Get(const char* key, double* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr || value->ToDouble(out)) return Status();
    return WrongType(key, "a number");
  }
  Status Get(const char* key, std::string* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    const std::string* text = value->string();
    if (text == nullptr) return WrongType(key, "a string");
    *out = *text;
    return Status();
  }
  // One integer, or an array of them.
  Status Get(const char* key, std::vector<int32_t>* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    out->clear();
    const JsonValue::Array* items = value->array();
    if (items == nullptr) {
      return ToInt32(key, *value, &out->emplace_back());
    }
    for (const JsonValue& item : *items) {
      TENON_RETURN_IF_ERROR(ToInt32(key, item, &out->emplace_back()));
    }
    return Status();
  }
  Status GetRequired(const char* key, int32_t* out) const {
    TENON_RETURN_IF_ERROR(Require(key));
    return Get(key, out);
  }

  Status WrongType(const char* key, const char* expected) const {
    return InvalidArgumentError(source_, ": ", key, " is not ", expected);
  }
  const std::string& source() const { return source_; }

 private:
  Status ToInt32(const char* key, const JsonValue& value, int32_t* out) const {
    const int64_t* wide = value.integer();
    if (wide == nullptr) return WrongType(key, "an integer");
    if (*wide < std::numeric_limits<int32_t>::min() ||
        *wide > std::numeric_limits<int32_t>::max()) {
      return InvalidArgumentError(source_, ": ", key, " is ", *wide,
                                  ", which does not fit 32 bits");
    }
    *out = static_cast<int32_t>(*wide);
    return Status();
  }

  const JsonValue& object_;
  const std::string& source_;
};

}  // namespace tenon

#endif  // TENON_ENGINE_JSON_FIELDS_H_
