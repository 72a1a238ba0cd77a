#ifndef TENON_TESTS_REFERENCE_MOE_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_REFERENCE_H_

#include <cmath>
#include <functional>
#include <vector>

namespace tenon::reference {

// One expert's matrices, row-major: gate and up [intermediate, hidden], down
// [hidden, intermediate].
struct MoeExpert {
  const double* gate;
  const double* up;
  const double* down;
};

using MoeRow = std::vector<double>;

// The chosen experts' part of one token:
//   h = silu(x * gate^T) * (x * up^T)
//   y = sum over choices of weight * (h * down^T)
// `round` is applied where the op rounds: to each weighted row, and to y;
// `finish_hidden` makes of h what the down projection reads.
inline MoeRow MoeToken(const MoeRow& x, size_t intermediate,
                       const std::vector<MoeExpert>& chosen,
                       const std::vector<double>& weights,
                       const std::function<double(double)>& round,
                       const std::function<MoeRow(MoeRow)>& finish_hidden) {
  const size_t hidden = x.size();
  std::vector<double> y(hidden);
  for (size_t j = 0; j < chosen.size(); ++j) {
    std::vector<double> h(intermediate);
    for (size_t i = 0; i < intermediate; ++i) {
      double gate = 0.0, up = 0.0;
      for (size_t k = 0; k < hidden; ++k) {
        gate += x[k] * chosen[j].gate[i * hidden + k];
        up += x[k] * chosen[j].up[i * hidden + k];
      }
      h[i] = gate / (1.0 + std::exp(-gate)) * up;
    }
    h = finish_hidden(h);
    for (size_t n = 0; n < hidden; ++n) {
      double sum = 0.0;
      for (size_t i = 0; i < intermediate; ++i) {
        sum += h[i] * chosen[j].down[n * intermediate + i];
      }
      y[n] += round(weights[j] * sum);
    }
  }
  for (double& v : y) v = round(v);
  return y;
}

// The same, with h rounded like the rest.
inline MoeRow MoeToken(const MoeRow& x, size_t intermediate,
                       const std::vector<MoeExpert>& chosen,
                       const std::vector<double>& weights,
                       const std::function<double(double)>& round) {
  return MoeToken(x, intermediate, chosen, weights, round, [&](MoeRow h) {
    for (double& v : h) v = round(v);
    return h;
  });
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_REFERENCE_H_
