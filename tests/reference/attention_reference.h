#ifndef TENON_TESTS_REFERENCE_ATTENTION_REFERENCE_H_
#define TENON_TESTS_REFERENCE_ATTENTION_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace tenon::reference {

// softmax(q * k^T * scale) * v of one query, for `count` keys and values of the
// size of q that `key(i)` and `value(i)` point to. No keys: zeros.
template <class Key, class Value>
std::vector<double> Attention(const std::vector<double>& q, int64_t count,
                              Key&& key, Value&& value, double scale) {
  const size_t size = q.size();
  std::vector<double> scores(static_cast<size_t>(count));
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    const double* k = key(i);
    double dot = 0.0;
    for (size_t d = 0; d < size; ++d) dot += q[d] * k[d];
    scores[i] = dot * scale;
    max = std::max(max, scores[i]);
  }
  double sum = 0.0;
  std::vector<double> out(size);
  for (int64_t i = 0; i < count; ++i) {
    const double weight = std::exp(scores[i] - max);
    const double* v = value(i);
    sum += weight;
    for (size_t d = 0; d < size; ++d) out[d] += weight * v[d];
  }
  for (double& o : out) o = count == 0 ? 0.0 : o / sum;
  return out;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_ATTENTION_REFERENCE_H_
