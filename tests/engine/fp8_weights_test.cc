// Weights in float8_e4m3: published ones, those that are quantised while they
// are loaded, and random ones.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/tensor_parallel.h"
#include "engine/weight_plan.h"
#include "engine/weight_quantize.h"
#include "ops/quantize/quantize.h"
#include "tests/engine/mutate.h"
#include "tests/engine/weights_fixture.h"
#include "tests/testing/checkpoint_files.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using testing::ExpectError;
using testing::Expert;
using testing::FileTensor;
using testing::MakeFileTensor;
using testing::ModelDirectory;
using testing::Read;

// Sizes that end within blocks of 128, and ranks that begin within them: of 192
// experts' channels 2 ranks have 96, 4 have 48; of 768 dense ones 4 have 192.
ModelConfig Config(Fp8Scaling scaling) {
  ModelConfig c = testing::SmallConfig();
  c.hidden_size = 160;
  c.num_layers = 2;
  c.mlp_only_layers = {1};
  c.num_experts = 3;
  c.moe_intermediate_size = 192;
  c.intermediate_size = 768;
  c.fp8_scaling = scaling;
  if (scaling == Fp8Scaling::kBlocks) c.fp8_scale_suffix = "_scale_inv";
  if (scaling == Fp8Scaling::kChannels) c.fp8_scale_suffix = "_scale";
  return c;
}

bool IsQuantized(const std::string& name) {
  return name.find("_proj.weight") != std::string::npos;
}

int64_t NumBlocks(int64_t size) { return (size + 127) / 128; }

// All tensors of a model with what may be float8_e4m3 in that, random bits (but
// no NaN) and scales.
void MakeFp8(Fp8Scaling scaling, DType scale_dtype, ModelDirectory* model) {
  std::vector<FileTensor> kept;
  std::vector<FileTensor> quantized;
  std::mt19937_64 rng(9);
  uint64_t seed = 1000;
  for (FileTensor& t : model->tensors()) {
    if (!IsQuantized(t.name)) {
      kept.push_back(std::move(t));
      continue;
    }
    const int64_t count = t.shape[0] * t.shape[1];
    t.dtype = "F8_E4M3";
    t.bytes.clear();
    for (int64_t i = 0; i < count; ++i) {
      const char byte = static_cast<char>(rng());
      t.bytes += (byte & 0x7f) == 0x7f ? '\0' : byte;
    }
    const std::vector<int64_t> shape =
        scaling == Fp8Scaling::kBlocks
            ? std::vector<int64_t>{NumBlocks(t.shape[0]), NumBlocks(t.shape[1])}
            : std::vector<int64_t>{t.shape[0], 1};
    kept.push_back(MakeFileTensor(
        t.name + model->config().fp8_scale_suffix, scale_dtype, shape,
        testing::Normal(shape[0] * shape[1], seed++, 0.01f, 0.001f)));
    quantized.push_back(std::move(t));
  }
  // Last, so that those of other dtypes are aligned to their elements.
  for (FileTensor& t : quantized) kept.push_back(std::move(t));
  model->tensors() = std::move(kept);
}

std::vector<float> Floats(const TensorView& view) {
  const std::string bytes = Read(view);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// A matrix and the scales that it has in memory.
struct Matrix {
  TensorView weight;
  TensorView scales;
};

Matrix ExpertMatrix(const ExpertMatrices& m, int32_t expert) {
  Matrix matrix{Expert(m, expert), TensorView()};
  if (m.scales.data == nullptr) return matrix;
  const float* scales = m.scales.data + expert * m.scales.expert_stride;
  matrix.scales =
      m.scales.block_rows == 1
          ? MakeTensor(scales, DType::kFloat32, m.device, {m.rows})
          : MakeMatrix(scales, DType::kFloat32, m.device, NumBlocks(m.rows),
                       NumBlocks(m.cols), m.scales.row_stride);
  return matrix;
}

// Every matrix of a layer that may be float8_e4m3, by its published name.
std::map<std::string, Matrix> MatricesOf(const LayerWeights& l) {
  std::map<std::string, Matrix> all = {{"self_attn.q_proj", {l.q, l.q_scales}},
                                       {"self_attn.k_proj", {l.k, l.k_scales}},
                                       {"self_attn.v_proj", {l.v, l.v_scales}},
                                       {"self_attn.o_proj", {l.o, l.o_scales}}};
  if (l.mlp_gate.present()) {
    all["mlp.gate_proj"] = {l.mlp_gate, l.mlp_gate_scales};
    all["mlp.up_proj"] = {l.mlp_up, l.mlp_up_scales};
    all["mlp.down_proj"] = {l.mlp_down, l.mlp_down_scales};
  }
  for (int32_t e = 0; e < l.gate.num_experts; ++e) {
    const std::string expert = StrCat("mlp.experts.", e, ".");
    all[expert + "gate_proj"] = ExpertMatrix(l.gate, e);
    all[expert + "up_proj"] = ExpertMatrix(l.up, e);
    all[expert + "down_proj"] = ExpertMatrix(l.down, e);
  }
  return all;
}

// What the elements stand for, [rows, cols].
std::vector<float> Dequantized(const std::string& bytes,
                               const std::vector<float>& scales, int64_t rows,
                               int64_t cols, bool blocks) {
  std::vector<float> values;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const float scale =
          blocks ? scales[r / 128 * NumBlocks(cols) + c / 128] : scales[r];
      const Float8E4M3 element = {static_cast<uint8_t>(bytes[r * cols + c])};
      values.push_back(ToFloat(element) * scale);
    }
  }
  return values;
}

