#include "engine/weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "engine/tensor_parallel.h"
#include "engine/weight_plan.h"
#include "engine/weight_upload.h"
#include "tests/engine/weights_fixture.h"
#include "tests/testing/checkpoint_files.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using testing::ExpectError;
using testing::Expert;
using testing::FileTensor;
using testing::ModelDirectory;
using testing::Read;
using testing::SmallConfig;

// Every tensor of a rank, by published name: what the weights have, and what
// rows and columns of the file they should be.
void ExpectRankHasItsPart(ModelDirectory* model, const Weights& w,
                          Shard shard) {
  const ModelConfig& c = model->config();
  const int64_t hidden = c.hidden_size;
  const int64_t dim = c.head_dim;
  const int64_t q = c.num_heads * dim / shard.world_size;
  const int64_t kv_heads = std::max(1, c.num_kv_heads / shard.world_size);
  const int64_t kv = kv_heads * dim;
  const int64_t kv_first =
      int64_t{shard.rank} * c.num_kv_heads / shard.world_size * dim;
  const auto expect = [&](const TensorView& view, const std::string& name,
                          int64_t first_row, int64_t rows, int64_t first_col,
                          int64_t cols) {
    EXPECT_EQ(Read(view) == model->Bytes(name + ".weight", first_row, rows,
                                         first_col, cols),
              true)
        << name;
  };
  expect(w.embedding, "model.embed_tokens", 0, c.vocab_size, 0, hidden);
  expect(w.final_norm, "model.norm", 0, 1, 0, hidden);
  expect(w.lm_head, c.tie_word_embeddings ? "model.embed_tokens" : "lm_head", 0,
         c.vocab_size, 0, hidden);
  ASSERT_EQ(w.layers.size(), static_cast<size_t>(c.num_layers));
  for (int32_t i = 0; i < c.num_layers; ++i) {
    const LayerWeights& l = w.layers[i];
    const std::string p = StrCat("model.layers.", i, ".");
    expect(l.input_norm, p + "input_layernorm", 0, 1, 0, hidden);
    expect(l.q, p + "self_attn.q_proj", shard.rank * q, q, 0, hidden);
    expect(l.k, p + "self_attn.k_proj", kv_first, kv, 0, hidden);
    expect(l.v, p + "self_attn.v_proj", kv_first, kv, 0, hidden);
    expect(l.o, p + "self_attn.o_proj", 0, hidden, shard.rank * q, q);
    expect(l.q_norm, p + "self_attn.q_norm", 0, 1, 0, dim);
    expect(l.k_norm, p + "self_attn.k_norm", 0, 1, 0, dim);
    expect(l.post_attention_norm, p + "post_attention_layernorm", 0, 1, 0,
           hidden);
    const bool sparse = c.IsMoeLayer(i);
    EXPECT_EQ(l.router.present(), sparse);
    EXPECT_EQ(l.mlp_gate.present(), !sparse);
    if (!sparse) {
      const int64_t inner = c.intermediate_size / shard.world_size;
      const int64_t first = shard.rank * inner;
      expect(l.mlp_gate, p + "mlp.gate_proj", first, inner, 0, hidden);
      expect(l.mlp_up, p + "mlp.up_proj", first, inner, 0, hidden);
      expect(l.mlp_down, p + "mlp.down_proj", 0, hidden, first, inner);
      continue;
    }
    expect(l.router, p + "mlp.gate", 0, c.num_experts, 0, hidden);
    const int64_t inner = c.moe_intermediate_size / shard.world_size;
    const int64_t first = shard.rank * inner;
    for (const ExpertMatrices* m : {&l.gate, &l.up, &l.down}) {
      EXPECT_EQ(m->num_experts, c.num_experts);
      EXPECT_EQ(m->dtype, w.dtype);
      EXPECT_TRUE(m->device == w.device);
    }
    for (int32_t e = 0; e < c.num_experts; ++e) {
      const std::string x = StrCat(p, "mlp.experts.", e, ".");
      expect(Expert(l.gate, e), x + "gate_proj", first, inner, 0, hidden);
      expect(Expert(l.up, e), x + "up_proj", first, inner, 0, hidden);
      expect(Expert(l.down, e), x + "down_proj", 0, hidden, first, inner);
    }
  }
}

// Weights from a checkpoint, on every device.
class LoadWeightsTest : public testing::OpTest {};

