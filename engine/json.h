#ifndef TENON_ENGINE_JSON_H_
#define TENON_ENGINE_JSON_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "ops/core/status.h"

namespace tenon {

// A JSON value. (Not nlohmann::json, whose destructor allocates: without memory
// that ends the process.)
class JsonValue {
 public:
  using Array = std::vector<JsonValue>;
  using Object = std::map<std::string, JsonValue, std::less<>>;

  JsonValue() = default;  // null
  explicit JsonValue(bool value) : value_(value) {}
  explicit JsonValue(int64_t value) : value_(value) {}
  explicit JsonValue(double value) : value_(value) {}
  explicit JsonValue(std::string value);
  explicit JsonValue(Array value);
  explicit JsonValue(Object value);

  bool is_null() const {
    return std::holds_alternative<std::nullptr_t>(value_);
  }

  // The value, if it is of that type; null otherwise.
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  // An integer that fits.
  const int64_t* integer() const { return std::get_if<int64_t>(&value_); }
  const std::string* string() const { return Pointee<std::string>(); }
  const Array* array() const { return Pointee<Array>(); }
  const Object* object() const { return Pointee<Object>(); }
  Array* array() { return const_cast<Array*>(Pointee<Array>()); }
  Object* object() { return const_cast<Object*>(Pointee<Object>()); }

  // Whether this is a number, which is then stored.
  bool ToDouble(double* out) const;
  // A member of this object; null where there is none.
  const JsonValue* Find(std::string_view key) const;

 private:
  template <class T>
  const T* Pointee() const {
    const auto* pointer = std::get_if<std::unique_ptr<T>>(&value_);
    return pointer == nullptr ? nullptr : pointer->get();
  }

  // Pointers keep a value small: there may be many in a file.
  std::variant<std::nullptr_t, bool, int64_t, double,
               std::unique_ptr<std::string>, std::unique_ptr<Array>,
               std::unique_ptr<Object>>
      value_;
};

// Parses JSON that nobody vouches for. Refused, beside what is no JSON: keys
// that occur twice in an object (readers disagree on which one counts) and
// nesting deeper than any file of a model has. Errors begin with `source` and
// have the code `code`.
StatusOr<JsonValue> ParseJson(std::string_view text, const std::string& source,
                              StatusCode code);

}  // namespace tenon

#endif  // TENON_ENGINE_JSON_H_
