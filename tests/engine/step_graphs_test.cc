// Decode steps in buckets: padding that changes nothing, and CUDA graphs that
// give the same bits as the same steps launched one by one.

#include "engine/step_graphs.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/session.h"
#include "ops/core/device_info.h"
#include "tests/engine/traffic.h"

namespace tenon {
namespace {

using testing::ExpectSameTraffic;
using testing::Traffic;

TEST(DecodeBucketsTest, HoldEveryNumberOfRows) {
  for (const int32_t max_rows : {1, 2, 3, 8, 9, 33, 64, 100, 256, 300, 512}) {
    SCOPED_TRACE(max_rows);
    const DecodeBuckets buckets(max_rows);
    EXPECT_EQ(buckets.sizes().back(), max_rows);
    for (int32_t rows = 1; rows <= max_rows; ++rows) {
      const int32_t bucket = buckets.Find(rows);
      ASSERT_GE(bucket, rows);
      ASSERT_LE(bucket, max_rows);
      ASSERT_LE(bucket, rows < 8 ? 2 * rows - 1 + (rows == 1)
                                 : rows + (rows < 65    ? 7
                                           : rows < 257 ? 15
                                                        : 31));
    }
    EXPECT_EQ(buckets.Find(max_rows + 1), 0);
  }
  EXPECT_EQ(DecodeBuckets(40).sizes(),
            std::vector<int32_t>({1, 2, 4, 8, 16, 24, 32, 40}));
  EXPECT_EQ(DecodeBuckets(5).sizes(), std::vector<int32_t>({1, 2, 4, 5}));
  EXPECT_EQ(DecodeBuckets(1 << 20).sizes().back(), 512);
  EXPECT_EQ(DecodeBuckets().Find(1), 0);
}

class StepGraphsTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device";
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(GetParam(), {DeviceType::kCuda, 0});
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
  }

  std::unique_ptr<Session> MakeSession(bool graphs, bool batch_invariant) {
    SessionOptions options = testing::TrafficOptions(batch_invariant);
    options.cuda_graphs = graphs;
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    EXPECT_TRUE(session.ok()) << session.status().message();
    return session.ok() ? *std::move(session) : nullptr;
  }

  std::shared_ptr<const Model> model_;
};

TEST_P(StepGraphsTest, GraphsOnAndOffGiveTheSameBits) {
  for (const bool batch_invariant : {false, true}) {
    SCOPED_TRACE(batch_invariant);
    const std::unique_ptr<Session> on = MakeSession(true, batch_invariant);
    const std::unique_ptr<Session> off = MakeSession(false, batch_invariant);
    ASSERT_TRUE(on != nullptr && off != nullptr);
    EXPECT_EQ(on->num_graphs(), 5);  // 1, 2, 4, 8, 11
    EXPECT_EQ(off->num_graphs(), 0);
    Traffic traffic_on(on.get());
    Traffic traffic_off(off.get());
    traffic_on.Run(400, false);
    traffic_off.Run(400, false);
    ExpectSameTraffic(traffic_on, traffic_off);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, StepGraphsTest,
                         ::testing::Values("tests/golden/qwen3_moe_tiny",
                                           "tests/golden/qwen3_dense_tiny",
                                           "tests/golden/qwen3_moe_tiny_fp8"),
                         [](const auto& info) {
                           return std::string(info.param).substr(13);
                         });

}  // namespace
}  // namespace tenon
