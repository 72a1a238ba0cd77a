#ifndef TENON_TESTS_FUZZ_ERROR_BOX_H_
#define TENON_TESTS_FUZZ_ERROR_BOX_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "tests/fuzz/input.h"

namespace tenon::fuzz {

// Whether `text` has `word` as a whole identifier.
bool Mentions(const std::string& text, const std::string& word);

// A tenon_error: usually a good one, at times absent, too short or longer than
// the library's. Its memory ends where it says, so that a sanitizer sees a
// write past that.
class ErrorBox {
 public:
  explicit ErrorBox(Input& in);

  tenon_error* get() { return reinterpret_cast<tenon_error*>(memory_.get()); }

  // Checks what holds for the result of every function: a pinned code, the same
  // in the struct, and on failure a message "<function>: ..." that names one of
  // `fields`. Counts the call.
  void Check(const char* function, int32_t code, bool is_mutated,
             const std::vector<const char*>& fields) const;

  // Empty where the box has no room for a whole message.
  std::string message() const;

 private:
  bool is_whole() const { return size_ >= sizeof(tenon_error); }

  size_t size_ = 0;
  std::unique_ptr<uint8_t[]> memory_;
};

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_ERROR_BOX_H_