std::vector<float> Dequantized(const Matrix& m) {
  EXPECT_EQ(m.weight.dtype, DType::kFloat8E4M3);
  EXPECT_EQ(m.scales.dtype, DType::kFloat32);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(m.scales.data) % 4, 0u);
  const bool blocks = m.scales.rank == 2;
  if (blocks) {
    EXPECT_EQ(m.scales.shape[0], NumBlocks(m.weight.shape[0]));
    EXPECT_EQ(m.scales.shape[1], NumBlocks(m.weight.shape[1]));
    EXPECT_EQ(m.scales.stride[0] % 4, 0);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(m.scales.data) % 16, 0u);
  } else {
    EXPECT_EQ(m.scales.shape[0], m.weight.shape[0]);
  }
  return Dequantized(Read(m.weight), Floats(m.scales), m.weight.shape[0],
                     m.weight.shape[1], blocks);
}

// The same of a tensor of the file.
std::vector<float> Dequantized(ModelDirectory* model, const std::string& name) {
  const FileTensor& t = model->tensor(name + ".weight");
  const FileTensor& s =
      model->tensor(t.name + model->config().fp8_scale_suffix);
  std::vector<float> scales;
  const size_t size = s.dtype == "F32" ? 4 : 2;
  for (size_t at = 0; at < s.bytes.size(); at += size) {
    uint32_t bits = 0;
    std::memcpy(&bits, &s.bytes[at], size);
    scales.push_back(FloatFromBits(size == 4 ? bits : bits << 16));
  }
  return Dequantized(t.bytes, scales, t.shape[0], t.shape[1],
                     model->config().fp8_scaling == Fp8Scaling::kBlocks);
}

// Which rows and columns of the whole a rank has of a matrix.
std::pair<Share, Share> SharesOf(const ModelConfig& c, const LocalShape& local,
                                 const std::string& name) {
  const auto all = [](int64_t size) { return MakeShare(0, size); };
  const Share q =
      MakeShare(local.first_head * c.head_dim, local.num_heads * c.head_dim);
  const Share kv = MakeShare(local.first_kv_head * c.head_dim,
                             local.num_kv_heads * c.head_dim);
  if (name == "self_attn.q_proj") return {q, all(c.hidden_size)};
  if (name == "self_attn.o_proj") return {all(c.hidden_size), q};
  if (name.find("self_attn") == 0) return {kv, all(c.hidden_size)};
  const Share& inner = name.find("experts") != std::string::npos
                           ? local.moe_intermediate
                           : local.intermediate;
  if (name.find("down_proj") != std::string::npos) {
    return {all(c.hidden_size), inner};
  }
  return {inner, all(c.hidden_size)};
}

// Each of a rank's elements stands for exactly what it stands for in the whole
// matrix, and padding for zero.
void ExpectPartOf(const Matrix& part, const std::vector<float>& whole,
                  int64_t whole_cols, const Share& rows, const Share& cols) {
  const std::vector<float> values = Dequantized(part);
  ASSERT_EQ(part.weight.shape[0], rows.size);
  ASSERT_EQ(part.weight.shape[1], cols.size);
  int64_t differences = 0;
  for (int64_t r = 0; r < rows.size; ++r) {
    for (int64_t c = 0; c < cols.size; ++c) {
      const int64_t row = rows.WholeIndex(r);
      const int64_t col = cols.WholeIndex(c);
      const float expected =
          row < 0 || col < 0 ? 0.0f : whole[row * whole_cols + col];
      differences += values[r * cols.size + c] != expected;
    }
  }
  EXPECT_EQ(differences, 0);
}

