#include "engine/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "tests/engine/kv_cache_fixture.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using kv_cache_test::Append;
using kv_cache_test::MakeCache;
using kv_cache_test::SmallOptions;

void ExpectError(const Status& status, StatusCode code,
                 const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.message();
  for (const std::string& part : parts) {
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
        << "\"" << status.message() << "\" does not name \"" << part << "\"";
  }
}

Status AppendOne(KvCache* cache, SequenceId id,
                 const std::vector<float>& tokens) {
  TENON_RETURN_IF_ERROR(
      Append(cache, {{id, static_cast<int32_t>(tokens.size())}}, {tokens}));
  cache->FinishAppend();
  return Status();
}

// The tokens that a sequence's pages hold. Appends one token to see its block
// table, and takes it back.
std::vector<float> Read(KvCache* cache, SequenceId id) {
  const int32_t length = *cache->Length(id);
  std::vector<float> tokens;
  if (length == 0) return tokens;
  Status status = cache->PlanAppend({{id, 1}});
  EXPECT_TRUE(status.ok()) << status.message();
  cache->CommitAppend();
  EXPECT_TRUE(cache->CopyPages(Stream()).ok());
  std::vector<int32_t> pages(cache->max_pages_per_sequence());
  cache->FillBlockTable(pages.data(), 0);
  const int32_t page_size = cache->options().page_size;
  for (int32_t i = 0; i < length; ++i) {
    const int64_t slot =
        int64_t{pages[i / page_size]} * page_size + i % page_size;
    tokens.push_back(cache->k(0).As<float>()[slot]);
    for (int32_t layer = 0; layer < cache->options().num_layers; ++layer) {
      EXPECT_EQ(cache->k(layer).As<float>()[slot],
                tokens.back() + 0.25f * layer);
      EXPECT_EQ(cache->v(layer).As<float>()[slot],
                -tokens.back() - 0.25f * layer);
    }
  }
  cache->RollbackAppend();
  return tokens;
}

TEST(KvCacheTest, ViewsAreDistinctZeroedPlanes) {
  KvCacheOptions o = SmallOptions();
  o.num_layers = 3;
  o.num_kv_heads = 2;
  o.head_dim = 64;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                      DType::kFloat8E4M3}) {
    o.dtype = dtype;
    const KvCache cache = MakeCache(o);
    const int64_t bytes =
        24 * 4 * 2 * 64 * static_cast<int64_t>(DTypeSize(dtype));
    std::set<void*> planes;
    for (int32_t layer = 0; layer < 3; ++layer) {
      for (const TensorView& view : {cache.k(layer), cache.v(layer)}) {
        planes.insert(view.data);
        EXPECT_EQ(view.dtype, dtype);
        ASSERT_EQ(view.rank, 4);
        EXPECT_EQ(NumElements(view) * static_cast<int64_t>(DTypeSize(dtype)),
                  bytes);
        EXPECT_EQ(view.stride[0], 4 * 2 * 64);
        const char* data = view.As<char>();
        EXPECT_EQ(std::count(data, data + bytes, 0), bytes);
        std::memset(view.data, 1, static_cast<size_t>(bytes));
      }
    }
    EXPECT_EQ(planes.size(), 6u);
    EXPECT_GE(cache.bytes(), 6 * bytes);
  }
}

TEST(KvCacheTest, AppendsAcrossPages) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId id = *cache.CreateSequence();
  EXPECT_EQ(*cache.Length(id), 0);
  ASSERT_TRUE(AppendOne(&cache, id, {1, 2, 3}).ok());
  EXPECT_EQ(cache.num_free_pages(), 23);
  ASSERT_TRUE(AppendOne(&cache, id, {4, 5, 6, 7, 8, 9}).ok());
  EXPECT_EQ(*cache.Length(id), 9);
  EXPECT_EQ(cache.num_free_pages(), 21);
  EXPECT_EQ(Read(&cache, id), (std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(cache.num_free_pages(), 21);
}

TEST(KvCacheTest, FillsSlotsAndTablesRowByRow) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  const SequenceId b = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, b, {0, 0, 0}).ok());  // page 0
  ASSERT_TRUE(cache.PlanAppend({{a, 5}, {b, 2}}).ok());
  EXPECT_EQ(*cache.Length(a), 0);  // planned: nothing has changed
  EXPECT_EQ(cache.num_free_pages(), 23);
  cache.CommitAppend();
  EXPECT_TRUE(cache.page_copies().empty());
  std::vector<int64_t> slots(7);
  cache.FillSlotMapping(slots.data());
  EXPECT_EQ(slots, (std::vector<int64_t>{4, 5, 6, 7, 8, 3, 12}));
  std::vector<int32_t> table(8, -1);
  cache.FillBlockTable(table.data(), 4);
  EXPECT_EQ(table, (std::vector<int32_t>{1, 2, -1, -1, 0, 3, -1, -1}));
  cache.FinishAppend();
  EXPECT_EQ(*cache.Length(a), 5);
  EXPECT_EQ(*cache.Length(b), 5);
}

