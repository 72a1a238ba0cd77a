#ifndef TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_
#define TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_

#include "ops/moe/moe_router.h"

namespace tenon {

inline constexpr int kMoeRouterMaxExperts = 1024;
inline constexpr int kMoeRouterMaxTopK = 32;

// Keeps the division by the sum of the chosen weights finite.
inline constexpr float kMoeRouterMinSum = 1e-20f;

// Both backends order floats by unsigned keys. 0 can not be chosen; this one,
// of NaN, is below those of all numbers.
inline constexpr unsigned kMoeRouterNanKey = 1;

// Whether a token chooses no expert.
constexpr bool IsMoePadding(const MoeRouterParams& p, int64_t token) {
  return p.padding.present() &&
         p.padding.As<const int32_t>()[token * p.padding.stride[0]] < 0;
}

// Backends trust `params`: MoeRouter() has validated them.
Status MoeRouterCpu(const MoeRouterParams& params, Stream stream);
Status MoeRouterCuda(const MoeRouterParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_ROUTER_BACKEND_H_
