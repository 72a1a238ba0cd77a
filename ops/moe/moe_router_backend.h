#ifndef TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_
#define TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_

#include "ops/moe/moe_router.h"

namespace tenon {

inline constexpr int kMoeRouterMaxExperts = 1024;
inline constexpr int kMoeRouterMaxTopK = 32;

// Keeps the division by the sum of the chosen weights finite.
inline constexpr float kMoeRouterMinSum = 1e-20f;

// Backends trust `params`: MoeRouter() has validated them. Both order floats by
// unsigned keys: 0 can not be chosen, kMoeRouterNanKey is below all numbers.
inline constexpr unsigned kMoeRouterNanKey = 1;
Status MoeRouterCpu(const MoeRouterParams& params, Stream stream);
Status MoeRouterCuda(const MoeRouterParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_
