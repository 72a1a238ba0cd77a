#ifndef TENON_TESTS_REFERENCE_EMBEDDING_REFERENCE_H_
#define TENON_TESTS_REFERENCE_EMBEDDING_REFERENCE_H_

#include <cstdint>
#include <vector>

namespace tenon::reference {

// Rows ids[t] of table [vocab, hidden]; zeros for an id outside it.
inline std::vector<double> Embedding(const std::vector<int64_t>& ids,
                                     const std::vector<double>& table,
                                     int64_t vocab, int64_t hidden) {
  std::vector<double> out;
  for (int64_t id : ids) {
    for (int64_t i = 0; i < hidden; ++i) {
      out.push_back(id >= 0 && id < vocab ? table[id * hidden + i] : 0.0);
    }
  }
  return out;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_EMBEDDING_REFERENCE_H_
