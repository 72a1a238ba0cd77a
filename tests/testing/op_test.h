#ifndef TENON_TESTS_TESTING_OP_TEST_H_
#define TENON_TESTS_TESTING_OP_TEST_H_

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "ops/core/device_info.h"
#include "ops/core/memory.h"
#include "ops/core/tensor_view.h"

namespace tenon::testing {

// One device and dtype that an op suite runs for.
struct Target {
  Device device;
  DType dtype = DType::kFloat32;
};

inline std::vector<Target> AllTargets() {
  std::vector<Target> targets;
  for (DeviceType type : {DeviceType::kCpu, DeviceType::kCuda}) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      targets.push_back({{type, 0}, dtype});
    }
  }
  return targets;
}

inline std::vector<Target> Float32Targets() {
  return {{{DeviceType::kCpu, 0}, DType::kFloat32},
          {{DeviceType::kCuda, 0}, DType::kFloat32}};
}

inline std::string TargetName(const ::testing::TestParamInfo<Target>& info) {
  return StrCat(DeviceTypeName(info.param.device.type), "_",
                DTypeName(info.param.dtype));
}

// Base of every op suite: skips CUDA targets where there is no GPU, and gives
// the test a stream (two CPU threads, so that pieces really run side by side).
class OpTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (device().type == DeviceType::kCuda && NumCudaDevices() == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    StatusOr<OwnedStream> stream = OwnedStream::Create(device(), 2);
    ASSERT_TRUE(stream.ok()) << stream.status().message();
    stream_ = *std::move(stream);
  }

  Device device() const { return GetParam().device; }
  DType dtype() const { return GetParam().dtype; }
  Stream stream() const { return stream_.get(); }

  // Runs when the stream is done, so that results may be read.
  void Finish() {
    const Status status = Synchronize(device(), stream());
    ASSERT_TRUE(status.ok()) << status.message();
  }

 private:
  OwnedStream stream_;
};

// EXPECTs an InvalidArgument whose message names all of `parts`.
inline void ExpectInvalid(const Status& status,
                          const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status.message();
  for (const std::string& part : parts) {
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
        << "\"" << status.message() << "\" does not name \"" << part << "\"";
  }
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_OP_TEST_H_