TEST(KvCacheTest, ForkSharesPagesUntilOneWrites) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2, 3, 4, 5, 6}).ok());
  const SequenceId b = *cache.Fork(a);
  EXPECT_EQ(cache.num_free_pages(), 22);
  EXPECT_EQ(*cache.Length(b), 6);

  ASSERT_TRUE(cache.PlanAppend({{b, 1}}).ok());
  cache.CommitAppend();
  ASSERT_EQ(cache.page_copies().size(), 1u);  // of the last page alone
  EXPECT_EQ(cache.page_copies()[0].num_tokens, 2);
  cache.RollbackAppend();
  EXPECT_EQ(cache.num_free_pages(), 22);

  ASSERT_TRUE(AppendOne(&cache, b, {70}).ok());
  EXPECT_EQ(cache.num_free_pages(), 21);
  ASSERT_TRUE(AppendOne(&cache, a, {7}).ok());  // alone on its page now
  EXPECT_EQ(cache.num_free_pages(), 21);
  EXPECT_EQ(Read(&cache, a), (std::vector<float>{1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(Read(&cache, b), (std::vector<float>{1, 2, 3, 4, 5, 6, 70}));

  ASSERT_TRUE(cache.Release(a).ok());
  EXPECT_EQ(Read(&cache, b), (std::vector<float>{1, 2, 3, 4, 5, 6, 70}));
  ASSERT_TRUE(cache.Release(b).ok());
  EXPECT_EQ(cache.num_free_pages(), 24);
  EXPECT_EQ(cache.num_sequences(), 0);
}

TEST(KvCacheTest, AFullSharedPageIsNotCopied) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2, 3, 4}).ok());
  const SequenceId b = *cache.Fork(a);
  ASSERT_TRUE(cache.PlanAppend({{b, 1}, {a, 1}}).ok());
  cache.CommitAppend();
  EXPECT_TRUE(cache.page_copies().empty());
  cache.FinishAppend();
  EXPECT_EQ(cache.num_free_pages(), 21);
}

TEST(KvCacheTest, TheLastOfSharersInOneAppendKeepsThePage) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2}).ok());
  const SequenceId b = *cache.Fork(a);
  const SequenceId c = *cache.Fork(b);
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(
        Append(&cache, {{a, 1}, {b, 1}, {c, 1}}, {{10}, {20}, {30}}).ok());
    EXPECT_EQ(cache.page_copies().size(), 2u);
    EXPECT_EQ(cache.num_free_pages(), 21);
    if (round == 0) cache.RollbackAppend();
  }
  cache.FinishAppend();
  EXPECT_EQ(Read(&cache, a), (std::vector<float>{1, 2, 10}));
  EXPECT_EQ(Read(&cache, b), (std::vector<float>{1, 2, 20}));
  EXPECT_EQ(Read(&cache, c), (std::vector<float>{1, 2, 30}));
}

TEST(KvCacheTest, RollbackGivesBackWhatAShorterSharerWouldOverwrite) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId longer = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, longer, {1, 2, 3}).ok());
  const SequenceId shorter = *cache.Fork(longer);
  ASSERT_TRUE(cache.Truncate(shorter, 1).ok());
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(
        Append(&cache, {{longer, 1}, {shorter, 2}}, {{4}, {20, 30}}).ok());
    EXPECT_EQ(cache.page_copies().size(), 2u);
    EXPECT_EQ(cache.num_free_pages(), 21);
    if (round == 1) break;
    cache.RollbackAppend();
    EXPECT_EQ(cache.num_free_pages(), 23);
    EXPECT_EQ(Read(&cache, longer), (std::vector<float>{1, 2, 3}));
    EXPECT_EQ(Read(&cache, shorter), (std::vector<float>{1}));
  }
  cache.FinishAppend();
  EXPECT_EQ(cache.num_free_pages(), 22);
  EXPECT_EQ(Read(&cache, longer), (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(Read(&cache, shorter), (std::vector<float>{1, 20, 30}));
}

TEST(KvCacheTest, TruncateFreesPagesAndForgetsTokens) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2, 3, 4, 5, 6}).ok());
  const SequenceId b = *cache.Fork(a);
  ASSERT_TRUE(cache.Truncate(b, 3).ok());  // within the first, shared page
  ASSERT_TRUE(AppendOne(&cache, b, {40}).ok());
  EXPECT_EQ(Read(&cache, a), (std::vector<float>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(Read(&cache, b), (std::vector<float>{1, 2, 3, 40}));
  ASSERT_TRUE(cache.Truncate(a, 4).ok());
  ASSERT_TRUE(cache.Truncate(a, 4).ok());
  ASSERT_TRUE(cache.Truncate(b, 0).ok());
  EXPECT_EQ(cache.num_free_pages(), 23);
  EXPECT_EQ(Read(&cache, a), (std::vector<float>{1, 2, 3, 4}));
  ExpectError(cache.Truncate(a, 5), StatusCode::kInvalidArgument,
              {"length", "5", "4"});
  ExpectError(cache.Truncate(a, -1), StatusCode::kInvalidArgument,
              {"length", "-1"});
}

TEST(KvCacheTest, StaleIdsAreNotFound) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId old = *cache.CreateSequence();
  ASSERT_TRUE(cache.Release(old).ok());
  const SequenceId fresh = *cache.CreateSequence();
  EXPECT_EQ(fresh.slot, old.slot);  // the slot is used again
  EXPECT_NE(fresh, old);
  for (const SequenceId id : {old, SequenceId(), SequenceId{99, 1},
                              SequenceId{fresh.slot, fresh.generation + 1}}) {
    ExpectError(cache.Length(id).status(), StatusCode::kNotFound,
                {"no sequence"});
    ExpectError(cache.Fork(id).status(), StatusCode::kNotFound, {});
    ExpectError(cache.Truncate(id, 0), StatusCode::kNotFound, {});
    ExpectError(cache.Release(id), StatusCode::kNotFound, {});
    ExpectError(cache.PlanAppend({{fresh, 1}, {id, 1}}), StatusCode::kNotFound,
                {});
  }
  EXPECT_TRUE(AppendOne(&cache, fresh, {1}).ok());
}

