// The sampler through the C interface: what a row's edits and masks do, what it
// reports, and drafts. Distributions are the op's own suite's.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "abi/tenon.h"

namespace {

template <class T>
struct Tensor {
  std::vector<T> values;
  std::vector<int64_t> shape;
  DLTensor dl = {};

  Tensor(std::vector<int64_t> dims, T fill) : shape(std::move(dims)) {
    size_t count = 1;
    for (int64_t n : shape) count *= static_cast<size_t>(n);
    values.assign(count, fill);
  }
  const DLTensor* get() {
    constexpr bool is_float = std::is_same_v<T, float>;
    constexpr bool is_byte = std::is_same_v<T, uint8_t>;
    dl.data = values.data();
    dl.device = {static_cast<DLDeviceType>(TENON_DL_CPU), 0};
    dl.ndim = static_cast<int32_t>(shape.size());
    dl.dtype = {static_cast<uint8_t>(is_float  ? TENON_DL_FLOAT
                                     : is_byte ? TENON_DL_UINT
                                               : TENON_DL_INT),
                8 * sizeof(T), 1};
    dl.shape = shape.data();
    return &dl;
  }
};

constexpr int32_t kVocab = 40;

class SamplerAbiTest : public ::testing::Test {
 protected:
  SamplerAbiTest() {
    args_.struct_size = sizeof(args_);
    for (int32_t i = 0; i < kVocab; ++i) {
      logits_.values[static_cast<size_t>(i)] = 0.25f * static_cast<float>(i);
    }
  }

  // Of one row.
  int32_t Run() {
    params_memory_.values.assign(sizeof(params_), 0);
    std::memcpy(params_memory_.values.data(), &params_, sizeof(params_));
    args_.logits = logits_.get();
    args_.params = params_memory_.get();
    args_.tokens = token_.get();
    args_.statuses = status_.get();
    error_ = {sizeof(error_), 0, ""};
    args_.workspace_size = 0;
    int32_t code =
        tenon_sampler_workspace_size(0, &args_, &args_.workspace_size, &error_);
    if (code != TENON_OK) return code;
    workspace_.assign(args_.workspace_size / 64 + 2, {});
    args_.workspace = workspace_.data();
    return tenon_sampler(0, &args_, nullptr, &error_);
  }
  int32_t Token() {
    EXPECT_EQ(Run(), TENON_OK) << error_.message;
    return token_.values[0];
  }
  void GiveEdits(std::vector<tenon_logit_edit> edits) {
    ASSERT_EQ(
        tenon_logit_edits_sort(edits.data(), static_cast<int64_t>(edits.size()),
                               kVocab, nullptr),
        TENON_OK);
    edits_memory_.assign(edits.begin(), edits.end());
    edits_memory_.emplace_back();  // room that no row has
    edits_.shape = {static_cast<int64_t>(edits_memory_.size()), 16};
    args_.edits = edits_.get();
    edits_.dl.data = edits_memory_.data();
    edit_offsets_.values = {0, static_cast<int32_t>(edits.size())};
    args_.edit_offsets = edit_offsets_.get();
  }

  struct alignas(64) Block {
    char bytes[64];
  };
  struct alignas(16) Edit : tenon_logit_edit {
    Edit() : tenon_logit_edit{} {}
    Edit(const tenon_logit_edit& e) : tenon_logit_edit(e) {}
  };

  tenon_sampling_params params_ = {};  // greedy
  tenon_sampler_args args_ = {};
  tenon_error error_ = {};
  Tensor<float> logits_{{1, kVocab}, 0.0f};
  Tensor<int32_t> token_{{1}, -7};
  Tensor<int32_t> status_{{1}, -7};
  Tensor<int32_t> edit_offsets_{{2}, 0};
  Tensor<uint8_t> edits_{{1, 16}, 0};

