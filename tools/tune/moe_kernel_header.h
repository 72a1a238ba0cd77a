#ifndef TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_
#define TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_

#include <optional>
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

// Merges rows of every dtype into `base`. Its source is then that of the rows
// that stay, if any do, and that of `measured`.
void MergeMoeKernelFile(const MoeKernelFile& measured, MoeKernelFile* base);

// What was found at one number of slots per expert: sizes that are faster than
// those built in, or none.
struct MoeMeasurement {
  double slots_per_expert = 0.0;
  std::optional<MoeKernelConfig> better;
};

// The rows for calls of these sizes, from measurements in ascending order. One
// speaks for all calls above the one before; where nothing was better, or
// measured, stands what is built in.
std::vector<MoeKernelRow> MoeKernelRowsFrom(
    MoeGpu gpu, DType weights, int64_t hidden, int64_t intermediate,
    const std::vector<MoeMeasurement>& measurements);

}  // namespace tenon

#endif  // TENON_TOOLS_TUNE_MOE_KERNEL_HEADER_H_
