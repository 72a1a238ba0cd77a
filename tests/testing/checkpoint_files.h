#ifndef TENON_TESTS_TESTING_CHECKPOINT_FILES_H_
#define TENON_TESTS_TESTING_CHECKPOINT_FILES_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "ops/core/dtype.h"
#include "tests/testing/random.h"

// Model directories made by a test.

namespace tenon::testing {

// A tensor of a safetensors file.
struct FileTensor {
  std::string name;
  std::string dtype;  // as the format writes it, such as "F32"
  std::vector<int64_t> shape;
  std::string bytes;
};

// A file of a given header, as it is, and data.
inline std::string SafetensorsFile(const std::string& header,
                                   const std::string& data) {
  std::string file;
  for (int i = 0; i < 8; ++i) {
    file += static_cast<char>(header.size() >> (8 * i) & 0xff);
  }
  return file + header + data;
}

// A well-formed file. The header is padded to 8 bytes, as publishers do.
inline std::string SafetensorsFile(const std::vector<FileTensor>& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::string data;
  for (const FileTensor& tensor : tensors) {
    header += ",\"" + tensor.name + "\":{\"dtype\":\"" + tensor.dtype +
              "\",\"shape\":[";
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      header += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
    }
    header += "],\"data_offsets\":[" + std::to_string(data.size()) + ",";
    data += tensor.bytes;
    header += std::to_string(data.size()) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return SafetensorsFile(header, data);
}

// A directory that is gone when the test is over.
class TempDirectory {
 public:
  TempDirectory() {
    std::string pattern = ::testing::TempDir() + "/tenon_XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~TempDirectory() { std::filesystem::remove_all(path_); }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  const std::string& path() const { return path_; }
  void Write(const std::string& name, const std::string& contents) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << contents;
  }
  void Remove(const std::string& name) const {
    std::filesystem::remove(path_ + "/" + name);
  }

 private:
  std::string path_;
};

inline const char* FileDTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "F32";
    case DType::kFloat16:
      return "F16";
    default:
      return "BF16";
  }
}

inline FileTensor MakeFileTensor(const std::string& name, DType dtype,
                                 std::vector<int64_t> shape,
                                 const std::vector<float>& values) {
  FileTensor tensor{name, FileDTypeName(dtype), std::move(shape), ""};
  for (const float value : values) {
    const auto append = [&](const auto& stored) {
      tensor.bytes.append(reinterpret_cast<const char*>(&stored),
                          sizeof(stored));
    };
    if (dtype == DType::kFloat32) append(value);
    if (dtype == DType::kFloat16) append(FromFloat<Float16>(value));
    if (dtype == DType::kBFloat16) append(FromFloat<BFloat16>(value));
  }
  return tensor;
}

// All tensors of a Qwen3 model under their published names, with seeded values:
// norms around 1, matrices of deviation 0.05.
inline std::vector<FileTensor> ModelTensors(const ModelConfig& c, DType dtype,
                                            uint64_t seed) {
  std::vector<FileTensor> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    const bool norm = shape.size() == 1;
    tensors.push_back(MakeFileTensor(
        name + ".weight", dtype, std::move(shape),
        Normal(count, seed++, norm ? 1.0f : 0.0f, norm ? 0.2f : 0.05f)));
  };
  const int64_t hidden = c.hidden_size;
  add("model.embed_tokens", {c.vocab_size, hidden});
  for (int32_t i = 0; i < c.num_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const int64_t dim = c.head_dim;
    add(layer + "self_attn.q_proj", {c.num_heads * dim, hidden});
    add(layer + "self_attn.k_proj", {c.num_kv_heads * dim, hidden});
    add(layer + "self_attn.v_proj", {c.num_kv_heads * dim, hidden});
    add(layer + "self_attn.o_proj", {hidden, c.num_heads * dim});
    add(layer + "self_attn.q_norm", {dim});
    add(layer + "self_attn.k_norm", {dim});
    add(layer + "input_layernorm", {hidden});
    add(layer + "post_attention_layernorm", {hidden});
    const bool sparse = c.IsMoeLayer(i);
    const int64_t inner =
        sparse ? c.moe_intermediate_size : c.intermediate_size;
    if (sparse) add(layer + "mlp.gate", {c.num_experts, hidden});
    for (int32_t e = 0; e < (sparse ? c.num_experts : 1); ++e) {
      const std::string mlp =
          layer + "mlp." +
          (sparse ? "experts." + std::to_string(e) + "." : std::string());
      add(mlp + "gate_proj", {inner, hidden});
      add(mlp + "up_proj", {inner, hidden});
      add(mlp + "down_proj", {hidden, inner});
    }
  }
  add("model.norm", {hidden});
  if (!c.tie_word_embeddings) add("lm_head", {c.vocab_size, hidden});
  return tensors;
}

// A small model with dense and expert layers, whose sizes all differ.
inline ModelConfig SmallConfig() {
  ModelConfig c;
  c.architecture = Architecture::kQwen3Moe;
  c.hidden_size = 24;
  c.num_layers = 3;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = 64;
  c.vocab_size = 37;
  c.max_position_embeddings = 256;
  c.intermediate_size = 40;
  c.num_experts = 5;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 16;
  c.norm_topk_prob = true;
  c.mlp_only_layers = {1};
  c.rms_norm_eps = 1e-6f;
  c.rope_theta = 10000.0;
  return c;
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_CHECKPOINT_FILES_H_
