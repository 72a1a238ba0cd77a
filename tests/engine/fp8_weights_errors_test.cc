// What is refused of fp8 checkpoints.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/engine/fp8_weights_fixture.h"
#include "tests/engine/mutate.h"

namespace tenon {
namespace {

using testing::Dequantized;
using testing::ExpectError;
using testing::FileTensor;
using testing::Fp8Config;
using testing::MakeFileTensor;
using testing::MakeFp8;
using testing::MatricesOf;
using testing::ModelDirectory;

// A published model after `change`, loaded.
template <class Change>
Status LoadChanged(const Change& change,
                   Fp8Scaling scaling = Fp8Scaling::kBlocks) {
  ModelDirectory model(Fp8Config(scaling));
  MakeFp8(scaling, DType::kFloat32, &model);
  change(&model);
  return model.Load().status();
}

TEST(Fp8WeightsErrorsTest, NamesScalesThatAreMissingOrMisshapen) {
  const std::string q = "model.layers.0.self_attn.q_proj.weight_scale_inv";
  const std::string down =
      "model.layers.0.mlp.experts.2.down_proj.weight_scale_inv";
  for (const std::string& name : {q, down}) {
    ExpectError(LoadChanged([&](ModelDirectory* m) { m->Remove(name); }),
                StatusCode::kNotFound, {name, "float8_e4m3"});
  }
  const auto reshape = [](const std::string& name, std::vector<int64_t> shape) {
    return [=](ModelDirectory* m) {
      int64_t count = 1;
      for (const int64_t size : shape) count *= size;
      m->tensor(name) = MakeFileTensor(name, DType::kFloat32, shape,
                                       std::vector<float>(count, 1.0f));
    };
  };
  const StatusCode invalid = StatusCode::kInvalidArgument;
  ExpectError(LoadChanged(reshape(q, {2, 4})), invalid,
              {q, "[2, 4]", "[4, 2]", "[512, 160]"});
  ExpectError(LoadChanged(reshape(q, {8})), invalid, {q, "[8]", "[4, 2]"});
  ExpectError(LoadChanged(reshape(q, {512, 1})), invalid, {q, "[4, 2]"});
  ExpectError(LoadChanged(reshape(down, {2, 1})), invalid,
              {down, "[2, 1]", "[2, 2]"});
  const std::string row = "model.layers.0.self_attn.q_proj.weight_scale";
  ExpectError(LoadChanged(reshape(row, {1, 512}), Fp8Scaling::kChannels),
              invalid, {row, "[1, 512]", "[512, 1]"});
  EXPECT_TRUE(LoadChanged(reshape(row, {512}), Fp8Scaling::kChannels).ok());
}

TEST(Fp8WeightsErrorsTest, NamesScalesThatAreNoNumbers) {
  const std::string name = "model.layers.1.mlp.up_proj.weight_scale_inv";
  const StatusCode invalid = StatusCode::kInvalidArgument;
  for (const float bad :
       {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    ExpectError(LoadChanged([&](ModelDirectory* m) {
                  std::memcpy(&m->tensor(name).bytes[3 * 4], &bad, 4);
                }),
                invalid, {name, "row 1, column 1", "finite"});
  }
  for (const char* dtype : {"F16", "I32"}) {
    ExpectError(LoadChanged([&](ModelDirectory* m) {
                  FileTensor& t = m->tensor(name);
                  t.dtype = dtype;
                  if (t.dtype == "F16") t.bytes.resize(t.bytes.size() / 2);
                }),
                invalid, {name, "expected float32 or bfloat16"});
  }
}

TEST(Fp8WeightsErrorsTest, NamesWhatMayNotBeFp8) {
  const StatusCode invalid = StatusCode::kInvalidArgument;
  for (const char* name : {"model.layers.0.mlp.gate.weight", "lm_head.weight",
                           "model.embed_tokens.weight", "model.norm.weight"}) {
    ExpectError(LoadChanged([&](ModelDirectory* m) {
                  FileTensor t = m->tensor(name);
                  m->Remove(name);
                  t.dtype = "F8_E4M3";
                  t.bytes.resize(t.bytes.size() / 2);
                  m->tensors().push_back(t);
                }),
                invalid, {name, "float8_e4m3", "expected float32"});
  }
  // Without a quantization_config nothing says what the elements stand for.
  ModelDirectory model(Fp8Config(Fp8Scaling::kBlocks));
  MakeFp8(Fp8Scaling::kBlocks, DType::kFloat32, &model);
  ExpectError(
      LoadWeights(model.Open(), Fp8Config(Fp8Scaling::kNone), Device())
          .status(),
      invalid,
      {"model.layers.0.self_attn.q_proj.weight", "quantization_config"});
}

TEST(Fp8WeightsErrorsTest, NamesMatricesThatDoNotGoTogether) {
  const StatusCode invalid = StatusCode::kInvalidArgument;
  ModelDirectory plain(Fp8Config(Fp8Scaling::kBlocks));
  const auto unquantize = [&](const std::string& name, bool keep_scales) {
    return [&plain, name, keep_scales](ModelDirectory* m) {
      m->Remove(name);
      if (!keep_scales) m->Remove(name + "_scale_inv");
      m->tensors().insert(m->tensors().begin(), plain.tensor(name));
    };
  };
  const std::string k = "model.layers.1.self_attn.k_proj.weight";
  EXPECT_TRUE(LoadChanged(unquantize(k, false)).ok());
  ExpectError(LoadChanged(unquantize(k, true)), invalid,
              {k, "bfloat16", "float8_e4m3", "_scale_inv"});
  const std::string up = "model.layers.0.mlp.experts.1.up_proj.weight";
  ExpectError(LoadChanged(unquantize(up, false)), invalid,
              {up, "bfloat16", "float8_e4m3", "first expert"});
}

TEST(Fp8WeightsErrorsTest, NamesMemoryThatIsNotThere) {
  ModelDirectory model(Fp8Config(Fp8Scaling::kNone));
  LoadOptions options;
  options.quantize_fp8 = true;
  const Status status =
      model.LoadWith({DeviceType::kCuda, 99}, options).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.message()).find("bytes on cuda:99"),
            std::string::npos)
      << status.message();
}

TEST(Fp8WeightsErrorsTest, MutatedFilesNeverCrash) {
  ModelConfig config = Fp8Config(Fp8Scaling::kBlocks);
  config.num_layers = 1;
  config.mlp_only_layers.clear();
  config.num_experts = config.num_experts_per_tok = 1;
  ModelDirectory model(config);
  MakeFp8(Fp8Scaling::kBlocks, DType::kFloat32, &model);
  const std::string good = testing::SafetensorsFile(model.tensors());
  uint64_t header_size = 0;
  std::memcpy(&header_size, good.data(), sizeof(header_size));
  const std::string header = good.substr(8, header_size);
  const std::string data = good.substr(8 + header_size);
  const testing::TempDirectory directory;
  std::mt19937_64 rng(4);
  int loaded = 0;
  for (int i = 0; i < 400; ++i) {
    // A changed number of a shape or offset is often rejected early; changed
    // names and dtypes get further.
    directory.Write(
        "model.safetensors",
        testing::SafetensorsFile(testing::Mutate(header, &rng), data));
    const auto checkpoint = Checkpoint::Open(directory.path());
    if (!checkpoint.ok()) continue;
    const StatusOr<Weights> weights =
        LoadWeights(*checkpoint, config, Device());
    if (weights.ok()) {
      ++loaded;
      for (const auto& [name, matrix] : MatricesOf(weights->layers[0])) {
        if (matrix.scales.present()) Dequantized(matrix);
      }
    } else {
      EXPECT_NE(std::string(weights.status().message()), "");
    }
  }
  EXPECT_GT(loaded, 0);
}

}  // namespace
}  // namespace tenon
