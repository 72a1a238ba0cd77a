// Padding of a decode step: rows beside it, and the cache, are as without it.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "engine/kv_cache.h"
#include "engine/model.h"

namespace tenon {
namespace {

constexpr int32_t kPageSize = 8;
constexpr int32_t kPages = 2;  // of a sequence
constexpr int32_t kRows = 3;
constexpr int32_t kBucket = 8;
constexpr int32_t kContext = 11;

class DecodePaddingTest : public ::testing::TestWithParam<const char*> {
 protected:
  struct Result {
    std::vector<float> logits;  // of the rows
    std::vector<char> cache;
    std::vector<int32_t> experts;        // of the last layer, padding included
    std::vector<float> padding_numbers;  // residual of the padding
  };

  static void ExpectOk(const Status& status) {
    ASSERT_TRUE(status.ok()) << status.message();
  }

  // kContext steps of kRows sequences, filled up with padding to `rows`.
  Result Run(const Model& model, int32_t rows) {
    KvCacheOptions options;
    options.num_layers = model.config.num_layers;
    options.num_kv_heads = model.config.num_kv_heads;
    options.head_dim = model.config.head_dim;
    options.dtype = model.weights.dtype;
    options.page_size = kPageSize;
    options.num_pages = kRows * kPages;
    options.max_sequences = kRows;
    options.max_context = kPageSize * kPages;
    StatusOr<KvCache> cache = KvCache::Create(options);
    ExpectOk(cache.status());
    StepLimits limits;
    limits.max_tokens = limits.max_rows = limits.max_logit_rows = kBucket;
    limits.max_context = options.max_context;
    limits.page_size = kPageSize;
    limits.max_pages_per_row = kPages;
    StatusOr<Activations> activations = Activations::Create(
        model.config, model.weights, limits, false, nullptr, false);
    ExpectOk(activations.status());
    for (int32_t position = 0; position < kContext; ++position) {
      Step(model, *cache, *activations, rows, position);
    }
    Result result;
    const float* logits = activations->logits.As<float>();
    result.logits.assign(logits,
                         logits + int64_t{kRows} * model.config.vocab_size);
    for (int32_t layer = 0; layer < options.num_layers; ++layer) {
      for (const TensorView& plane : {cache->k(layer), cache->v(layer)}) {
        const char* bytes = plane.As<char>();
        result.cache.insert(
            result.cache.end(), bytes,
            bytes + NumElements(plane) *
                        static_cast<int64_t>(DTypeSize(plane.dtype)));
      }
    }
    if (activations->topk_ids.present()) {
      const TensorView ids = activations->TopkIds(0, rows);
      result.experts.assign(ids.As<int32_t>(),
                            ids.As<int32_t>() + NumElements(ids));
    }
    const TensorView& residual = activations->residual;
    for (int64_t i = kRows * residual.shape[1]; i < rows * residual.shape[1];
         ++i) {
      result.padding_numbers.push_back(residual.As<float>()[i]);
    }
    return result;
  }

  static void Step(const Model& model, const KvCache& cache,
                   const Activations& activations, int32_t rows,
                   int32_t position) {
    std::vector<int32_t> ids(rows, -1), positions(rows, -1), kv_len(rows, 0),
        table(rows * kPages, -1), start(rows + 1), logit_rows(rows);
    std::vector<int64_t> slots(rows, -1);
    for (int32_t i = 0; i < rows; ++i) {
      start[i + 1] = i + 1;
      logit_rows[i] = i;
      if (i >= kRows) continue;
      ids[i] = (position * 17 + i * 5 + 3) % model.config.vocab_size;
      positions[i] = position;
      kv_len[i] = position + 1;
      slots[i] = i * kPages * kPageSize + position;
      for (int32_t p = 0; p < kPages; ++p)
        table[i * kPages + p] = i * kPages + p;
    }
    const auto view = [](const auto& values, DType dtype) {
      return MakeTensor(values.data(), dtype, Device(),
                        {static_cast<int64_t>(values.size())});
    };
    StepInputs inputs;
    inputs.token_ids = view(ids, DType::kInt32);
    inputs.positions = view(positions, DType::kInt32);
    inputs.slot_mapping = view(slots, DType::kInt64);
    inputs.block_table =
        MakeTensor(table.data(), DType::kInt32, Device(), {rows, kPages});
    inputs.query_start = view(start, DType::kInt32);
    inputs.kv_len = view(kv_len, DType::kInt32);
    inputs.logit_rows = view(logit_rows, DType::kInt32);
    inputs.all_logits = true;
    inputs.max_kv_len = kPageSize * kPages;
    inputs.max_query_len = 1;
    const StepContext context{model.config, model.weights, cache, activations,
                              inputs,       nullptr,       false, Stream()};
    ExpectOk(DecodeStep(context));
  }
};

TEST_P(DecodePaddingTest, ChangesNothing) {
  StatusOr<std::shared_ptr<const Model>> model =
      Model::Load(GetParam(), Device());
  ASSERT_TRUE(model.ok()) << model.status().message();
  const Result alone = Run(**model, kRows);
  const Result padded = Run(**model, kBucket);
  EXPECT_TRUE(alone.logits == padded.logits);
  EXPECT_TRUE(alone.cache == padded.cache);
  for (size_t i = 0; i < padded.experts.size(); ++i) {
    if (i < alone.experts.size()) {
      EXPECT_EQ(padded.experts[i], alone.experts[i]);
    } else {
      EXPECT_EQ(padded.experts[i], -1);
    }
  }
  EXPECT_EQ(padded.padding_numbers,
            std::vector<float>(padded.padding_numbers.size(), 0.0f));
}

INSTANTIATE_TEST_SUITE_P(Models, DecodePaddingTest,
                         ::testing::Values("tests/golden/qwen3_moe_tiny",
                                           "tests/golden/qwen3_dense_tiny"),
                         [](const auto& info) {
                           return std::string(info.param).substr(13);
                         });

}  // namespace
}  // namespace tenon
