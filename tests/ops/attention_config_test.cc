#include "ops/attention/attention_config.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "ops/attention/attention_hopper_prefill.h"

namespace tenon {
namespace {

AttentionParams ShapeOnly(DeviceType type, int64_t tokens, int64_t num_seqs,
                          int32_t max_kv_len) {
  const Device device = {type, 0};
  AttentionParams p;
  p.q = p.out =
      MakeTensor(nullptr, DType::kBFloat16, device, {tokens, 32, 128});
  p.k_cache = p.v_cache =
      MakeTensor(nullptr, DType::kBFloat16, device, {4096, 16, 4, 128});
  p.block_table = MakeTensor(nullptr, DType::kInt32, device, {num_seqs, 2560});
  p.query_start = MakeTensor(nullptr, DType::kInt32, device, {num_seqs + 1});
  p.kv_len = MakeTensor(nullptr, DType::kInt32, device, {num_seqs});
  p.scale = 1.0f;
  p.max_kv_len = max_kv_len;
  return p;
}

TEST(AttentionConfigTest, SelectsTheKernel) {
  AttentionParams p = ShapeOnly(DeviceType::kCuda, 64, 64, 0);
  p.max_query_len = 1;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.max_query_len = kMaxDecodeQueries;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.max_query_len = kMaxDecodeQueries + 1;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kPrefill);
  p.max_query_len = 0;  // up to 64
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kPrefill);
  p.batch_invariant = true;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.out.stride[1] = 129;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
  p.out.stride[1] = 128;
  p.k_cache.stride[0] += 4;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
  p = ShapeOnly(DeviceType::kCuda, 4, 64, 0);
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kDecode);
  p.q.dtype = p.out.dtype = p.k_cache.dtype = p.v_cache.dtype = DType::kFloat32;
  EXPECT_EQ(SelectAttentionKernel(p), AttentionKernel::kGeneric);
}

TEST(AttentionConfigTest, SelectsTilesForOneSequence) {
  AttentionParams p = ShapeOnly(DeviceType::kCuda, 64, 1, 0);
  EXPECT_EQ(PlanAttention(p).num_rows, 0);
  p = ShapeOnly(DeviceType::kCuda, 64, 2, 0);
  EXPECT_EQ(PlanAttention(p).num_rows, 2 * kMaxDecodeQueries);
  EXPECT_EQ(PlanAttention(p).queries_per_seq, kMaxDecodeQueries);
  p.max_query_len = 1;
  EXPECT_EQ(PlanAttention(p).num_rows, 64);
}

TEST(AttentionConfigTest, SelectsTheHopperPrefill) {
  const AttentionParams params = ShapeOnly(DeviceType::kCuda, 64, 1, 0);
  EXPECT_TRUE(CanUseHopperPrefill(params));
  const auto refuses = [&](auto&& change) {
    AttentionParams p = params;
    change(p);
    return !CanUseHopperPrefill(p);
  };
  using P = AttentionParams;
  EXPECT_TRUE(refuses([](P& p) { p.q.shape[2] = 256; }));
  EXPECT_TRUE(refuses([](P& p) { p.q.dtype = DType::kFloat32; }));
  EXPECT_TRUE(refuses([](P& p) { p.k_cache.shape[1] = 20; }));
  EXPECT_TRUE(refuses([](P& p) { p.v_cache.stride[2] = 136; }));
  EXPECT_TRUE(refuses([](P& p) { p.v_cache.stride[0] = 0; }));
  EXPECT_TRUE(refuses([](P& p) { p.k_cache.shape[0] = 0; }));
  EXPECT_FALSE(refuses([](P& p) { p.k_cache.shape[1] = 24; }));
  EXPECT_FALSE(refuses([](P& p) { p.k_cache.stride[2] = 192; }));
  const auto with_float8 = [](P& p) {
    p.k_cache.dtype = p.v_cache.dtype = DType::kFloat8E4M3;
  };
  EXPECT_FALSE(refuses(with_float8));
  EXPECT_TRUE(refuses([&](P& p) {
    with_float8(p);
    p.q.shape[2] = 64;
  }));
  EXPECT_TRUE(refuses([&](P& p) {
    with_float8(p);
    p.k_cache.stride[2] = 192;
  }));
}

