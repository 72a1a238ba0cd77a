#include "ops/moe/moe_align.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "ops/core/build_config.h"
#include "tests/reference/moe_align_reference.h"
#include "tests/testing/cuda_graph.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::TestTensor;
using testing::UniformIntegers;

// Tensors of one call; outputs start with values that no call writes.
struct Call {
  Call(Device device, int64_t tokens, int64_t top_k, int32_t num_experts,
       const std::vector<int64_t>& id_values, int32_t tile_rows,
       int64_t num_tiles) {
    const auto filled = [&](std::vector<int64_t> shape, int64_t count) {
      return TestTensor::FromIntegers(device, DType::kInt32, std::move(shape),
                                      std::vector<int64_t>(count, -77));
    };
    ids = TestTensor::FromIntegers(device, DType::kInt32, {tokens, top_k},
                                   id_values);
    offsets = filled({num_experts + 1}, num_experts + 1);
    slots = filled({tokens * top_k}, tokens * top_k);
    tiles = filled({num_tiles, 3}, num_tiles * 3);
    p.topk_ids = ids.view();
    p.num_experts = num_experts;
    p.expert_offsets = offsets.view();
    p.sorted_slots = slots.view();
    if (tile_rows > 0) p.tiles = tiles.view();
    p.tile_rows = tile_rows;
    ReserveWorkspace(device);
  }

  void ReserveWorkspace(Device device) {
    const int64_t bytes = static_cast<int64_t>(MoeAlignWorkspaceBytes(p));
    workspace = TestTensor(device, DType::kUInt8, {bytes});
    p.workspace = workspace.view().data;
    p.workspace_size = static_cast<size_t>(bytes);
  }

  TestTensor ids, offsets, slots, tiles, workspace;
  MoeAlignParams p;
};

class MoeAlignTest : public testing::OpTest {
 protected:
  Call MakeCall(int64_t tokens, int64_t top_k, int32_t num_experts,
                const std::vector<int64_t>& ids, int32_t tile_rows,
                int64_t extra_tiles = 0) {
    const int64_t num_tiles =
        tile_rows > 0 ? MoeMaxTiles(tokens * top_k, num_experts, tile_rows) : 0;
    return Call(device(), tokens, top_k, num_experts, ids, tile_rows,
                num_tiles + extra_tiles);
  }

  void RunAndCheck(Call& call, const std::vector<int64_t>& ids) {
    const Status status = MoeAlign(call.p, stream());
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
    const bool with_tiles = call.p.tiles.present();
    const reference::MoeAlignment expected = reference::MoeAlign(
        ids, call.p.num_experts, with_tiles ? call.p.tile_rows : 1 << 30,
        with_tiles ? call.p.tiles.shape[0] : 0);
    EXPECT_EQ(call.offsets.Integers(), expected.expert_offsets);
    EXPECT_EQ(call.slots.Integers(), expected.sorted_slots);
    if (with_tiles) {
      EXPECT_EQ(call.tiles.Integers(), expected.tiles);
    }
    EXPECT_EQ(call.ids.Bytes(), call.ids.InitialBytes());
    for (const TestTensor* tensor :
         {&call.offsets, &call.slots, &call.tiles, &call.workspace}) {
      EXPECT_EQ(tensor->NumStrayWrites(), 0);
    }
  }
};

TEST_P(MoeAlignTest, Acceptance15_OneHotVector) {
  const std::vector<int64_t> ids = {0, 1, 2, 0, 3, 1, 3, 1, 4};
  Call call = MakeCall(3, 3, 5, ids, 0);
  RunAndCheck(call, ids);
  const std::vector<int64_t> offsets = call.offsets.Integers();
  const std::vector<int64_t> slots = call.slots.Integers();
  std::vector<std::string> one_hot(5, "000000000");
  for (int e = 0; e < 5; ++e) {
    for (int64_t i = offsets[e]; i < offsets[e + 1]; ++i) {
      one_hot[e][slots[i]] = '1';
    }
  }
  EXPECT_EQ(one_hot,
            (std::vector<std::string>{"100100000", "010001010", "001000000",
                                      "000010100", "000000001"}));
}

TEST_P(MoeAlignTest, Acceptance15_CompactVector) {
  const std::vector<int64_t> ids = {0, 1, 1, 3};
  Call call = MakeCall(2, 2, 4, ids, 0);
  RunAndCheck(call, ids);
  EXPECT_EQ(call.offsets.Integers(), (std::vector<int64_t>{0, 1, 3, 3, 4}));
  EXPECT_EQ(call.slots.Integers(), (std::vector<int64_t>{0, 1, 2, 3}));
}

