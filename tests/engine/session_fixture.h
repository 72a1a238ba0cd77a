#ifndef TENON_TESTS_ENGINE_SESSION_FIXTURE_H_
#define TENON_TESTS_ENGINE_SESSION_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "ops/core/device_info.h"

// A tiny model on each kind of device, and sessions of it.

namespace tenon::testing {

class SessionTestBase : public ::testing::TestWithParam<DeviceType> {
 protected:
  static constexpr int32_t kVocab = 131;

  explicit SessionTestBase(
      const char* model_folder = "tests/golden/qwen3_moe_tiny")
      : model_folder_(model_folder) {}

  void SetUp() override {
    if (on_cuda() && NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device";
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(model_folder_, {GetParam(), 0});
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
  }

  static bool on_cuda() { return GetParam() == DeviceType::kCuda; }

  std::unique_ptr<Session> SessionWith(const SessionOptions& options) {
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    EXPECT_TRUE(session.ok()) << session.status().message();
    return session.ok() ? *std::move(session) : nullptr;
  }

  // Whose token is the most likely one.
  static StepRow Row(SequenceId sequence, const std::vector<int32_t>& tokens) {
    StepRow row;
    row.sequence = sequence;
    row.tokens = tokens.data();
    row.num_tokens = static_cast<int32_t>(tokens.size());
    row.sampling.temperature = 0.0f;
    return row;
  }

  std::shared_ptr<const Model> model_;

 private:
  const char* model_folder_;
};

inline auto SessionDevices() {
  return ::testing::Values(DeviceType::kCpu, DeviceType::kCuda);
}

inline std::string SessionDeviceName(
    const ::testing::TestParamInfo<DeviceType>& info) {
  return DeviceTypeName(info.param);
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_SESSION_FIXTURE_H_
