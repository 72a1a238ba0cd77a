#ifndef TENON_TESTS_REFERENCE_MOE_SWIGLU_REFERENCE_H_
#define TENON_TESTS_REFERENCE_MOE_SWIGLU_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <functional>

namespace tenon::reference {

// round(silu(gate)) * up.
inline double SwiGlu(double gate, double up,
                     const std::function<double(double)>& round) {
  return round(gate / (1.0 + std::exp(-gate))) * up;
}

// (up + 1) * gate * sigmoid(alpha * gate), of clamped gate and up.
inline double SwiGluLimited(double gate, double up, double limit,
                            double alpha) {
  gate = std::min(gate, limit);
  up = std::clamp(up, -limit, limit);
  return (up + 1.0) * gate / (1.0 + std::exp(-alpha * gate));
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_MOE_SWIGLU_REFERENCE_H_
