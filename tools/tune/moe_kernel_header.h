#ifndef TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_
#define TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_

#include <string>
#include <vector>

#include "engine/moe_kernel_file.h"

namespace tenon {

// The tables of ops/moe/moe_kernel_table.h, each with where it comes from.
struct MoeKernelTables {
  MoeKernelFile other;
  MoeKernelFile h100;
  MoeKernelFile h200;

  MoeKernelFile& Of(MoeGpu gpu);
};

MoeKernelTables BuiltInMoeKernelTables();

// The text of ops/moe/moe_kernel_table.h.
std::string FormatMoeKernelHeader(const MoeKernelTables& tables);

// Rows of `base` and of `measured`; where both have rows of the same dtype and
// sizes (max_hidden and max_intermediate), those of `measured`.
std::vector<MoeKernelRow> MergeMoeKernelRows(
    const std::vector<MoeKernelRow>& base,
    const std::vector<MoeKernelRow>& measured);

// Rows of one pair of sizes, in ascending order: neighbours with the same
// choice become one, and the last has no bound.
std::vector<MoeKernelRow> SimplifyMoeKernelRows(std::vector<MoeKernelRow> rows);

}  // namespace tenon

#endif  // TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_
