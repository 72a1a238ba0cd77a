// Against Hugging Face transformers: checkpoints that it made, logits and
// greedy tokens that it computed (tests/golden/README.md).

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/safetensors.h"
#include "engine/session.h"
#include "ops/core/device_info.h"
#include "tests/testing/compare.h"

namespace tenon {
namespace {

constexpr char kFolder[] = "tests/golden/";

struct GoldenCase {
  const char* model;
  DeviceType device;
};

std::string CaseName(const ::testing::TestParamInfo<GoldenCase>& info) {
  return StrCat(info.param.model, "_", DeviceTypeName(info.param.device));
}

template <class T>
std::vector<T> Read(const std::vector<StoredTensor>& tensors,
                    const std::string& name) {
  for (const StoredTensor& tensor : tensors) {
    if (tensor.name != name) continue;
    EXPECT_EQ(tensor.view.dtype, kDTypeOf<T>);
    const T* data = tensor.view.As<const T>();
    return std::vector<T>(data, data + NumElements(tensor.view));
  }
  ADD_FAILURE() << "no tensor " << name;
  return {};
}

class GoldenTest : public ::testing::TestWithParam<GoldenCase> {
 protected:
  void SetUp() override {
    if (device().type == DeviceType::kCuda && NumCudaDevices() == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    const std::string folder = StrCat(kFolder, GetParam().model);
    StatusOr<MappedFile> file =
        MappedFile::Open(folder + "/expected.safetensors");
    ASSERT_TRUE(file.ok()) << file.status().message();
    StatusOr<std::vector<StoredTensor>> expected =
        ParseSafetensors(file->data(), file->size(), file->path());
    ASSERT_TRUE(expected.ok()) << expected.status().message();
    prompt_ = Read<int32_t>(*expected, "prompt");
    logits_ = Read<float>(*expected, "logits");
    greedy_ = Read<int32_t>(*expected, "greedy");
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(folder, device());
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
  }

  Device device() const { return {GetParam().device, 0}; }

  std::unique_ptr<Session> MakeSession(bool batch_invariant) {
    SessionOptions options;
    options.max_sequences = 4;
    options.max_tokens = 128;
    options.max_context = 256;
    options.max_logit_rows = 128;
    options.batch_invariant = batch_invariant;
    options.num_threads = 2;
    StatusOr<std::unique_ptr<Session>> session =
        Session::Create(model_, options);
    EXPECT_TRUE(session.ok()) << session.status().message();
    return session.ok() ? *std::move(session) : nullptr;
  }

  struct Run {
    std::vector<float> logits;    // of the whole prompt
    std::vector<int32_t> greedy;  // continuation
  };

  // The prompt in chunks of `chunk` tokens, then greedy tokens one by one.
  Run Generate(Session* session, int32_t chunk) {
    Run run;
    const int64_t vocab = model_->config.vocab_size;
    run.logits.resize(prompt_.size() * vocab);
    StatusOr<SequenceId> sequence = session->CreateSequence();
    EXPECT_TRUE(sequence.ok());
    std::vector<StepRowResult> results;
    StepRow row;
    row.sequence = *sequence;
    row.sampling.temperature = 0.0f;
    row.logits_mode = LogitsMode::kAll;
    const int32_t count = static_cast<int32_t>(prompt_.size());
    for (int32_t at = 0; at < count; at += row.num_tokens) {
      row.tokens = &prompt_[at];
      row.num_tokens = std::min(chunk, count - at);
      row.logits = &run.logits[at * vocab];
      const Status status = session->Step({row}, &results);
      EXPECT_TRUE(status.ok()) << status.message();
      if (!status.ok()) return run;
    }
    row.logits_mode = LogitsMode::kNone;
    row.num_tokens = 1;
    while (run.greedy.size() < greedy_.size()) {
      run.greedy.push_back(results[0].token);
      row.tokens = &run.greedy.back();
      const Status status = session->Step({row}, &results);
      EXPECT_TRUE(status.ok()) << status.message();
      if (!status.ok()) return run;
    }
    EXPECT_TRUE(session->ReleaseSequence(*sequence).ok());
    return run;
  }

  double MedianRowError(const std::vector<float>& logits) const {
    const int64_t vocab = model_->config.vocab_size;
    std::vector<double> errors;
    for (size_t at = 0; at < logits.size(); at += vocab) {
      errors.push_back(testing::RelativeFrobeniusError(
          {logits.begin() + at, logits.begin() + at + vocab},
          {logits_.begin() + at, logits_.begin() + at + vocab}));
    }
    std::sort(errors.begin(), errors.end());
    return errors[errors.size() / 2];
  }

  static std::vector<double> Doubles(const std::vector<float>& values) {
    return {values.begin(), values.end()};
  }

  std::vector<int32_t> prompt_;
  std::vector<float> logits_;
  std::vector<int32_t> greedy_;
  std::shared_ptr<const Model> model_;
};

TEST_P(GoldenTest, LogitsAndGreedyTokensMatchTransformers) {
  const bool exact = model_->weights.dtype == DType::kFloat32;
  for (bool batch_invariant : {false, true}) {
    SCOPED_TRACE(batch_invariant ? "batch-invariant" : "default");
    const std::unique_ptr<Session> session = MakeSession(batch_invariant);
    ASSERT_NE(session, nullptr);
    const Run run = Generate(session.get(), 96);
    if (exact) {
      EXPECT_LT(testing::RelativeFrobeniusError(Doubles(run.logits),
                                                Doubles(logits_)),
                1e-5);
    } else {
      // bf16 activations against float32 ones on the same weights. The median
      // row, as two experts that are nearly tied may swap in single rows.
      EXPECT_LT(MedianRowError(run.logits), 2.5e-2);
    }
    if (!exact) continue;
    double largest = 0.0;
    double difference = 0.0;
    for (size_t i = 0; i < logits_.size(); ++i) {
      largest = std::max<double>(largest, std::fabs(logits_[i]));
      difference =
          std::max<double>(difference, std::fabs(run.logits[i] - logits_[i]));
    }
    EXPECT_LT(difference / largest, 1e-4);
    EXPECT_EQ(run.greedy, greedy_);
  }
}

TEST_P(GoldenTest, ChunksOfThePromptAreBitEqualWhenBatchInvariant) {
  const std::unique_ptr<Session> session = MakeSession(true);
  ASSERT_NE(session, nullptr);
  const Run whole = Generate(session.get(), 96);
  for (int32_t chunk : {7, 1}) {
    SCOPED_TRACE(chunk);
    const Run run = Generate(session.get(), chunk);
    EXPECT_EQ(std::memcmp(run.logits.data(), whole.logits.data(),
                          whole.logits.size() * sizeof(float)),
              0);
    EXPECT_EQ(run.greedy, whole.greedy);
  }
}

TEST_P(GoldenTest, ChunksOfThePromptGiveTheSameGreedyTokens) {
  if (model_->weights.dtype != DType::kFloat32) {
    GTEST_SKIP() << "close logits may swap in bf16";
  }
  const std::unique_ptr<Session> session = MakeSession(false);
  ASSERT_NE(session, nullptr);
  for (int32_t chunk : {7, 1}) {
    EXPECT_EQ(Generate(session.get(), chunk).greedy, greedy_) << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, GoldenTest,
    ::testing::Values(GoldenCase{"qwen3_moe_tiny", DeviceType::kCpu},
                      GoldenCase{"qwen3_dense_tiny", DeviceType::kCpu},
                      GoldenCase{"qwen3_moe_sharded", DeviceType::kCpu},
                      GoldenCase{"qwen3_moe_tiny", DeviceType::kCuda},
                      GoldenCase{"qwen3_dense_tiny", DeviceType::kCuda},
                      GoldenCase{"qwen3_moe_sharded", DeviceType::kCuda}),
    CaseName);

}  // namespace
}  // namespace tenon
