#ifndef TENON_OPS_CORE_CPU_MATMUL_ISA_H_
#define TENON_OPS_CORE_CPU_MATMUL_ISA_H_

#include "ops/core/cpu_matmul.h"
#include "ops/core/device_info.h"

// The functions of cpu_matmul.h for a given instruction set, so that tests
// reach every path on one host. `isa` must not exceed DetectCpuIsa().

namespace tenon {

void CpuMatmul(CpuIsa isa, const CpuMatmulParams& params);
void CpuConvertToFloat(CpuIsa isa, DType dtype, const void* from, int64_t count,
                       float* to);
void CpuConvertFromFloat(CpuIsa isa, DType dtype, const float* from,
                         int64_t count, void* to);

}  // namespace tenon

#endif  // TENON_OPS_CORE_CPU_MATMUL_ISA_H_
