// A long run of steps with two in flight, sequences joining and leaving: memory
// of host and device stays what it was, and every token what it is alone.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "engine/session.h"
#include "tests/engine/session_fixture.h"
#include "tests/engine/traffic.h"
#include "tests/testing/memory_use.h"

namespace tenon {
namespace {

using testing::ResidentBytes;
using testing::Traffic;
using testing::TrafficLogits;
using testing::UsedDeviceBytes;

class SteadyMemoryTest : public testing::SessionTestBase {};

TEST_P(SteadyMemoryTest, TwoThousandStepsInFlightTakeNone) {
  const int num_steps = on_cuda() ? 2000 : 400;
  const std::unique_ptr<Session> session =
      SessionWith(testing::TrafficOptions(true));
  ASSERT_NE(session, nullptr);
  const int64_t free_pages = session->num_free_pages();
  Traffic traffic(session.get(), TrafficLogits::kNone);
  traffic.Run(num_steps / 4, true);  // loads what is loaded when it is needed
  const int64_t resident = ResidentBytes();
  ASSERT_GT(resident, 0);
  // Others may use the device too: one quarter in which nothing was taken shows
  // that steps take nothing, so there are more than four before it fails.
  int64_t taken = std::numeric_limits<int64_t>::max();
  int quarters = 0;
  for (; quarters < 4 || (taken > 0 && quarters < 16); ++quarters) {
    const int64_t before = UsedDeviceBytes(model_->device);
    traffic.Run(num_steps / 4, true);
    const int64_t after = UsedDeviceBytes(model_->device);
    ASSERT_TRUE(before >= 0 && after >= 0);
    taken = std::min(taken, after - before);
  }
  EXPECT_LE(taken, 0);
  // The records of what was drawn are less than this.
  EXPECT_LT(ResidentBytes() - resident,
            (int64_t{quarters * num_steps / 4} << 10) + (int64_t{1} << 20));

  EXPECT_GT(traffic.records().size(), 40u);
  traffic.ReleaseAll();
  EXPECT_EQ(session->num_free_pages(), free_pages);
  EXPECT_EQ(session->num_sequences(), 0);
  const std::unique_ptr<Session> alone =
      SessionWith(testing::TrafficOptions(true));
  for (const Traffic::Record& record : traffic.records()) {
    const SequenceId sequence = *alone->CreateSequence();
    StepRow row = Row(sequence, record.prompt);
    row.sampling = Traffic::Sampling(record.seed);
    std::vector<StepRowResult> results;
    for (size_t i = 0; i < record.tokens.size(); ++i) {
      ASSERT_TRUE(alone->Step({row}, &results).ok());
      ASSERT_EQ(results[0].token, record.tokens[i]) << "token " << i;
      ASSERT_EQ(results[0].logprob, record.logprobs[i]) << "token " << i;
      row.tokens = &record.tokens[i];
      row.num_tokens = 1;
    }
    ASSERT_TRUE(alone->ReleaseSequence(sequence).ok());
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, SteadyMemoryTest, testing::SessionDevices(),
                         testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
