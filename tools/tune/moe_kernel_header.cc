#include "tools/tune/moe_kernel_header.h"

#include <algorithm>
#include <set>
#include <tuple>
#include <utility>

namespace tenon {
namespace {

std::pair<int64_t, int64_t> Sizes(const MoeKernelRow& row) {
  return {row.max_hidden, row.max_intermediate};
}

bool HasRowsOf(const std::vector<MoeKernelRow>& rows,
               const std::pair<int64_t, int64_t>& sizes) {
  return std::any_of(rows.begin(), rows.end(), [&](const MoeKernelRow& row) {
    return Sizes(row) == sizes;
  });
}

std::vector<MoeKernelRow> Copy(const MoeKernelRows& rows) {
  return {rows.rows, rows.rows + rows.count};
}

MoeKernelFile FileOf(const MoeKernelTable& table, const char* device,
                     const char* source) {
  return {device, source, Copy(table.float32), Copy(table.float16),
          Copy(table.float8)};
}

std::string Size(int64_t value) {
  return value == MoeKernelRow::kAnySize ? "MoeKernelRow::kAnySize"
                                         : StrCat(value);
}

std::string Tile(const MoeWgmmaTile& tile) {
  return StrCat("{", tile.token_tile, ", ", tile.row_warpgroups, ", ",
                tile.blocks_per_sm, "}");
}

std::string FormatRows(const std::string& name,
                       const std::vector<MoeKernelRow>& rows) {
  if (rows.empty()) return "";
  std::string out = StrCat("inline constexpr MoeKernelRow ", name, "[] = {\n");
  for (const MoeKernelRow& row : rows) {
    const double load = row.max_slots_per_expert;
    const MoeKernelConfig& c = row.config;
    out += StrCat("    {", Size(row.max_hidden), ", ",
                  Size(row.max_intermediate), ", ",
                  load == MoeKernelRow::kAnyLoad ? "MoeKernelRow::kAnyLoad"
                                                 : ShortestDecimal(load),
                  ",\n     {", Tile(c.gate_up), ", ", Tile(c.down), ", ",
                  c.mma_tile_rows, "}},\n");
  }
  return out + "};\n";
}

std::string RowsOf(const std::string& name,
                   const std::vector<MoeKernelRow>& rows) {
  return rows.empty() ? "{}" : StrCat("{", name, ", ", rows.size(), "}");
}

// A string literal over lines of at most 70 characters.
std::string Literal(const std::string& text) {
  constexpr size_t kWidth = 70;
  std::string out;
  for (size_t i = 0; i == 0 || i < text.size(); i += kWidth) {
    out += out.empty() ? "\n    \"" : "\"\n    \"";
    for (const char c : text.substr(i, kWidth)) {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + "\"";
}

std::string FormatTable(const char* gpu, const MoeKernelFile& file) {
  const std::string name = StrCat("kMoeKernels", gpu);
  return StrCat("\ninline constexpr char ", name,
                "Device[] =", Literal(file.device), ";\ninline constexpr char ",
                name, "Source[] =", Literal(file.source), ";\n",
                FormatRows(name + "Float32", file.float32),
                FormatRows(name + "Float16", file.float16),
                FormatRows(name + "Float8", file.float8),
                "inline constexpr MoeKernelTable ", name, " = {\n    ",
                RowsOf(name + "Float32", file.float32), ",\n    ",
                RowsOf(name + "Float16", file.float16), ",\n    ",
                RowsOf(name + "Float8", file.float8), "};\n");
}

}  // namespace

MoeKernelFile& MoeKernelTables::Of(MoeGpu gpu) {
  switch (gpu) {
    case MoeGpu::kH100:
      return h100;
    case MoeGpu::kH200:
      return h200;
    case MoeGpu::kOther:
      break;
  }
  return other;
}

MoeKernelTables BuiltInMoeKernelTables() {
  return {
      FileOf(kMoeKernelsOther, kMoeKernelsOtherDevice, kMoeKernelsOtherSource),
      FileOf(kMoeKernelsH100, kMoeKernelsH100Device, kMoeKernelsH100Source),
      FileOf(kMoeKernelsH200, kMoeKernelsH200Device, kMoeKernelsH200Source)};
}

std::string FormatMoeKernelHeader(const MoeKernelTables& tables) {
  return StrCat(R"(#ifndef TENON_OPS_MOE_MOE_KERNEL_TABLE_H_
#define TENON_OPS_MOE_MOE_KERNEL_TABLE_H_

#include "ops/moe/moe_kernel_config.h"

// Sizes of the expert kernels, by GPU. tools/tune measures them and writes this
// file (--header); each table says where it comes from. A row:
//   max_hidden, max_intermediate, max_slots_per_expert,
//   {gate_up {token_tile, row_warpgroups, blocks_per_sm}, down {same},
//    mma_tile_rows}

namespace tenon {

// clang-format off
)",
                FormatTable("Other", tables.other),
                FormatTable("H100", tables.h100),
                FormatTable("H200", tables.h200), R"(
// clang-format on

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_KERNEL_TABLE_H_
)");
}

std::vector<MoeKernelRow> MergeMoeKernelRows(
    const std::vector<MoeKernelRow>& base,
    const std::vector<MoeKernelRow>& measured) {
  std::vector<MoeKernelRow> rows = measured;
  for (const MoeKernelRow& row : base) {
    if (!HasRowsOf(measured, Sizes(row))) rows.push_back(row);
  }
  std::stable_sort(rows.begin(), rows.end(),
                   [](const MoeKernelRow& a, const MoeKernelRow& b) {
                     return std::tuple(Sizes(a), a.max_slots_per_expert) <
                            std::tuple(Sizes(b), b.max_slots_per_expert);
                   });
  return rows;
}

void MergeMoeKernelFile(const MoeKernelFile& measured, MoeKernelFile* base) {
  bool keeps = false;
  const auto merge = [&](std::vector<MoeKernelRow> MoeKernelFile::*rows) {
    for (const MoeKernelRow& row : base->*rows) {
      keeps = keeps || !HasRowsOf(measured.*rows, Sizes(row));
    }
    base->*rows = MergeMoeKernelRows(base->*rows, measured.*rows);
  };
  merge(&MoeKernelFile::float32);
  merge(&MoeKernelFile::float16);
  merge(&MoeKernelFile::float8);
  base->source =
      keeps ? StrCat(base->source, "; ", measured.source) : measured.source;
}

std::vector<MoeKernelRow> MoeKernelRowsFrom(
    MoeGpu gpu, DType weights, int64_t hidden, int64_t intermediate,
    const std::vector<MoeMeasurement>& measurements) {
  // Wherever the choice may change.
  std::set<double> bounds = {MoeKernelRow::kAnyLoad};
  for (const MoeKernelTable* table :
       {&BuiltInMoeKernels(gpu), &BuiltInMoeKernels(MoeGpu::kOther)}) {
    const MoeKernelRows& rows = table->For(weights);
    for (int32_t i = 0; i < rows.count; ++i) {
      bounds.insert(rows.rows[i].max_slots_per_expert);
    }
  }
  for (const MoeMeasurement& m : measurements) {
    bounds.insert(m.slots_per_expert);
  }
  std::vector<MoeKernelRow> rows;
  for (double bound : bounds) {
    MoeKernelRow row;
    row.max_hidden = hidden;
    row.max_intermediate = intermediate;
    row.max_slots_per_expert = bound;
    row.config =
        ChooseMoeKernel(gpu, nullptr, {weights, hidden, intermediate, bound});
    const auto m = std::find_if(
        measurements.begin(), measurements.end(),
        [&](const MoeMeasurement& m) { return bound <= m.slots_per_expert; });
    if (m != measurements.end() && m->better) row.config = *m->better;
    if (!rows.empty() && rows.back().config == row.config) {
      rows.back().max_slots_per_expert = bound;
    } else {
      rows.push_back(row);
    }
  }
  return rows;
}

}  // namespace tenon
