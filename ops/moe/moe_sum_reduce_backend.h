#ifndef TENON_OPS_MOE_MOE_SUM_REDUCE_BACKEND_H_
#define TENON_OPS_MOE_MOE_SUM_REDUCE_BACKEND_H_

#include "ops/moe/moe_sum_reduce.h"

namespace tenon {

// Backends trust `params`: MoeSumReduce() has validated them.
Status MoeSumReduceCpu(const MoeSumReduceParams& params, Stream stream);
Status MoeSumReduceCuda(const MoeSumReduceParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_SUM_REDUCE_BACKEND_H_
