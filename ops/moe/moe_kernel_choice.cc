#include "ops/moe/moe_kernel_choice.h"

#include <string>
#include <utility>

namespace tenon {
namespace {

using SizeBounds = std::pair<int64_t, int64_t>;

SizeBounds Sizes(const MoeKernelRow& row) {
  return {row.max_hidden, row.max_intermediate};
}

bool HasTile(const MoeWgmmaTile& tile) {
  for (const MoeWgmmaTile& known : kMoeWgmmaTiles) {
    if (tile == known) return true;
  }
  return false;
}

std::string Describe(const MoeWgmmaTile& tile) {
  return StrCat("token_tile ", tile.token_tile, ", row_warpgroups ",
                tile.row_warpgroups, ", blocks_per_sm ", tile.blocks_per_sm);
}

Status CheckRows(const char* what, const char* dtype, DType weights,
                 const MoeKernelRows& rows) {
  if (rows.count < 0 || (rows.count > 0 && rows.rows == nullptr)) {
    return InvalidArgumentError(what, ": ", dtype, " has ", rows.count,
                                " rows at ", rows.rows);
  }
  for (int32_t i = 0; i < rows.count; ++i) {
    const MoeKernelRow& row = rows.rows[i];
    const auto fail = [&](const std::string& problem) {
      return InvalidArgumentError(what, ": ", dtype, " row ", i, ": ", problem);
    };
    if (row.max_hidden < 1 || row.max_intermediate < 1 ||
        !(row.max_slots_per_expert > 0.0)) {
      return fail("a bound is not positive");
    }
    const bool last_of_group =
        i + 1 == rows.count || Sizes(rows.rows[i + 1]) != Sizes(row);
    if (last_of_group && row.max_slots_per_expert != MoeKernelRow::kAnyLoad) {
      return fail("the last of these sizes has a max_slots_per_expert");
    }
    if (i + 1 < rows.count) {
      const MoeKernelRow& next = rows.rows[i + 1];
      if (Sizes(next) < Sizes(row)) return fail("sizes do not ascend");
      if (!last_of_group &&
          !(row.max_slots_per_expert < next.max_slots_per_expert)) {
        return fail("max_slots_per_expert does not ascend");
      }
    }
    const MoeKernelConfig& config = row.config;
    if (!HasTile(config.gate_up)) {
      return fail("gate_up has no kernel of " + Describe(config.gate_up));
    }
    if (!HasTile(config.down)) {
      return fail("down has no kernel of " + Describe(config.down));
    }
    if (!HasMoeMmaTile(weights, config.mma_tile_rows)) {
      return fail(StrCat("no kernel has mma_tile_rows ", config.mma_tile_rows));
    }
  }
  return Status();
}

}  // namespace

Status CheckMoeKernelTable(const char* what, const MoeKernelTable& table) {
  TENON_RETURN_IF_ERROR(
      CheckRows(what, "float32", DType::kFloat32, table.float32));
  TENON_RETURN_IF_ERROR(
      CheckRows(what, "float16", DType::kFloat16, table.float16));
  return CheckRows(what, "float8", DType::kFloat8E4M3, table.float8);
}

}  // namespace tenon
