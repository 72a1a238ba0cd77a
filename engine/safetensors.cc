#include "engine/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "engine/json.h"

namespace tenon {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct StoredType {
  const char* name;
  int64_t size;
  DType dtype;
};
constexpr StoredType kStoredTypes[] = {
    {"BF16", 2, DType::kBFloat16},   {"F16", 2, DType::kFloat16},
    {"F32", 4, DType::kFloat32},     {"F8_E4M3", 1, DType::kFloat8E4M3},
    {"I32", 4, DType::kInt32},       {"I64", 8, DType::kInt64},
    {"U8", 1, DType::kUInt8},        {"BOOL", 1, DType::kInvalid},
    {"I8", 1, DType::kInvalid},      {"F8_E5M2", 1, DType::kInvalid},
    {"F8_E8M0", 1, DType::kInvalid}, {"I16", 2, DType::kInvalid},
    {"U16", 2, DType::kInvalid},     {"U32", 4, DType::kInvalid},
    {"F64", 8, DType::kInvalid},     {"U64", 8, DType::kInvalid},
    {"C64", 8, DType::kInvalid},
};

const StoredType* FindStoredType(std::string_view name) {
  for (const StoredType& type : kStoredTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

// A tensor of the header and where its data lies in the file.
struct Entry {
  StoredTensor tensor;
  int64_t begin = 0;
  int64_t end = 0;
};

// Reads "shape", and tells how many bytes it stands for.
Status ParseShape(const JsonValue& value, int64_t element_size,
                  const std::string& where, TensorView* view, int64_t* bytes) {
  const JsonValue::Array* shape = value.array();
  if (shape == nullptr) {
    return DataLossError(where, "shape is not an array");
  }
  if (shape->size() > static_cast<size_t>(kMaxRank)) {
    return DataLossError(where, "has ", shape->size(),
                         " dimensions, expected at most ", kMaxRank);
  }
  int64_t span = element_size;  // as if no dimension were zero
  *bytes = element_size;
  for (const JsonValue& item : *shape) {
    const int64_t* dim = item.integer();
    if (dim == nullptr || *dim < 0) {
      return DataLossError(where, "shape holds something that is no size");
    }
    if (__builtin_mul_overflow(span, std::max<int64_t>(*dim, 1), &span)) {
      return DataLossError(where, "shape has more than 2^63 bytes");
    }
    *bytes *= *dim;
    view->shape[view->rank++] = *dim;
  }
  if (view->rank == 0) view->shape[view->rank++] = 1;
  int64_t stride = 1;
  for (int i = view->rank - 1; i >= 0; --i) {
    view->stride[i] = stride;
    stride *= std::max<int64_t>(view->shape[i], 1);
  }
  return Status();
}

// Reads "data_offsets", which count from the end of the header.
Status ParseOffsets(const JsonValue& value, int64_t data_size,
                    const std::string& where, Entry* entry) {
  const JsonValue::Array* offsets = value.array();
  if (offsets == nullptr || offsets->size() != 2 ||
      (*offsets)[0].integer() == nullptr ||
      (*offsets)[1].integer() == nullptr) {
    return DataLossError(where, "data_offsets is not a pair of integers");
  }
  entry->begin = *(*offsets)[0].integer();
  entry->end = *(*offsets)[1].integer();
  if (entry->begin < 0 || entry->end < entry->begin || entry->end > data_size) {
    return DataLossError(where, "data_offsets [", entry->begin, ", ",
                         entry->end, "] is not within the ", data_size,
                         " bytes of data that the file has");
  }
  return Status();
}

StatusOr<Entry> ParseEntry(const std::string& name, const JsonValue& info,
                           const char* data, int64_t data_size,
                           const std::string& source) {
  const std::string where = StrCat(source, ": tensor \"", name, "\": ");
  if (info.object() == nullptr) return DataLossError(where, "not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (info.Find(key) == nullptr) {
      return DataLossError(where, "has no ", key);
    }
  }
  const std::string* dtype = info.Find("dtype")->string();
  const StoredType* type = dtype == nullptr ? nullptr : FindStoredType(*dtype);
  if (type == nullptr) {
    return DataLossError(where, "dtype ",
                         dtype == nullptr ? "(not a string)" : dtype->c_str(),
                         " is unknown");
  }
  Entry entry;
  entry.tensor.name = name;
  entry.tensor.stored_dtype = type->name;
  TensorView& view = entry.tensor.view;
  view.dtype = type->dtype;
  int64_t bytes = 0;
  TENON_RETURN_IF_ERROR(
      ParseShape(*info.Find("shape"), type->size, where, &view, &bytes));
  TENON_RETURN_IF_ERROR(
      ParseOffsets(*info.Find("data_offsets"), data_size, where, &entry));
  if (entry.end - entry.begin != bytes) {
    return DataLossError(where, "data_offsets span ", entry.end - entry.begin,
                         " bytes, but ", type->name, " ", ShapeToString(view),
                         " has ", bytes);
  }
  entry.tensor.bytes = bytes;
  view.data = const_cast<char*>(data) + entry.begin;
  if (bytes > 0 && reinterpret_cast<uintptr_t>(view.data) % type->size != 0) {
    return DataLossError(where, "data is not aligned to its ", type->name,
                         " elements");
  }
  return entry;
}

// Requires the data, sorted by offset, to follow one another from 0 to the end
// of the file.
Status CheckCoverage(const std::vector<Entry>& entries, int64_t data_size,
                     const std::string& source) {
  int64_t end = 0;
  const Entry* previous = nullptr;
  for (const Entry& entry : entries) {
    if (entry.begin < end) {
      return DataLossError(source, ": tensor \"", entry.tensor.name,
                           "\": data overlaps that of \"",
                           previous->tensor.name, "\"");
    }
    if (entry.begin > end) {
      return DataLossError(source, ": tensor \"", entry.tensor.name,
                           "\": data begins at ", entry.begin, ", expected ",
                           end, ": bytes without a tensor");
    }
    end = entry.end;
    previous = &entry;
  }
  if (end != data_size) {
    return DataLossError(source, ": has ", data_size,
                         " bytes of data, its tensors ", end);
  }
  return Status();
}

StatusOr<uint64_t> HeaderLength(const char* data, size_t size,
                                const std::string& source) {
  if (size < kLengthBytes) {
    return DataLossError(source, ": has ", size,
                         " bytes, too few for a safetensors file");
  }
  uint64_t length = 0;
  for (int i = kLengthBytes - 1; i >= 0; --i) {
    length = length << 8 | static_cast<unsigned char>(data[i]);
  }
  if (length > kMaxHeaderBytes) {
    return DataLossError(source, ": header of ", length,
                         " bytes, expected at most ", kMaxHeaderBytes);
  }
  if (length > size - kLengthBytes) {
    return DataLossError(source, ": header of ", length,
                         " bytes goes beyond the file of ", size,
                         " bytes; is the download complete?");
  }
  return length;
}

}  // namespace

StatusOr<std::vector<StoredTensor>> ParseSafetensors(
    const char* data, size_t size, const std::string& source) {
  const StatusOr<uint64_t> length = HeaderLength(data, size, source);
  if (!length.ok()) return length.status();
  const std::string_view text(data + kLengthBytes, *length);
  const StatusOr<JsonValue> header =
      ParseJson(text, StrCat(source, ": header"), StatusCode::kDataLoss);
  if (!header.ok()) return header.status();
  const JsonValue::Object* members = header->object();
  if (members == nullptr) {
    return DataLossError(source, ": header is not a JSON object");
  }
  const char* tensor_data = data + kLengthBytes + *length;
  const int64_t data_size = static_cast<int64_t>(size - kLengthBytes - *length);

  std::vector<Entry> entries;
  entries.reserve(members->size());
  for (const auto& [name, info] : *members) {
    if (name == "__metadata__") continue;
    StatusOr<Entry> entry =
        ParseEntry(name, info, tensor_data, data_size, source);
    if (!entry.ok()) return entry.status();
    entries.push_back(*std::move(entry));
  }
  // Empty tensors lie before what begins where they are.
  std::stable_sort(
      entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
      });
  TENON_RETURN_IF_ERROR(CheckCoverage(entries, data_size, source));

  std::vector<StoredTensor> tensors;
  tensors.reserve(entries.size());
  for (Entry& entry : entries) tensors.push_back(std::move(entry.tensor));
  return tensors;
}

std::string ShapeToString(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < view.rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(view.shape[i]);
  }
  return text + "]";
}

}  // namespace tenon
