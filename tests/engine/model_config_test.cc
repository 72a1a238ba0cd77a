#include "engine/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/engine/mutate.h"
#include "tests/testing/checkpoint_files.h"

namespace tenon {
namespace {

using testing::TempDirectory;

constexpr char kSource[] = "dir/config.json";

// As published for Qwen3-30B-A3B.
std::string Published() {
  return R"({
  "architectures": ["Qwen3MoeForCausalLM"],
  "attention_bias": false,
  "bos_token_id": 151643,
  "decoder_sparse_step": 1,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 6144,
  "max_position_embeddings": 40960,
  "max_window_layers": 48,
  "mlp_only_layers": [],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 768,
  "norm_topk_prob": true,
  "num_attention_heads": 32,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 48,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_scaling": null,
  "rope_theta": 1000000.0,
  "sliding_window": null,
  "tie_word_embeddings": false,
  "torch_dtype": "bfloat16",
  "use_sliding_window": false,
  "vocab_size": 151936
})";
}

// The published text with one piece replaced.
std::string With(const std::string& old_text, const std::string& new_text) {
  std::string text = Published();
  const size_t at = text.find(old_text);
  EXPECT_NE(at, std::string::npos) << old_text;
  return text.replace(at, old_text.size(), new_text);
}
std::string Add(const std::string& fields) {
  return With("\"attention_bias\"", fields + ", \"attention_bias\"");
}

void ExpectError(const std::string& text, StatusCode code,
                 const std::vector<std::string>& parts) {
  const StatusOr<ModelConfig> config = ParseModelConfig(text, kSource);
  ASSERT_FALSE(config.ok()) << "expected an error that names " << parts[0];
  EXPECT_EQ(config.status().code(), code) << config.status().message();
  const std::string message = config.status().message();
  EXPECT_EQ(message.find(kSource), 0u) << message;
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos)
        << "\"" << message << "\" does not name \"" << part << "\"";
  }
}
void ExpectInvalid(const std::string& text,
                   const std::vector<std::string>& parts) {
  ExpectError(text, StatusCode::kInvalidArgument, parts);
}
void ExpectUnimplemented(const std::string& text,
                         const std::vector<std::string>& parts) {
  ExpectError(text, StatusCode::kUnimplemented, parts);
}

TEST(ModelConfigTest, ReadsThePublishedForm) {
  const StatusOr<ModelConfig> config = ParseModelConfig(Published(), kSource);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->architecture, Architecture::kQwen3Moe);
  EXPECT_EQ(config->hidden_size, 2048);
  EXPECT_EQ(config->num_layers, 48);
  EXPECT_EQ(config->num_heads, 32);
  EXPECT_EQ(config->num_kv_heads, 4);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->vocab_size, 151936);
  EXPECT_EQ(config->max_position_embeddings, 40960);
  EXPECT_EQ(config->intermediate_size, 6144);
  EXPECT_EQ(config->num_experts, 128);
  EXPECT_EQ(config->num_experts_per_tok, 8);
  EXPECT_EQ(config->moe_intermediate_size, 768);
  EXPECT_TRUE(config->norm_topk_prob);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_EQ(config->rope_theta, 1e6);
  EXPECT_EQ(config->bos_token_id, 151643);
  EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{151645});
  EXPECT_TRUE(config->HasMoeLayers());
  EXPECT_FALSE(config->HasDenseLayers());
}

TEST(ModelConfigTest, ReadsTheFormOfTransformers5) {
  std::string text = With("\"rope_theta\": 1000000.0",
                          "\"rope_parameters\": {\"rope_theta\": 5000000, "
                          "\"rope_type\": \"default\"}");
  const size_t at = text.find("\"num_experts\"");
  text.replace(at, 13, "\"num_local_experts\"");
  const StatusOr<ModelConfig> config = ParseModelConfig(text, kSource);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->rope_theta, 5e6);
  EXPECT_EQ(config->num_experts, 128);
}

