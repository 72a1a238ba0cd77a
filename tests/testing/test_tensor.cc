#include "tests/testing/test_tensor.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

namespace tenon::testing {
namespace {

constexpr int64_t kGuardBytes = TestTensor::kGuardBytes;
constexpr uint8_t kPoison = 0xff;  // NaN in every float dtype, -1 in integers

// Behind a tensor. Where a tool watches the ends of allocations there are none:
// it then sees reads past the end too, which leave no trace here.
int64_t GuardBytesBehind() {
#ifdef __SANITIZE_ADDRESS__
  return 0;
#else
  static const bool is_tight = std::getenv("TENON_TIGHT_TENSORS") != nullptr;
  return is_tight ? 0 : kGuardBytes;
#endif
}

template <class T>
void StoreAs(uint8_t* to, float value) {
  const T typed = FromFloat<T>(value);
  std::memcpy(to, &typed, sizeof(typed));
}

template <class T>
T LoadAs(const uint8_t* from) {
  T typed;
  std::memcpy(&typed, from, sizeof(typed));
  return typed;
}

void StoreFloat(DType dtype, uint8_t* to, float value) {
  switch (dtype) {
    case DType::kFloat32:
      return StoreAs<float>(to, value);
    case DType::kFloat16:
      return StoreAs<Float16>(to, value);
    case DType::kBFloat16:
      return StoreAs<BFloat16>(to, value);
    case DType::kFloat8E4M3:
      return StoreAs<Float8E4M3>(to, value);
    default:
      FAIL() << "not a float dtype: " << DTypeName(dtype);
  }
}

double LoadDouble(DType dtype, const uint8_t* from) {
  switch (dtype) {
    case DType::kFloat32:
      return LoadAs<float>(from);
    case DType::kFloat16:
      return ToFloat(LoadAs<Float16>(from));
    case DType::kBFloat16:
      return ToFloat(LoadAs<BFloat16>(from));
    case DType::kFloat8E4M3:
      return ToFloat(LoadAs<Float8E4M3>(from));
    case DType::kInt32:
      return LoadAs<int32_t>(from);
    case DType::kInt64:
      return static_cast<double>(LoadAs<int64_t>(from));
    case DType::kUInt8:
      return *from;
    case DType::kInvalid:
      break;
  }
  return 0.0;
}

std::vector<int64_t> RowMajorStrides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  return strides;
}

}  // namespace

TestTensor::TestTensor(Device device, DType dtype, std::vector<int64_t> shape,
                       const std::vector<float>& values)
    : TestTensor(device, dtype, shape, RowMajorStrides(shape), values) {}

TestTensor::TestTensor(Device device, DType dtype, std::vector<int64_t> shape,
                       std::vector<int64_t> strides,
                       const std::vector<float>& values) {
  Build(device, dtype, std::move(shape), std::move(strides));
  for (size_t i = 0; i < values.size(); ++i) {
    StoreFloat(dtype, &initial_[ByteOffset(static_cast<int64_t>(i))],
               values[i]);
  }
  Upload();
}

TestTensor TestTensor::FromIntegers(Device device, DType dtype,
                                    std::vector<int64_t> shape,
                                    const std::vector<int64_t>& values) {
  TestTensor tensor;
  const std::vector<int64_t> strides = RowMajorStrides(shape);
  tensor.Build(device, dtype, std::move(shape), strides);
  for (size_t i = 0; i < values.size(); ++i) {
    // Little-endian: the low bytes of an int64 are the narrower integer.
    std::memcpy(&tensor.initial_[tensor.ByteOffset(static_cast<int64_t>(i))],
                &values[i], DTypeSize(dtype));
  }
  tensor.Upload();
  return tensor;
}

void TestTensor::Build(Device device, DType dtype, std::vector<int64_t> shape,
                       std::vector<int64_t> strides) {
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int32_t>(shape.size());
  int64_t extent = 1;
  for (int i = 0; i < view_.rank; ++i) {
    view_.shape[i] = shape[i];
    view_.stride[i] = strides[i];
    extent += (shape[i] - 1) * strides[i];
  }
  if (NumElements(view_) == 0) extent = 0;
  const int64_t bytes = kGuardBytes +
                        extent * static_cast<int64_t>(DTypeSize(dtype)) +
                        GuardBytesBehind();
  initial_.assign(static_cast<size_t>(bytes), kPoison);
  StatusOr<Buffer> buffer = Buffer::Allocate(device, initial_.size());
  ASSERT_TRUE(buffer.ok()) << buffer.status().message();
  buffer_ = *std::move(buffer);
  view_.data = static_cast<uint8_t*>(buffer_.data()) + kGuardBytes;
}

void TestTensor::Upload() {
  Status status = CopyMemory(buffer_.data(), view_.device, initial_.data(),
                             Device{}, initial_.size(), Stream());
  // The copy may still be under way, and streams of tests do not wait for it.
  if (status.ok()) status = Synchronize(view_.device, Stream());
  ASSERT_TRUE(status.ok()) << status.message();
}

int64_t TestTensor::ByteOffset(int64_t element) const {
  int64_t offset = 0;
  for (int i = view_.rank - 1; i >= 0; --i) {
    offset += element % view_.shape[i] * view_.stride[i];
    element /= view_.shape[i];
  }
  return kGuardBytes + offset * static_cast<int64_t>(DTypeSize(view_.dtype));
}

std::vector<uint8_t> TestTensor::Bytes() const {
  std::vector<uint8_t> bytes(initial_.size());
  Status status = CopyMemory(bytes.data(), Device{}, buffer_.data(),
                             view_.device, bytes.size(), Stream());
  if (status.ok()) status = Synchronize(view_.device, Stream());
  EXPECT_TRUE(status.ok()) << status.message();
  return bytes;
}

std::vector<double> TestTensor::Values() const {
  const std::vector<uint8_t> bytes = Bytes();
  std::vector<double> values(static_cast<size_t>(NumElements(view_)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] =
        LoadDouble(view_.dtype, &bytes[ByteOffset(static_cast<int64_t>(i))]);
  }
  return values;
}

std::vector<int64_t> TestTensor::Integers() const {
  const std::vector<uint8_t> bytes = Bytes();
  std::vector<int64_t> values(static_cast<size_t>(NumElements(view_)));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint8_t* from = &bytes[ByteOffset(static_cast<int64_t>(i))];
    values[i] = view_.dtype == DType::kInt64 ? LoadAs<int64_t>(from)
                                             : LoadAs<int32_t>(from);
  }
  return values;
}

std::vector<double> TestTensor::InitialValues() const {
  std::vector<double> values(static_cast<size_t>(NumElements(view_)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] =
        LoadDouble(view_.dtype, &initial_[ByteOffset(static_cast<int64_t>(i))]);
  }
  return values;
}

int64_t TestTensor::NumStrayWrites() const {
  std::vector<uint8_t> bytes = Bytes();
  const size_t size = DTypeSize(view_.dtype);
  for (int64_t i = 0; i < NumElements(view_); ++i) {
    const int64_t offset = ByteOffset(i);
    std::memcpy(&bytes[offset], &initial_[offset], size);
  }
  int64_t count = 0;
  for (size_t i = 0; i < bytes.size(); ++i) count += bytes[i] != initial_[i];
  return count;
}

}  // namespace tenon::testing
