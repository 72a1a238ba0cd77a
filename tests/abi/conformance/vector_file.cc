#include "tests/abi/conformance/vector_file.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

namespace tenon::conformance {
namespace {

struct FloatFormat {
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number
};

FloatFormat FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {10, -14};
    case DType::kBFloat16:
      return {7, -126};
    case DType::kFloat8E4M3:
      return {3, -6};
    default:
      return {23, -126};
  }
}

bool IsInteger(DType dtype) {
  return dtype == DType::kInt32 || dtype == DType::kInt64 ||
         dtype == DType::kUInt8;
}

// The distance between neighbours at a finite value.
double Quantum(const FloatFormat& format, double value) {
  const int exponent = value == 0.0 ? format.min_exponent : std::ilogb(value);
  return std::ldexp(
      1.0, std::max(exponent, format.min_exponent) - format.mantissa_bits);
}

// The bits of a rounded value; infinities are those of IEEE formats.
uint64_t FloatBitsOf(DType dtype, double value) {
  const FloatFormat format = FormatOf(dtype);
  const int sign_bit = static_cast<int>(DTypeSize(dtype)) * 8 - 1;
  const uint64_t sign = std::signbit(value) ? uint64_t{1} << sign_bit : 0;
  const uint64_t infinity =
      (uint64_t{1} << sign_bit) - (uint64_t{1} << format.mantissa_bits);
  const uint64_t quiet_bit = uint64_t{1} << (format.mantissa_bits - 1);
  if (std::isnan(value)) return infinity | quiet_bit;
  if (std::isinf(value)) return sign | infinity;
  value = std::fabs(value);
  const double quantum = Quantum(format, value);
  const int exponent =
      std::ilogb(quantum) + format.mantissa_bits - format.min_exponent;
  // A normal number's leading bit adds the 1 that its exponent field lacks.
  return sign | ((static_cast<uint64_t>(exponent) << format.mantissa_bits) +
                 static_cast<uint64_t>(value / quantum));
}

std::string Join(const std::vector<int64_t>& values) {
  std::string text;
  for (int64_t v : values)
    text += (text.empty() ? "" : ",") + std::to_string(v);
  return text;
}

const char* Name(DType dtype) {
  return dtype == DType::kFloat8E4M3 ? "float8_e4m3fn" : DTypeName(dtype);
}

std::vector<double> Multiples(int64_t count, uint64_t seed, int64_t low,
                              int64_t high) {
  std::mt19937_64 rng(seed);
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) {
    const auto span = static_cast<uint64_t>(high - low + 1);
    values.push_back((low + static_cast<int64_t>(rng() % span)) / 8.0);
  }
  return values;
}

}  // namespace

double Round(DType dtype, double value) {
  if (IsInteger(dtype) || !std::isfinite(value)) return value;
  const double quantum = Quantum(FormatOf(dtype), value);
  return std::nearbyint(value / quantum) * quantum;
}

double RoundingMargin(DType dtype, double value) {
  const double steps = std::fabs(value) / Quantum(FormatOf(dtype), value);
  return std::fabs(steps - std::floor(steps) - 0.5);
}

HostTensor::HostTensor(DType dtype, std::vector<int64_t> shape,
                       const std::vector<double>& values, Layout layout)
    : dtype_(dtype), shape_(std::move(shape)), layout_(layout) {
  strides_.resize(shape_.size(), 1);
  for (size_t i = shape_.size() - 1; i > 0; --i) {
    strides_[i - 1] = strides_[i] * shape_[i] + layout.padding;
  }
  const int64_t size = static_cast<int64_t>(DTypeSize(dtype));
  const int64_t elements = layout.offset + shape_[0] * strides_[0];
  memory_.assign(static_cast<size_t>(elements * size + layout.tail_bytes),
                 IsInteger(dtype) ? 0xa5 : 0xff);
  if (!values.empty()) Write(values);
}

HostTensor HostTensor::OfBytes(const void* data, int64_t rows,
                               int64_t row_bytes) {
  HostTensor tensor(DType::kUInt8, {rows, row_bytes});
  std::memcpy(tensor.memory_.data(), data,
              static_cast<size_t>(rows * row_bytes));
  return tensor;
}

void HostTensor::Write(const std::vector<double>& values) {
  int64_t count = 1;
  for (int64_t extent : shape_) count *= extent;
  Require(count == static_cast<int64_t>(values.size()), "number of values");
  values_.clear();
  const size_t size = DTypeSize(dtype_);
  for (int64_t i = 0; i < count; ++i) {
    int64_t offset = layout_.offset;
    int64_t rest = i;
    for (size_t d = shape_.size(); d-- > 0;) {
      offset += rest % shape_[d] * strides_[d];
      rest /= shape_[d];
    }
    values_.push_back(Round(dtype_, values[i]));
    const uint64_t bits =
        IsInteger(dtype_)
            ? static_cast<uint64_t>(static_cast<int64_t>(values_.back()))
            : FloatBitsOf(dtype_, values_.back());
    // Little-endian, as is every machine that runs this.
    std::memcpy(&memory_[static_cast<size_t>(offset) * size], &bits, size);
  }
}

HostTensor HostTensor::With(const std::vector<double>& values) const {
  HostTensor tensor = *this;
  tensor.Write(values);
  return tensor;
}

std::vector<int64_t> HostTensor::integers() const {
  return {values_.begin(), values_.end()};
}

std::string HostTensor::Description() const {
  const int64_t size = static_cast<int64_t>(DTypeSize(dtype_));
  return std::string(Name(dtype_)) + " " + Join(shape_) + " " +
         (layout_.padding > 0 ? Join(strides_) : "-") + " " +
         std::to_string(layout_.offset * size);
}

std::string HostTensor::Hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : memory_) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Case::Case(const std::string& op, const std::string& variant)
    : head_("\ncase " + op + "." + variant + " " + op + "\n") {}

void Case::Comment(const std::string& text) { args_ += "# " + text + "\n"; }

void Case::Arg(const std::string& field, int64_t value) {
  args_ += "arg " + field + " " + std::to_string(value) + "\n";
}

void Case::Arg(const std::string& field, float value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(value));
  args_ += "arg " + field + " " + text + "\n";
}

void Case::In(const std::string& field, const HostTensor& tensor) {
  tensors_ += "tensor " + field + " " + tensor.Description() + " " +
              tensor.Hex() + "\n";
}

void Case::Out(const std::string& field, const HostTensor& before,
               const std::vector<double>& expected, int ulps) {
  In(field, before);
  expected_ += "expect " + field + " " + std::to_string(ulps) + " " +
               before.With(expected).Hex() + "\n";
}

void Case::Reject(int32_t code, const std::string& word) {
  expected_ += "reject " + std::to_string(code) + " " + word + "\n";
}

std::string Case::Text() const {
  return head_ + args_ + tensors_ + expected_ + "end\n";
}

std::vector<double> Eighths(int64_t count, uint64_t seed) {
  return Multiples(count, seed, -16, 16);
}

std::vector<double> PositiveEighths(int64_t count, uint64_t seed) {
  return Multiples(count, seed, 2, 16);
}

std::vector<double> FromIntegers(const std::vector<int64_t>& integers) {
  return {integers.begin(), integers.end()};
}

void Require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "make_vectors: %s\n", message);
  std::exit(1);
}

}  // namespace tenon::conformance
