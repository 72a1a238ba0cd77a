#ifndef TENON_TESTS_REFERENCE_MOE_SUM_REDUCE_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_SUM_REDUCE_REFERENCE_H_

#include <vector>

namespace tenon::reference {

// Sum over the middle dimension of x [tokens, top_k, hidden], each partial sum
// rounded to float32.
inline std::vector<double> MoeSumReduce(const std::vector<double>& x,
                                        size_t tokens, size_t top_k,
                                        size_t hidden) {
  std::vector<double> out(tokens * hidden);
  for (size_t i = 0; i < out.size(); ++i) {
    const double* column = &x[i / hidden * top_k * hidden + i % hidden];
    out[i] = column[0];
    for (size_t j = 1; j < top_k; ++j) {
      out[i] = static_cast<float>(out[i] + column[j * hidden]);
    }
  }
  return out;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_SUM_REDUCE_REFERENCE_H_
