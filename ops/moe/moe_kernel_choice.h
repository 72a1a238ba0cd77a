#ifndef TENON_OPS_MOE_MOE_KERNEL_CHOICE_H_
#define TENON_OPS_MOE_MOE_KERNEL_CHOICE_H_

#include <cstdint>

#include "ops/core/dtype.h"
#include "ops/core/status.h"
#include "ops/moe/moe_kernel_config.h"
#include "ops/moe/moe_kernel_table.h"

// The sizes of the expert kernels of a call: a pure function of its shape, the
// kind of GPU and, where a caller gives one, a table that tools/tune measured.

namespace tenon {

// GPUs with tables of their own.
enum class MoeGpu { kOther, kH100, kH200 };

// H200 is the Hopper with the wide memory bus.
constexpr MoeGpu MoeGpuOf(int compute_capability, int memory_bus_bits) {
  if (compute_capability != 90) return MoeGpu::kOther;
  return memory_bus_bits >= 6000 ? MoeGpu::kH200 : MoeGpu::kH100;
}

constexpr const MoeKernelTable& BuiltInMoeKernels(MoeGpu gpu) {
  switch (gpu) {
    case MoeGpu::kH100:
      return kMoeKernelsH100;
    case MoeGpu::kH200:
      return kMoeKernelsH200;
    case MoeGpu::kOther:
      break;
  }
  return kMoeKernelsOther;
}

// What the choice depends on, of one chunk of tokens.
struct MoeKernelQuery {
  DType weights = DType::kInvalid;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  double slots_per_expert = 0.0;  // tokens * top_k / num_experts
};

// Of table.For(query.weights), the first row that the call is within; -1: none.
constexpr int32_t FindMoeKernelRow(const MoeKernelTable& table,
                                   const MoeKernelQuery& query) {
  const MoeKernelRows& rows = table.For(query.weights);
  for (int32_t i = 0; i < rows.count; ++i) {
    const MoeKernelRow& row = rows.rows[i];
    if (query.hidden <= row.max_hidden &&
        query.intermediate <= row.max_intermediate &&
        query.slots_per_expert <= row.max_slots_per_expert) {
      return i;
    }
  }
  return -1;
}

// Whether `a` is for closer sizes than `b`: no larger, and one smaller.
constexpr bool HasCloserSizes(const MoeKernelRow& a, const MoeKernelRow& b) {
  return a.max_hidden <= b.max_hidden &&
         a.max_intermediate <= b.max_intermediate &&
         (a.max_hidden < b.max_hidden ||
          a.max_intermediate < b.max_intermediate);
}

// Looks in `tuned` (may be null), in the GPU's own table, and in that for other
// GPUs, which has a row for everything. A row of `tuned` takes a call only from
// built-in rows for sizes that are not closer to the call's: measured for one
// shape, it does not speak for a smaller one that was measured itself. One
// without bounds of sizes speaks for all.
constexpr MoeKernelConfig ChooseMoeKernel(MoeGpu gpu,
                                          const MoeKernelTable* tuned,
                                          const MoeKernelQuery& query) {
  const MoeKernelRows& built_in = BuiltInMoeKernels(gpu).For(query.weights);
  const int32_t own = FindMoeKernelRow(BuiltInMoeKernels(gpu), query);
  int32_t row = tuned != nullptr ? FindMoeKernelRow(*tuned, query) : -1;
  if (row >= 0) {
    const MoeKernelRow& found = tuned->For(query.weights).rows[row];
    const bool is_for_all = found.max_hidden == MoeKernelRow::kAnySize &&
                            found.max_intermediate == MoeKernelRow::kAnySize;
    if (is_for_all || own < 0 || !HasCloserSizes(built_in.rows[own], found)) {
      return found.config;
    }
  }
  if (own >= 0) return built_in.rows[own].config;
  row = FindMoeKernelRow(kMoeKernelsOther, query);
  return kMoeKernelsOther.For(query.weights).rows[row].config;
}

// Requires what MoeKernelTable says of the rows, and sizes that kernels
// exist for. InvalidArgument begins with `what`.
Status CheckMoeKernelTable(const char* what, const MoeKernelTable& table);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_KERNEL_CHOICE_H_
