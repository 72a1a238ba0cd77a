#ifndef TENON_OPS_MOE_MOE_SWIGLU_BACKEND_H_
#define TENON_OPS_MOE_MOE_SWIGLU_BACKEND_H_

#include "ops/moe/moe_swiglu.h"

namespace tenon {

// Backends trust `params`: MoeSwiGlu() has validated them.
Status MoeSwiGluCpu(const MoeSwiGluParams& params, Stream stream);
Status MoeSwiGluCuda(const MoeSwiGluParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_SWIGLU_BACKEND_H_
