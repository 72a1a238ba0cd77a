// Weights in float8_e4m3: published ones, those that are quantised while they
// are loaded, and random ones.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/tensor_parallel.h"
#include "engine/weight_plan.h"
#include "engine/weight_quantize.h"
#include "ops/quantize/quantize.h"
#include "tests/engine/fp8_weights_fixture.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using testing::Dequantized;
using testing::ExpectError;
using testing::FileTensor;
using testing::Floats;
using testing::Fp8Config;
using testing::MakeFileTensor;
using testing::MakeFp8;
using testing::MatricesOf;
using testing::Matrix;
using testing::ModelDirectory;
using testing::NumBlocks;
using testing::Read;

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
      const ModelConfig config = Fp8Config(scaling);
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
    const ModelConfig config = Fp8Config(scaling);
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
  const ModelConfig config = Fp8Config(Fp8Scaling::kBlocks);
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
  const ModelConfig config = Fp8Config(Fp8Scaling::kNone);
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
  ModelDirectory model(Fp8Config(Fp8Scaling::kNone), dtype());
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
  const ModelConfig config = Fp8Config(Fp8Scaling::kBlocks);
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
    const ModelConfig config = Fp8Config(scaling);
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
  ModelDirectory model(Fp8Config(Fp8Scaling::kBlocks));
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
  const ModelConfig config = Fp8Config(Fp8Scaling::kNone);
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

}  // namespace
}  // namespace tenon
