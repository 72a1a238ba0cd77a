#include "engine/tensor_parallel.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/testing/checkpoint_files.h"
#include "tests/testing/op_test.h"

namespace tenon {
namespace {

using testing::SmallConfig;

TEST(TensorParallelTest, SplitsEvenlyAndReplicatesKvHeads) {
  ModelConfig c = SmallConfig();
  c.num_heads = 16;
  c.num_kv_heads = 4;
  c.intermediate_size = 64;
  c.moe_intermediate_size = 32;
  for (int32_t world_size : {1, 2, 4, 8, 16}) {
    for (int32_t rank = 0; rank < world_size; ++rank) {
      SCOPED_TRACE(StrCat(rank, " of ", world_size));
      const StatusOr<LocalShape> local = MakeLocalShape(c, {rank, world_size});
      ASSERT_TRUE(local.ok()) << local.status().message();
      EXPECT_EQ(local->num_heads, 16 / world_size);
      EXPECT_EQ(local->first_head, rank * 16 / world_size);
      EXPECT_EQ(local->intermediate.size, 64 / world_size);
      EXPECT_EQ(local->intermediate.first, rank * 64 / world_size);
      EXPECT_EQ(local->moe_intermediate.size, 32 / world_size);
      EXPECT_EQ(local->moe_intermediate.first, rank * 32 / world_size);
      // Local query head h reads local KV head h / (heads / kv heads): it must
      // be the one that it reads in the whole model.
      const int32_t group = local->num_heads / local->num_kv_heads;
      for (int32_t h = 0; h < local->num_heads; ++h) {
        EXPECT_EQ(local->first_kv_head + h / group,
                  (local->first_head + h) / 4);
      }
    }
  }
}

// Every rank's part of a split of fp8 blocks: each channel on one rank, and
// each block's channels where a block of the rank begins.
TEST(TensorParallelTest, Fp8BlocksBeginAtMultiplesOf128) {
  for (const int32_t size : {128, 256, 320, 768, 1408, 1536, 2560}) {
    for (int32_t world_size : {1, 2, 4, 8, 16}) {
      ModelConfig c = SmallConfig();
      c.num_heads = 16;
      c.num_kv_heads = 4;
      c.head_dim = 128;
      c.fp8_scaling = Fp8Scaling::kBlocks;
      c.moe_intermediate_size = c.intermediate_size = size;
      std::vector<int> owners(size, 0);
      for (int32_t rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(StrCat(size, ", ", rank, " of ", world_size));
        const StatusOr<LocalShape> local =
            MakeLocalShape(c, {rank, world_size});
        ASSERT_TRUE(local.ok()) << local.status().message();
        const Share& share = local->moe_intermediate;
        EXPECT_EQ(share.count, size / world_size);
        EXPECT_EQ(share.size, local->intermediate.size);
        EXPECT_GE(share.size, share.count);
        EXPECT_LT(share.size, share.count + 128);
        int64_t block = -1;
        for (int64_t i = 0; i < share.size; ++i) {
          const int64_t whole = share.WholeIndex(i);
          if (i % 128 == 0) {
            ASSERT_GE(whole, 0);
            block = whole / 128;
          }
          if (whole < 0) continue;
          EXPECT_EQ(whole / 128, block);
          ++owners[whole];
        }
      }
      EXPECT_EQ(owners, std::vector<int>(size, 1));
    }
  }
}

TEST(TensorParallelTest, Fp8BlocksCostPaddingOnlyWhereTheyMust) {
  ModelConfig c = SmallConfig();
  c.num_heads = 16;
  c.num_kv_heads = 4;
  c.head_dim = 128;
  c.moe_intermediate_size = 768;
  const auto size = [&](int32_t world_size, int32_t rank) {
    return MakeLocalShape(c, {rank, world_size})->moe_intermediate.size;
  };
  for (const Fp8Scaling scaling :
       {Fp8Scaling::kNone, Fp8Scaling::kChannels, Fp8Scaling::kBlocks}) {
    c.fp8_scaling = scaling;
    const bool blocks = scaling == Fp8Scaling::kBlocks;
    for (int32_t rank = 0; rank < 4; ++rank) EXPECT_EQ(size(4, rank), 192);
    EXPECT_EQ(size(8, 0), 96);
    EXPECT_EQ(size(8, 1), blocks ? 160 : 96);  // 96 to 127, 128 to 191
  }
}

TEST(TensorParallelTest, Fp8BlocksOfSmallHeads) {
  ModelConfig c = SmallConfig();
  c.head_dim = 64;
  c.num_heads = 12;
  c.num_kv_heads = 12;
  c.moe_intermediate_size = c.intermediate_size = 128;
  c.fp8_scaling = Fp8Scaling::kBlocks;
  for (int32_t world_size : {1, 2}) {  // 12 or 6 heads: whole blocks
    EXPECT_TRUE(MakeLocalShape(c, {world_size - 1, world_size}).ok());
  }
  EXPECT_TRUE(MakeLocalShape(c, {0, 4}).ok());  // 3 heads from a block's start
  const Status status = MakeLocalShape(c, {1, 4}).status();
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  for (const char* part : {"num_attention_heads", "world_size 4", "head_dim"}) {
    EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
        << status.message();
  }
  c.fp8_scaling = Fp8Scaling::kChannels;
  EXPECT_TRUE(MakeLocalShape(c, {1, 4}).ok());
}

TEST(TensorParallelTest, RejectsWhatDoesNotDivide) {
  const auto expect = [](const char* field, Shard shard, auto&& change) {
    ModelConfig c = SmallConfig();
    change(c);
    testing::ExpectInvalid(MakeLocalShape(c, shard).status(), {field});
  };
  const auto same = [](ModelConfig&) {};
  expect("rank", {0, 0}, same);
  expect("rank", {-1, 2}, same);
  expect("rank", {2, 2}, same);
  expect("num_attention_heads", {0, 3}, same);
  expect("num_key_value_heads", {0, 2}, [](ModelConfig& c) {
    c.num_heads = 12;
    c.num_kv_heads = 3;
  });
  expect("num_key_value_heads", {0, 4}, [](ModelConfig& c) {
    c.num_heads = 12;
    c.num_kv_heads = 3;
  });
  expect("moe_intermediate_size", {0, 4},
         [](ModelConfig& c) { c.moe_intermediate_size = 18; });
  expect("intermediate_size", {0, 4},
         [](ModelConfig& c) { c.intermediate_size = 42; });
  ModelConfig c = SmallConfig();
  c.mlp_only_layers.clear();  // no dense layer: its size may be anything
  c.intermediate_size = 43;
  EXPECT_TRUE(MakeLocalShape(c, {0, 2}).ok());
}

}  // namespace
}  // namespace tenon
