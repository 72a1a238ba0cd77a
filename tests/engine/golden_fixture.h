#ifndef TENON_TESTS_ENGINE_GOLDEN_FIXTURE_H_
#define TENON_TESTS_ENGINE_GOLDEN_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/safetensors.h"
#include "engine/session.h"
#include "ops/core/device_info.h"
#include "tests/testing/compare.h"
#include "tests/testing/test_size.h"

// A golden model, loaded, with what transformers computed from it.

namespace tenon::testing {

inline constexpr char kGoldenFolder[] = "tests/golden/";

struct GoldenCase {
  const char* model;
  DeviceType device;
};

inline std::string GoldenCaseName(
    const ::testing::TestParamInfo<GoldenCase>& info) {
  return StrCat(info.param.model, "_", DeviceTypeName(info.param.device));
}

class GoldenTest : public ::testing::TestWithParam<GoldenCase> {
 protected:
  void SetUp() override {
    if (device().type == DeviceType::kCuda && NumCudaDevices() == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    const std::string folder = StrCat(kGoldenFolder, GetParam().model);
    StatusOr<MappedFile> file =
        MappedFile::Open(folder + "/expected.safetensors");
    ASSERT_TRUE(file.ok()) << file.status().message();
    StatusOr<std::vector<StoredTensor>> expected =
        ParseSafetensors(file->data(), file->size(), file->path());
    ASSERT_TRUE(expected.ok()) << expected.status().message();
    prompt_ = Read<int32_t>(*expected, "prompt");
    logits_ = Read<float>(*expected, "logits");
    quantized_logits_ = Read<float>(*expected, "quantized_logits");
    greedy_ = Read<int32_t>(*expected, "greedy");
    ASSERT_FALSE(prompt_.empty());
    ASSERT_FALSE(logits_.empty());
    StatusOr<std::shared_ptr<const Model>> model =
        Model::Load(folder, device());
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *std::move(model);
    if (SmallTests()) KeepFirstTokens(24);
  }

  Device device() const { return {GetParam().device, 0}; }

  // Empty where there is none of that name.
  template <class T>
  static std::vector<T> Read(const std::vector<StoredTensor>& tensors,
                             const std::string& name) {
    for (const StoredTensor& tensor : tensors) {
      if (tensor.name != name) continue;
      EXPECT_EQ(tensor.view.dtype, kDTypeOf<T>);
      const T* data = tensor.view.As<const T>();
      return std::vector<T>(data, data + NumElements(tensor.view));
    }
    return {};
  }

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

  // Of rows of logits, against those expected.
  double MedianRowError(const std::vector<float>& logits,
                        const std::vector<float>& expected) const {
    const int64_t vocab = model_->config.vocab_size;
    std::vector<double> errors;
    for (size_t at = 0; at < logits.size(); at += vocab) {
      errors.push_back(RelativeFrobeniusError(
          {logits.begin() + at, logits.begin() + at + vocab},
          {expected.begin() + at, expected.begin() + at + vocab}));
    }
    std::sort(errors.begin(), errors.end());
    return errors[errors.size() / 2];
  }

  // Of the prompt, with their logits; none of what follows the whole of it.
  void KeepFirstTokens(size_t count) {
    prompt_.resize(count);
    for (std::vector<float>* logits : {&logits_, &quantized_logits_}) {
      logits->resize(
          std::min(logits->size(), count * model_->config.vocab_size));
    }
    greedy_.clear();
  }

  static std::vector<double> Doubles(const std::vector<float>& values) {
    return {values.begin(), values.end()};
  }

  std::vector<int32_t> prompt_;
  std::vector<float> logits_;
  std::vector<float> quantized_logits_;  // of fp8 models alone
  std::vector<int32_t> greedy_;
  std::shared_ptr<const Model> model_;
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_GOLDEN_FIXTURE_H_