TEST_P(LoadWeightsTest, EveryRankHasItsPart) {
  for (bool tied : {false, true}) {
    ModelConfig config = SmallConfig();
    config.tie_word_embeddings = tied;
    ModelDirectory model(config, dtype());
    for (int32_t world_size : {1, 2, 4}) {
      for (int32_t rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(StrCat(rank, " of ", world_size, tied ? ", tied" : ""));
        StatusOr<Weights> loaded = model.Load(device(), {rank, world_size});
        ASSERT_TRUE(loaded.ok()) << loaded.status().message();
        const Weights weights = *std::move(loaded);  // views survive the move
        EXPECT_EQ(weights.dtype, dtype());
        EXPECT_EQ(weights.lm_head.data == weights.embedding.data, tied);
        ExpectRankHasItsPart(&model, weights, {rank, world_size});
      }
    }
  }
}

TEST_P(LoadWeightsTest, QkvIsOneMatrixOnCuda) {
  ModelDirectory model(SmallConfig(), dtype());
  const StatusOr<Weights> weights = model.Load(device(), {1, 2});
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  for (const LayerWeights& layer : weights->layers) {
    if (device().type == DeviceType::kCpu) {
      EXPECT_FALSE(layer.qkv.present());
    } else {
      EXPECT_EQ(
          Read(layer.qkv) == Read(layer.q) + Read(layer.k) + Read(layer.v),
          true);
    }
  }
}

TEST_P(LoadWeightsTest, NormsMayBeFloat32) {
  ModelDirectory model(SmallConfig(), dtype());
  for (const char* name :
       {"model.norm.weight", "model.layers.0.self_attn.q_norm.weight"}) {
    FileTensor& norm = model.tensor(name);
    norm =
        testing::MakeFileTensor(norm.name, DType::kFloat32, norm.shape,
                                testing::Normal(norm.shape[0], 5, 1.0f, 0.1f));
  }
  const StatusOr<Weights> weights = model.Load(device());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_EQ(weights->final_norm.dtype, DType::kFloat32);
  EXPECT_EQ(weights->layers[0].q_norm.dtype, DType::kFloat32);
  EXPECT_EQ(weights->layers[1].q_norm.dtype, dtype());
  ExpectRankHasItsPart(&model, *weights, {});
}

TEST_P(LoadWeightsTest, ReportsProgress) {
  ModelDirectory model(SmallConfig(), dtype());
  int64_t last = 0;
  int64_t total = 0;
  const StatusOr<Weights> weights =
      model.Load(device(), {}, [&](int64_t done, int64_t of) {
        EXPECT_GT(done, last);
        EXPECT_LE(done, of);
        last = done;
        total = of;
        return true;
      });
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, weights->bytes);
}

TEST_P(LoadWeightsTest, ProgressStopsIt) {
  ModelDirectory model(SmallConfig(), dtype());
  const StatusOr<Weights> weights =
      model.Load(device(), {}, [](int64_t, int64_t) { return false; });
  ASSERT_EQ(weights.status().code(), StatusCode::kCancelled);
  EXPECT_NE(strstr(weights.status().message(), "stopped by progress after"),
            nullptr)
      << weights.status().message();
}

