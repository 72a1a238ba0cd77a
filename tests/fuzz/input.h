#ifndef TENON_TESTS_FUZZ_INPUT_H_
#define TENON_TESTS_FUZZ_INPUT_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>

namespace tenon::fuzz {

// The decisions of a test case, read from a fuzzer's bytes. When they are used
// up, a generator that the first of them seed goes on, so that a short input
// makes as long a test case as any other.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {
    for (size_t i = 0; i < size && i < 8; ++i) state_ = state_ * 257 + data[i];
  }

  // 0 to n - 1; of a byte where that is enough.
  uint64_t Below(uint64_t n) { return n <= 1 ? 0 : Take(n <= 256 ? 1 : 8) % n; }
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Below(high - low + 1));
  }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  uint64_t Bits() { return Take(8); }

  template <class T>
  T Pick(std::initializer_list<T> values) {
    return values.begin()[Below(values.size())];
  }
  template <class List>
  auto& PickFrom(List& list) {
    return *(std::begin(list) + Below(std::size(list)));
  }

  // Whether the next decision still comes from the fuzzer.
  bool has_bytes() const { return at_ < size_; }

 private:
  uint64_t Take(int bytes) {
    if (at_ >= size_) return Generate();
    uint64_t value = 0;
    for (int i = 0; i < bytes && at_ < size_; ++i) {
      value |= static_cast<uint64_t>(data_[at_++]) << (8 * i);
    }
    return value;
  }

  uint64_t Generate() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint64_t state_ = 0;
};

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_INPUT_H_
