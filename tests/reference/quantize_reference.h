#ifndef TENON_TESTS_REFERENCE_QUANTIZE_REFERENCE_H_
#define TENON_TESTS_REFERENCE_QUANTIZE_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace tenon::reference {

// The nearest e4m3 value, ties to an even code, saturating at 448; of the value
// of every code, made by the format's definition: 1 sign, 4 exponent bits
// biased by 7, 3 fraction bits.
inline double RoundToE4M3(double value) {
  if (std::isnan(value)) return value;
  const double magnitude = std::min(std::fabs(value), 448.0);
  double best = 0.0;
  bool best_is_even = true;
  for (int code = 0; code < 0x7f; ++code) {  // 0x7f is NaN
    const int exponent = code / 8;
    const double of_code = exponent == 0
                               ? std::ldexp(code, -9)
                               : std::ldexp(8 + code % 8, exponent - 7 - 3);
    const double distance = std::fabs(of_code - magnitude);
    const double best_distance = std::fabs(best - magnitude);
    const bool is_even = code % 2 == 0;
    if (distance < best_distance ||
        (distance == best_distance && is_even && !best_is_even)) {
      best = of_code;
      best_is_even = is_even;
    }
  }
  return std::copysign(best, value);
}

struct QuantizedFp8 {
  std::vector<double> out;     // [rows, cols], values of e4m3
  std::vector<double> scales;  // [blocks of rows, blocks of columns]

  // out times its scale.
  std::vector<double> Dequantized() const {
    std::vector<double> values(out.size());
    const int64_t blocks = (cols + block_cols - 1) / block_cols;
    for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
      values[i] =
          out[i] *
          scales[i / cols / block_rows * blocks + i % cols / block_cols];
    }
    return values;
  }

  int64_t cols, block_rows, block_cols;
};

// x [rows, cols] in blocks of block_rows x block_cols (0: all columns):
//   amax = max(largest |x|, 1e-10), scale = amax / 448,
//   out = e4m3(x * (448 / amax)), divisions and product rounded to float32.
inline QuantizedFp8 QuantizeFp8(const std::vector<double>& x, int64_t rows,
                                int64_t cols, int64_t block_rows,
                                int64_t block_cols) {
  const auto to_float = [](double v) {
    return static_cast<double>(static_cast<float>(v));
  };
  if (block_cols == 0) block_cols = cols;
  QuantizedFp8 q;
  q.cols = cols;
  q.block_rows = block_rows;
  q.block_cols = block_cols;
  q.out.resize(x.size());
  for (int64_t row = 0; row < rows; row += block_rows) {
    for (int64_t col = 0; col < cols; col += block_cols) {
      double amax = to_float(1e-10);
      const auto for_each = [&](const auto& f) {
        for (int64_t r = row; r < std::min(rows, row + block_rows); ++r) {
          for (int64_t c = col; c < std::min(cols, col + block_cols); ++c) {
            f(r * cols + c);
          }
        }
      };
      for_each([&](int64_t i) {
        if (!std::isnan(x[i])) amax = std::max(amax, std::fabs(x[i]));
      });
      q.scales.push_back(to_float(amax / 448.0));
      const double inverse = to_float(448.0 / amax);
      for_each(
          [&](int64_t i) { q.out[i] = RoundToE4M3(to_float(x[i] * inverse)); });
    }
  }
  return q;
}

}  // namespace tenon::reference

#endif  // TENON_TESTS_REFERENCE_QUANTIZE_REFERENCE_H_