INSTANTIATE_TEST_SUITE_P(Targets, LoadWeightsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

TEST(MapWeightsTest, NothingIsCopied) {
  ModelDirectory model(SmallConfig());
  const std::shared_ptr<const Checkpoint> checkpoint = model.Open();
  const StatusOr<Weights> weights =
      LoadWeights(checkpoint, model.config(), Device());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_EQ(weights->buffer.size(), 0u);
  EXPECT_EQ(weights->layers[0].q.data,
            checkpoint->Find("model.layers.0.self_attn.q_proj.weight")->data);
  EXPECT_EQ(
      weights->layers[2].down.table[4],
      checkpoint->Find("model.layers.2.mlp.experts.4.down_proj.weight")->data);
  EXPECT_EQ(weights->bytes, checkpoint->total_bytes());
}

TEST(MapWeightsTest, TheCheckpointLivesAsLongAsTheWeights) {
  ModelDirectory model(SmallConfig());
  StatusOr<Weights> weights = model.Load();  // the only owner of the map
  ASSERT_TRUE(weights.ok());
  ExpectRankHasItsPart(&model, *weights, {});
}

// The upload, chunk boundaries at every kind of place; on the CPU, where it can
// be compared byte by byte.
TEST(UploadPartsTest, PacksTheSameBytesWhateverTheChunks) {
  ModelDirectory model(SmallConfig());
  const std::shared_ptr<const Checkpoint> checkpoint = model.Open();
  for (const Shard shard : {Shard{0, 1}, Shard{1, 2}, Shard{3, 4}}) {
    const LocalShape local = *MakeLocalShape(model.config(), shard);
    std::vector<WeightPart> parts;
    PlanHead(model.config(), &parts);
    for (int32_t i = 0; i < 3; ++i) {
      PlanLayer(model.config(), local, i, &parts);
    }
    PlanTail(model.config(), &parts);
    for (WeightPart& part : parts) {
      part.dtype = DType::kBFloat16;
      part.source = *checkpoint->Find(part.name);
    }
    PackedLayout layout;
    StatusOr<Weights> weights =
        AllocateWeights(model.config(), Device(), &parts, &layout);
    ASSERT_TRUE(weights.ok()) << weights.status().message();
    weights->dtype = DType::kBFloat16;
    for (int64_t chunk :
         {int64_t{1000}, int64_t{4096}, int64_t{65537}, weights->bytes - 1,
          weights->bytes, 2 * weights->bytes}) {
      SCOPED_TRACE(StrCat("chunk ", chunk));
      std::memset(weights->buffer.data(), 0xee, weights->buffer.size());
      int64_t last = 0;
      const Status status =
          UploadParts(parts, weights->bytes, weights->buffer.data(), Device(),
                      chunk, [&](int64_t done, int64_t total) {
                        EXPECT_GT(done, last);
                        EXPECT_EQ(total, weights->bytes);
                        last = done;
                        return true;
                      });
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(last, weights->bytes);
      ExpectRankHasItsPart(&model, *weights, shard);
    }
    // w13: rows of gate, then of up, expert after expert; w2 likewise.
    const LayerWeights& layer = weights->layers[0];
    const int64_t inner = local.moe_intermediate.size;
    EXPECT_EQ(layer.gate.expert_stride, 2 * inner * 24);
    EXPECT_EQ(layer.up.data,
              static_cast<const BFloat16*>(layer.gate.data) + inner * 24);
    EXPECT_EQ(layer.down.expert_stride, inner * 24);
    EXPECT_EQ(layer.down.row_stride, inner);
    EXPECT_EQ(layer.k.data, layer.q.As<BFloat16>() + NumElements(layer.q));
    EXPECT_EQ(layer.v.data, layer.k.As<BFloat16>() + NumElements(layer.k));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.o.data) % 256, 0u);
  }
}

TEST(LoadWeightsErrorsTest, NamesWhatIsMissing) {
  for (const char* name :
       {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight"}) {
    ModelDirectory model(SmallConfig());
    model.Remove(name);
    ExpectError(model.Load().status(), StatusCode::kNotFound, {name});
  }
}

TEST(LoadWeightsErrorsTest, NamesWhatIsMisshapen) {
  const auto expect = [](const std::string& name, std::vector<int64_t> shape,
                         const std::vector<std::string>& parts) {
    ModelDirectory model(SmallConfig());
    FileTensor& tensor = model.tensor(name);
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    tensor.shape = std::move(shape);
    tensor.bytes.resize(static_cast<size_t>(count * 2));
    std::vector<std::string> all = {name, "model.safetensors"};
    all.insert(all.end(), parts.begin(), parts.end());
    ExpectError(model.Load().status(), StatusCode::kInvalidArgument, all);
  };
  expect("model.embed_tokens.weight", {36, 24}, {"[36, 24]", "[37, 24]"});
  expect("model.layers.0.self_attn.k_proj.weight", {24, 128},
         {"[24, 128]", "[128, 24]"});
  expect("model.layers.0.self_attn.q_norm.weight", {128}, {"[128]", "[64]"});
  expect("model.layers.0.input_layernorm.weight", {1, 24}, {"[1, 24]", "[24]"});
  expect("model.layers.2.mlp.experts.4.up_proj.weight", {16, 24, 1},
         {"[16, 24, 1]", "[16, 24]"});
  expect("model.layers.1.mlp.down_proj.weight", {24, 0}, {"[24, 0]"});
}

TEST(LoadWeightsErrorsTest, NamesWhatHasAnotherDtype) {
  const auto expect = [](const std::string& name, const std::string& dtype,
                         StatusCode code,
                         const std::vector<std::string>& parts) {
    ModelDirectory model(SmallConfig());
    FileTensor& tensor = model.tensor(name);
    tensor.dtype = dtype;
    if (dtype == "F32") tensor.bytes += tensor.bytes;
    if (dtype == "F8_E4M3") tensor.bytes.resize(tensor.bytes.size() / 2);
    ExpectError(model.Load().status(), code, parts);
  };
  const std::string q = "model.layers.0.self_attn.q_proj.weight";
  expect(q, "F16", StatusCode::kInvalidArgument, {q, "float16", "bfloat16"});
  expect(q, "F32", StatusCode::kInvalidArgument, {q, "float32", "bfloat16"});
  expect(q, "I16", StatusCode::kUnimplemented, {q, "I16"});
  expect("model.embed_tokens.weight", "F8_E4M3", StatusCode::kInvalidArgument,
         {"model.embed_tokens.weight", "float8_e4m3"});
  expect("model.norm.weight", "F16", StatusCode::kInvalidArgument,
         {"model.norm.weight", "float16"});
}

TEST(LoadWeightsErrorsTest, ChecksConfigShardAndDevice) {
  ModelDirectory model(SmallConfig());
  ModelConfig bad = SmallConfig();
  bad.head_dim = 0;
  ExpectError(LoadWeights(model.Open(), bad, Device()).status(),
              StatusCode::kInvalidArgument, {"head_dim"});
  ExpectError(model.Load(Device(), {0, 3}).status(),
              StatusCode::kInvalidArgument, {"num_attention_heads"});
  const Status status = model.Load({DeviceType::kCuda, 99}).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.message()).find("bytes on cuda:99"),
            std::string::npos)
      << status.message();
}

