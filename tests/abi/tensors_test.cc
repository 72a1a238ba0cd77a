// Reading a DLTensor that is not trusted.

#include "abi/tensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/testing/op_test.h"

namespace tenon::abi {
namespace {

using testing::ExpectInvalid;

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

class ReadTensorTest : public ::testing::Test {
 protected:
  // A float32 tensor of this shape and these strides (none: null).
  DLTensor Tensor(std::vector<int64_t> shape,
                  std::vector<int64_t> strides = {}) {
    shape_ = std::move(shape);
    strides_ = std::move(strides);
    DLTensor tensor = {};
    tensor.data = memory_;
    tensor.device = {TENON_DL_CPU, 0};
    tensor.ndim = static_cast<int32_t>(shape_.size());
    tensor.dtype = {TENON_DL_FLOAT, 32, 1};
    tensor.shape = shape_.data();
    tensor.strides = strides_.empty() ? nullptr : strides_.data();
    return tensor;
  }

  TensorView Read(const DLTensor& tensor) {
    TensorView view;
    const Status status = ReadTensor("x", &tensor, TensorData::kUsed, &view);
    EXPECT_TRUE(status.ok()) << status.message();
    return view;
  }

  void Expect(const std::vector<std::string>& parts, const DLTensor& tensor) {
    TensorView view;
    ExpectInvalid(ReadTensor("x", &tensor, TensorData::kUsed, &view), parts);
  }

  std::vector<int64_t> Strides(const TensorView& view) {
    return {view.stride, view.stride + view.rank};
  }

  alignas(64) char memory_[256] = {};
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
};

using Dims = std::vector<int64_t>;

TEST_F(ReadTensorTest, CopiesEverything) {
  DLTensor tensor = Tensor({2, 3, 4}, {40, 8, 1});
  tensor.byte_offset = 12;
  const TensorView view = Read(tensor);
  EXPECT_EQ(view.data, memory_ + 12);
  EXPECT_EQ(view.dtype, DType::kFloat32);
  EXPECT_EQ(view.device, Device());
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(Dims(view.shape, view.shape + 3), Dims({2, 3, 4}));
  EXPECT_EQ(Strides(view), Dims({40, 8, 1}));
}

TEST_F(ReadTensorTest, NullStridesAreCompact) {
  EXPECT_EQ(Strides(Read(Tensor({2, 3, 4, 5}))), Dims({60, 20, 5, 1}));
  EXPECT_EQ(Strides(Read(Tensor({7}))), Dims({1}));
}

TEST_F(ReadTensorTest, StridesThatNothingIsReachedByAreReplaced) {
  EXPECT_EQ(Strides(Read(Tensor({2, 1, 4}, {8, -9, 1}))), Dims({8, 4, 1}));
  EXPECT_EQ(Strides(Read(Tensor({1, 3, 4}, {kMax, 8, 1}))), Dims({24, 8, 1}));
  EXPECT_EQ(Strides(Read(Tensor({4, 1}, {6, kMax}))), Dims({6, 1}));
  EXPECT_EQ(Strides(Read(Tensor({1, 1}, {0, 0}))), Dims({1, 1}));
  // Nothing at all is reached in an empty tensor.
  EXPECT_EQ(Strides(Read(Tensor({4, 0, 3}, {-1, -2, -3}))), Dims({3, 3, 1}));
  EXPECT_EQ(Strides(Read(Tensor({0}, {kMax}))), Dims({1}));
}

TEST_F(ReadTensorTest, BroadcastAndTransposedStridesStay) {
  EXPECT_EQ(Strides(Read(Tensor({8, 4}, {0, 1}))), Dims({0, 1}));
  EXPECT_EQ(Strides(Read(Tensor({2, 4}, {1, 2}))), Dims({1, 2}));
}

TEST_F(ReadTensorTest, EmptyTensorsNeedNoData) {
  DLTensor tensor = Tensor({0, 4});
  tensor.data = nullptr;
  tensor.byte_offset = 13;
  const TensorView view = Read(tensor);
  EXPECT_NE(view.data, nullptr);  // ops may do arithmetic on it
  EXPECT_EQ(NumElements(view), 0);
}

TEST_F(ReadTensorTest, DataIsNotLookedAtForQueries) {
  DLTensor tensor = Tensor({3, 4});
  tensor.data = nullptr;
  tensor.byte_offset = ~uint64_t{0};
  TensorView view;
  EXPECT_TRUE(ReadTensor("x", &tensor, TensorData::kIgnored, &view).ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % 256, 0u);
}

TEST_F(ReadTensorTest, DTypes) {
  const auto read = [&](uint8_t code, uint8_t bits) {
    DLTensor tensor = Tensor({1});
    tensor.dtype = {code, bits, 1};
    return Read(tensor).dtype;
  };
  EXPECT_EQ(read(TENON_DL_FLOAT, 32), DType::kFloat32);
  EXPECT_EQ(read(TENON_DL_FLOAT, 16), DType::kFloat16);
  EXPECT_EQ(read(TENON_DL_BFLOAT, 16), DType::kBFloat16);
  EXPECT_EQ(read(TENON_DL_FLOAT8_E4M3FN, 8), DType::kFloat8E4M3);
  EXPECT_EQ(read(TENON_DL_INT, 32), DType::kInt32);
  EXPECT_EQ(read(TENON_DL_INT, 64), DType::kInt64);
  EXPECT_EQ(read(TENON_DL_UINT, 8), DType::kUInt8);
  for (int code = 0; code < 256; ++code) {
    for (int bits : {0, 1, 4, 8, 16, 32, 64, 128, 255}) {
      for (int lanes : {0, 1, 2, 256}) {
        DLTensor tensor = Tensor({1});
        tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits),
                        static_cast<uint16_t>(lanes)};
        TensorView view;
        const Status status =
            ReadTensor("x", &tensor, TensorData::kUsed, &view);
        if (status.ok()) {
          EXPECT_EQ(DTypeSize(view.dtype) * 8, static_cast<size_t>(bits));
          EXPECT_EQ(lanes, 1);
          continue;
        }
        ExpectInvalid(status, {StrCat("x.dtype is {code ", code, ", bits ",
                                      bits, ", lanes ", lanes, "}")});
      }
    }
  }
}

