// No bit of Moe's result depends on the table of kernel sizes that a caller
// passes, and no table can do harm.

#include <gtest/gtest.h>

#include "ops/moe/moe_kernel_choice.h"
#include "tests/ops/moe_fixture.h"

namespace tenon::moe_test {
namespace {

class MoeKernelsTest : public Fixture {
 protected:
  // Every size for each projection on its own. The CPU reads none.
  std::vector<MoeKernelConfig> AllConfigs(DType weights) const {
    if (!on_cuda()) return {MoeKernelConfig()};
    std::vector<MoeKernelConfig> configs;
    for (const MoeWgmmaTile& tile : kMoeWgmmaTiles) {
      MoeKernelConfig config;
      config.gate_up = tile;
      configs.push_back(config);
      config = MoeKernelConfig();
      config.down = tile;
      configs.push_back(config);
    }
    for (int32_t rows : kMoeMmaTileRows) {
      if (!HasMoeMmaTile(weights, rows)) continue;
      MoeKernelConfig config;
      config.mma_tile_rows = rows;
      configs.push_back(config);
    }
    return configs;
  }

  static MoeKernelTable TableFor(DType weights, const MoeKernelRow& row) {
    MoeKernelTable table;
    const MoeKernelRows rows = {&row, 1};
    (weights == DType::kFloat32      ? table.float32
     : weights == DType::kFloat8E4M3 ? table.float8
                                     : table.float16) = rows;
    return table;
  }

  void ExpectSameBits(const Problem& problem, bool with_residual = false) {
    SCOPED_TRACE(problem.Text());
    const testing::TestTensor residual(
        device(), dtype(), {problem.tokens, problem.hidden},
        {problem.hidden + problem.padding, 1},
        Normal(problem.tokens * problem.hidden, 9));
    Call call(device(), dtype(), problem);
    if (with_residual) call.params().residual = residual.view();
    const MoeKernelRow first;
    const MoeKernelTable first_table =
        TableFor(call.params().gate.dtype, first);
    call.params().kernels = &first_table;
    Run(call);
    const std::vector<uint8_t> expected = call.out().Bytes();
    const DType weights = call.params().gate.dtype;
    for (const MoeKernelConfig& config : AllConfigs(weights)) {
      SCOPED_TRACE(StrCat("token tiles ", config.gate_up.token_tile, ", ",
                          config.down.token_tile, ", rows ",
                          config.mma_tile_rows));
      MoeKernelRow row;
      row.config = config;
      const MoeKernelTable table = TableFor(weights, row);
      const testing::TestTensor out(device(), dtype(),
                                    {problem.tokens, problem.hidden},
                                    {problem.hidden + problem.padding, 1}, {});
      call.params().out = out.view();
      call.params().kernels = &table;
      call.AddWorkspace();
      Run(call);
      EXPECT_EQ(out.Bytes(), expected);
      EXPECT_EQ(out.NumStrayWrites(), 0);
      EXPECT_EQ(call.workspace().NumStrayWrites(), 0);
    }
  }
};

TEST_P(MoeKernelsTest, NoSizeChangesABit) {
  Problem problem;
  problem.num_experts = 5;
  problem.top_k = 3;
  for (Experts experts :
       {Experts::kAsX, Experts::kFp8Blocks, Experts::kFp8Rows}) {
    problem.experts = experts;
    for (int64_t tokens : Fewer<int64_t>({1, 21, 150, SmallOr(40, 700)})) {
      problem.tokens = on_cuda() ? tokens : tokens / 7 + 1;
      problem.hidden = on_cuda() ? 256 : 64;
      problem.intermediate = on_cuda() ? 192 : 48;
      ExpectSameBits(problem);
    }
    problem.hidden = 36;  // 16 bytes at a time is not possible
    problem.intermediate = 20;
    ExpectSameBits(problem);
  }
}

// Every kernel with little to do, as for tools that watch each access.
TEST_P(MoeKernelsTest, NoSizeChangesABitOfASmallCall) {
  Problem problem;
  problem.num_experts = 2;
  problem.top_k = 2;
  problem.tokens = 3;
  problem.hidden = problem.intermediate = 128;
  for (Experts experts :
       {Experts::kAsX, Experts::kFp8Blocks, Experts::kFp8Rows}) {
    problem.experts = experts;
    ExpectSameBits(problem, true);
  }
}

// Tiles and steps that are not full, rows that are apart, many choices.
TEST_P(MoeKernelsTest, NoSizeChangesABitOfFewTokens) {
  for (Experts experts :
       {Experts::kAsX, Experts::kFp8Blocks, Experts::kFp8Rows}) {
    for (int64_t tokens : Fewer<int64_t>({1, 2, 5, 8, 9, 17, 32}, 3)) {
      Problem problem;
      problem.experts = experts;
      problem.tokens = tokens;
      problem.num_experts = on_cuda() ? 12 : 5;
      problem.top_k = tokens == 5 ? 16 : 8;
      problem.hidden = !on_cuda() ? 32 : tokens == 2 ? 640 : 256;
      problem.intermediate = !on_cuda() ? 16 : tokens == 1 ? 384 : 128;
      problem.padding = 16;
      ExpectSameBits(problem, tokens % 2 == 0);
    }
  }
}

TEST_P(MoeKernelsTest, NoSizeChangesABitWhereIdsRepeatOrAreOfNoExpert) {
  for (Experts experts :
       {Experts::kAsX, Experts::kFp8Blocks, Experts::kFp8Rows}) {
    Problem problem;
    problem.experts = experts;
    problem.tokens = 4;
    problem.num_experts = 3;
    problem.top_k = 4;
    problem.hidden = problem.intermediate = 128;
    problem.ids = {0, 0, 2, 0, -1, 3, -1, 3, 1, 1, 1, 1, 2, -1, 0, 2};
    ExpectSameBits(problem);
    problem.ids.assign(16, -1);
    ExpectSameBits(problem, true);
  }
}

TEST_P(MoeKernelsTest, AnEmptyTableIsOk) {
  Problem problem;
  problem.tokens = 4;
  problem.hidden = 64;
  problem.intermediate = 32;
  problem.num_experts = 3;
  problem.top_k = 2;
  Call call(device(), dtype(), problem);
  Run(call);
  const std::vector<uint8_t> expected = call.out().Bytes();
  const MoeKernelTable table;
  call.params().kernels = &table;
  Run(call);
  EXPECT_EQ(call.out().Bytes(), expected);
}

TEST_P(MoeKernelsTest, RejectsTablesThatCannotBeUsed) {
  Problem problem;
  problem.hidden = problem.intermediate = 16;
  Call call(device(), dtype(), problem);
  MoeKernelRow row;
  MoeKernelTable table;
  table.float8 = {&row, 1};  // whether or not this call would use it
  call.params().kernels = &table;
  row.config.down.token_tile = 12;
  testing::ExpectInvalid(Moe(call.params(), stream()),
                         {"Moe", "kernels", "float8", "down", "12"});
  row = MoeKernelRow();
  row.max_slots_per_expert = 1.0;
  testing::ExpectInvalid(Moe(call.params(), stream()),
                         {"Moe", "kernels", "float8", "max_slots_per_expert"});
  table.float8 = {nullptr, 1};
  testing::ExpectInvalid(Moe(call.params(), stream()),
                         {"Moe", "kernels", "float8", "1 rows"});
  Finish();
  EXPECT_EQ(call.out().Bytes(), call.out().InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeKernelsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