TEST(AttentionConfigTest, PartsCoverEveryContext) {
  for (const AttentionParts& parts :
       {AttentionParts{1, 512, 512}, AttentionParts{32, 256, 2048},
        AttentionParts{1, 64, 2048}, AttentionParts{9, 64, 2048}}) {
    int32_t most = 0;
    for (int64_t context = 1; context < int64_t{1} << 31;
         context += 1 + context / 97) {
      const auto c = static_cast<int32_t>(context);
      const int64_t length = parts.Length(c);
      const int64_t count = parts.Count(c);
      ASSERT_EQ(length % AttentionParts::kLengthUnit, 0);
      ASSERT_GE(length * count, context);
      ASSERT_LT(length * (count - 1), context);
      ASSERT_LE(count, AttentionParts::kMaxCount);
      ASSERT_LE(count, parts.MaxCount(c)) << context;
      ASSERT_GE(parts.MaxCount(c), most);
      most = parts.MaxCount(c);
    }
  }
}

TEST(AttentionConfigTest, WorkspaceIsEnoughAndNeverShrinks) {
  for (DeviceType type : {DeviceType::kCpu, DeviceType::kCuda}) {
    for (bool batch_invariant : {false, true}) {
      for (int32_t max_kv_len : {1, 64, 65, 1000, 2049, 40960, 0}) {
        size_t previous = 0;
        for (int64_t tokens = 1; tokens < 3000; tokens += 1 + tokens / 9) {
          AttentionParams p = ShapeOnly(type, tokens, 16, max_kv_len);
          p.batch_invariant = batch_invariant;
          const size_t bytes = AttentionWorkspaceBytes(p);
          ASSERT_GE(bytes, previous);
          previous = bytes;
          p.max_kv_len = 1;
          ASSERT_LE(AttentionWorkspaceBytes(p), bytes);
          p.max_kv_len = max_kv_len;
          for (int32_t max_query_len : {0, 1, 8}) {
            p.max_query_len = max_query_len;
            const AttentionPlan plan = PlanAttention(p);
            const int64_t rows = std::min(plan.num_rows, plan.rows_per_pass);
            const bool on_cpu = type == DeviceType::kCpu;
            if (plan.max_parts == 1 && !on_cpu) continue;
            const int64_t floats =
                rows * 32 * (plan.max_parts * 130 + (on_cpu ? 128 : 0));
            ASSERT_LE(static_cast<size_t>(floats) * 4, bytes)
                << tokens << " tokens, max_kv_len " << max_kv_len;
          }
        }
      }
    }
  }
}

TEST(AttentionConfigTest, WidensFloat8CachesWhereThereIsRoom) {
  AttentionParams p = ShapeOnly(DeviceType::kCuda, 512, 4, 8000);
  const size_t without = AttentionWorkspaceBytes(p);
  EXPECT_EQ(PlanAttention(p).widened_keys, 0);
  p.k_cache.dtype = p.v_cache.dtype = DType::kFloat8E4M3;
  const AttentionPlan plan = PlanAttention(p);
  EXPECT_EQ(plan.widened_keys, 8064);
  EXPECT_GE(plan.widened_at, without);
  EXPECT_EQ(plan.widened_at % 256, 0u);
  // Four sequences, K and V of 4 heads of 128, and a block table.
  EXPECT_EQ(AttentionWorkspaceBytes(p),
            plan.widened_at + 4 * (8064 * 2 * 4 * 128 * 2 + 4));
  size_t previous = 0;
  for (int32_t max_kv_len : {1, 512, 513, 8000, 16256, 16257, 20000, 40960}) {
    p.max_kv_len = max_kv_len;
    EXPECT_GE(AttentionWorkspaceBytes(p), previous) << max_kv_len;
    previous = AttentionWorkspaceBytes(p);
    EXPECT_EQ(PlanAttention(p).widened_keys > 0,
              max_kv_len > 512 && max_kv_len <= 16256);
  }
  p.max_kv_len = 1000;
  const auto widens = [&](auto&& change) {
    AttentionParams changed = p;
    change(changed);
    return PlanAttention(changed).widened_keys > 0;
  };
  using P = AttentionParams;
  EXPECT_TRUE(widens([](P&) {}));
  EXPECT_FALSE(widens([](P& p) { p.batch_invariant = true; }));
  EXPECT_FALSE(widens([](P& p) { p.max_query_len = 8; }));
  EXPECT_FALSE(widens([](P& p) { p.max_kv_len = 512; }));
  EXPECT_TRUE(widens([](P& p) {
    p.max_kv_len = 512;
    p.q.shape[0] = p.out.shape[0] = 513;
  }));
  EXPECT_FALSE(widens([](P& p) { p.q.shape[2] = 256; }));
}

TEST(AttentionConfigTest, InvalidParamsNeedNoWorkspace) {
  AttentionParams p = ShapeOnly(DeviceType::kCpu, 4, 4, 0);
  EXPECT_GT(AttentionWorkspaceBytes(p), 0u);
  p.q.shape[1] = 33;
  EXPECT_EQ(AttentionWorkspaceBytes(p), 0u);
}

}  // namespace
}  // namespace tenon
