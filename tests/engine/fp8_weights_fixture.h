#ifndef TENON_TESTS_ENGINE_FP8_WEIGHTS_FIXTURE_H_
#define TENON_TESTS_ENGINE_FP8_WEIGHTS_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/engine/weights_fixture.h"
#include "tests/testing/checkpoint_files.h"
#include "tests/testing/random.h"

// Models in float8_e4m3 for the suites of weights.

namespace tenon::testing {

// Sizes that end within blocks of 128, and ranks that begin within them: of 192
// experts' channels 2 ranks have 96, 4 have 48; of 768 dense ones 4 have 192.
inline ModelConfig Fp8Config(Fp8Scaling scaling) {
  ModelConfig c = SmallConfig();
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

inline bool IsQuantized(const std::string& name) {
  return name.find("_proj.weight") != std::string::npos;
}

inline int64_t NumBlocks(int64_t size) { return (size + 127) / 128; }

// All tensors of a model with what may be float8_e4m3 in that, random bits (but
// no NaN) and scales.
inline void MakeFp8(Fp8Scaling scaling, DType scale_dtype,
                    ModelDirectory* model) {
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
        Normal(shape[0] * shape[1], seed++, 0.01f, 0.001f)));
    quantized.push_back(std::move(t));
  }
  // Last, so that those of other dtypes are aligned to their elements.
  for (FileTensor& t : quantized) kept.push_back(std::move(t));
  model->tensors() = std::move(kept);
}

inline std::vector<float> Floats(const TensorView& view) {
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

inline Matrix ExpertMatrix(const ExpertMatrices& m, int32_t expert) {
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
inline std::map<std::string, Matrix> MatricesOf(const LayerWeights& l) {
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
inline std::vector<float> Dequantized(const std::string& bytes,
                                      const std::vector<float>& scales,
                                      int64_t rows, int64_t cols, bool blocks) {
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

inline std::vector<float> Dequantized(const Matrix& m) {
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
inline std::vector<float> Dequantized(ModelDirectory* model,
                                      const std::string& name) {
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

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_FP8_WEIGHTS_FIXTURE_H_
