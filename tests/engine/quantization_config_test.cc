// quantization_config of a config.json.

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "tests/engine/mutate.h"

namespace tenon {
namespace {

constexpr char kSource[] = "dir/config.json";

// As published for Qwen3-30B-A3B-FP8.
std::string Fp8() {
  return R"({
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128]
  })";
}

// As llm-compressor writes it for FP8_DYNAMIC.
std::string CompressedTensors() {
  return R"({
    "config_groups": {"group_0": {
      "input_activations": {"actorder": null, "block_structure": null,
        "dynamic": true, "group_size": null, "num_bits": 8, "observer": null,
        "observer_kwargs": {}, "strategy": "token", "symmetric": true,
        "type": "float"},
      "output_activations": null,
      "targets": ["Linear"],
      "weights": {"actorder": null, "block_structure": null, "dynamic": false,
        "group_size": null, "num_bits": 8, "observer": "minmax",
        "observer_kwargs": {}, "strategy": "channel", "symmetric": true,
        "type": "float"}}},
    "format": "float-quantized",
    "global_compression_ratio": null,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": null,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed"
  })";
}

std::string With(std::string text, const std::string& old_text,
                 const std::string& new_text) {
  const size_t at = text.find(old_text);
  EXPECT_NE(at, std::string::npos) << old_text;
  return text.replace(at, old_text.size(), new_text);
}

StatusOr<ModelConfig> Parse(const std::string& quantization) {
  return ParseModelConfig(R"({"architectures": ["Qwen3ForCausalLM"],
      "head_dim": 128, "hidden_size": 256, "intermediate_size": 512,
      "max_position_embeddings": 1024, "num_attention_heads": 4,
      "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0, "vocab_size": 100, "quantization_config": )" +
                              quantization + "}",
                          kSource);
}

void ExpectError(const std::string& quantization, StatusCode code,
                 const std::vector<std::string>& parts) {
  const StatusOr<ModelConfig> config = Parse(quantization);
  ASSERT_FALSE(config.ok()) << "expected an error that names " << parts[0];
  EXPECT_EQ(config.status().code(), code) << config.status().message();
  const std::string message = config.status().message();
  EXPECT_EQ(message.find(std::string(kSource) + ": quantization_config"), 0u)
      << message;
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos)
        << "\"" << message << "\" does not name \"" << part << "\"";
  }
}

TEST(QuantizationConfigTest, ReadsThePublishedFp8Form) {
  for (const std::string& text :
       {Fp8(), With(Fp8(), "\"fmt\": \"e4m3\",", ""),
        With(Fp8(), "\"dynamic\"", "null"),
        With(Fp8(), "[\"lm_head\", \"model.layers.0.mlp.gate\"]", "null")}) {
    const StatusOr<ModelConfig> config = Parse(text);
    ASSERT_TRUE(config.ok()) << config.status().message();
    EXPECT_EQ(config->fp8_scaling, Fp8Scaling::kBlocks);
    EXPECT_EQ(config->fp8_scale_suffix, "_scale_inv");
  }
  const StatusOr<ModelConfig> none = Parse("null");
  ASSERT_TRUE(none.ok()) << none.status().message();
  EXPECT_EQ(none->fp8_scaling, Fp8Scaling::kNone);
}

TEST(QuantizationConfigTest, ReadsCompressedTensors) {
  StatusOr<ModelConfig> config = Parse(CompressedTensors());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->fp8_scaling, Fp8Scaling::kChannels);
  EXPECT_EQ(config->fp8_scale_suffix, "_scale");
  config = Parse(With(
      With(CompressedTensors(), "\"strategy\": \"channel\"",
           "\"strategy\": \"block\""),
      "\"weights\": {\"actorder\": null, \"block_structure\": null",
      "\"weights\": {\"actorder\": null, \"block_structure\": [128, 128]"));
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->fp8_scaling, Fp8Scaling::kBlocks);
  EXPECT_EQ(config->fp8_scale_suffix, "_scale");
}

TEST(QuantizationConfigTest, RejectsOtherMethods) {
  for (const char* method : {"gptq", "awq", "bitsandbytes", ""}) {
    ExpectError(With(Fp8(), "\"fp8\"", StrCat("\"", method, "\"")),
                StatusCode::kUnimplemented,
                {"quant_method", method, "fp8 or compressed-tensors"});
  }
  ExpectError("{}", StatusCode::kInvalidArgument, {"quant_method is missing"});
  ExpectError("\"fp8\"", StatusCode::kInvalidArgument, {"not an object"});
  ExpectError(With(Fp8(), "\"fp8\"", "8"), StatusCode::kInvalidArgument,
              {"quant_method is not a string"});
}