TEST_P(MoeAlignTest, Acceptance15_RandomIds) {
  for (const auto& [tokens, top_k, num_experts] :
       std::vector<std::tuple<int64_t, int64_t, int32_t>>{{1, 1, 1},
                                                          {1, 8, 128},
                                                          {2, 5, 3},
                                                          {13, 8, 127},
                                                          {111, 3, 257},
                                                          {128, 8, 128},
                                                          {600, 8, 160},
                                                          {1023, 8, 1024},
                                                          {1024, 8, 128},
                                                          {1025, 8, 128},
                                                          {1367, 6, 40},
                                                          {4099, 3, 257},
                                                          {8192, 8, 128},
                                                          {8192, 1, 1024},
                                                          {16384, 9, 161},
                                                          {32768, 8, 128}}) {
    SCOPED_TRACE(StrCat(tokens, "x", top_k, " experts ", num_experts));
    const std::vector<int64_t> ids =
        UniformIntegers(tokens * top_k, 1, 0, num_experts - 1);
    Call call = MakeCall(tokens, top_k, num_experts, ids, 16);
    RunAndCheck(call, ids);
    const std::vector<uint8_t> first = call.slots.Bytes();
    ASSERT_TRUE(MoeAlign(call.p, stream()).ok());
    Finish();
    EXPECT_EQ(call.slots.Bytes(), first);
  }
}

TEST_P(MoeAlignTest, Acceptance15_IdsOutOfRangeAreSkipped) {
  for (int64_t tokens : {7, 1000, 1500, 9000}) {
    SCOPED_TRACE(tokens);
    std::vector<int64_t> ids = UniformIntegers(tokens * 8, 2, -20, 70);
    ids[3] = std::numeric_limits<int32_t>::min();
    ids[4] = std::numeric_limits<int32_t>::max();
    ids[5] = 49;
    ids[6] = 50;
    ids[7] = -1;
    Call call = MakeCall(tokens, 8, 50, ids, 8);
    RunAndCheck(call, ids);
  }
}

TEST_P(MoeAlignTest, Acceptance15_AllSkipped) {
  for (int64_t tokens : {1, 5000}) {
    const std::vector<int64_t> ids(tokens * 4, -1);
    Call call = MakeCall(tokens, 4, 16, ids, 8);
    RunAndCheck(call, ids);
  }
}

TEST_P(MoeAlignTest, Acceptance15_AllOnOneExpert) {
  for (int64_t tokens : {3, 1024, 1025, 8192}) {
    for (int64_t expert : {0, 77, 127}) {
      SCOPED_TRACE(StrCat(tokens, " on ", expert));
      const std::vector<int64_t> ids(tokens * 8, expert);
      Call call = MakeCall(tokens, 8, 128, ids, 64);
      RunAndCheck(call, ids);
    }
  }
}

TEST_P(MoeAlignTest, Acceptance16_TileVector) {
  std::vector<int64_t> ids;
  for (const auto& [expert, count] : std::vector<std::pair<int64_t, int>>{
           {2, 60}, {-1, 16}, {0, 8}, {3, 16}}) {
    ids.insert(ids.end(), count, expert);
  }
  EXPECT_EQ(MoeMaxTiles(100, 4, 16), 10);
  Call call = MakeCall(50, 2, 4, ids, 16);
  RunAndCheck(call, ids);
  EXPECT_EQ(call.tiles.Integers(),
            (std::vector<int64_t>{0, 0,  0, 2, 0,  8, 2, 1,  24, 2,
                                  2, 40, 2, 3, 56, 3, 0, 68, -1, 0,
                                  0, -1, 0, 0, -1, 0, 0, -1, 0,  0}));
}

