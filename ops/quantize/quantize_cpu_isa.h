#ifndef TENON_OPS_QUANTIZE_QUANTIZE_CPU_ISA_H_
#define TENON_OPS_QUANTIZE_QUANTIZE_CPU_ISA_H_

#include <cstdint>

#include "ops/core/device_info.h"
#include "ops/core/dtype.h"

namespace tenon {

// The loops of quantisation as compiled for one instruction set.
struct QuantizeKernels {
  // The largest of amax and the magnitudes; NaN does not count.
  float (*max_magnitude)(const float* x, int64_t count, float amax);
  // out = e4m3(x * inverse)
  void (*scale)(const float* x, int64_t count, float inverse, Float8E4M3* out);
};

// `isa` must not exceed DetectCpuIsa(). Given explicitly by tests, so that they
// reach every path on one host.
QuantizeKernels QuantizeKernelsFor(CpuIsa isa);

}  // namespace tenon

#endif  // TENON_OPS_QUANTIZE_QUANTIZE_CPU_ISA_H_