TEST(QuantizationConfigTest, RejectsOtherFormsOfFp8) {
  const auto unimplemented = [](const std::string& old_text,
                                const std::string& new_text,
                                const std::vector<std::string>& parts) {
    ExpectError(With(Fp8(), old_text, new_text), StatusCode::kUnimplemented,
                parts);
  };
  unimplemented("e4m3", "e5m2", {"fmt e5m2", "expected e4m3"});
  unimplemented("\"dynamic\"", "\"static\"",
                {"activation_scheme static", "expected dynamic"});
  unimplemented("[128, 128]", "[64, 128]",
                {"weight_block_size [64, 128]", "expected [128, 128]"});
  unimplemented("[128, 128]", "[128]", {"weight_block_size [128]"});
  unimplemented("[128, 128]", "null", {"weight_block_size is missing"});
  unimplemented("\"fmt\"", "\"scale_fmt\": \"ue8m0\", \"fmt\"", {"scale_fmt"});
  ExpectError(With(Fp8(), "[128, 128]", "[128, \"x\"]"),
              StatusCode::kInvalidArgument, {"weight_block_size"});
  ExpectError(With(Fp8(), "[\"lm_head\"", "[7"), StatusCode::kInvalidArgument,
              {"modules_to_not_convert"});
  ExpectError(With(Fp8(), "[\"lm_head\", \"model.layers.0.mlp.gate\"]", "{}"),
              StatusCode::kInvalidArgument, {"modules_to_not_convert"});
}

TEST(QuantizationConfigTest, RejectsOtherFormsOfCompressedTensors) {
  const auto expect = [](const std::string& old_text,
                         const std::string& new_text, StatusCode code,
                         const std::vector<std::string>& parts) {
    ExpectError(With(CompressedTensors(), old_text, new_text), code, parts);
  };
  const StatusCode unimplemented = StatusCode::kUnimplemented;
  const StatusCode invalid = StatusCode::kInvalidArgument;
  expect("float-quantized", "pack-quantized", unimplemented,
         {"format pack-quantized"});
  expect("\"compressed\"", "\"frozen\"", unimplemented,
         {"quantization_status frozen"});
  expect("\"kv_cache_scheme\": null", "\"kv_cache_scheme\": {}", unimplemented,
         {"kv_cache_scheme"});
  expect("\"channel\"", "\"tensor\"", unimplemented,
         {"group_0: weights: strategy tensor", "channel or block"});
  expect("\"channel\"", "\"block\"", unimplemented,
         {"block_structure is missing"});
  expect("\"dynamic\": true", "\"dynamic\": false", unimplemented,
         {"input_activations: dynamic false"});
  expect("\"dynamic\": false", "\"dynamic\": true", unimplemented,
         {"weights: dynamic true"});
  expect("\"num_bits\": 8", "\"num_bits\": 4", unimplemented, {"num_bits 4"});
  expect("\"symmetric\": true", "\"symmetric\": false", unimplemented,
         {"symmetric false"});
  expect("\"type\": \"float\"", "\"type\": \"int\"", unimplemented,
         {"type int"});
  expect("\"output_activations\": null", "\"output_activations\": {}",
         unimplemented, {"output_activations"});
  expect("{\"group_0\": {", "{\"group_1\": {}, \"group_0\": {", unimplemented,
         {"config_groups has 2 groups"});
  expect("\"input_activations\"", "\"x\"", invalid,
         {"input_activations is missing"});
  expect("\"weights\"", "\"x\"", invalid, {"weights is missing"});
  expect("\"config_groups\"", "\"x\"", invalid, {"config_groups is missing"});
  expect("[\"lm_head\"", "[[]", invalid, {"ignore"});
  ExpectError(R"({"quant_method": "compressed-tensors",
                  "config_groups": {"group_0": 3}})",
              invalid, {"group_0 is not an object"});
  ExpectError(R"({"quant_method": "compressed-tensors",
                  "config_groups": {}})",
              unimplemented, {"config_groups has 0 groups"});
}

TEST(QuantizationConfigTest, MutatedTextNeverCrashes) {
  std::mt19937_64 rng(5);
  int accepted = 0;
  for (int i = 0; i < 4000; ++i) {
    const StatusOr<ModelConfig> config =
        Parse(testing::Mutate(i % 2 ? Fp8() : CompressedTensors(), &rng));
    if (config.ok()) {
      ++accepted;
      EXPECT_EQ(config->fp8_scaling == Fp8Scaling::kNone,
                config->fp8_scale_suffix.empty());
    } else {
      EXPECT_EQ(std::string(config.status().message()).find(kSource), 0u)
          << config.status().message();
    }
  }
  EXPECT_GT(accepted, 50);
  EXPECT_LT(accepted, 3900);
}

}  // namespace
}  // namespace tenon
