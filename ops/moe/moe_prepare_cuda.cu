#include "ops/moe/moe_backend.h"
#include "ops/moe/moe_prepare.h"
#include "ops/moe/moe_prepare_cuda.cuh"
#include "ops/moe/moe_router_cuda.cuh"
#include "ops/quantize/quantize_cuda.cuh"

// Everything between the router's logits and the first matrix product: up to
// kMaxClusterTokens tokens in one launch, beyond that in two.
//
// A routing block routes its tokens, a warp each, and notes in shared memory
// which of them chose an expert, a bit per token: the number of bits is the
// expert's count, the number of bits below a token's is its rank, and neither
// depends on the order in which warps arrive. The blocks of one launch are a
// thread block cluster: each writes its counts into the shared memory of all
// others, and after one barrier each knows where its slots go. Where there are
// too many tokens for a cluster, the first launch leaves the counts in memory,
// and every block of the second one sums them up for itself.
//
// The remaining blocks of the (first) launch quantise x meanwhile.

namespace tenon {
namespace {

using moe_prepare::Block;
using moe_prepare::Layout;
using moe_prepare::Params;

constexpr char kOp[] = "Moe";

// ---------------------------------------------------------------------------
// Clusters
// ---------------------------------------------------------------------------

__device__ __forceinline__ void ArriveAtCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void WaitForCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores to where `to`, in this block's shared memory, lies in that of `block`
// of the cluster.
__device__ __forceinline__ void StoreInCluster(int32_t* to, int block,
                                               int32_t value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2;\n"
      "}\n" ::"r"(address),
      "r"(block), "r"(value)
      : "memory");
#endif
}

// ---------------------------------------------------------------------------
// Quantising
// ---------------------------------------------------------------------------

constexpr int kGroupLanes = kFp8GroupSize / cuda::kFp8Vec;

template <class T, bool kAligned>
__device__ void QuantizeGroups(const Params& p) {
  const int64_t hidden = p.x.shape[1];
  const int64_t groups_per_row = NumFp8Groups(hidden);
  const int64_t groups = p.tokens * groups_per_row;
  const int64_t per_block = blockDim.x / kGroupLanes;
  const int64_t blocks = gridDim.x - p.num_routing_blocks;
  const int lane = threadIdx.x % kGroupLanes;
  int64_t i = (blockIdx.x - p.num_routing_blocks) * per_block +
              threadIdx.x / kGroupLanes;
  // The lanes of a warp go on together, for its shuffles.
  for (; __any_sync(~0u, i < groups); i += blocks * per_block) {
    const bool exists = i < groups;
    const int64_t token = i / groups_per_row;
    const int64_t group = i - token * groups_per_row;
    const int64_t col = group * kFp8GroupSize + lane * cuda::kFp8Vec;
    const int64_t cols = exists ? hidden : 0;
    float x[cuda::kFp8Vec];
    cuda::LoadForFp8<kAligned>(p.x.As<const T>() + token * p.x.stride[0], col,
                               cols, x);
    const Fp8Scale scale =
        Fp8ScaleOf(cuda::LanesMax<kGroupLanes>(cuda::MaxMagnitude(x)));
    cuda::StoreFp8<kAligned>(cuda::ToFp8x8(x, scale.inverse),
                             p.x_fp8 + token * hidden, col, cols);
    if (exists && lane == 0) p.x_scales[i] = scale.scale;
  }
}

__device__ void Quantize(const Params& p) {
  switch (p.x.dtype) {
    case DType::kFloat32:
      return p.x_aligned ? QuantizeGroups<float, true>(p)
                         : QuantizeGroups<float, false>(p);
    case DType::kFloat16:
      return p.x_aligned ? QuantizeGroups<__half, true>(p)
                         : QuantizeGroups<__half, false>(p);
    default:
      return p.x_aligned ? QuantizeGroups<__nv_bfloat16, true>(p)
                         : QuantizeGroups<__nv_bfloat16, false>(p);
  }
}

// ---------------------------------------------------------------------------
// Routing
// ---------------------------------------------------------------------------

// Routes the block's tokens, a warp each at a time. Where registers suffice the
// logits of the next one are under way meanwhile.
template <int kValues>
__device__ void RouteTokens(Block& block, uint32_t* group_keys) {
  constexpr bool kAhead = kValues <= 8;
  const MoeRouterParams& r = block.p.router;
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  group_keys += threadIdx.x / 32 * r.num_expert_groups;
  int token = threadIdx.x / 32;
  float logits[kValues];
  if (kAhead && token < block.num_tokens) {
    moe_router::LoadLogits(r.logits, block.first_token + token, logits);
  }
  for (; token < block.num_tokens; token += warps) {
    float next[kValues];
    const int ahead = kAhead ? token + warps : token;
    if (ahead < block.num_tokens) {
      moe_router::LoadLogits(r.logits, block.first_token + ahead, next);
    }
    moe_router::Choice choice = moe_router::Route(
        r, block.first_token + token, kAhead ? logits : next, group_keys);
    moe_router::StoreChoice(r, block.first_token + token, choice);
    if (lane >= r.top_k) {  // a shared expert
      choice.id = static_cast<int>(r.logits.shape[1]) + lane - r.top_k;
    }
    if (lane < block.p.columns) block.Mark(token, lane, choice.id);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues; ++i) logits[i] = next[i];
  }
}