TEST(ModelConfigTest, ReadsADenseModel) {
  const std::string text = With("Qwen3MoeForCausalLM", "Qwen3ForCausalLM");
  const StatusOr<ModelConfig> config = ParseModelConfig(text, kSource);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->architecture, Architecture::kQwen3);
  EXPECT_EQ(config->num_experts, 0);
  EXPECT_FALSE(config->HasMoeLayers());
  EXPECT_FALSE(config->IsMoeLayer(0));
}

TEST(ModelConfigTest, NullMeansNotGiven) {
  const StatusOr<ModelConfig> config = ParseModelConfig(
      With("\"eos_token_id\": 151645",
           "\"eos_token_id\": null, \"quantization_config\": null, "
           "\"rope_parameters\": null"),
      kSource);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_TRUE(config->eos_token_ids.empty());
  ExpectInvalid(With("2048", "null"), {"hidden_size is missing"});
}

TEST(ModelConfigTest, SparseLayersFollowStepAndExceptions) {
  ModelConfig config = testing::SmallConfig();
  config.num_layers = 6;
  config.decoder_sparse_step = 2;
  config.mlp_only_layers = {3};
  std::vector<bool> sparse;
  for (int32_t i = 0; i < 6; ++i) sparse.push_back(config.IsMoeLayer(i));
  EXPECT_EQ(sparse,
            (std::vector<bool>{false, true, false, false, false, true}));
}

TEST(ModelConfigTest, RejectsTextThatIsNoConfig) {
  ExpectInvalid("", {"not valid JSON"});
  ExpectInvalid("{", {"not valid JSON"});
  ExpectInvalid("[1, 2]", {"not a JSON object"});
  ExpectInvalid(std::string("{\"a\": \"\xff\"}"), {"not valid JSON"});
  ExpectInvalid(Add("\"hidden_size\": 4096"), {"hidden_size", "twice"});
  ExpectInvalid(std::string(100000, '['), {"nested deeper"});
  ExpectInvalid("{}", {"architectures is missing"});
}

