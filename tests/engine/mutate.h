#ifndef TENON_TESTS_ENGINE_MUTATE_H_
#define TENON_TESTS_ENGINE_MUTATE_H_

#include <cstdint>
#include <iterator>
#include <random>
#include <string>

namespace tenon::testing {

// `text` with one to four random changes: a bit or byte changed, a stretch
// removed, repeated or moved, a number or word put in that parsers trip over.
inline std::string Mutate(std::string text, std::mt19937_64* rng) {
  static const char* const kWords[] = {"0",
                                       "-1",
                                       "1e999",
                                       "18446744073709551615",
                                       "9223372036854775807",
                                       "null",
                                       "[]",
                                       "{}",
                                       "true",
                                       "\"\"",
                                       "4096",
                                       "0.5",
                                       "2",
                                       "\"F64\"",
                                       "4294967296"};
  const auto below = [&](size_t n) {
    return n == 0 ? size_t{0} : static_cast<size_t>((*rng)() % n);
  };
  const size_t changes = 1 + below(4);
  for (size_t i = 0; i < changes; ++i) {
    const size_t at = below(text.size());
    const size_t length = below(1 + below(40));
    switch (below(7)) {
      case 0:
        if (!text.empty()) text[at] ^= static_cast<char>(1 << below(8));
        break;
      case 1:
        if (!text.empty()) text[at] = static_cast<char>(below(256));
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(below(text.size()), length));
        break;
      case 4:
        text.insert(at, kWords[below(std::size(kWords))]);
        break;
      case 5: {  // replace a run of digits
        const size_t begin = text.find_first_of("0123456789", at);
        if (begin == std::string::npos) break;
        size_t end = text.find_first_not_of("0123456789", begin);
        if (end == std::string::npos) end = text.size();
        text.replace(begin, end - begin, kWords[below(std::size(kWords))]);
        break;
      }
      default:
        if (below(4) == 0) text.resize(at);
        break;
    }
  }
  return text;
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_MUTATE_H_
