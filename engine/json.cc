#include "engine/json.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

namespace tenon {
namespace {

constexpr size_t kMaxDepth = 32;

// Makes values of what the parser reports.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return Put(JsonValue()); }
  bool boolean(bool value) override { return Put(JsonValue(value)); }
  bool number_integer(int64_t value) override { return Put(JsonValue(value)); }
  bool number_unsigned(uint64_t value) override {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Put(JsonValue(static_cast<double>(value)));
    }
    return Put(JsonValue(static_cast<int64_t>(value)));
  }
  bool number_float(double value, const std::string&) override {
    return Put(JsonValue(value));
  }
  bool string(std::string& value) override {
    return Put(JsonValue(std::move(value)));
  }
  bool binary(nlohmann::json::binary_t&) override { return false; }

  bool start_object(size_t) override {
    return Open(JsonValue(JsonValue::Object()));
  }
  bool start_array(size_t) override {
    return Open(JsonValue(JsonValue::Array()));
  }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(std::string& name) override {
    const auto [it, is_new] = open_.back()->object()->try_emplace(name);
    if (!is_new) duplicate_ = name;
    member_ = &it->second;
    return true;
  }

  bool parse_error(size_t, const std::string&,
                   const nlohmann::json::exception&) override {
    return false;
  }

  JsonValue& root() { return root_; }
  const std::optional<std::string>& duplicate() const { return duplicate_; }
  bool is_too_deep() const { return open_.size() > kMaxDepth; }

 private:
  // Where the next value goes.
  JsonValue* Place() {
    if (open_.empty()) return &root_;
    JsonValue::Array* array = open_.back()->array();
    return array == nullptr ? member_ : &array->emplace_back();
  }
  bool Put(JsonValue value) {
    *Place() = std::move(value);
    return true;
  }
  bool Open(JsonValue value) {
    JsonValue* place = Place();
    *place = std::move(value);
    open_.push_back(place);
    return !is_too_deep();
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  JsonValue root_;
  std::vector<JsonValue*> open_;  // arrays and objects around the next value
  JsonValue* member_ = nullptr;   // of the innermost object
  std::optional<std::string> duplicate_;  // a key that occurred twice
};

}  // namespace

JsonValue::JsonValue(std::string value)
    : value_(std::make_unique<std::string>(std::move(value))) {}
JsonValue::JsonValue(Array value)
    : value_(std::make_unique<Array>(std::move(value))) {}
JsonValue::JsonValue(Object value)
    : value_(std::make_unique<Object>(std::move(value))) {}

bool JsonValue::ToDouble(double* out) const {
  if (const auto* number = std::get_if<double>(&value_)) {
    *out = *number;
  } else if (const int64_t* number = integer()) {
    *out = static_cast<double>(*number);
  } else {
    return false;
  }
  return true;
}

const JsonValue* JsonValue::Find(std::string_view key) const {
  const Object* members = object();
  if (members == nullptr) return nullptr;
  const auto it = members->find(key);
  return it == members->end() ? nullptr : &it->second;
}

StatusOr<JsonValue> ParseJson(std::string_view text, const std::string& source,
                              StatusCode code) {
  Builder builder;
  const bool is_json =
      nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  if (builder.is_too_deep()) {
    return Status(code, StrCat(source, ": JSON nested deeper than ", kMaxDepth,
                               " levels"));
  }
  if (!is_json) return Status(code, StrCat(source, ": not valid JSON"));
  if (builder.duplicate().has_value()) {
    return Status(
        code, StrCat(source, ": \"", *builder.duplicate(), "\" occurs twice"));
  }
  return std::move(builder.root());
}

}  // namespace tenon