class Fp8WeightsTest : public testing::OpTest {};

TEST_P(Fp8WeightsTest, RanksHaveThePublishedValues) {
  for (const Fp8Scaling scaling :
       {Fp8Scaling::kBlocks, Fp8Scaling::kChannels}) {
    for (const DType scale_dtype : {DType::kFloat32, DType::kBFloat16}) {
      const ModelConfig config = Config(scaling);
      ModelDirectory model(config, dtype());
      MakeFp8(scaling, scale_dtype, &model);
      const auto checkpoint = model.Open();
      for (const Shard shard : {Shard{0, 1}, Shard{0, 2}, Shard{1, 2},
                                Shard{1, 4}, Shard{2, 4}, Shard{3, 4}}) {
        SCOPED_TRACE(StrCat(static_cast<int>(scaling), ", scales in ",
                            DTypeName(scale_dtype), ", rank ", shard.rank,
                            " of ", shard.world_size));
        LoadOptions options;
        options.shard = shard;
        const StatusOr<Weights> weights =
            LoadWeights(checkpoint, config, device(), options);
        ASSERT_TRUE(weights.ok()) << weights.status().message();
        EXPECT_EQ(weights->dtype, dtype());
        EXPECT_EQ(weights->embedding.dtype, dtype());
        EXPECT_EQ(weights->layers[0].router.dtype, dtype());
        const LocalShape local = *MakeLocalShape(config, shard);
        for (int32_t i = 0; i < config.num_layers; ++i) {
          for (const auto& [name, matrix] : MatricesOf(weights->layers[i])) {
            SCOPED_TRACE(name);
            const std::string full = StrCat("model.layers.", i, ".", name);
            const auto [rows, cols] = SharesOf(config, local, name);
            ExpectPartOf(matrix, Dequantized(&model, full),
                         model.tensor(full + ".weight").shape[1], rows, cols);
          }
        }
      }
    }
  }
}

TEST_P(Fp8WeightsTest, QkvIsOneMatrixWhereBlocksDoNotBeginWithinOne) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "packed on CUDA alone";
  for (const Fp8Scaling scaling :
       {Fp8Scaling::kBlocks, Fp8Scaling::kChannels}) {
    const ModelConfig config = Config(scaling);
    ModelDirectory model(config, dtype());
    MakeFp8(scaling, DType::kFloat32, &model);
    // 8 query and 2 key/value heads of 64: k has 128 rows, or 64.
    for (int32_t world_size : {1, 2}) {
      const StatusOr<Weights> weights = model.Load(device(), {0, world_size});
      ASSERT_TRUE(weights.ok()) << weights.status().message();
      const LayerWeights& l = weights->layers[0];
      const bool whole = scaling == Fp8Scaling::kChannels || world_size == 1;
      EXPECT_EQ(l.qkv.present(), whole);
      EXPECT_EQ(l.qkv_scales.present(), whole);
      if (!whole) continue;
      std::vector<float> expected = Dequantized({l.q, l.q_scales});
      for (const Matrix& m : {Matrix{l.k, l.k_scales}, {l.v, l.v_scales}}) {
        for (const float value : Dequantized(m)) expected.push_back(value);
      }
      EXPECT_EQ(Dequantized({l.qkv, l.qkv_scales}) == expected, true);
    }
  }
}

TEST_P(Fp8WeightsTest, SomeMatricesMayStayAsTheyAre) {
  const ModelConfig config = Config(Fp8Scaling::kBlocks);
  ModelDirectory model(config, dtype());
  ModelDirectory plain(config, dtype());
  MakeFp8(Fp8Scaling::kBlocks, DType::kBFloat16, &model);
  const std::string k = "model.layers.0.self_attn.k_proj.weight";
  model.Remove(k + "_scale_inv");
  model.Remove(k);
  model.tensors().insert(model.tensors().begin(), plain.tensor(k));
  const StatusOr<Weights> weights = model.Load(device());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const LayerWeights& l = weights->layers[0];
  EXPECT_EQ(l.q.dtype, DType::kFloat8E4M3);
  EXPECT_EQ(l.k.dtype, dtype());
  EXPECT_FALSE(l.k_scales.present());
  EXPECT_FALSE(l.qkv.present());
  EXPECT_EQ(Read(l.k) == plain.tensor(k).bytes, true);
}

