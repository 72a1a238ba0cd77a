#ifndef TENON_TESTS_REFERENCE_QK_NORM_REFERENCE_H_
#define TENON_TESTS_REFERENCE_QK_NORM_REFERENCE_H_

#include <vector>

namespace tenon::reference {

// Rotary embedding, NeoX style, of the first 2 * n elements of a head, with n =
// cos.size() angles: element i pairs with element n + i. The norm before it is
// reference::RmsNorm of the head.
inline std::vector<double> Rotate(std::vector<double> head,
                                  const std::vector<double>& cos,
                                  const std::vector<double>& sin) {
  const size_t n = cos.size();
  for (size_t i = 0; i < n; ++i) {
    const double a = head[i];
    const double b = head[n + i];
    head[i] = a * cos[i] - b * sin[i];
    head[n + i] = b * cos[i] + a * sin[i];
  }
  return head;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_QK_NORM_REFERENCE_H_
