#ifndef TENON_OPS_QK_NORM_QK_NORM_BACKEND_H_
#define TENON_OPS_QK_NORM_QK_NORM_BACKEND_H_

#include "ops/qk_norm/qk_norm.h"

namespace tenon {

// Backends trust `params`: QkNorm() has validated them and turned the packed
// form into the strided one, so that q, k (and for a cache write, v) are views.
Status QkNormCpu(const QkNormParams& params, Stream stream);
Status QkNormCuda(const QkNormParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_QK_NORM_QK_NORM_BACKEND_H_
