// Sessions whose K and V are kept in float8_e4m3.

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "engine/session.h"
#include "tests/engine/session_fixture.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

class Fp8KvCacheTest : public testing::SessionTestBase {
 protected:
  Fp8KvCacheTest() : SessionTestBase("tests/golden/qwen3_dense_tiny") {
    for (int32_t i = 0; i < 40; ++i) {
      prompt_.push_back((i * 29 + i * i * 7) % kVocab);
    }
  }

  static SessionOptions Options() {
    SessionOptions options;
    options.max_sequences = 2;
    options.max_tokens = 64;
    options.max_context = 64;
    options.page_size = 8;
    options.max_logit_rows = 64;
    options.batch_invariant = true;
    options.num_threads = 2;
    return options;
  }
  static SessionOptions Fp8Options(float k_scale = 1.0f, float v_scale = 1.0f) {
    SessionOptions options = Options();
    options.kv_cache_dtype = DType::kFloat8E4M3;
    options.kv_cache_k_scale = k_scale;
    options.kv_cache_v_scale = v_scale;
    return options;
  }

  // Logits of every token of the prompt, given in chunks.
  std::vector<float> Logits(const SessionOptions& options, int32_t chunk) {
    const std::unique_ptr<Session> session = SessionWith(options);
    StatusOr<SequenceId> sequence = session->CreateSequence();
    EXPECT_TRUE(sequence.ok());
    std::vector<float> logits(prompt_.size() * kVocab);
    const auto size = static_cast<int32_t>(prompt_.size());
    for (int32_t i = 0; i < size; i += chunk) {
      StepRow row;
      row.sequence = *sequence;
      row.tokens = &prompt_[i];
      row.num_tokens = std::min(chunk, size - i);
      row.sample = false;
      row.logits_mode = LogitsMode::kAll;
      row.logits = &logits[static_cast<size_t>(i) * kVocab];
      std::vector<StepRowResult> results;
      const Status status = session->Step({row}, &results);
      EXPECT_TRUE(status.ok()) << status.message();
    }
    return logits;
  }

  // Relative, in the Frobenius norm.
  static double Error(const std::vector<float>& actual,
                      const std::vector<float>& expected) {
    double error = 0.0;
    double norm = 0.0;
    for (size_t i = 0; i < actual.size(); ++i) {
      const double difference = actual[i] - expected[i];
      error += difference * difference;
      norm += double{expected[i]} * expected[i];
    }
    return std::sqrt(error / norm);
  }

  std::vector<int32_t> prompt_;
};

// Three bits of fraction err by 1/32 on average, in K and in V.
constexpr double kMaxError = 0.06;

TEST_P(Fp8KvCacheTest, LogitsAreNearThoseOfTheExactCache) {
  const std::vector<float> exact = Logits(Options(), 40);
  const double error = Error(Logits(Fp8Options(), 40), exact);
  EXPECT_LT(error, kMaxError);
  EXPECT_GT(error, 1e-4) << "the cache is not float8";
}

TEST_P(Fp8KvCacheTest, ChunksOfThePromptGiveTheSameBits) {
  const std::vector<float> whole = Logits(Fp8Options(), 40);
  EXPECT_EQ(Logits(Fp8Options(), 1), whole);
  EXPECT_EQ(Logits(Fp8Options(), 13), whole);
}

TEST_P(Fp8KvCacheTest, ScalesReachBothSides) {
  const std::vector<float> exact = Logits(Options(), 40);
  // Powers of two change the exponent of what is stored.
  EXPECT_LT(Error(Logits(Fp8Options(0.25f, 1.0f), 40), exact), kMaxError);
  EXPECT_LT(Error(Logits(Fp8Options(1.0f, 0.125f), 40), exact), kMaxError);
  // Nothing but zeros is stored.
  EXPECT_GT(Error(Logits(Fp8Options(1e6f, 1.0f), 40), exact), kMaxError);
  EXPECT_GT(Error(Logits(Fp8Options(1.0f, 1e6f), 40), exact), kMaxError);
}

TEST_P(Fp8KvCacheTest, ForksCopyPages) {
  const std::unique_ptr<Session> session = SessionWith(Fp8Options());
  const auto run = [&](SequenceId sequence, std::vector<int32_t> tokens) {
    std::vector<float> logits(kVocab);
    StepRow row;
    row.sequence = sequence;
    row.tokens = tokens.data();
    row.num_tokens = static_cast<int32_t>(tokens.size());
    row.sample = false;
    row.logits_mode = LogitsMode::kLast;
    row.logits = logits.data();
    std::vector<StepRowResult> results;
    const Status status = session->Step({row}, &results);
    EXPECT_TRUE(status.ok()) << status.message();
    return logits;
  };
  const SequenceId first = *session->CreateSequence();
  run(first, {prompt_.begin(), prompt_.begin() + 13});
  const SequenceId second = *session->ForkSequence(first);
  const std::vector<float> of_first = run(first, {7, 8});
  EXPECT_EQ(run(second, {7, 8}), of_first);
}

TEST_P(Fp8KvCacheTest, TakesAsManyBytesAsElements) {
  const int64_t size = static_cast<int64_t>(DTypeSize(model_->weights.dtype));
  EXPECT_EQ(SessionWith(Options())->kv_cache_bytes(),
            size * SessionWith(Fp8Options())->kv_cache_bytes());
  SessionOptions same = Options();
  same.kv_cache_dtype = model_->weights.dtype;
  EXPECT_EQ(SessionWith(same)->kv_cache_bytes(),
            SessionWith(Options())->kv_cache_bytes());
}

TEST_P(Fp8KvCacheTest, RejectsBadOptions) {
  const auto expect = [&](std::vector<std::string> parts,
                          const SessionOptions& options) {
    testing::ExpectInvalid(Session::Create(model_, options).status(), parts);
  };
  SessionOptions options = Options();
  options.kv_cache_dtype = DType::kInt32;
  expect({"Session", "kv_cache_dtype is int32"}, options);
  options = Options();
  options.kv_cache_k_scale = 2.0f;
  expect({"k_scale is 2"}, options);
  expect({"v_scale", "-1"}, Fp8Options(1.0f, -1.0f));
  expect({"k_scale", "nan"}, Fp8Options(NAN, 1.0f));
}

INSTANTIATE_TEST_SUITE_P(Devices, Fp8KvCacheTest, testing::SessionDevices(),
                         testing::SessionDeviceName);

}  // namespace
}  // namespace tenon