TEST(LoadWeightsErrorsTest, AnAbsurdConfigFailsAtTheFirstMissingTensor) {
  ModelDirectory model(SmallConfig());
  ModelConfig config = SmallConfig();
  config.num_layers = 1024;
  config.num_experts = 1024;
  ExpectError(LoadWeights(model.Open(), config, Device()).status(),
              StatusCode::kInvalidArgument, {"model.layers.0.mlp.gate.weight"});
}

TEST(GoldenWeightsTest, LoadsWhatTransformersWrites) {
  for (const char* name :
       {"qwen3_moe_tiny", "qwen3_dense_tiny", "qwen3_moe_sharded"}) {
    SCOPED_TRACE(name);
    const std::string directory = StrCat("tests/golden/", name);
    const StatusOr<ModelConfig> config = LoadModelConfig(directory);
    ASSERT_TRUE(config.ok()) << config.status().message();
    const auto checkpoint = Checkpoint::Open(directory);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    const StatusOr<Weights> weights =
        LoadWeights(*checkpoint, *config, Device());
    ASSERT_TRUE(weights.ok()) << weights.status().message();
    EXPECT_EQ(weights->bytes, (*checkpoint)->total_bytes());  // all is used
  }
}

class RandomWeightsTest : public testing::OpTest {
 protected:
  Weights Make(Device on, const Shard& shard = {}, uint64_t seed = 1) {
    StatusOr<Weights> weights =
        RandomWeights(SmallConfig(), dtype(), on, shard, seed);
    EXPECT_TRUE(weights.ok()) << weights.status().message();
    return *std::move(weights);
  }
};

std::vector<double> Values(const TensorView& view) {
  const std::string bytes = Read(view);
  std::vector<double> values;
  for (size_t i = 0; i < bytes.size(); i += DTypeSize(view.dtype)) {
    const char* at = &bytes[i];
    uint16_t half;
    std::memcpy(&half, at, sizeof(half));
    float value = 0.0f;
    if (view.dtype == DType::kFloat32) std::memcpy(&value, at, sizeof(value));
    if (view.dtype == DType::kFloat16) value = ToFloat(Float16{half});
    if (view.dtype == DType::kBFloat16) value = ToFloat(BFloat16{half});
    values.push_back(value);
  }
  return values;
}

// The mean, deviation and kurtosis of all values.
std::vector<double> Moments(const std::vector<double>& values) {
  double mean = 0.0;
  for (double v : values) mean += v / static_cast<double>(values.size());
  double second = 0.0;
  double fourth = 0.0;
  for (double v : values) {
    const double square = (v - mean) * (v - mean);
    second += square / static_cast<double>(values.size());
    fourth += square * square / static_cast<double>(values.size());
  }
  return {mean, std::sqrt(second), fourth / (second * second)};
}

