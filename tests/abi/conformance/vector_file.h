#ifndef TENON_TESTS_ABI_CONFORMANCE_VECTOR_FILE_H_
#define TENON_TESTS_ABI_CONFORMANCE_VECTOR_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "ops/core/dtype.h"

// Writes the format of README.md.

namespace tenon::conformance {

// Rounds to the nearest value of the dtype, ties to even.
double Round(DType dtype, double value);

// How far `value` is from where Round would give another result, as a fraction
// of the distance between neighbouring values of the dtype.
double RoundingMargin(DType dtype, double value);

// Where a tensor's elements lie in its memory.
struct Layout {
  // Elements left free behind every extent but the last; 0: compact, and NULL
  // strides.
  int64_t padding = 0;
  int64_t offset = 0;  // elements in front
  int64_t tail_bytes = 8;
};

// The memory of one tensor: elements, and filler bytes before, between and
// behind them.
class HostTensor {
 public:
  // Without values every element is filler, as outputs begin.
  HostTensor(DType dtype, std::vector<int64_t> shape,
             const std::vector<double>& values = {}, Layout layout = {});
  // uint8 [rows, size of Struct].
  template <class Struct>
  static HostTensor OfStructs(const std::vector<Struct>& structs) {
    return OfBytes(structs.data(), static_cast<int64_t>(structs.size()),
                   sizeof(Struct));
  }

  DType dtype() const { return dtype_; }
  // The elements in row-major order, rounded to the dtype.
  const std::vector<double>& values() const { return values_; }
  std::vector<int64_t> integers() const;

  // The same memory with other elements.
  HostTensor With(const std::vector<double>& values) const;

  std::string Description() const;  // dtype, shape, strides and offset
  std::string Hex() const;

 private:
  static HostTensor OfBytes(const void* data, int64_t rows, int64_t row_bytes);
  void Write(const std::vector<double>& values);

  DType dtype_;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  Layout layout_;
  std::vector<double> values_;
  std::vector<uint8_t> memory_;
};

// One case. Statements may be added in any order.
class Case {
 public:
  Case(const std::string& op, const std::string& variant);

  void Comment(const std::string& text);
  void Arg(const std::string& field, int64_t value);
  void Arg(const std::string& field, float value);
  void Arg(const std::string& field, int32_t value) {
    Arg(field, int64_t{value});
  }
  void In(const std::string& field, const HostTensor& tensor);
  // An output, or a tensor that is updated: `expected` are its elements after
  // the call, from which they may be `ulps` representable values away.
  void Out(const std::string& field, const HostTensor& before,
           const std::vector<double>& expected, int ulps);
  void Reject(int32_t code, const std::string& word);

  std::string Text() const;

 private:
  std::string head_;
  std::string args_;
  std::string tensors_;
  std::string expected_;
};

// `count` multiples of 1/8 from -2 to 2, the same for a seed on every machine.
// Sums of their products are exact in float32.
std::vector<double> Eighths(int64_t count, uint64_t seed);
// The same from 1/4 to 2.
std::vector<double> PositiveEighths(int64_t count, uint64_t seed);

std::vector<double> FromIntegers(const std::vector<int64_t>& integers);

// Ends the program with a message unless `condition` holds.
void Require(bool condition, const char* message);

}  // namespace tenon::conformance

#endif  // TENON_TESTS_ABI_CONFORMANCE_VECTOR_FILE_H_
