#ifndef TENON_OPS_CORE_CPU_MATMUL_ISA_H_
#define TENON_OPS_CORE_CPU_MATMUL_ISA_H_

#include "ops/core/cpu_matmul.h"
#include "ops/core/device_info.h"

namespace tenon {

// The functions of cpu_matmul.h as compiled for one instruction set.
struct CpuKernels {
  void (*matmul)(const CpuMatmulParams& params);
  void (*convert_to_float)(DType dtype, const void* from, int64_t count,
                           float* to);
  void (*convert_from_float)(DType dtype, const float* from, int64_t count,
                             void* to);
};

// `isa` must not exceed DetectCpuIsa(). Given explicitly by tests, so that they
// reach every path on one host.
CpuKernels CpuKernelsFor(CpuIsa isa);

}  // namespace tenon

#endif  // TENON_OPS_CORE_CPU_MATMUL_ISA_H_
