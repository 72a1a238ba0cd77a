#ifndef TENON_TESTS_FUZZ_SESSION_ORACLE_H_
#define TENON_TESTS_FUZZ_SESSION_ORACLE_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "abi/tenon.h"

namespace tenon::fuzz {

// What a session should hold: sequences, their lengths, and which pages they
// share. A page is a number here, in an order that does not depend on
// addresses, so that equal inputs cover equal code.
class SessionOracle {
 public:
  struct Sequence {
    tenon_sequence handle = 0;
    int64_t length = 0;
    std::vector<int64_t> pages;
  };
  // New tokens of sequences()[index].
  struct Append {
    size_t index;
    int64_t num_tokens;
  };

  SessionOracle() = default;
  SessionOracle(tenon_session handle, const tenon_session_info& limits)
      : handle(handle), limits(limits) {}

  std::vector<Sequence>& sequences() { return sequences_; }
  bool is_full() const {
    return sequences_.size() == static_cast<size_t>(limits.max_sequences);
  }

  int64_t num_free_pages() const {
    std::set<int64_t> used;
    for (const Sequence& sequence : sequences_) {
      used.insert(sequence.pages.begin(), sequence.pages.end());
    }
    return limits.num_pages - static_cast<int64_t>(used.size());
  }

  void Truncate(size_t index, int64_t length) {
    sequences_[index].length = length;
    sequences_[index].pages.resize(NumPages(length));
  }

  // Whether there is room for the new tokens; if so, they are appended.
  bool TryAppend(const std::vector<Append>& appends) {
    std::vector<bool> copies;
    int64_t needed = 0;
    std::map<int64_t, Leaving> leaving;
    for (const Append& append : appends) {
      const Sequence& sequence = sequences_[append.index];
      const int64_t length = sequence.length + append.num_tokens;
      if (length > limits.max_context) return false;
      copies.push_back(CopiesLastPage(sequence, &leaving));
      needed += static_cast<int64_t>(NumPages(length)) -
                static_cast<int64_t>(sequence.pages.size()) +
                (copies.back() ? 1 : 0);
    }
    if (needed > num_free_pages()) return false;
    for (size_t i = 0; i < appends.size(); ++i) {
      Sequence& sequence = sequences_[appends[i].index];
      if (copies[i]) sequence.pages.back() = next_page_++;
      sequence.length += appends[i].num_tokens;
      while (sequence.pages.size() < NumPages(sequence.length)) {
        sequence.pages.push_back(next_page_++);
      }
    }
    return true;
  }

  tenon_session handle = 0;
  tenon_session_info limits = {};
  uint64_t num_steps = 0;
  uint64_t num_tokens = 0;

 private:
  // Sequences of a step that get a copy of a page before they write to it.
  struct Leaving {
    int64_t count = 0;
    int64_t max_length = 0;
  };

  size_t NumPages(int64_t length) const {
    return static_cast<size_t>((length + limits.page_size - 1) /
                               limits.page_size);
  }

  int64_t NumUsers(int64_t page) const {
    int64_t users = 0;
    for (const Sequence& sequence : sequences_) {
      users += std::count(sequence.pages.begin(), sequence.pages.end(), page);
    }
    return users;
  }

  // A shared page is copied by all who write to it in a step, but the last one
  // if no other is left, and none that left had more tokens there.
  bool CopiesLastPage(const Sequence& sequence,
                      std::map<int64_t, Leaving>* leaving) const {
    if (sequence.length % limits.page_size == 0) return false;
    const int64_t last = sequence.pages.back();
    Leaving& left = (*leaving)[last];
    if (NumUsers(last) - left.count <= 1 &&
        left.max_length <= sequence.length) {
      return false;
    }
    ++left.count;
    left.max_length = std::max(left.max_length, sequence.length);
    return true;
  }

  std::vector<Sequence> sequences_;
  int64_t next_page_ = 0;
};

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_SESSION_ORACLE_H_
