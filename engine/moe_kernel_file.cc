#include "engine/moe_kernel_file.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "engine/file.h"
#include "engine/json.h"

namespace tenon {
namespace {

constexpr char kFormat[] = "tenon-moe-kernels-1";
constexpr size_t kMaxBytes = size_t{1} << 20;
constexpr size_t kMaxRows = 4096;  // of one dtype

// An object all of whose members have to be known. Errors name the place.
class StrictObject {
 public:
  static StatusOr<StrictObject> Of(const JsonValue& value, std::string place) {
    if (value.object() == nullptr) {
      return InvalidArgumentError(place, " is not an object");
    }
    return StrictObject(*value.object(), std::move(place));
  }

  Status Get(const char* key, std::string* out) {
    const JsonValue* value = nullptr;
    TENON_RETURN_IF_ERROR(Take(key, &value));
    if (value->string() == nullptr) return WrongType(key, "a string");
    *out = *value->string();
    return Status();
  }
  Status Get(const char* key, int32_t* out) {
    const JsonValue* value = nullptr;
    TENON_RETURN_IF_ERROR(Take(key, &value));
    const int64_t* wide = value->integer();
    if (wide == nullptr || *wide < 0 ||
        *wide > std::numeric_limits<int32_t>::max()) {
      return WrongType(key, "a count");
    }
    *out = static_cast<int32_t>(*wide);
    return Status();
  }
  // A bound: null stands for none, which `out` has already.
  Status Get(const char* key, int64_t* out) {
    const JsonValue* value = nullptr;
    TENON_RETURN_IF_ERROR(Take(key, &value));
    if (value->is_null()) return Status();
    if (value->integer() == nullptr) {
      return WrongType(key, "an integer or null");
    }
    *out = *value->integer();
    return Status();
  }
  Status Get(const char* key, double* out) {
    const JsonValue* value = nullptr;
    TENON_RETURN_IF_ERROR(Take(key, &value));
    if (value->is_null() || value->ToDouble(out)) return Status();
    return WrongType(key, "a number or null");
  }
  Status Get(const char* key, MoeWgmmaTile* out) {
    const JsonValue* value = nullptr;
    TENON_RETURN_IF_ERROR(Take(key, &value));
    StatusOr<StrictObject> tile = Of(*value, StrCat(place_, ": ", key));
    TENON_RETURN_IF_ERROR(tile.status());
    TENON_RETURN_IF_ERROR(tile->Get("token_tile", &out->token_tile));
    TENON_RETURN_IF_ERROR(tile->Get("row_warpgroups", &out->row_warpgroups));
    TENON_RETURN_IF_ERROR(tile->Get("blocks_per_sm", &out->blocks_per_sm));
    return tile->Finish();
  }
  // Null where there is no such member.
  const JsonValue* TakeOptional(const char* key) {
    const auto it = members_.find(key);
    if (it == members_.end()) return nullptr;
    ++num_taken_;
    taken_.emplace_back(key);
    return &it->second;
  }

  // Call it when all members have been taken.
  Status Finish() const {
    if (num_taken_ == members_.size()) return Status();
    for (const auto& [key, value] : members_) {
      bool known = false;
      for (const std::string& name : taken_) known = known || name == key;
      if (!known) return InvalidArgumentError(place_, ": unknown key ", key);
    }
    return Status();
  }

  Status WrongType(const char* key, const char* expected) const {
    return InvalidArgumentError(place_, ": ", key, " is not ", expected);
  }

 private:
  StrictObject(const JsonValue::Object& members, std::string place)
      : members_(members), place_(std::move(place)) {}

  Status Take(const char* key, const JsonValue** out) {
    *out = TakeOptional(key);
    if (*out != nullptr) return Status();
    return InvalidArgumentError(place_, ": ", key, " is missing");
  }

  const JsonValue::Object& members_;
  std::string place_;
  std::vector<std::string> taken_;
  size_t num_taken_ = 0;
};

Status ReadRow(const JsonValue& value, std::string place, MoeKernelRow* row) {
  StatusOr<StrictObject> object = StrictObject::Of(value, std::move(place));
  TENON_RETURN_IF_ERROR(object.status());
  TENON_RETURN_IF_ERROR(object->Get("max_hidden", &row->max_hidden));
  TENON_RETURN_IF_ERROR(
      object->Get("max_intermediate", &row->max_intermediate));
  TENON_RETURN_IF_ERROR(
      object->Get("max_slots_per_expert", &row->max_slots_per_expert));
  TENON_RETURN_IF_ERROR(object->Get("gate_up", &row->config.gate_up));
  TENON_RETURN_IF_ERROR(object->Get("down", &row->config.down));
  TENON_RETURN_IF_ERROR(
      object->Get("mma_tile_rows", &row->config.mma_tile_rows));
  return object->Finish();
}

Status ReadRows(StrictObject* object, const char* key, const std::string& name,
                std::vector<MoeKernelRow>* rows) {
  const JsonValue* value = object->TakeOptional(key);
  if (value == nullptr) return Status();
  if (value->array() == nullptr) return object->WrongType(key, "an array");
  if (value->array()->size() > kMaxRows) {
    return InvalidArgumentError(name, ": ", key, " has ",
                                value->array()->size(), " rows, at most ",
                                kMaxRows, " are possible");
  }
  for (const JsonValue& item : *value->array()) {
    std::string place = StrCat(name, ": ", key, " row ", rows->size());
    MoeKernelRow* const row = &rows->emplace_back();
    TENON_RETURN_IF_ERROR(ReadRow(item, std::move(place), row));
  }
  return Status();
}

std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;  // no control codes
  }
  return out + "\"";
}