TEST(KvCacheTest, RejectedAppendsChangeNothing) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2}).ok());
  const SequenceId b = *cache.Fork(a);
  ExpectError(cache.PlanAppend({{a, 1}, {b, 0}}), StatusCode::kInvalidArgument,
              {"num_tokens", "0"});
  ExpectError(cache.PlanAppend({{a, -1}}), StatusCode::kInvalidArgument,
              {"num_tokens", "-1"});
  ExpectError(cache.PlanAppend({{a, 1}, {b, 1}, {a, 1}}),
              StatusCode::kInvalidArgument, {"two rows"});
  ExpectError(cache.PlanAppend({{a, 39}}), StatusCode::kResourceExhausted,
              {"41", "max_context is 40"});
  ExpectError(cache.PlanAppend({{a, 2147483647}}),
              StatusCode::kResourceExhausted, {"2147483649"});
  EXPECT_EQ(Read(&cache, a), (std::vector<float>{1, 2}));
  EXPECT_EQ(Read(&cache, b), (std::vector<float>{1, 2}));
  EXPECT_EQ(cache.num_free_pages(), 23);
  // The sharing that a rejected plan counted on is forgotten.
  ASSERT_TRUE(cache.PlanAppend({{a, 1}}).ok());
  cache.CommitAppend();
  EXPECT_EQ(cache.page_copies().size(), 1u);
  cache.FinishAppend();
}

TEST(KvCacheTest, RunsOutOfPagesAndSequences) {
  KvCacheOptions o = SmallOptions();
  o.num_pages = 3;
  o.max_sequences = 2;
  KvCache cache = MakeCache(o);
  EXPECT_EQ(cache.max_pages_per_sequence(), 3);
  const SequenceId a = *cache.CreateSequence();
  const SequenceId b = *cache.CreateSequence();
  ExpectError(cache.CreateSequence().status(), StatusCode::kResourceExhausted,
              {"max_sequences", "2"});
  ExpectError(cache.Fork(a).status(), StatusCode::kResourceExhausted, {});
  ASSERT_TRUE(AppendOne(&cache, a, {1, 2, 3, 4, 5}).ok());
  ExpectError(cache.PlanAppend({{a, 4}, {b, 1}}),
              StatusCode::kResourceExhausted, {"2 pages", "1 of 3"});
  ASSERT_TRUE(AppendOne(&cache, a, {6, 7, 8}).ok());
  ASSERT_TRUE(AppendOne(&cache, b, {1}).ok());
  EXPECT_EQ(cache.num_free_pages(), 0);
  ASSERT_TRUE(AppendOne(&cache, b, {2, 3, 4}).ok());  // in its own page
  ExpectError(cache.PlanAppend({{b, 1}}), StatusCode::kResourceExhausted,
              {"1 pages", "0 of 3"});
}