TEST(ModelConfigTest, RejectsUnknownArchitectures) {
  ExpectUnimplemented(
      With("Qwen3MoeForCausalLM", "LlamaForCausalLM"),
      {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"});
  ExpectInvalid(With("[\"Qwen3MoeForCausalLM\"]", "[]"), {"architectures"});
  ExpectInvalid(With("[\"Qwen3MoeForCausalLM\"]", "7"), {"architectures"});
  ExpectInvalid(With("[\"Qwen3MoeForCausalLM\"]", "[7]"), {"architectures"});
}

TEST(ModelConfigTest, RejectsWhatWouldChangeTheResults) {
  ExpectUnimplemented(
      With("\"attention_bias\": false", "\"attention_bias\": true"),
      {"attention_bias"});
  ExpectUnimplemented(
      With("\"use_sliding_window\": false", "\"use_sliding_window\": true"),
      {"use_sliding_window"});
  ExpectUnimplemented(
      With("\"rope_scaling\": null",
           "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0}"),
      {"rope_scaling", "yarn"});
  ExpectUnimplemented(
      With("\"rope_scaling\": null",
           "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4.0}"),
      {"rope_scaling", "linear"});
  ExpectUnimplemented(Add("\"rope_parameters\": {\"rope_type\": \"llama3\"}"),
                      {"rope_parameters", "llama3"});
  ExpectUnimplemented(Add("\"rope_parameters\": {\"rope_theta\": 1e6, "
                          "\"partial_rotary_factor\": 0.5}"),
                      {"partial_rotary_factor", "0.5"});
  ExpectUnimplemented(With("silu", "gelu"), {"hidden_act", "gelu"});
  ExpectUnimplemented(
      Add("\"layer_types\": [\"full_attention\", \"sliding_attention\"]"),
      {"layer_types"});
  ExpectInvalid(Add("\"rope_parameters\": {\"rope_theta\": 10000}"),
                {"rope_theta", "10000", "1e+06"});
}

TEST(ModelConfigTest, RejectsWrongTypes) {
  for (const char* value : {"\"2048\"", "2048.0", "true", "[2048]", "{}"}) {
    ExpectInvalid(With("2048", value), {"hidden_size", "not an integer"});
  }
  ExpectInvalid(With("2048", "18446744073709551615"), {"hidden_size"});
  ExpectInvalid(With("2048", "4294967296"), {"hidden_size", "4294967296"});
  ExpectInvalid(With("\"norm_topk_prob\": true", "\"norm_topk_prob\": 1"),
                {"norm_topk_prob"});
  ExpectInvalid(With("1e-06", "\"small\""), {"rms_norm_eps", "not a number"});
  ExpectInvalid(With("1000000.0", "[]"), {"rope_theta"});
  ExpectInvalid(With("\"silu\"", "3"), {"hidden_act"});
  ExpectInvalid(With("\"mlp_only_layers\": []", "\"mlp_only_layers\": [\"a\"]"),
                {"mlp_only_layers"});
  ExpectInvalid(With("\"rope_scaling\": null", "\"rope_scaling\": 4"),
                {"rope_scaling"});
  ExpectInvalid(Add("\"layer_types\": 3"), {"layer_types"});
  ExpectInvalid(With("151645", "[151645, null]"), {"eos_token_id"});
}

TEST(ModelConfigTest, RejectsMissingFields) {
  for (const char* field :
       {"hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size",
        "max_position_embeddings", "num_experts", "num_experts_per_tok",
        "moe_intermediate_size", "rms_norm_eps", "rope_theta"}) {
    const std::string quoted = StrCat("\"", field, "\"");
    ExpectInvalid(With(quoted, "\"unknown_key\""),
                  {StrCat(field, " is missing")});
  }
}

TEST(ModelConfigTest, RejectsZeroAndAbsurdValues) {
  struct Case {
    const char* field;
    const char* old_text;
    std::vector<const char*> values;
  };
  const std::vector<Case> cases = {
      {"hidden_size", "2048", {"0", "-1", "2147483647"}},
      {"num_hidden_layers", "\"num_hidden_layers\": 48", {"0", "-3", "99999"}},
      {"num_attention_heads",
       "\"num_attention_heads\": 32",
       {"0", "-1", "1000000", "33"}},
      {"num_key_value_heads",
       "\"num_key_value_heads\": 4",
       {"0", "-1", "5", "64"}},
      {"head_dim", "\"head_dim\": 128", {"0", "-128", "96", "512"}},
      {"vocab_size", "151936", {"0", "-1", "1048577", "2147483647"}},
      {"max_position_embeddings", "40960", {"0", "-1", "2147483647"}},
      {"num_experts", "\"num_experts\": 128", {"0", "-1", "1025", "7"}},
      {"num_experts_per_tok",
       "\"num_experts_per_tok\": 8",
       {"0", "-1", "33", "129"}},
      {"moe_intermediate_size", "768", {"0", "-1", "2147483647"}},
      {"decoder_sparse_step", "\"decoder_sparse_step\": 1", {"0", "-1"}},
      {"mlp_only_layers", "\"mlp_only_layers\": []", {"[48]", "[-1]"}},
      {"rms_norm_eps", "1e-06", {"0", "-1e-6", "1e-60", "2"}},
      {"rope_theta", "1000000.0", {"0.5", "-1", "1e300"}},
      {"eos_token_id", "151645", {"-1", "151936"}},
      {"bos_token_id", "151643", {"-2", "151936"}},
  };
  for (const Case& c : cases) {
    for (const char* value : c.values) {
      SCOPED_TRACE(StrCat(c.field, " = ", value));
      std::string new_text = value;
      if (c.old_text[0] == '"') {
        new_text = StrCat("\"", c.field, "\": ", value);
      }
      ExpectInvalid(With(c.old_text, new_text), {c.field});
    }
  }
}

TEST(ModelConfigTest, OnlyDenseLayersNeedIntermediateSize) {
  std::string text = With("\"intermediate_size\": 6144,", "");
  EXPECT_TRUE(ParseModelConfig(text, kSource).ok());
  const size_t at = text.find("\"mlp_only_layers\": []");
  ExpectInvalid(text.replace(at, 21, "\"mlp_only_layers\": [0]"),
                {"intermediate_size"});
}

// A list as long as the file allows would be searched for every layer.
TEST(ModelConfigTest, RejectsMoreDenseLayersThanLayers) {
  std::string layers = "0";
  for (int i = 1; i < 48; ++i) layers += ", 0";
  const char* key = "\"mlp_only_layers\": [";
  EXPECT_TRUE(ParseModelConfig(With(key, key + layers), kSource).ok());
  ExpectInvalid(With(key, key + layers + ", 0"), {"mlp_only_layers has 49"});
}

TEST(ModelConfigTest, RejectsSizesWhoseProductOverflows) {
  ModelConfig config = testing::SmallConfig();
  config.hidden_size = 1 << 20;
  config.moe_intermediate_size = 1 << 20;
  config.num_experts = 1024;
  config.num_layers = 1024;
  const Status status = config.Validate();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("parameters"),
            std::string::npos);
}

TEST(ModelConfigTest, GenerationConfigGivesTheEndTokens) {
  TempDirectory directory;
  directory.Write("config.json", Published());
  StatusOr<ModelConfig> config = LoadModelConfig(directory.path());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{151645});

  directory.Write("generation_config.json",
                  "{\"eos_token_id\": [151645, 151643], \"top_k\": 20}");
  config = LoadModelConfig(directory.path());
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{151645, 151643}));

  for (const char* bad : {"{\"eos_token_id\": 151936}",
                          "{\"eos_token_id\": \"</s>\"}", "[", ""}) {
    directory.Write("generation_config.json", bad);
    config = LoadModelConfig(directory.path());
    ASSERT_FALSE(config.ok()) << bad;
    EXPECT_NE(
        std::string(config.status().message()).find("generation_config.json"),
        std::string::npos)
        << config.status().message();
  }
}