TEST_F(ReadTensorTest, Devices) {
  DLTensor tensor = Tensor({1});
  tensor.device = {TENON_DL_CUDA, 3};
  EXPECT_EQ(Read(tensor).device, (Device{DeviceType::kCuda, 3}));
  tensor.device = {TENON_DL_CUDA_HOST, 3};
  EXPECT_EQ(Read(tensor).device, Device());
  tensor.device = {TENON_DL_CUDA, -2};
  Expect({"x.device.device_id is -2, expected >= 0"}, tensor);
  tensor.device = {TENON_DL_CPU, 1};
  Expect({"x.device.device_id is 1, expected 0 on the CPU"}, tensor);
  for (int32_t type : {0, -1, 4, 10, 13, 1 << 30}) {
    std::memcpy(&tensor.device.device_type, &type, sizeof(type));
    Expect({StrCat("x.device.device_type is ", type)}, tensor);
  }
}

TEST_F(ReadTensorTest, RankAndShape) {
  for (int32_t ndim : {-1, 0, 5, 1 << 30}) {
    DLTensor tensor = Tensor({1});
    tensor.ndim = ndim;
    Expect({StrCat("x.ndim is ", ndim, ", expected 1 to 4")}, tensor);
  }
  DLTensor tensor = Tensor({1});
  tensor.shape = nullptr;
  Expect({"x.shape is null"}, tensor);
  Expect({"x.shape[1] is -3, expected >= 0"}, Tensor({2, -3}));
  Expect({"x.shape[0] is -9223372036854775808"},
         Tensor({std::numeric_limits<int64_t>::min()}));
}

TEST_F(ReadTensorTest, Overflows) {
  Expect({"x.strides[0] is -4, expected >= 0"}, Tensor({2, 3}, {-4, 1}));
  Expect({"x.shape and x.strides make more elements or bytes"},
         Tensor({kMax / 2, 3}, {0, 0}));  // a view of one element
  Expect({"more elements or bytes"}, Tensor({kMax / 2, 3, 0}));
  Expect({"more elements or bytes"}, Tensor({1 << 30, 1 << 30, 1 << 30}));
  Expect({"more elements or bytes"}, Tensor({2, 3}, {kMax, 1}));
  Expect({"more elements or bytes"},
         Tensor({2, 2, 2}, {kMax / 2, kMax / 2, 1}));
  Expect({"more elements or bytes"}, Tensor({kMax}));
  Expect({"more elements or bytes"}, Tensor({kMax / 4 + 1}));
  DLTensor tensor = Tensor({kMax / 4});
  tensor.data = reinterpret_cast<void*>(uintptr_t{4096});
  Expect({"past the address space"}, tensor);
  tensor.data = reinterpret_cast<void*>(~uintptr_t{63});
  Expect({"past the address space"}, tensor);
  tensor = Tensor({4});
  tensor.byte_offset = ~uint64_t{0} - 3;
  Expect({"byte_offset 18446744073709551612", "past the address space"},
         tensor);
  tensor = Tensor({4});
  tensor.data = reinterpret_cast<void*>(uintptr_t{1} << 63);
  Expect({"past the address space"}, tensor);
}

TEST_F(ReadTensorTest, Data) {
  DLTensor tensor = Tensor({4});
  tensor.data = nullptr;
  Expect({"x.data is null"}, tensor);
  tensor.byte_offset = 4096;
  Expect({"x.data is null"}, tensor);
  tensor = Tensor({4});
  tensor.byte_offset = 2;
  Expect({"x.data is 0x", "byte_offset 2", "not aligned to its elements"},
         tensor);
  tensor.data = memory_ + 2;
  Read(tensor);  // the sum counts
}

TEST_F(ReadTensorTest, TheStructItselfMayBeUnaligned) {
  alignas(8) char raw[sizeof(DLTensor) + 4 * sizeof(int64_t) + 8];
  const int64_t shape[2] = {2, 3};
  char* unaligned_shape = raw + 4 + sizeof(DLTensor);
  std::memcpy(unaligned_shape, shape, sizeof(shape));
  DLTensor tensor = Tensor({2, 3});
  tensor.shape = reinterpret_cast<int64_t*>(unaligned_shape);
  std::memcpy(raw + 4, &tensor, sizeof(tensor));
  TensorView view;
  const Status status = ReadTensor("x", reinterpret_cast<DLTensor*>(raw + 4),
                                   TensorData::kUsed, &view);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(view.data, memory_);
  EXPECT_EQ(view.shape[1], 3);
}

}  // namespace
}  // namespace tenon::abi
