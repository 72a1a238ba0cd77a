#ifndef TENON_OPS_RMS_NORM_RMS_NORM_BACKEND_H_
#define TENON_OPS_RMS_NORM_RMS_NORM_BACKEND_H_

#include "ops/rms_norm/rms_norm.h"

namespace tenon {

// Backends trust `params`: RmsNorm() has validated them.
Status RmsNormCpu(const RmsNormParams& params, Stream stream);
Status RmsNormCuda(const RmsNormParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_RMS_NORM_RMS_NORM_BACKEND_H_
