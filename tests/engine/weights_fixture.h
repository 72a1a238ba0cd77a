#ifndef TENON_TESTS_ENGINE_WEIGHTS_FIXTURE_H_
#define TENON_TESTS_ENGINE_WEIGHTS_FIXTURE_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/weights.h"
#include "tests/testing/checkpoint_files.h"

// What the suites of weights share.

namespace tenon::testing {

inline void ExpectError(const Status& status, StatusCode code,
                        const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.message();
  for (const std::string& part : parts) {
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
        << "\"" << status.message() << "\" does not name \"" << part << "\"";
  }
}

// A model on disk, with seeded values.
class ModelDirectory {
 public:
  explicit ModelDirectory(const ModelConfig& config,
                          DType dtype = DType::kBFloat16)
      : config_(config), tensors_(ModelTensors(config, dtype, 1)) {}

  const ModelConfig& config() const { return config_; }
  FileTensor& tensor(const std::string& name) {
    for (FileTensor& tensor : tensors_) {
      if (tensor.name == name) return tensor;
    }
    ADD_FAILURE() << name;
    return tensors_[0];
  }
  std::vector<FileTensor>& tensors() { return tensors_; }
  void Remove(const std::string& name) {
    const FileTensor* tensor = &this->tensor(name);
    tensors_.erase(tensors_.begin() + (tensor - tensors_.data()));
  }

  std::shared_ptr<const Checkpoint> Open() {
    directory_.Write("model.safetensors", SafetensorsFile(tensors_));
    auto checkpoint = Checkpoint::Open(directory_.path());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    return *checkpoint;
  }
  StatusOr<Weights> Load(Device device = Device(), Shard shard = {},
                         const LoadProgress& progress = nullptr) {
    LoadOptions options;
    options.shard = shard;
    options.progress = progress;
    return LoadWeights(Open(), config_, device, options);
  }

  StatusOr<Weights> LoadWith(Device device, const LoadOptions& options) {
    return LoadWeights(Open(), config_, device, options);
  }

  // The bytes of rows and columns of a tensor, from what was written.
  std::string Bytes(const std::string& name, int64_t first_row, int64_t rows,
                    int64_t first_col, int64_t cols) {
    const FileTensor& t = tensor(name);
    const int64_t full_cols = t.shape.back();
    const int64_t full_rows = t.shape.size() == 1 ? 1 : t.shape[0];
    const int64_t size = t.bytes.size() / (full_rows * full_cols);
    std::string bytes;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      bytes +=
          t.bytes.substr((row * full_cols + first_col) * size, cols * size);
    }
    return bytes;
  }

 private:
  ModelConfig config_;
  std::vector<FileTensor> tensors_;
  TempDirectory directory_;
};

// The bytes of a vector or matrix, read from its device.
inline std::string Read(const TensorView& view) {
  const int64_t rows = view.rank == 2 ? view.shape[0] : 1;
  const int64_t cols = view.shape[view.rank - 1];
  const int64_t size = static_cast<int64_t>(DTypeSize(view.dtype));
  std::string bytes(static_cast<size_t>(rows * cols * size), '\0');
  for (int64_t row = 0; row < rows; ++row) {
    const char* from =
        view.As<char>() + (view.rank == 2 ? row * view.stride[0] * size : 0);
    EXPECT_TRUE(CopyMemory(&bytes[row * cols * size], Device(), from,
                           view.device, cols * size, Stream())
                    .ok());
  }
  EXPECT_TRUE(Synchronize(view.device, Stream()).ok());
  return bytes;
}

inline TensorView Expert(const ExpertMatrices& m, int32_t expert) {
  const void* data = m.table != nullptr
                         ? m.table[expert]
                         : static_cast<const char*>(m.data) +
                               expert * m.expert_stride *
                                   static_cast<int64_t>(DTypeSize(m.dtype));
  return MakeMatrix(data, m.dtype, m.device, m.rows, m.cols, m.row_stride);
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_WEIGHTS_FIXTURE_H_