std::string Bound(int64_t value) {
  return value == MoeKernelRow::kAnySize ? "null" : StrCat(value);
}

std::string FormatTile(const MoeWgmmaTile& tile) {
  return StrCat("{\"token_tile\": ", tile.token_tile,
                ", \"row_warpgroups\": ", tile.row_warpgroups,
                ", \"blocks_per_sm\": ", tile.blocks_per_sm, "}");
}

std::string FormatRow(const MoeKernelRow& row) {
  const double load = row.max_slots_per_expert;
  return StrCat("    {\"max_hidden\": ", Bound(row.max_hidden),
                ", \"max_intermediate\": ", Bound(row.max_intermediate),
                ", \"max_slots_per_expert\": ",
                load == MoeKernelRow::kAnyLoad ? "null" : ShortestDecimal(load),
                ",\n     \"gate_up\": ", FormatTile(row.config.gate_up),
                ",\n     \"down\": ", FormatTile(row.config.down),
                ",\n     \"mma_tile_rows\": ", row.config.mma_tile_rows, "}");
}

MoeKernelRows View(const std::vector<MoeKernelRow>& rows) {
  return {rows.data(), static_cast<int32_t>(rows.size())};
}

}  // namespace

MoeKernelTable MoeKernelFile::table() const {
  return {View(float32), View(float16), View(float8)};
}

StatusOr<MoeKernelFile> ParseMoeKernelFile(std::string_view text,
                                           const std::string& name) {
  const StatusOr<JsonValue> json =
      ParseJson(text, name, StatusCode::kInvalidArgument);
  TENON_RETURN_IF_ERROR(json.status());
  StatusOr<StrictObject> object = StrictObject::Of(*json, name);
  TENON_RETURN_IF_ERROR(object.status());
  std::string format;
  TENON_RETURN_IF_ERROR(object->Get("format", &format));
  if (format != kFormat) {
    return InvalidArgumentError(name, ": format is ", format, ", expected ",
                                kFormat);
  }
  MoeKernelFile file;
  TENON_RETURN_IF_ERROR(object->Get("device", &file.device));
  TENON_RETURN_IF_ERROR(object->Get("source", &file.source));
  TENON_RETURN_IF_ERROR(ReadRows(&*object, "float32", name, &file.float32));
  TENON_RETURN_IF_ERROR(ReadRows(&*object, "float16", name, &file.float16));
  TENON_RETURN_IF_ERROR(ReadRows(&*object, "float8", name, &file.float8));
  TENON_RETURN_IF_ERROR(object->Finish());
  TENON_RETURN_IF_ERROR(CheckMoeKernelTable(name.c_str(), file.table()));
  return file;
}

StatusOr<MoeKernelFile> ReadMoeKernelFile(const std::string& path) {
  const StatusOr<std::string> text = ReadFile(path, kMaxBytes);
  TENON_RETURN_IF_ERROR(text.status());
  return ParseMoeKernelFile(*text, path);
}

std::string FormatMoeKernelFile(const MoeKernelFile& file) {
  std::string out = StrCat("{\n  \"format\": ", Quoted(kFormat),
                           ",\n  \"device\": ", Quoted(file.device),
                           ",\n  \"source\": ", Quoted(file.source));
  const std::pair<const char*, const std::vector<MoeKernelRow>*> all[] = {
      {"float32", &file.float32},
      {"float16", &file.float16},
      {"float8", &file.float8}};
  for (const auto& [key, rows] : all) {
    if (rows->empty()) continue;
    out += StrCat(",\n  \"", key, "\": [");
    const char* separator = "\n";
    for (const MoeKernelRow& row : *rows) {
      out += separator + FormatRow(row);
      separator = ",\n";
    }
    out += "\n  ]";
  }
  return out + "\n}\n";
}

std::string ShortestDecimal(double value) {
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

}  // namespace tenon
