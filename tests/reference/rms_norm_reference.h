#ifndef TENON_TESTS_REFERENCE_RMS_NORM_REFERENCE_H_
#define TENON_TESTS_REFERENCE_RMS_NORM_REFERENCE_H_

#include <cmath>
#include <functional>
#include <vector>

namespace tenon::reference {

// x / sqrt(mean(x^2) + epsilon) * weight. `round` is applied to the normalised
// x before the weight: the identity for a float32 multiply, rounding to the
// dtype for cast-then-multiply.
inline std::vector<double> RmsNorm(
    const std::vector<double>& x, const std::vector<double>& weight,
    double epsilon,
    const std::function<double(double)>& round = [](double v) { return v; }) {
  double sum = 0.0;
  for (double v : x) sum += v * v;
  const double rms = std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = round(x[i] / rms) * weight[i];
  return y;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_RMS_NORM_REFERENCE_H_
