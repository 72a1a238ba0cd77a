#ifndef TENON_OPS_ATTENTION_ATTENTION_BACKEND_H_
#define TENON_OPS_ATTENTION_ATTENTION_BACKEND_H_

#include "ops/attention/attention.h"
#include "ops/attention/attention_config.h"

namespace tenon {

// Scores are kept in units of log2(e), so that exp2 replaces exp.
inline constexpr float kLog2E = 1.44269504088896340736f;

// Backends trust `params`: Attention() has validated them.
Status AttentionCpu(const AttentionParams& params, const AttentionPlan& plan,
                    Stream stream);
Status AttentionCuda(const AttentionParams& params, const AttentionPlan& plan,
                     Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_ATTENTION_ATTENTION_BACKEND_H_