TEST_P(MoeAlignTest, Acceptance16_TilesCoverEveryPositionOnce) {
  for (int64_t tokens : {1, 50, 1025, 5000}) {
    for (int32_t tile_rows : {1, 7, 64, std::numeric_limits<int32_t>::max()}) {
      SCOPED_TRACE(StrCat(tokens, " tokens, tiles of ", tile_rows));
      const std::vector<int64_t> ids = UniformIntegers(tokens * 8, 3, -5, 99);
      Call call = MakeCall(tokens, 8, 100, ids, tile_rows, 5);
      RunAndCheck(call, ids);
      const std::vector<int64_t> offsets = call.offsets.Integers();
      const std::vector<int64_t> tiles = call.tiles.Integers();
      std::vector<int> covered(offsets.back(), 0);
      for (size_t i = 0; i < tiles.size(); i += 3) {
        if (tiles[i] < 0) continue;
        const int64_t end =
            std::min(tiles[i + 2] + tile_rows, offsets[tiles[i] + 1]);
        for (int64_t j = tiles[i + 2]; j < end; ++j) ++covered[j];
      }
      EXPECT_EQ(covered, std::vector<int>(covered.size(), 1));
    }
  }
}

TEST_P(MoeAlignTest, Acceptance16_MaxTiles) {
  EXPECT_EQ(MoeMaxTiles(0, 128, 16), 0);
  EXPECT_EQ(MoeMaxTiles(8, 128, 16), 8);  // a tile per slot at most
  EXPECT_EQ(MoeMaxTiles(100, 4, 1), 100);
  EXPECT_EQ(MoeMaxTiles(8192, 128, 64), (8192 + 128 * 63 + 63) / 64);
  const int32_t max = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(MoeMaxTiles(max, 1024, max), 1025);
}

TEST_P(MoeAlignTest, StridedIds) {
  for (int64_t tokens : {9, 3000}) {
    const std::vector<int64_t> wide = UniformIntegers(tokens * 11, 4, 0, 31);
    TestTensor ids =
        TestTensor::FromIntegers(device(), DType::kInt32, {tokens, 11}, wide);
    std::vector<int64_t> inner;
    for (int64_t t = 0; t < tokens; ++t) {
      inner.insert(inner.end(), wide.begin() + t * 11 + 2,
                   wide.begin() + t * 11 + 7);
    }
    Call call = MakeCall(tokens, 5, 32, inner, 16);
    call.p.topk_ids = Columns(ids.view(), 2, 5);
    RunAndCheck(call, inner);
    EXPECT_EQ(ids.Bytes(), ids.InitialBytes());
  }
}

TEST_P(MoeAlignTest, StridedTiles) {
  const std::vector<int64_t> ids = UniformIntegers(24, 5, 0, 3);
  Call call = MakeCall(3, 8, 4, ids, 4);
  const int64_t num_tiles = call.p.tiles.shape[0];
  TestTensor wide =
      TestTensor::FromIntegers(device(), DType::kInt32, {num_tiles, 5},
                               std::vector<int64_t>(num_tiles * 5, -77));
  call.p.tiles = Columns(wide.view(), 1, 3);
  ASSERT_TRUE(MoeAlign(call.p, stream()).ok());
  Finish();
  const reference::MoeAlignment expected =
      reference::MoeAlign(ids, 4, 4, num_tiles);
  const std::vector<int64_t> actual = wide.Integers();
  for (int64_t i = 0; i < num_tiles * 5; ++i) {
    const int64_t column = i % 5 - 1;
    EXPECT_EQ(actual[i], column >= 0 && column < 3
                             ? expected.tiles[i / 5 * 3 + column]
                             : -77);
  }
}

TEST_P(MoeAlignTest, DoesNotDependOnThreads) {
  const std::vector<int64_t> ids = UniformIntegers(5000 * 8, 6, -1, 63);
  Call call = MakeCall(5000, 8, 64, ids, 16);
  Stream alone = stream();
  alone.cpu = nullptr;
  ASSERT_TRUE(MoeAlign(call.p, alone).ok());
  Finish();
  const std::vector<uint8_t> slots = call.slots.Bytes();
  RunAndCheck(call, ids);
  EXPECT_EQ(call.slots.Bytes(), slots);
}

TEST_P(MoeAlignTest, RunsInACudaGraph) {
  if (device().type != DeviceType::kCuda) GTEST_SKIP() << "CUDA only";
  if constexpr (kCudaBuilt) {
    // Two paths; 1024 experts need the most shared memory.
    for (int64_t tokens : {16, 2000}) {
      const std::vector<int64_t> ids = UniformIntegers(tokens * 8, 8, -1, 1023);
      Call call = MakeCall(tokens, 8, 1024, ids, 16);
      Call captured = MakeCall(tokens, 8, 1024, ids, 16);
      RunAndCheck(call, ids);
      const Status status = testing::RunAsCudaGraph(
          stream(), 3, [&] { return MoeAlign(captured.p, stream()); });
      ASSERT_TRUE(status.ok()) << status.message();
      Finish();
      EXPECT_EQ(captured.slots.Bytes(), call.slots.Bytes());
      EXPECT_EQ(captured.tiles.Bytes(), call.tiles.Bytes());
    }
  }
}

