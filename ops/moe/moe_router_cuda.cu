#include "ops/moe/moe_router_cuda.cuh"

namespace tenon {
namespace {

constexpr int kWarps = 4;  // per block; one token each

template <int kValues>
__global__ void __launch_bounds__(kWarps * 32)
    MoeRouterKernel(MoeRouterParams p) {
  __shared__ uint32_t group_keys[kWarps][kValues * 32];
  __shared__ moe_router::Pick picks[kWarps][kMoeRouterMaxTopK];
  const int warp = threadIdx.x / 32;
  const int64_t token = blockIdx.x * int64_t{kWarps} + warp;
  cuda::WaitForPreviousKernels();
  if (token >= p.logits.shape[0]) return;
  float logits[kValues];
  moe_router::LoadLogits(p.logits, token, logits);
  moe_router::StoreChoice(
      p, token,
      moe_router::Route(p, token, logits, picks[warp], group_keys[warp]));
}

}  // namespace

Status MoeRouterCuda(const MoeRouterParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.logits.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const int64_t num_experts = p.logits.shape[1];
  auto* kernel = MoeRouterKernel<kMoeRouterMaxExperts / 32>;
  if (num_experts <= 256) kernel = MoeRouterKernel<8>;
  if (num_experts <= 128) kernel = MoeRouterKernel<4>;
  const dim3 grid(
      static_cast<unsigned>(cuda::CeilDiv(p.logits.shape[0], int64_t{kWarps})));
  return cuda::LaunchDependent("MoeRouter", stream, grid, kWarps * 32, 0,
                               kernel, p);
}

}  // namespace tenon