// Tells all blocks of the cluster this one's counts.
__device__ void ExchangeCounts(const Block& block, int32_t* cluster_counts) {
  const int num_experts = block.p.num_experts;
  const int cluster = block.p.num_routing_blocks;
  const int rank = blockIdx.x;
  if (cluster > 1) WaitForCluster();  // until all blocks are there
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    const int count = block.Count(e);
    int32_t* const entry = &cluster_counts[rank * num_experts + e];
    if (cluster == 1) {
      *entry = count;
    } else {
      for (int b = 0; b < cluster; ++b) StoreInCluster(entry, b, count);
    }
  }
  if (cluster > 1) {
    ArriveAtCluster();
    WaitForCluster();
  } else {
    __syncthreads();
  }
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int total = 0;
    int before = 0;
    for (int b = 0; b < cluster; ++b) {
      const int count = cluster_counts[b * num_experts + e];
      total += count;
      if (b < rank) before += count;
    }
    block.total[e] = total;
    block.first[e] = before;
  }
  __syncthreads();
}

template <int kValues>
constexpr int MaxThreads() {
  return kValues > 8 ? 512 : 1024;
}

template <int kValues>
__global__ void __launch_bounds__(MaxThreads<kValues>())
    PrepareKernel(const __grid_constant__ Params p,
                  const __grid_constant__ Layout layout) {
  if (blockIdx.x >= p.num_routing_blocks) {
    cuda::WaitForPreviousKernels();
    Quantize(p);
    return;
  }
  const bool places = p.counts == nullptr;
  Block block(p, layout);
  int32_t* const words = reinterpret_cast<int32_t*>(moe_prepare::shared_memory);
  block.ClearMasks();
  if (places && p.num_routing_blocks > 1) ArriveAtCluster();
  __syncthreads();
  cuda::WaitForPreviousKernels();
  if (p.router.logits.present()) {
    RouteTokens<kValues>(
        block, reinterpret_cast<uint32_t*>(words + layout.group_keys));
  } else {
    block.MarkGivenIds();
  }
  block.Sync();
  if (!places) {
    uint16_t* counts = p.counts + blockIdx.x * int64_t{p.counts_stride};
    for (int e = threadIdx.x; e < p.counts_stride; e += blockDim.x) {
      counts[e] = static_cast<uint16_t>(e < p.num_experts ? block.Count(e) : 0);
    }
    return;
  }
  ExchangeCounts(block, words + layout.cluster_counts);
  moe_prepare::MakePositions(block);
  block.Place();
}

constexpr int kPlaceThreads = 1024;

