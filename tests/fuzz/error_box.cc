#include "tests/fuzz/error_box.h"

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstring>

#include "tests/fuzz/check.h"

namespace tenon::fuzz {
namespace {

constexpr uint8_t kFill = 0xa5;

bool IsWordCharacter(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
}

}  // namespace

bool Mentions(const std::string& text, const std::string& word) {
  for (size_t at = text.find(word); at != std::string::npos;
       at = text.find(word, at + 1)) {
    const size_t end = at + word.size();
    const bool begins = at == 0 || !IsWordCharacter(text[at - 1]);
    if (begins && (end == text.size() || !IsWordCharacter(text[end]))) {
      return true;
    }
  }
  return false;
}

ErrorBox::ErrorBox(Input& in) {
  uint32_t struct_size = sizeof(tenon_error);
  if (in.OneIn(8)) {
    struct_size = static_cast<uint32_t>(
        in.Pick<uint64_t>({0, 4, 7, 8, 9, 10, 40, sizeof(tenon_error) - 1,
                           sizeof(tenon_error) + 1, 2 * sizeof(tenon_error)}));
    if (struct_size == 0 && in.OneIn(2)) return;  // none at all
  }
  size_ = struct_size;
  memory_ = std::make_unique<uint8_t[]>(std::max<size_t>(size_, 4));
  std::memset(memory_.get(), kFill, size_);
  std::memcpy(memory_.get(), &struct_size, sizeof(struct_size));
}

std::string ErrorBox::message() const {
  if (!is_whole()) return "";
  return reinterpret_cast<const tenon_error*>(memory_.get())->message;
}

void ErrorBox::Check(const char* function, int32_t code, bool is_mutated,
                     const std::vector<const char*>& fields) const {
  ++counters().calls;
  if (is_mutated) ++counters().mutated;
  if (code != TENON_OK) ++counters().rejected;
  const std::string name = function;
  if (code < TENON_OK || code > TENON_UNAUTHENTICATED) {
    Fail(name + " returned " + std::to_string(code));
  }
  if (memory_ == nullptr) return;
  constexpr size_t kMessage = offsetof(tenon_error, message);
  if (size_ < kMessage) {
    for (size_t i = sizeof(uint32_t); i < size_; ++i) {
      if (memory_[i] != kFill) Fail(name + " wrote to an error without room");
    }
    return;
  }
  int32_t stored;
  std::memcpy(&stored, &memory_[offsetof(tenon_error, code)], sizeof(stored));
  if (stored != code) {
    Fail(name + " returned " + std::to_string(code) + " and stored " +
         std::to_string(stored));
  }
  if (size_ == kMessage) return;
  const char* text = reinterpret_cast<const char*>(&memory_[kMessage]);
  const size_t room = std::min(size_, sizeof(tenon_error)) - kMessage;
  const size_t length = strnlen(text, room);
  if (length == room) Fail(name + ": the message has no end");
  const std::string message(text, length);
  if (code == TENON_OK) {
    if (!message.empty()) Fail(name + " succeeded and says " + message);
    return;
  }
  const std::string prefix = name + ": ";
  if (message.compare(0, length, prefix, 0, std::min(length, prefix.size())) !=
          0 &&
      message.compare(0, prefix.size(), prefix) != 0) {
    Fail("the message of " + name + " is: " + message);
  }
  if (!is_whole()) return;
  const std::string rest =
      message.size() > prefix.size() ? message.substr(prefix.size()) : "";
  for (const char* field : fields) {
    if (Mentions(rest, field) && rest != field) return;
  }
  Fail("the message names no field: " + message);
}

}  // namespace tenon::fuzz
