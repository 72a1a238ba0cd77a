#ifndef TENON_TESTS_REFERENCE_LINEAR_REFERENCE_H_
#define TENON_TESTS_REFERENCE_LINEAR_REFERENCE_H_

#include <cmath>
#include <cstdint>
#include <vector>

namespace tenon::reference {

struct LinearResult {
  std::vector<double> out;
  // Sum of |x * weight| of each element: what rounding errors are relative to.
  std::vector<double> magnitude;
};

// out = x * weight^T + bias for x [rows, depth], weight [cols, depth] and bias
// [cols] or empty.
inline LinearResult Linear(const std::vector<double>& x,
                           const std::vector<double>& weight,
                           const std::vector<double>& bias, int64_t rows,
                           int64_t cols, int64_t depth) {
  LinearResult result;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; ++n) {
      double sum = bias.empty() ? 0.0 : bias[n];
      double magnitude = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double product = x[m * depth + k] * weight[n * depth + k];
        sum += product;
        magnitude += std::fabs(product);
      }
      result.out.push_back(sum);
      result.magnitude.push_back(magnitude);
    }
  }
  return result;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_LINEAR_REFERENCE_H_