// What is quantised on load is what QuantizeFp8 makes of each matrix.
TEST_P(Fp8WeightsTest, QuantizesWhileLoading) {
  const ModelConfig config = Config(Fp8Scaling::kNone);
  ModelDirectory model(config, dtype());
  const auto checkpoint = model.Open();
  for (const Shard shard : {Shard{0, 1}, Shard{1, 2}}) {
    LoadOptions options;
    options.shard = shard;
    const StatusOr<Weights> plain =
        LoadWeights(checkpoint, config, Device(), options);
    options.quantize_fp8 = true;
    int64_t last = 0;
    options.progress = [&](int64_t done, int64_t total) {
      EXPECT_GT(done, last);
      EXPECT_LE(done, total);
      last = done;
      return true;
    };
    const StatusOr<Weights> weights =
        LoadWeights(checkpoint, config, device(), options);
    ASSERT_TRUE(plain.ok()) << plain.status().message();
    ASSERT_TRUE(weights.ok()) << weights.status().message();
    EXPECT_EQ(last, weights->bytes);
    EXPECT_EQ(weights->dtype, dtype());
    EXPECT_EQ(Read(weights->layers[0].router) == Read(plain->layers[0].router),
              true);
    EXPECT_EQ(Read(weights->lm_head) == Read(plain->lm_head), true);
    for (size_t i = 0; i < weights->layers.size(); ++i) {
      const auto quantized = MatricesOf(weights->layers[i]);
      for (const auto& [name, matrix] : MatricesOf(plain->layers[i])) {
        SCOPED_TRACE(name);
        const int64_t rows = matrix.weight.shape[0];
        const int64_t cols = matrix.weight.shape[1];
        std::string out(static_cast<size_t>(rows * cols), '\0');
        std::vector<float> scales(
            static_cast<size_t>(NumBlocks(rows) * NumBlocks(cols)));
        QuantizeFp8Params p;
        p.x = matrix.weight;
        p.out = MakeTensor(&out[0], DType::kFloat8E4M3, Device(), {rows, cols});
        p.scales = MakeTensor(scales.data(), DType::kFloat32, Device(),
                              {NumBlocks(rows), NumBlocks(cols)});
        p.block_rows = p.block_cols = 128;
        ASSERT_TRUE(QuantizeFp8(p, Stream()).ok());
        EXPECT_EQ(Read(quantized.at(name).weight) == out, true);
        EXPECT_EQ(Floats(quantized.at(name).scales), scales);
      }
    }
  }
}

// A checkpoint that another program quantised (tests/golden/make_golden.py).
TEST_P(Fp8WeightsTest, QuantizingMakesThePublishedCheckpoint) {
  if (dtype() != DType::kFloat32) GTEST_SKIP() << "its source is float32";
  const auto load = [&](const std::string& directory) {
    const StatusOr<ModelConfig> config = LoadModelConfig(directory);
    EXPECT_TRUE(config.ok()) << config.status().message();
    const auto checkpoint = Checkpoint::Open(directory);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    LoadOptions options;
    options.quantize_fp8 = true;
    return LoadWeights(*checkpoint, *config, device(), options);
  };
  const StatusOr<Weights> quantized = load("tests/golden/qwen3_moe_tiny");
  const StatusOr<Weights> published = load("tests/golden/qwen3_moe_tiny_fp8");
  ASSERT_TRUE(quantized.ok()) << quantized.status().message();
  ASSERT_TRUE(published.ok()) << published.status().message();
  for (size_t i = 0; i < published->layers.size(); ++i) {
    const auto ours = MatricesOf(quantized->layers[i]);
    for (const auto& [name, matrix] : MatricesOf(published->layers[i])) {
      EXPECT_EQ(Read(ours.at(name).weight) == Read(matrix.weight), true)
          << name;
      EXPECT_EQ(Floats(ours.at(name).scales), Floats(matrix.scales)) << name;
    }
  }
}