TEST_P(MoeAlignTest, ZeroTokensIsOk) {
  for (int64_t extra_tiles : {0, 6}) {
    Call call = MakeCall(0, 8, 16, {}, 16, extra_tiles);
    RunAndCheck(call, {});
  }
  Call no_choices = MakeCall(3, 0, 16, {}, 0);
  RunAndCheck(no_choices, {});
}

TEST_P(MoeAlignTest, RejectsBadArguments) {
  const std::vector<int64_t> ids = UniformIntegers(12000, 7, 0, 15);
  Call call = MakeCall(1500, 8, 16, ids, 16);
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    MoeAlignParams p = call.p;
    change(p);
    parts.push_back("MoeAlign: ");
    testing::ExpectInvalid(MoeAlign(p, stream()), parts);
  };
  using P = MoeAlignParams;
  expect({"topk_ids is missing"}, [](P& p) { p.topk_ids = TensorView(); });
  expect({"topk_ids", "rank 1"}, [](P& p) { p.topk_ids.rank = 1; });
  expect({"topk_ids", "int64"}, [](P& p) { p.topk_ids.dtype = DType::kInt64; });
  expect({"topk_ids", "null"}, [](P& p) { p.topk_ids.data = nullptr; });
  expect({"topk_ids", "2^31"}, [](P& p) {
    p.topk_ids.shape[0] = int64_t{1} << 28;
    p.topk_ids.stride[0] = 0;
  });
  expect({"topk_ids", "2^31"}, [](P& p) {
    p.topk_ids.shape[0] = int64_t{1} << 61;
    p.topk_ids.stride[0] = 0;
  });
  expect({"num_experts is 0"}, [](P& p) { p.num_experts = 0; });
  expect({"num_experts is -1"}, [](P& p) { p.num_experts = -1; });
  expect({"num_experts is 1025"}, [](P& p) { p.num_experts = 1025; });
  expect({"expert_offsets", "[16]", "[17]"},
         [](P& p) { p.expert_offsets.shape[0] = 16; });
  expect({"expert_offsets", "float32"},
         [](P& p) { p.expert_offsets.dtype = DType::kFloat32; });
  expect({"expert_offsets is missing"},
         [](P& p) { p.expert_offsets = TensorView(); });
  expect({"sorted_slots", "[11999]", "[12000]"},
         [](P& p) { p.sorted_slots.shape[0] = 11999; });
  expect({"sorted_slots is on cuda:7"}, [](P& p) {
    p.sorted_slots.device = {DeviceType::kCuda, 7};
  });
  expect({"tile_rows is 0"}, [](P& p) { p.tile_rows = 0; });
  expect({"tiles", "expected [*, 3]"}, [](P& p) { p.tiles.shape[1] = 2; });
  expect({"tiles", "share memory"}, [](P& p) { p.tiles.stride[0] = 2; });
  expect({"number of tiles is 764, expected 765"},
         [](P& p) { p.tiles.shape[0] = 764; });
  expect({"sorted_slots overlaps topk_ids"},
         [](P& p) { p.sorted_slots.data = p.topk_ids.data; });
  expect({"tiles overlaps expert_offsets"},
         [](P& p) { p.tiles.data = p.expert_offsets.data; });
  expect({"workspace is null"}, [](P& p) { p.workspace = nullptr; });
  expect({"workspace_size"}, [](P& p) { --p.workspace_size; });
  expect({"workspace", "aligned"},
         [](P& p) { p.workspace = static_cast<char*>(p.workspace) + 4; });
  for (const TestTensor* tensor : {&call.offsets, &call.slots, &call.tiles}) {
    EXPECT_EQ(tensor->Bytes(), tensor->InitialBytes());
  }
}

TEST_P(MoeAlignTest, WorkspaceBytesOfBadArguments) {
  MoeAlignParams p;
  EXPECT_EQ(MoeAlignWorkspaceBytes(p), 0u);
  p.topk_ids = MakeTensor(nullptr, DType::kInt32, device(), {-4, 8});
  p.num_experts = 16;
  EXPECT_EQ(MoeAlignWorkspaceBytes(p), 0u);
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeAlignTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
