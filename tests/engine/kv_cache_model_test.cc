#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "tests/engine/kv_cache_fixture.h"

namespace tenon {
namespace {

// Against a model that keeps every sequence's tokens in a vector of its own.
class KvCacheModelTest : public ::testing::Test {
 protected:
  struct Known {
    SequenceId id;
    std::vector<float> tokens;
    std::vector<int32_t> pages;
  };

  void SetUp() override {
    cache_ = kv_cache_test::MakeCache(kv_cache_test::SmallOptions());
  }

  size_t Below(size_t n) { return static_cast<size_t>(rng_() % n); }

  static size_t NumPages(size_t tokens) { return (tokens + 3) / 4; }

  void Create() {
    const StatusOr<SequenceId> id = cache_.CreateSequence();
    ASSERT_EQ(id.ok(), known_.size() < 6);
    if (id.ok()) known_.push_back({*id, {}, {}});
  }
  void Fork() {
    const Known parent = known_[Below(known_.size())];
    const StatusOr<SequenceId> id = cache_.Fork(parent.id);
    ASSERT_EQ(id.ok(), known_.size() < 6);
    if (id.ok()) known_.push_back({*id, parent.tokens, parent.pages});
  }
  void Truncate() {
    Known& k = known_[Below(known_.size())];
    const size_t length = Below(k.tokens.size() + 1);
    ASSERT_TRUE(cache_.Truncate(k.id, static_cast<int32_t>(length)).ok());
    k.tokens.resize(length);
    k.pages.resize(NumPages(length));
  }
  void Release() {
    const size_t i = Below(known_.size());
    ASSERT_TRUE(cache_.Release(known_[i].id).ok());
    stale_.push_back(known_[i].id);
    known_.erase(known_.begin() + static_cast<long>(i));
  }
  void Append() {
    std::shuffle(known_.begin(), known_.end(), rng_);
    const size_t rows = 1 + Below(known_.size());
    std::vector<AppendRow> append;
    std::vector<std::vector<float>> tokens(rows);
    for (size_t i = 0; i < rows; ++i) {
      const size_t count = 1 + Below(Below(4) == 0 ? 12 : 2);
      for (size_t j = 0; j < count; ++j) tokens[i].push_back(++next_token_);
      append.push_back({known_[i].id, static_cast<int32_t>(count)});
    }
    const int64_t free_before = cache_.num_free_pages();
    const Status status = kv_cache_test::Append(&cache_, append, tokens);
    if (!status.ok()) {
      ASSERT_EQ(status.code(), StatusCode::kResourceExhausted);
      ASSERT_EQ(cache_.num_free_pages(), free_before);
      ++rejected_;
      return;
    }
    copies_ += static_cast<int64_t>(cache_.page_copies().size());
    if (Below(3) == 0) {
      cache_.RollbackAppend();
      ASSERT_EQ(cache_.num_free_pages(), free_before);
      return;
    }
    const int64_t width = cache_.max_pages_per_sequence();
    std::vector<int32_t> table(rows * static_cast<size_t>(width), -1);
    cache_.FillBlockTable(table.data(), width);
    cache_.FinishAppend();
    for (size_t i = 0; i < rows; ++i) {
      Known& k = known_[i];
      k.tokens.insert(k.tokens.end(), tokens[i].begin(), tokens[i].end());
      const auto row = table.begin() + static_cast<long>(i) * width;
      k.pages.assign(row, row + static_cast<long>(NumPages(k.tokens.size())));
    }
  }

  // Lengths, contents and page counts of everything.
  void CheckAll() {
    std::set<int32_t> pages_in_use;
    for (const Known& k : known_) {
      ASSERT_EQ(*cache_.Length(k.id), static_cast<int32_t>(k.tokens.size()));
      pages_in_use.insert(k.pages.begin(), k.pages.end());
      for (size_t i = 0; i < k.tokens.size(); ++i) {
        const int64_t slot = int64_t{k.pages[i / 4]} * 4 + i % 4;
        ASSERT_EQ(cache_.k(0).As<float>()[slot], k.tokens[i]);
        ASSERT_EQ(cache_.k(1).As<float>()[slot], k.tokens[i] + 0.25f);
        ASSERT_EQ(cache_.v(1).As<float>()[slot], -k.tokens[i] - 0.25f);
      }
    }
    ASSERT_EQ(cache_.num_free_pages(),
              24 - static_cast<int64_t>(pages_in_use.size()));
    for (const SequenceId id : stale_) {
      ASSERT_EQ(cache_.Length(id).status().code(), StatusCode::kNotFound);
    }
    stale_.clear();
  }

  KvCache cache_;
  std::mt19937_64 rng_{7};
  std::vector<Known> known_;
  std::vector<SequenceId> stale_;
  float next_token_ = 0;
  int64_t rejected_ = 0;
  int64_t copies_ = 0;
};

TEST_F(KvCacheModelTest, HundredThousandRandomOperations) {
  for (int i = 0; i < 100000; ++i) {
    const size_t what = Below(16);
    if (known_.empty() || what == 0) {
      Create();
    } else if (what == 1) {
      Fork();
    } else if (what == 2) {
      Truncate();
    } else if (what == 3) {
      Release();
    } else {
      Append();
    }
    if (HasFatalFailure()) FAIL() << "operation " << i;
    if (next_token_ > 1e6f) next_token_ = 0;  // floats count exactly
    if (i % 16 == 0) CheckAll();
    if (HasFatalFailure()) FAIL() << "after operation " << i;
  }
  EXPECT_GT(rejected_, 1000);
  EXPECT_GT(copies_, 1000);
  while (!known_.empty()) Release();
  EXPECT_EQ(cache_.num_free_pages(), 24);
  EXPECT_EQ(cache_.num_sequences(), 0);
}

}  // namespace
}  // namespace tenon
