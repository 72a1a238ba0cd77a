#include "abi/call.h"

#include <algorithm>
#include <cstring>

namespace tenon::abi {
namespace {

// Appends to a buffer of fixed size, cutting what does not fit.
struct Writer {
  char* begin;
  size_t room;  // with the closing zero
  size_t size = 0;

  void Append(const char* text, size_t length) {
    if (room == 0) return;
    length = std::min(length, room - 1 - size);
    std::memcpy(begin + size, text, length);
    size += length;
    begin[size] = '\0';
  }
  void Append(const char* text) { Append(text, std::strlen(text)); }
};

// What follows the name of a C++ entry point ("RmsNorm: ") at the front of a
// message; all of it where there is none.
const char* SkipName(const char* message) {
  const char* end = message;
  while ((*end >= 'A' && *end <= 'Z') || (*end >= 'a' && *end <= 'z')) ++end;
  const bool is_name = end != message && *message >= 'A' && *message <= 'Z' &&
                       end[0] == ':' && end[1] == ' ';
  return is_name ? end + 2 : message;
}

Status CheckStructSize(const char* name, const void* pointer,
                       size_t first_size) {
  TENON_RETURN_IF_ERROR(CheckPresent(name, pointer));
  uint32_t size;
  std::memcpy(&size, pointer, sizeof(size));
  // A multiple of their alignment, as the size of all is: no field is cut.
  if (size >= first_size && size <= kMaxStructSize && size % 8 == 0) {
    return Status();
  }
  return InvalidArgumentError(name, ".struct_size is ", size,
                              ", expected a multiple of 8 from ", first_size,
                              " to ", kMaxStructSize);
}

}  // namespace

int32_t Report(const char* function, int32_t code, const char* message,
               tenon_error* error) {
  if (error == nullptr) return code;
  constexpr size_t kMessage = offsetof(tenon_error, message);
  const size_t size = std::min<size_t>(error->struct_size, sizeof(*error));
  if (size < kMessage) return code;
  error->code = code;
  Writer out{error->message, size - kMessage};
  out.Append("");
  if (code == TENON_OK) return code;
  out.Append(function);
  out.Append(": ");
  out.Append(SkipName(message));
  return code;
}

int32_t Report(const char* function, const Status& status, tenon_error* error) {
  return Report(function, static_cast<int32_t>(status.code()), status.message(),
                error);
}

Status ReadStruct(const char* name, const void* from, size_t first_size,
                  size_t known_size, void* to) {
  TENON_RETURN_IF_ERROR(CheckStructSize(name, from, first_size));
  uint32_t size;
  std::memcpy(&size, from, sizeof(size));
  const char* bytes = static_cast<const char*>(from);
  for (size_t i = known_size; i < size; ++i) {
    if (bytes[i] == 0) continue;
    return UnimplementedError(
        name, ": a field at byte ", i,
        " is set, which is newer than this library (its struct ends at ",
        known_size, ")");
  }
  const size_t copied = std::min<size_t>(size, known_size);
  std::memcpy(to, from, copied);
  std::memset(static_cast<char*>(to) + copied, 0, known_size - copied);
  return Status();
}

Status WriteStruct(const char* name, const void* from, size_t first_size,
                   size_t known_size, void* to) {
  TENON_RETURN_IF_ERROR(CheckStructSize(name, to, first_size));
  uint32_t size;
  std::memcpy(&size, to, sizeof(size));
  const size_t copied = std::min<size_t>(size, known_size);
  char* bytes = static_cast<char*>(to);
  std::memcpy(bytes + sizeof(size),
              static_cast<const char*>(from) + sizeof(size),
              copied - sizeof(size));
  std::memset(bytes + copied, 0, size - copied);
  return Status();
}

Status CheckReserved(const char* field, uint64_t value) {
  if (value == 0) return Status();
  return InvalidArgumentError(field, " is ", value, ", must be 0");
}

Status CheckPresent(const char* name, const void* pointer) {
  if (pointer != nullptr) return Status();
  return InvalidArgumentError(name, " is null");
}

}  // namespace tenon::abi
