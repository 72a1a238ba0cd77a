#ifndef TENON_TESTS_ENGINE_KV_CACHE_FIXTURE_H_
#define TENON_TESTS_ENGINE_KV_CACHE_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "engine/kv_cache.h"

// A small KV cache, whose elements are the tokens themselves.

namespace tenon::kv_cache_test {

inline KvCacheOptions SmallOptions() {
  KvCacheOptions o;
  o.num_layers = 2;
  o.num_kv_heads = 1;
  o.head_dim = 1;
  o.dtype = DType::kFloat32;
  o.page_size = 4;
  o.num_pages = 24;
  o.max_sequences = 6;
  o.max_context = 40;
  return o;
}

inline KvCache MakeCache(const KvCacheOptions& options) {
  StatusOr<KvCache> cache = KvCache::Create(options);
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  return *std::move(cache);
}

// Appends and writes `tokens` to K of every layer, and their negatives to V, as
// a step would.
inline Status Append(KvCache* cache, const std::vector<AppendRow>& rows,
                     const std::vector<std::vector<float>>& tokens) {
  TENON_RETURN_IF_ERROR(cache->PlanAppend(rows));
  cache->CommitAppend();
  TENON_RETURN_IF_ERROR(cache->CopyPages(Stream()));
  int64_t total = 0;
  for (const AppendRow& row : rows) total += row.num_tokens;
  std::vector<int64_t> slots(static_cast<size_t>(total));
  cache->FillSlotMapping(slots.data());
  const int64_t* slot = slots.data();
  for (const std::vector<float>& row : tokens) {
    for (const float token : row) {
      for (int32_t layer = 0; layer < cache->options().num_layers; ++layer) {
        cache->k(layer).As<float>()[*slot] = token + 0.25f * layer;
        cache->v(layer).As<float>()[*slot] = -token - 0.25f * layer;
      }
      ++slot;
    }
  }
  return Status();
}

}  // namespace tenon::kv_cache_test

#endif  // TENON_TESTS_ENGINE_KV_CACHE_FIXTURE_H_