TEST(KvCacheTest, NothingElseChangesDuringAnAppend) {
  KvCache cache = MakeCache(SmallOptions());
  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(cache.PlanAppend({{a, 1}}).ok());
  for (int phase = 0; phase < 2; ++phase) {
    const auto refused = StatusCode::kFailedPrecondition;
    ExpectError(cache.CreateSequence().status(), refused, {"append"});
    ExpectError(cache.Fork(a).status(), refused, {"append"});
    ExpectError(cache.Truncate(a, 0), refused, {"append"});
    ExpectError(cache.Release(a), refused, {"append"});
    ExpectError(cache.PlanAppend({{a, 1}}), refused, {"append"});
    if (phase == 0) cache.CommitAppend();
  }
  cache.RollbackAppend();
  EXPECT_EQ(*cache.Length(a), 0);
  ASSERT_TRUE(cache.PlanAppend({{a, 1}}).ok());
  cache.RollbackAppend();  // of a plan
  cache.RollbackAppend();  // of nothing
  EXPECT_EQ(cache.num_free_pages(), 24);
  EXPECT_TRUE(cache.Release(a).ok());
}

TEST(KvCacheTest, RejectsBadOptions) {
  const auto expect = [](const char* field, auto&& change) {
    KvCacheOptions o = SmallOptions();
    change(o);
    ExpectError(KvCache::Create(o).status(), StatusCode::kInvalidArgument,
                {"KvCache", field});
  };
  expect("num_layers", [](KvCacheOptions& o) { o.num_layers = 0; });
  expect("num_kv_heads", [](KvCacheOptions& o) { o.num_kv_heads = -1; });
  expect("head_dim", [](KvCacheOptions& o) { o.head_dim = 0; });
  expect("page_size", [](KvCacheOptions& o) { o.page_size = 0; });
  expect("num_pages", [](KvCacheOptions& o) { o.num_pages = 0; });
  expect("num_pages", [](KvCacheOptions& o) { o.num_pages = 1ll << 31; });
  expect("max_sequences", [](KvCacheOptions& o) { o.max_sequences = 0; });
  expect("max_context", [](KvCacheOptions& o) { o.max_context = 0; });
  expect("dtype", [](KvCacheOptions& o) { o.dtype = DType::kInt32; });
  expect("dtype", [](KvCacheOptions& o) { o.dtype = DType::kInvalid; });
  expect("k_scale is 2", [](KvCacheOptions& o) { o.k_scale = 2.0f; });
  expect("v_scale is 0", [](KvCacheOptions& o) {
    o.dtype = DType::kFloat8E4M3;
    o.v_scale = 0.0f;
  });
  expect("num_pages", [](KvCacheOptions& o) {
    o.num_layers = o.num_kv_heads = o.head_dim = o.page_size = 1 << 16;
    o.num_pages = 1 << 30;
  });
}

// The copies of pages and the zeros, on every device.
class KvCacheDeviceTest : public testing::OpTest {};

TEST_P(KvCacheDeviceTest, CopiesTheUsedPartOfAPage) {
  KvCacheOptions o = SmallOptions();
  o.device = device();
  o.dtype = dtype();
  o.head_dim = 64;
  KvCache cache = MakeCache(o);
  const size_t size = DTypeSize(o.dtype);
  const auto read = [&](const TensorView& view) {
    std::vector<char> bytes(static_cast<size_t>(NumElements(view)) * size);
    EXPECT_TRUE(CopyMemory(bytes.data(), Device(), view.data, device(),
                           bytes.size(), stream())
                    .ok());
    Finish();
    return bytes;
  };
  EXPECT_EQ(read(cache.v(1)), std::vector<char>(24 * 4 * 64 * size, 0));

  const SequenceId a = *cache.CreateSequence();
  ASSERT_TRUE(cache.PlanAppend({{a, 7}}).ok());
  cache.CommitAppend();
  cache.FinishAppend();
  ASSERT_TRUE(cache.Fork(a).ok());
  std::vector<char> contents(24 * 4 * 64 * size);
  for (size_t i = 0; i < contents.size(); ++i) {
    contents[i] = static_cast<char>(i * 2654435761u >> 13);
  }
  for (int32_t layer = 0; layer < 2; ++layer) {
    for (const TensorView& view : {cache.k(layer), cache.v(layer)}) {
      ASSERT_TRUE(CopyMemory(view.data, device(), contents.data(), Device(),
                             contents.size(), stream())
                      .ok());
    }
  }
  ASSERT_TRUE(cache.PlanAppend({{a, 1}}).ok());
  cache.CommitAppend();
  ASSERT_EQ(cache.page_copies().size(), 1u);
  const PageCopy copy = cache.page_copies()[0];
  ASSERT_TRUE(cache.CopyPages(stream()).ok());
  Finish();
  const size_t page_bytes = 4 * 64 * size;
  std::copy_n(&contents[copy.from * page_bytes], 3 * 64 * size,
              &contents[copy.to * page_bytes]);
  for (int32_t layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(read(cache.k(layer)), contents);
    EXPECT_EQ(read(cache.v(layer)), contents);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, KvCacheDeviceTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
