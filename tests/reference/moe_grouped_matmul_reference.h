#ifndef TENON_TESTS_REFERENCE_MOE_GROUPED_MATMUL_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_GROUPED_MATMUL_REFERENCE_H_

#include <vector>

namespace tenon::reference {

// One row of a grouped matrix product:
//   y[n] = (sum over k of x[k] * weight[n, k] + bias[n]) * routing
// weight points at the expert's first element, rows are x.size() apart; bias is
// empty or has an element per n.
inline std::vector<double> MoeGroupedMatmulRow(const std::vector<double>& x,
                                               const double* weight,
                                               size_t num_rows,
                                               const std::vector<double>& bias,
                                               double routing) {
  std::vector<double> y(num_rows);
  for (size_t n = 0; n < num_rows; ++n) {
    double sum = 0.0;
    for (size_t k = 0; k < x.size(); ++k)
      sum += x[k] * weight[n * x.size() + k];
    if (!bias.empty()) sum += bias[n];
    y[n] = sum * routing;
  }
  return y;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_GROUPED_MATMUL_REFERENCE_H_