TEST_P(RandomWeightsTest, AreBellShaped) {
  const Weights weights = Make(device());
  for (const TensorView& view :
       {weights.layers[0].q, weights.layers[2].o,
        Expert(weights.layers[0].up, 3), weights.layers[1].mlp_down,
        weights.embedding}) {
    const std::vector<double> moments = Moments(Values(view));
    EXPECT_NEAR(moments[0], 0.0, 0.003);
    EXPECT_NEAR(moments[1], 0.02, 0.002);
    EXPECT_NEAR(moments[2], 2.7, 0.4);  // of a sum of four uniform draws
  }
  std::vector<double> norms = Values(weights.final_norm);
  for (const LayerWeights& layer : weights.layers) {
    for (double v : Values(layer.input_norm)) norms.push_back(v);
    for (double v : Values(layer.q_norm)) norms.push_back(v);
  }
  EXPECT_NEAR(Moments(norms)[0], 1.0, 0.03);
  EXPECT_NEAR(Moments(norms)[1], 0.1, 0.03);
}

TEST_P(RandomWeightsTest, AllTensorsDiffer) {
  const Weights weights = Make(device());
  std::map<std::string, int> seen;
  for (const LayerWeights& layer : weights.layers) {
    ++seen[Read(layer.k)];
    ++seen[Read(layer.v)];
    ++seen[Read(layer.input_norm)];
    ++seen[Read(layer.post_attention_norm)];
    if (!layer.router.present()) continue;
    for (int32_t e = 0; e < 5; ++e) {
      ++seen[Read(Expert(layer.gate, e))];
      ++seen[Read(Expert(layer.up, e))];
      ++seen[Read(Expert(layer.down, e))];
    }
  }
  EXPECT_EQ(seen.size(), 3u * 4 + 2 * 15);
  EXPECT_NE(Read(Make(device(), {}, 2).embedding), Read(weights.embedding));
}

TEST_P(RandomWeightsTest, EveryDeviceMakesTheSameBits) {
  const Weights here = Make(device(), {1, 2});
  const Weights cpu = Make(Device(), {1, 2});
  ASSERT_EQ(here.bytes, cpu.bytes);
  for (size_t i = 0; i < here.layers.size(); ++i) {
    EXPECT_EQ(Read(here.layers[i].q) == Read(cpu.layers[i].q), true);
    EXPECT_EQ(Read(here.layers[i].o) == Read(cpu.layers[i].o), true);
    EXPECT_EQ(Read(here.layers[i].q_norm) == Read(cpu.layers[i].q_norm), true);
    if (!here.layers[i].router.present()) continue;
    EXPECT_EQ(Read(Expert(here.layers[i].down, 4)) ==
                  Read(Expert(cpu.layers[i].down, 4)),
              true);
  }
  EXPECT_EQ(Read(here.lm_head) == Read(cpu.lm_head), true);
}

TEST_P(RandomWeightsTest, RanksHaveTheirPartsOfOneModel) {
  const Weights whole = Make(device());
  const Weights part = Make(device(), {1, 2});
  EXPECT_EQ(Read(part.layers[0].q) == Read(Rows(whole.layers[0].q, 256, 256)),
            true);
  EXPECT_EQ(
      Read(part.layers[0].o) == Read(Columns(whole.layers[0].o, 256, 256)),
      true);
  EXPECT_EQ(Read(Expert(part.layers[2].down, 3)) ==
                Read(Columns(Expert(whole.layers[2].down, 3), 8, 8)),
            true);
  EXPECT_EQ(Read(Expert(part.layers[2].up, 3)) ==
                Read(Rows(Expert(whole.layers[2].up, 3), 8, 8)),
            true);
}

TEST_P(RandomWeightsTest, RejectsBadArguments) {
  ModelConfig bad = SmallConfig();
  bad.num_experts_per_tok = 6;
  ExpectError(RandomWeights(bad, dtype(), device(), {}, 1).status(),
              StatusCode::kInvalidArgument, {"num_experts_per_tok"});
  ExpectError(RandomWeights(SmallConfig(), DType::kFloat8E4M3, device(), {}, 1)
                  .status(),
              StatusCode::kInvalidArgument, {"dtype", "float8_e4m3"});
  ExpectError(
      RandomWeights(SmallConfig(), dtype(), device(), {0, 5}, 1).status(),
      StatusCode::kInvalidArgument, {"num_attention_heads"});
}

INSTANTIATE_TEST_SUITE_P(Targets, RandomWeightsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
