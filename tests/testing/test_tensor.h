#ifndef TENON_TESTS_TESTING_TEST_TENSOR_H_
#define TENON_TESTS_TESTING_TEST_TENSOR_H_

#include <cstdint>
#include <vector>

#include "ops/core/memory.h"
#include "ops/core/tensor_view.h"

namespace tenon::testing {

// A tensor on any device for a test: filled from host values (rounded to its
// dtype), read back as doubles, with guard bytes around it and in the gaps of
// its strides that a test can check for stray writes. With AddressSanitizer,
// and where the environment has TENON_TIGHT_TENSORS (for compute-sanitizer), it
// ends where its memory does.
class TestTensor {
 public:
  static constexpr int64_t kGuardBytes = 256;  // ahead of it

  TestTensor() = default;

  // Row-major. Fewer values than elements: the rest is poison (NaN or -1-like
  // bytes), as an output should start.
  TestTensor(Device device, DType dtype, std::vector<int64_t> shape,
             const std::vector<float>& values = {});
  // With strides in elements.
  TestTensor(Device device, DType dtype, std::vector<int64_t> shape,
             std::vector<int64_t> strides, const std::vector<float>& values);

  static TestTensor FromIntegers(Device device, DType dtype,
                                 std::vector<int64_t> shape,
                                 const std::vector<int64_t>& values);

  const TensorView& view() const { return view_; }

  // The elements in row-major order, read from the device now.
  std::vector<double> Values() const;
  std::vector<int64_t> Integers() const;
  // The elements as they were at construction, after rounding to the dtype.
  std::vector<double> InitialValues() const;

  // The raw bytes of all memory, guards included: equal bytes mean nothing was
  // written.
  std::vector<uint8_t> Bytes() const;
  const std::vector<uint8_t>& InitialBytes() const { return initial_; }

  // Number of bytes outside the elements (guards and stride gaps) that differ
  // from their initial value.
  int64_t NumStrayWrites() const;

 private:
  void Build(Device device, DType dtype, std::vector<int64_t> shape,
             std::vector<int64_t> strides);
  void Upload();
  int64_t ByteOffset(int64_t element) const;  // of a row-major index

  TensorView view_;
  Buffer buffer_;
  std::vector<uint8_t> initial_;
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_TEST_TENSOR_H_
