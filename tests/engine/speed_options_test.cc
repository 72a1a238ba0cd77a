// Options that change the speed only change no bit: graphs or single launches,
// norms fused into their neighbours or not, steps enqueued ahead or waited for.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "engine/session.h"
#include "ops/core/device_info.h"
#include "tests/engine/traffic.h"
#include "tests/testing/test_size.h"

namespace tenon {
namespace {

using testing::ExpectSameTraffic;
using testing::SmallOr;
using testing::Traffic;
using testing::TrafficLogits;

constexpr int32_t kMaxContext = 48;

// Wide enough for the kernels of large models.
constexpr char kWideModel[] = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
  "hidden_size": 512, "num_hidden_layers": 3, "vocab_size": 512,
  "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
  "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
  "intermediate_size": 256, "norm_topk_prob": true, "hidden_act": "silu",
  "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
  "tie_word_embeddings": false%s
})";
constexpr char kFp8[] = R"(, "quantization_config": {"quant_method": "fp8",
  "fmt": "e4m3", "activation_scheme": "dynamic",
  "weight_block_size": [128, 128]})";

StatusOr<std::shared_ptr<const Model>> WideModel(const char* more,
                                                 Device device) {
  std::string config = kWideModel;
  config.replace(config.find("%s"), 2, more);
  StatusOr<ModelConfig> parsed = ParseModelConfig(config, "config");
  if (!parsed.ok()) return parsed.status();
  return Model::Random(*parsed, DType::kBFloat16, device, 3);
}

class SpeedOptionsTest
    : public ::testing::TestWithParam<std::tuple<DeviceType, std::string>> {
 protected:
  bool on_cuda() const { return std::get<0>(GetParam()) == DeviceType::kCuda; }

  void SetUp() override {
    if (on_cuda() && NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device";
    const Device device = {std::get<0>(GetParam()), 0};
    const std::string& name = std::get<1>(GetParam());
    StatusOr<std::shared_ptr<const Model>> model =
        name == "wide_bfloat16" ? WideModel("", device)
        : name == "wide_fp8"    ? WideModel(kFp8, device)
                                : Model::Load("tests/golden/" + name, device);
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
  }

  struct Speed {
    bool graphs = true;
    bool fuse = true;
    bool pipelined = false;
  };

  // What becomes of the same traffic.
  Traffic Run(const Speed& speed, bool batch_invariant, TrafficLogits logits,
              int num_steps = 0) {
    SessionOptions options = testing::TrafficOptions(batch_invariant);
    options.max_context = kMaxContext;
    options.cuda_graphs = speed.graphs;
    options.fuse = speed.fuse;
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    EXPECT_TRUE(session.ok()) << session.status().message();
    Traffic traffic(session->get(), logits, kMaxContext);
    if (num_steps == 0) num_steps = on_cuda() ? 150 : 16;
    traffic.Run(num_steps, speed.pipelined);
    return traffic;
  }

  std::shared_ptr<const Model> model_;
};

TEST_P(SpeedOptionsTest, ChangeNoTokenAndNoLogit) {
  for (const bool batch_invariant : {false, true}) {
    const Traffic expected = Run({}, batch_invariant, TrafficLogits::kAll);
    EXPECT_FALSE(expected.logits().empty());
    for (int bits = 1; bits < 8; ++bits) {
      const Speed speed = {(bits & 1) == 0, (bits & 2) == 0, (bits & 4) != 0};
      if (!on_cuda() && !speed.graphs) continue;
      SCOPED_TRACE(::testing::Message()
                   << "batch_invariant " << batch_invariant << " graphs "
                   << speed.graphs << " fuse " << speed.fuse << " pipelined "
                   << speed.pipelined);
      ExpectSameTraffic(expected,
                        Run(speed, batch_invariant, TrafficLogits::kAll));
    }
    // Without logits to wait for, two steps are really under way at once.
    const Traffic waited = Run({}, batch_invariant, TrafficLogits::kNone);
    ExpectSameTraffic(
        waited, Run({true, true, true}, batch_invariant, TrafficLogits::kNone));
    ASSERT_EQ(waited.records().size(), expected.records().size());
    for (size_t i = 0; i < expected.records().size(); ++i) {
      ASSERT_TRUE(waited.records()[i] == expected.records()[i]) << i;
    }
  }
}

// As few as a tool that watches every access has the time for.
TEST_P(SpeedOptionsTest, NorInAFewSteps) {
  const int num_steps = SmallOr(3, 9);
  const Traffic expected = Run({}, false, TrafficLogits::kSome, num_steps);
  ExpectSameTraffic(expected, Run({true, true, true}, false,
                                  TrafficLogits::kSome, num_steps));
  ExpectSameTraffic(expected, Run({false, false, false}, false,
                                  TrafficLogits::kSome, num_steps));
}

INSTANTIATE_TEST_SUITE_P(
    Models, SpeedOptionsTest,
    ::testing::Combine(::testing::Values(DeviceType::kCpu, DeviceType::kCuda),
                       ::testing::Values("qwen3_moe_tiny", "qwen3_dense_tiny",
                                         "qwen3_moe_tiny_fp8", "wide_bfloat16",
                                         "wide_fp8")),
    [](const auto& info) {
      return std::get<1>(info.param) + "_" +
             DeviceTypeName(std::get<0>(info.param));
    });

}  // namespace
}  // namespace tenon
