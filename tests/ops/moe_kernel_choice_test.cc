#include "ops/moe/moe_kernel_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "ops/moe/moe_tile_rows.h"

namespace tenon {
namespace {

// Of one multiprocessor, and the part of it that each block has for itself.
constexpr int64_t kHopperSharedBytes = 228 * 1024;
constexpr int64_t kHopperBlockSharedBytes = 227 * 1024;
constexpr int64_t kReservedSharedBytes = 1024;
constexpr int kHopperThreads = 2048;

constexpr MoeGpu kGpus[] = {MoeGpu::kOther, MoeGpu::kH100, MoeGpu::kH200};
constexpr DType kWeightDTypes[] = {DType::kFloat32, DType::kFloat16,
                                   DType::kBFloat16, DType::kFloat8E4M3};

MoeKernelRow Row(int64_t hidden, int64_t intermediate, double load,
                 int32_t mma_tile_rows = 64) {
  MoeKernelRow row;
  row.max_hidden = hidden;
  row.max_intermediate = intermediate;
  row.max_slots_per_expert = load;
  row.config.mma_tile_rows = mma_tile_rows;
  return row;
}

MoeKernelTable TableOf(const std::vector<MoeKernelRow>& rows) {
  MoeKernelTable table;
  table.float16 = {rows.data(), static_cast<int32_t>(rows.size())};
  return table;
}

MoeKernelQuery Query(int64_t hidden, int64_t intermediate, int64_t num_slots) {
  return {DType::kBFloat16, hidden, intermediate, num_slots / 128.0};
}

TEST(MoeKernelChoiceTest, EveryBuiltInRowIsUsable) {
  for (MoeGpu gpu : kGpus) {
    const Status status =
        CheckMoeKernelTable("built in", BuiltInMoeKernels(gpu));
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST(MoeKernelChoiceTest, EverySizeFitsAMultiprocessor) {
  for (const MoeWgmmaTile& tile : kMoeWgmmaTiles) {
    SCOPED_TRACE(tile.token_tile);
    EXPECT_EQ(tile.token_tile % 8, 0);  // wgmma's step of the narrow operand
    EXPECT_GE(tile.token_tile, 8);
    EXPECT_LE(tile.token_tile, 256);
    EXPECT_GE(tile.row_warpgroups, 1);
    EXPECT_GE(tile.blocks_per_sm, 1);
    const int64_t shared = MoeWgmmaMinSharedBytes(tile);
    EXPECT_LE(shared, kHopperBlockSharedBytes);
    EXPECT_LE((shared + kReservedSharedBytes) * tile.blocks_per_sm,
              kHopperSharedBytes);
    EXPECT_LE(128 * (1 + tile.row_warpgroups) * tile.blocks_per_sm,
              kHopperThreads);
  }
  for (int32_t rows : kMoeMmaTileRows) {
    EXPECT_EQ(rows % 16, 0);           // mma.sync's rows
    EXPECT_GE(rows, kMoeMinTileRows);  // for which scratch memory is sized
  }
}

TEST(MoeKernelChoiceTest, OtherGpusHaveARowForEverything) {
  for (DType dtype : kWeightDTypes) {
    for (int64_t slots : {int64_t{1}, int64_t{1} << 31}) {
      const MoeKernelQuery query = {dtype, int64_t{1} << 30, int64_t{1} << 30,
                                    static_cast<double>(slots)};
      EXPECT_GE(FindMoeKernelRow(BuiltInMoeKernels(MoeGpu::kOther), query), 0);
    }
  }
}

TEST(MoeKernelChoiceTest, PortableKernelsHaveTheTilesOfGroupedMatmul) {
  for (DType dtype : kWeightDTypes) {
    for (int64_t slots : {1, 8, 1536, 1537, 8000, 24575, 30000, 1000000}) {
      const MoeKernelQuery query = {dtype, 2048, 768, slots / 128.0};
      EXPECT_EQ(ChooseMoeKernel(MoeGpu::kOther, nullptr, query).mma_tile_rows,
                MoeTileRows(dtype, true, slots, 128))
          << DTypeName(dtype) << " " << slots;
    }
  }
}

TEST(MoeKernelChoiceTest, ChoiceIsAConstantExpression) {
  constexpr MoeKernelConfig config = ChooseMoeKernel(
      MoeGpu::kOther, nullptr, {DType::kFloat32, 2048, 768, 0.0625});
  static_assert(config.mma_tile_rows == 16);
}

TEST(MoeKernelChoiceTest, FirstRowWithinAllBounds) {
  const std::vector<MoeKernelRow> rows = {
      Row(2048, 192, 1.0, 16), Row(2048, 192, MoeKernelRow::kAnyLoad, 64),
      Row(2048, 768, 0.5, 128), Row(2048, 768, MoeKernelRow::kAnyLoad, 16)};
  const MoeKernelTable table = TableOf(rows);
  ASSERT_TRUE(CheckMoeKernelTable("table", table).ok());
  const auto found = [&](const MoeKernelQuery& query) {
    return FindMoeKernelRow(table, query);
  };
  EXPECT_EQ(found(Query(2048, 192, 128)), 0);  // bounds are inclusive
  EXPECT_EQ(found(Query(2048, 192, 129)), 1);
  EXPECT_EQ(found(Query(1024, 64, 1 << 30)), 1);
  EXPECT_EQ(found(Query(2048, 193, 64)), 2);
  EXPECT_EQ(found(Query(2048, 768, 65)), 3);
  EXPECT_EQ(found(Query(2049, 192, 1)), -1);
  EXPECT_EQ(found(Query(2048, 769, 1)), -1);
  MoeKernelQuery fp8 = Query(2048, 192, 1);
  fp8.weights = DType::kFloat8E4M3;
  EXPECT_EQ(found(fp8), -1);
}

TEST(MoeKernelChoiceTest, ATunedTableComesFirstWhereItHasARow) {
  const std::vector<MoeKernelRow> rows = {
      Row(2048, 768, MoeKernelRow::kAnyLoad, 128)};
  const MoeKernelTable tuned = TableOf(rows);
  for (MoeGpu gpu : kGpus) {
    EXPECT_EQ(ChooseMoeKernel(gpu, &tuned, Query(2048, 768, 8)),
              rows[0].config);
    EXPECT_EQ(ChooseMoeKernel(gpu, &tuned, Query(4096, 768, 8)),
              ChooseMoeKernel(gpu, nullptr, Query(4096, 768, 8)));
  }
}

// What was measured for one shape is no news of another one that the GPU's own
// table has rows for.
TEST(MoeKernelChoiceTest, ATunedRowYieldsToOnesOfCloserSizes) {
  for (MoeGpu gpu : {MoeGpu::kH100, MoeGpu::kH200}) {
    const MoeKernelRows& built_in = BuiltInMoeKernels(gpu).float16;
    for (int32_t i = 0; i < built_in.count; ++i) {
      const MoeKernelRow& own = built_in.rows[i];
      const MoeKernelQuery query = {DType::kBFloat16, own.max_hidden,
                                    own.max_intermediate,
                                    std::min(own.max_slots_per_expert, 1e6)};
      const auto with = [&](int64_t hidden, int64_t intermediate) {
        // Sizes that no kernel has tell it apart.
        const std::vector<MoeKernelRow> rows = {
            Row(hidden, intermediate, MoeKernelRow::kAnyLoad, 1)};
        const MoeKernelTable tuned = TableOf(rows);
        return ChooseMoeKernel(gpu, &tuned, query);
      };
      EXPECT_EQ(with(8192, 8192), own.config) << i;
      EXPECT_EQ(with(own.max_hidden, own.max_intermediate + 1), own.config);
      EXPECT_EQ(with(own.max_hidden, own.max_intermediate).mma_tile_rows, 1);
      EXPECT_EQ(
          with(MoeKernelRow::kAnySize, MoeKernelRow::kAnySize).mma_tile_rows,
          1);
    }
  }
}

TEST(MoeKernelChoiceTest, GpusByCapabilityAndBus) {
  EXPECT_EQ(MoeGpuOf(90, 5120), MoeGpu::kH100);
  EXPECT_EQ(MoeGpuOf(90, 6144), MoeGpu::kH200);
  EXPECT_EQ(MoeGpuOf(80, 5120), MoeGpu::kOther);
  EXPECT_EQ(MoeGpuOf(100, 8192), MoeGpu::kOther);
}

void ExpectRejected(const MoeKernelTable& table, const std::string& part) {
  const Status status = CheckMoeKernelTable("table", table);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find(part), std::string::npos)
      << status.message();
}

TEST(MoeKernelChoiceTest, RejectsTablesThatDoNotAscend) {
  constexpr double kAny = MoeKernelRow::kAnyLoad;
  ExpectRejected(TableOf({Row(2048, 768, 1.0)}), "row 0: the last of these");
  ExpectRejected(
      TableOf({Row(2048, 768, 2.0), Row(2048, 768, 2.0), Row(2048, 768, kAny)}),
      "row 0: max_slots_per_expert does not ascend");
  ExpectRejected(TableOf({Row(2048, 768, kAny), Row(2048, 768, kAny)}),
                 "row 0: max_slots_per_expert does not ascend");
  ExpectRejected(TableOf({Row(2048, 768, kAny), Row(2048, 192, kAny)}),
                 "row 0: sizes do not ascend");
  ExpectRejected(TableOf({Row(4096, 192, kAny), Row(2048, 768, kAny)}),
                 "row 0: sizes do not ascend");
  ExpectRejected(TableOf({Row(2048, 192, 1.0), Row(2048, 768, kAny)}),
                 "row 0: the last of these");
  ExpectRejected(TableOf({Row(0, 768, kAny)}), "not positive");
  ExpectRejected(TableOf({Row(2048, -1, kAny)}), "not positive");
  ExpectRejected(TableOf({Row(2048, 768, 0.0), Row(2048, 768, kAny)}),
                 "not positive");
  ExpectRejected(TableOf({Row(2048, 768, std::nan(""))}), "not positive");
}

TEST(MoeKernelChoiceTest, RejectsSizesWithoutAKernel) {
  std::vector<MoeKernelRow> rows = {Row(2048, 768, MoeKernelRow::kAnyLoad)};
  rows[0].config.gate_up.token_tile = 24;
  ExpectRejected(TableOf(rows),
                 "row 0: gate_up has no kernel of token_tile 24");
  rows[0].config.gate_up = MoeWgmmaTile();
  rows[0].config.down.row_warpgroups = 3;
  ExpectRejected(TableOf(rows), "down has no kernel");
  rows[0].config.down = MoeWgmmaTile();
  rows[0].config.mma_tile_rows = 32;
  ExpectRejected(TableOf(rows), "no kernel has mma_tile_rows 32");
  rows[0].config.mma_tile_rows = 128;
  EXPECT_TRUE(CheckMoeKernelTable("table", TableOf(rows)).ok());
  MoeKernelTable table;
  table.float8 = {rows.data(), 1};
  ExpectRejected(table, "float8 row 0: no kernel has mma_tile_rows 128");
  table = MoeKernelTable();
  table.float32 = {rows.data(), 1};
  ExpectRejected(table, "float32 row 0: no kernel has mma_tile_rows 128");
  table = MoeKernelTable();
  table.float8.count = 1;
  ExpectRejected(table, "float8 has 1 rows");
  table.float8.count = -1;
  ExpectRejected(table, "float8 has -1 rows");
}

}  // namespace
}  // namespace tenon