// After PrepareKernel has left its counts: the same blocks of tokens.
__global__ void __launch_bounds__(kPlaceThreads)
    PlaceKernel(const __grid_constant__ Params p,
                const __grid_constant__ Layout layout) {
  Block block(p, layout);
  block.ClearMasks();
  for (int e = threadIdx.x; e < p.num_experts; e += kPlaceThreads) {
    block.total[e] = 0;
    block.first[e] = 0;
  }
  __syncthreads();
  cuda::WaitForPreviousKernels();
  block.MarkGivenIds();
  // Two experts to a thread, and blocks spread over the threads.
  const int pairs = p.counts_stride / 2;
  const int stride = kPlaceThreads / pairs;
  const int pair = threadIdx.x % pairs;
  const uint32_t* counts = reinterpret_cast<const uint32_t*>(p.counts) + pair;
  if (threadIdx.x < pairs * stride) {
    int total[2] = {};
    int before[2] = {};
#pragma unroll 8
    for (int b = threadIdx.x / pairs; b < p.num_routing_blocks; b += stride) {
      const uint32_t both = counts[int64_t{b} * pairs];
      const int low = static_cast<int>(both & 0xffff);
      const int high = static_cast<int>(both >> 16);
      total[0] += low;
      total[1] += high;
      if (b < blockIdx.x) {
        before[0] += low;
        before[1] += high;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (pair * 2 + i >= p.num_experts) break;
      atomicAdd(&block.total[pair * 2 + i], total[i]);
      atomicAdd(&block.first[pair * 2 + i], before[i]);
    }
  }
  block.Sync();
  moe_prepare::MakePositions(block);
  block.Place();
}

// ---------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------

struct Plan {
  int cluster;  // routing blocks, if they are one cluster; 0: two launches
  int tokens_per_block;
  int threads;
  int quantizing_blocks;
};

// Most tokens that one block routes alone, and one cluster.
constexpr int kMaxBlockTokens = 16;
constexpr int kMaxClusterTokens = 1024;
constexpr int kClusterBlocks = 8;

int RoundUp(int64_t value, int step) {
  return static_cast<int>(cuda::CeilDiv(value, int64_t{step}) * step);
}

Plan MakePlan(const Params& p, int max_threads, bool has_clusters) {
  Plan plan;
  const int64_t tokens = p.tokens;
  if (tokens <= kMaxBlockTokens) {
    plan.cluster = 1;
    plan.tokens_per_block = p.tokens;
  } else if (has_clusters && tokens <= kMaxClusterTokens) {
    plan.cluster = kClusterBlocks;
    plan.tokens_per_block =
        static_cast<int>(cuda::CeilDiv(tokens, int64_t{plan.cluster}));
  } else {
    plan.cluster = 0;
    plan.tokens_per_block = static_cast<int>(MoePrepareBlockTokens(tokens));
  }
  // A warp to a token, or a thread to a given id; a thread to an expert.
  const int64_t for_tokens = int64_t{plan.tokens_per_block} *
                             (p.router.logits.present() ? 32 : p.columns);
  plan.threads = std::min(
      RoundUp(std::max<int64_t>(for_tokens, p.num_experts), 32), max_threads);
  plan.quantizing_blocks = 0;
  if (p.x_fp8 != nullptr) {
    const int64_t groups = tokens * NumFp8Groups(p.x.shape[1]);
    const int64_t blocks =
        cuda::CeilDiv(groups, int64_t{plan.threads / kGroupLanes});
    plan.quantizing_blocks = RoundUp(blocks, std::max(plan.cluster, 1));
  }
  return plan;
}

Status LaunchPrepare(Stream stream, const cudaLaunchConfig_t& config,
                     void (*kernel)(Params, Layout), const Params& p,
                     const Layout& layout) {
  if (p.num_routing_blocks > 8 && p.counts == nullptr) {
    TENON_RETURN_IF_ERROR(cuda::ToStatus(
        cudaFuncSetAttribute(kernel,
                             cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        kOp));
  }
  return cuda::LaunchWithConfig(kOp, config, kernel, p, layout);
}

Status Prepare(Params p, const Plan& plan, int major, void* workspace,
               Stream stream) {
  p.tokens_per_block = plan.tokens_per_block;
  p.num_routing_blocks = plan.cluster > 0
                             ? plan.cluster
                             : cuda::CeilDiv(p.tokens, plan.tokens_per_block);
  p.counts = plan.cluster > 0 ? nullptr : static_cast<uint16_t*>(workspace);
  p.counts_stride = (p.num_experts + 1) / 2 * 2;
  const Layout layout = LayOut(p, plan.cluster, plan.threads / 32);

  auto* kernel = PrepareKernel<4>;
  const int64_t routed =
      p.router.logits.present() ? p.router.logits.shape[1] : 0;
  if (routed > 128) kernel = PrepareKernel<8>;
  if (routed > 256) kernel = PrepareKernel<32>;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = cuda::LaunchConfig(
      stream,
      dim3(
          static_cast<unsigned>(p.num_routing_blocks + plan.quantizing_blocks)),
      dim3(static_cast<unsigned>(plan.threads)), layout.words * 4u);
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : plan.cluster > 1 ? 2 : 1;
  TENON_RETURN_IF_ERROR(LaunchPrepare(stream, config, kernel, p, layout));
  if (plan.cluster > 0) return Status();
  return cuda::LaunchDependent(
      kOp, stream, dim3(static_cast<unsigned>(p.num_routing_blocks)),
      dim3(kPlaceThreads), layout.words * size_t{4}, PlaceKernel, p, layout);
}

}  // namespace

Status MoePrepareCuda(const MoeParams& chunk, const MoeScratch& scratch,
                      Stream stream) {
  const cuda::DeviceGuard guard(chunk.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  int major = 0;
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                             chunk.x.device.index),
      kOp));
  Params p;
  if (chunk.router != nullptr) p.router = *chunk.router;
  p.topk_ids = chunk.topk_ids;
  p.tokens = static_cast<int32_t>(chunk.topk_ids.shape[0]);
  p.columns = static_cast<int32_t>(chunk.topk_ids.shape[1]);
  p.num_experts = static_cast<int32_t>(chunk.gate.num_experts);
  p.expert_offsets = scratch.expert_offsets;
  p.sorted_slots = scratch.sorted_slots;
  if (IsFp8(chunk.gate)) {
    p.x = chunk.x;
    p.x_fp8 = static_cast<uint8_t*>(scratch.x_fp8);
    p.x_scales = scratch.x_scales;
    p.x_aligned = chunk.x.shape[1] % cuda::kFp8Vec == 0 &&
                  cuda::RowsAreAligned(chunk.x, 16);
  }
  const bool many = p.router.logits.present() && p.router.logits.shape[1] > 256;
  // Code for clusters is that for Hopper alone.
  const Plan plan = MakePlan(p, many ? MaxThreads<32>() : 1024, major == 9);
  return Prepare(p, plan, major, scratch.align, stream);
}

}  // namespace tenon