TEST_P(Fp8WeightsTest, ProgressStopsTheQuantisation) {
  ModelDirectory model(Config(Fp8Scaling::kNone), dtype());
  LoadOptions options;
  options.quantize_fp8 = true;
  int calls = 0;
  options.progress = [&](int64_t, int64_t) { return ++calls < 5; };
  EXPECT_EQ(model.LoadWith(device(), options).status().code(),
            StatusCode::kCancelled);
  EXPECT_EQ(calls, 5);
}

// Dequantised and quantised again: the same elements and scales, since the
// largest element of a block is 448 in units of its scale.
TEST_P(Fp8WeightsTest, QuantizingUndoesDequantizing) {
  if (dtype() != DType::kFloat32) GTEST_SKIP() << "16 bits do not hold it";
  const ModelConfig config = Config(Fp8Scaling::kBlocks);
  ModelDirectory fp8(config, dtype());
  MakeFp8(Fp8Scaling::kBlocks, DType::kFloat32, &fp8);
  ModelDirectory plain(config, dtype());
  for (FileTensor& t : fp8.tensors()) {
    if (t.dtype != "F8_E4M3") continue;
    // -0 has no counterpart in what follows; 448 in each block.
    for (char& byte : t.bytes) byte = byte == '\x80' ? '\0' : byte;
    const std::string name = t.name.substr(0, t.name.size() - 7);
    for (int64_t r = 0; r < t.shape[0]; r += 128) {
      for (int64_t c = 0; c < t.shape[1]; c += 128) {
        t.bytes[r * t.shape[1] + c] = '\x7e';
      }
    }
    // A power of two times a few bits, so that products and quotients are
    // exact.
    FileTensor& s = fp8.tensor(t.name + "_scale_inv");
    std::vector<float> scales;
    for (size_t i = 0; i < s.bytes.size() / 4; ++i) {
      scales.push_back(std::ldexp(static_cast<float>(1 + i % 3), -9));
    }
    s = MakeFileTensor(s.name, DType::kFloat32, s.shape, scales);
    FileTensor& p = plain.tensor(t.name);
    p = MakeFileTensor(p.name, DType::kFloat32, p.shape,
                       Dequantized(&fp8, name));
  }
  LoadOptions options;
  options.quantize_fp8 = true;
  const StatusOr<Weights> stored = fp8.LoadWith(device(), options);
  const StatusOr<Weights> quantized = plain.LoadWith(device(), options);
  ASSERT_TRUE(stored.ok()) << stored.status().message();
  ASSERT_TRUE(quantized.ok()) << quantized.status().message();
  for (size_t i = 0; i < stored->layers.size(); ++i) {
    const auto again = MatricesOf(quantized->layers[i]);
    for (const auto& [name, matrix] : MatricesOf(stored->layers[i])) {
      EXPECT_EQ(Read(matrix.weight) == Read(again.at(name).weight), true)
          << name;
      EXPECT_EQ(Floats(matrix.scales), Floats(again.at(name).scales)) << name;
    }
  }
}

