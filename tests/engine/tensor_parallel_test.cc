#include "engine/tensor_parallel.h"

#include <gtest/gtest.h>

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