 private:
  Tensor<uint8_t> params_memory_{{1, sizeof(tenon_sampling_params)}, 0};
  std::vector<Edit> edits_memory_;
  std::vector<Block> workspace_;
};

TEST_F(SamplerAbiTest, PaddingIsNotDrawn) {
  EXPECT_EQ(Token(), kVocab - 1);
  args_.vocab_size = 13;
  EXPECT_EQ(Token(), 12);
  args_.vocab_size = kVocab + 1;
  EXPECT_EQ(Run(), TENON_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(error_.message, "vocab_size is 41"), nullptr)
      << error_.message;
}

TEST_F(SamplerAbiTest, EditsBanAllowAndBias) {
  GiveEdits({{39, TENON_EDIT_BAN, 0, 0}, {3, 0, 100.0f, 0}, {20, 0, 0, -1.0f}});
  EXPECT_EQ(Token(), 3);
  GiveEdits({{39, TENON_EDIT_BAN, 0, 0}, {38, 0, 0, -1.0f}});
  EXPECT_EQ(Token(), 37);
  GiveEdits({{5, TENON_EDIT_ALLOW, 0, 0}, {11, TENON_EDIT_ALLOW, 0, 0}});
  EXPECT_EQ(Token(), 39);
  params_.flags = TENON_SAMPLING_ONLY_ALLOWED;
  EXPECT_EQ(Token(), 11);
  params_.flags = 0;
  GiveEdits({{39, 3, 0, 0}});  // three times in the output
  params_.frequency_penalty = 0.05f;
  EXPECT_EQ(Token(), 39);
  params_.frequency_penalty = 0.09f;
  EXPECT_EQ(Token(), 38);
}

TEST_F(SamplerAbiTest, ABitmaskForbids) {
  Tensor<int32_t> bitmask({1, 2}, 0);
  bitmask.values = {1 << 9 | 1 << 30, 0};
  args_.bitmask = bitmask.get();
  EXPECT_EQ(Token(), 39);
  params_.flags = TENON_SAMPLING_USE_BITMASK;
  EXPECT_EQ(Token(), 30);
  bitmask.values = {0, 0};
  EXPECT_EQ(Token(), -1);
  EXPECT_EQ(status_.values[0], TENON_SAMPLE_NO_SUPPORT);
}

TEST_F(SamplerAbiTest, ListsTheBestTokens) {
  Tensor<int32_t> tokens({1, 4}, -7);
  Tensor<float> logprobs({1, 4}, 7.0f);
  Tensor<float> raw({1}, 7.0f);
  args_.top_tokens = tokens.get();
  args_.top_logprobs = logprobs.get();
  args_.raw_logprobs = raw.get();
  params_.num_top_logprobs = 3;
  EXPECT_EQ(Token(), 39);
  EXPECT_EQ(tokens.values, (std::vector<int32_t>{39, 38, 37, -1}));
  EXPECT_NEAR(logprobs.values[0] - logprobs.values[1], 0.25f, 1e-5f);
  EXPECT_EQ(logprobs.values[0], raw.values[0]);
  EXPECT_TRUE(std::isnan(logprobs.values[3]));
}

TEST_F(SamplerAbiTest, MirostatKeepsItsState) {
  Tensor<float> mu({1}, 6.0f);
  args_.mirostat_mu = mu.get();
  params_.temperature = 1.0f;
  params_.top_p = 1.0f;
  params_.mirostat_tau = 3.0f;
  params_.mirostat_eta = 0.1f;
  EXPECT_GE(Token(), 0);
  EXPECT_NE(mu.values[0], 6.0f);
}

TEST_F(SamplerAbiTest, RefusesWhatDoesNotFit) {
  const auto expect = [&](const char* message) {
    EXPECT_EQ(Run(), TENON_INVALID_ARGUMENT);
    EXPECT_NE(std::strstr(error_.message, message), nullptr) << error_.message;
  };
  args_.flags = 2;
  expect("flags is 2");
  args_.flags = 0;
  args_.top_logprobs_kind = 3;
  expect("top_logprobs_kind is 3");
  args_.top_logprobs_kind = 0;
  args_.random_stream = 2;
  expect("random_stream is 2");
  args_.random_stream = 0;
  args_.edits = edits_.get();
  expect("edit_offsets is null");
  args_.edits = nullptr;
  args_.edit_offsets = edit_offsets_.get();
  expect("edits is null");
  args_.edits = edits_.get();
  edits_.shape = {1, 12};
  expect("edits");
}

TEST(LogitEditsTest, SortRefusesAnIdTwice) {
  tenon_error error = {sizeof(error), 0, ""};
  tenon_logit_edit edits[] = {{7, 0, 0, 0}, {1, 0, 0, 0}, {7, 0, 1, 0}};
  EXPECT_EQ(tenon_logit_edits_sort(edits, 3, kVocab, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_logit_edits_sort: edits has id 7 twice");
  EXPECT_EQ(tenon_logit_edits_sort(nullptr, 0, kVocab, &error), TENON_OK);
  EXPECT_EQ(tenon_logit_edits_sort(nullptr, 1, kVocab, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_EQ(tenon_logit_edits_sort(edits, -1, kVocab, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_EQ(tenon_logit_edits_sort(edits, 2, 0, &error),
            TENON_INVALID_ARGUMENT);
}

TEST(SpeculativeAbiTest, AcceptsWhatTheTargetDrew) {
  Tensor<int32_t> drafts({2, 2}, 0), target({2, 3}, 0), tokens({2, 3}, -7);
  Tensor<int32_t> accepted({2}, -7), statuses({2}, -7);
  drafts.values = {4, 5, 4, 6};
  target.values = {4, 5, 9, 4, 5, 9};
  tenon_speculative_args args = {};
  args.struct_size = sizeof(args);
  args.draft_tokens = drafts.get();
  args.target_tokens = target.get();
  args.tokens = tokens.get();
  args.num_accepted = accepted.get();
  args.statuses = statuses.get();
  tenon_error error = {sizeof(error), 0, ""};
  ASSERT_EQ(tenon_speculative(0, &args, nullptr, &error), TENON_OK)
      << error.message;
  EXPECT_EQ(accepted.values, (std::vector<int32_t>{2, 1}));
  EXPECT_EQ(tokens.values, (std::vector<int32_t>{4, 5, 9, 4, 5, -1}));
  args.reserved = 1;
  EXPECT_EQ(tenon_speculative(0, &args, nullptr, &error),
            TENON_INVALID_ARGUMENT);
}

}  // namespace