TEST_P(Fp8WeightsTest, RandomWeightsAreBellShapedAndOneModel) {
  for (const Fp8Scaling scaling :
       {Fp8Scaling::kBlocks, Fp8Scaling::kChannels}) {
    const ModelConfig config = Config(scaling);
    const StatusOr<Weights> whole =
        RandomWeights(config, dtype(), device(), {}, 3);
    const StatusOr<Weights> cpu =
        RandomWeights(config, dtype(), Device(), {}, 3);
    ASSERT_TRUE(whole.ok()) << whole.status().message();
    ASSERT_TRUE(cpu.ok()) << cpu.status().message();
    EXPECT_EQ(whole->bytes, cpu->bytes);
    for (int32_t i = 0; i < config.num_layers; ++i) {
      const auto here = MatricesOf(whole->layers[i]);
      const auto there = MatricesOf(cpu->layers[i]);
      std::set<float> scales;
      double square = 0.0;
      int64_t count = 0;
      for (const auto& [name, matrix] : here) {
        EXPECT_EQ(Read(matrix.weight) == Read(there.at(name).weight), true)
            << name;
        EXPECT_EQ(Floats(matrix.scales), Floats(there.at(name).scales)) << name;
        for (const float v : Dequantized(matrix)) square += double{v} * v;
        count += NumElements(matrix.weight);
        for (const float scale : Floats(matrix.scales)) scales.insert(scale);
      }
      EXPECT_NEAR(std::sqrt(square / static_cast<double>(count)), 0.02, 0.0005);
      EXPECT_GT(scales.size(), 10u);
      for (const Shard shard : {Shard{1, 2}, Shard{1, 4}, Shard{3, 4}}) {
        const StatusOr<Weights> part =
            RandomWeights(config, dtype(), device(), shard, 3);
        ASSERT_TRUE(part.ok()) << part.status().message();
        const LocalShape local = *MakeLocalShape(config, shard);
        for (const auto& [name, matrix] : MatricesOf(part->layers[i])) {
          SCOPED_TRACE(name);
          const auto [rows, cols] = SharesOf(config, local, name);
          ExpectPartOf(matrix, Dequantized(here.at(name)),
                       here.at(name).weight.shape[1], rows, cols);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, Fp8WeightsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

TEST(Fp8MappedWeightsTest, MatricesStayInTheFile) {
  ModelDirectory model(Config(Fp8Scaling::kBlocks));
  MakeFp8(Fp8Scaling::kBlocks, DType::kBFloat16, &model);
  const auto checkpoint = model.Open();
  LoadOptions options;
  options.shard = {1, 4};
  const StatusOr<Weights> weights =
      LoadWeights(checkpoint, model.config(), Device(), options);
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const auto find = [&](const std::string& name) {
    return checkpoint->Find("model.layers." + name + ".weight")->As<char>();
  };
  const LayerWeights& sparse = weights->layers[0];
  const LayerWeights& dense = weights->layers[1];
  EXPECT_EQ(sparse.q.data, find("0.self_attn.q_proj") + 128 * 160);
  // Channels 48 to 95 of 192 are in one block; 192 to 383 of 768 begin in one
  // and are put in another order.
  EXPECT_EQ(sparse.gate.table[2], find("0.mlp.experts.2.gate_proj") + 48 * 160);
  const char* packed = static_cast<const char*>(weights->buffer.data());
  EXPECT_GE(dense.mlp_gate.As<char>(), packed);
  EXPECT_LT(dense.mlp_gate.As<char>(), packed + weights->buffer.size());
  EXPECT_EQ(dense.mlp_gate.shape[0], 192);
}

TEST(Fp8QuantizePartsTest, StripsOfAnySizeGiveTheSameBits) {
  const ModelConfig config = Config(Fp8Scaling::kNone);
  ModelDirectory model(config);
  const auto checkpoint = model.Open();
  std::vector<WeightPart> parts;
  PlanLayer(config, *MakeLocalShape(config, {0, 1}), 1, &parts);
  for (WeightPart& part : parts) {
    part.layer = 0;
    part.source = *checkpoint->Find(part.name);
    part.dtype = MayBeFp8(part.role) ? DType::kFloat8E4M3 : DType::kBFloat16;
    if (!MayBeFp8(part.role)) continue;
    part.placement = Placement::kQuantized;
    part.scaling = Fp8Scaling::kBlocks;
  }
  const PackedLayout layout = AssignOffsets(&parts);
  std::string first;
  for (const int64_t strip : {1, 100000, 10000000}) {
    std::string memory(static_cast<size_t>(layout.end) + 256, '\0');
    char* base =
        &memory[0] + (256 - reinterpret_cast<uintptr_t>(&memory[0]) % 256);
    const Status status =
        QuantizeParts(parts, base, Device(), strip, layout.end, nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    const std::string bytes(base, static_cast<size_t>(layout.end));
    if (first.empty()) first = bytes;
    EXPECT_EQ(bytes == first, true) << strip;
  }
}

// A published model after `change`, loaded.
template <class Change>
Status LoadChanged(const Change& change,
                   Fp8Scaling scaling = Fp8Scaling::kBlocks) {
  ModelDirectory model(Config(scaling));
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
  ModelDirectory model(Config(Fp8Scaling::kBlocks));
  MakeFp8(Fp8Scaling::kBlocks, DType::kFloat32, &model);
  ExpectError(
      LoadWeights(model.Open(), Config(Fp8Scaling::kNone), Device()).status(),
      invalid,
      {"model.layers.0.self_attn.q_proj.weight", "quantization_config"});
}

TEST(Fp8WeightsErrorsTest, NamesMatricesThatDoNotGoTogether) {
  const StatusCode invalid = StatusCode::kInvalidArgument;
  ModelDirectory plain(Config(Fp8Scaling::kBlocks));
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
  ModelDirectory model(Config(Fp8Scaling::kNone));
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
  ModelConfig config = Config(Fp8Scaling::kBlocks);
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
