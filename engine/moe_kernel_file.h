#ifndef TENON_ENGINE_MOE_KERNEL_FILE_H_
#define TENON_ENGINE_MOE_KERNEL_FILE_H_

#include <string>
#include <string_view>
#include <vector>

#include "ops/core/status.h"
#include "ops/moe/moe_kernel_choice.h"

namespace tenon {

// A table of expert-kernel sizes that was measured on some GPU, and where it
// comes from: what tools/tune writes and a caller passes. A JSON object:
//   "format"   "tenon-moe-kernels-1"
//   "device"   name of the GPU
//   "source"   what was measured, and when
//   "float32", "float16", "float8"   arrays of rows, by dtype of the weights;
//              each may be left out. A row is an object:
//     "max_hidden", "max_intermediate", "max_slots_per_expert"
//                the row's bounds, null: none
//     "gate_up", "down"   objects of token_tile, row_warpgroups, blocks_per_sm
//     "mma_tile_rows"
// See ops/moe/moe_kernel_config.h for what they mean. Nothing else may be there
// and nothing else missing.
struct MoeKernelFile {
  std::string device;
  std::string source;
  std::vector<MoeKernelRow> float32;
  std::vector<MoeKernelRow> float16;
  std::vector<MoeKernelRow> float8;

  // Points to the rows of this object.
  MoeKernelTable table() const;
};

// InvalidArgument, beginning with `name`, for anything that is not exactly a
// usable table.
StatusOr<MoeKernelFile> ParseMoeKernelFile(std::string_view text,
                                           const std::string& name);
// NotFound where there is no such file.
StatusOr<MoeKernelFile> ReadMoeKernelFile(const std::string& path);

// What ParseMoeKernelFile reads back to the same.
std::string FormatMoeKernelFile(const MoeKernelFile& file);

// The shortest decimal that reads back to the same value.
std::string ShortestDecimal(double value);

}  // namespace tenon

#endif  // TENON_ENGINE_MOE_KERNEL_FILE_H_