TEST(ModelConfigTest, NamesTheFileThatIsMissing) {
  const StatusOr<ModelConfig> config = LoadModelConfig("/no/such/directory");
  EXPECT_EQ(config.status().code(), StatusCode::kNotFound);
  EXPECT_NE(std::string(config.status().message())
                .find("/no/such/directory/config.json"),
            std::string::npos);
  TempDirectory directory;
  std::filesystem::create_directory(directory.path() + "/config.json");
  EXPECT_FALSE(LoadModelConfig(directory.path()).ok());
}

TEST(ModelConfigTest, MutatedTextNeverCrashes) {
  std::mt19937_64 rng(1);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string text = testing::Mutate(Published(), &rng);
    const StatusOr<ModelConfig> config = ParseModelConfig(text, kSource);
    if (config.ok()) {
      ++accepted;
      EXPECT_TRUE(config->Validate().ok());
    } else {
      EXPECT_EQ(std::string(config.status().message()).find(kSource), 0u)
          << config.status().message();
    }
  }
  EXPECT_GT(accepted, 100);  // a good share changes nothing that matters
  EXPECT_LT(accepted, 19000);
}

TEST(ModelConfigTest, ReadsTheGoldenConfigs) {
  for (const char* name :
       {"qwen3_moe_tiny", "qwen3_dense_tiny", "qwen3_moe_sharded"}) {
    const StatusOr<ModelConfig> config =
        LoadModelConfig(StrCat("tests/golden/", name));
    ASSERT_TRUE(config.ok()) << config.status().message();
    EXPECT_EQ(config->hidden_size, 64);
    EXPECT_EQ(config->vocab_size, 131);
    EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{130});
  }
}

}  // namespace
}  // namespace tenon
