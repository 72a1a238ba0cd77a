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
using moe_prepare::ExpertSlots;
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

// Routes tokens [first, first + count), a warp each at a time, and tells
// mark(token - first, column, id). Where registers suffice the logits of the
// next one are under way meanwhile.
template <int kValues, class Mark>
__device__ __forceinline__ void RouteTokens(const Params& p,
                                            const Layout& layout, int first,
                                            int count, const Mark& mark) {
  constexpr bool kAhead = kValues <= 8;
  const MoeRouterParams& r = p.router;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  auto* const picks =
      moe_prepare::Shared<moe_router::Pick>(layout.picks) + warp * r.top_k;
  uint32_t* const group_keys =
      moe_prepare::Shared<uint32_t>(layout.group_keys) +
      warp * r.num_expert_groups;
  float logits[kValues];
  if (kAhead && warp < count) {
    moe_router::LoadLogits(r.logits, first + warp, logits);
  }
  for (int token = warp; token < count; token += warps) {
    float next[kValues];
    const int ahead = kAhead ? token + warps : token;
    if (ahead < count) moe_router::LoadLogits(r.logits, first + ahead, next);
    const moe_router::Choice choice = moe_router::Route(
        r, first + token, kAhead ? logits : next, picks, group_keys);
    if (lane < p.columns) {
      const int shared_expert =
          static_cast<int>(r.logits.shape[1]) + lane - r.top_k;
      const bool routed = lane < r.top_k || choice.id < 0;
      mark(token, lane, routed ? choice.id : shared_expert);
    }
    moe_router::StoreChoice(r, first + token, choice);
#pragma unroll
    for (int i = 0; i < kValues; ++i) logits[i] = next[i];
  }
}

// Tells all blocks of the cluster this one's counts.
__device__ __forceinline__ void ExchangeCounts(const Block& block,
                                               int32_t* cluster_counts) {
  const int num_experts = block.p.num_experts;
  const int cluster = block.p.num_routing_blocks;
  int32_t* const counts = cluster_counts + blockIdx.x * num_experts;
  WaitForCluster();  // until all blocks are there
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    const int count = block.Count(e);
    for (int b = 0; b < cluster; ++b) StoreInCluster(counts + e, b, count);
  }
  ArriveAtCluster();
  WaitForCluster();
}

template <int kValues>
constexpr int MaxThreads() {
  return kValues > 8 ? 512 : 1024;
}

template <int kValues>
__global__ void __launch_bounds__(MaxThreads<kValues>())
    PrepareKernel(const __grid_constant__ Params p,
                  const __grid_constant__ Layout layout) {
  const bool places = p.counts == nullptr;
  if (blockIdx.x >= p.num_routing_blocks) {
    cuda::WaitForPreviousKernels();
    Quantize(p);
    return;
  }
  Block block(p, layout);
  block.ClearMasks();
  if (places) ArriveAtCluster();
  __syncthreads();
  cuda::WaitForPreviousKernels();
  if (p.router.logits.present()) {
    RouteTokens<kValues>(
        p, layout, block.first_token, block.num_tokens,
        [&](int token, int column, int id) { block.Mark(token, column, id); });
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
  int32_t* const counts = moe_prepare::Shared<int32_t>(layout.cluster_counts);
  ExchangeCounts(block, counts);
  moe_prepare::MakePositions(block, [&](int e) {
    ExpertSlots slots = {0, 0};
#pragma unroll
    for (int b = 0; b < moe_prepare::kMaxCluster; ++b) {
      const int count =
          b < p.num_routing_blocks ? counts[b * p.num_experts + e] : 0;
      slots.total += count;
      if (b < blockIdx.x) slots.before += count;
    }
    return slots;
  });
  block.Place();
}

// Few slots: one block, which compares all with all. Expert and slot number are
// one key; the offset of an expert is the number of keys below its first
// possible one, and the place of a slot the number of keys below its own.
template <int kValues>
__global__ void __launch_bounds__(512)
    PrepareFewKernel(const __grid_constant__ Params p,
                     const __grid_constant__ Layout layout) {
  cuda::WaitForPreviousKernels();
  if (blockIdx.x > 0) return Quantize(p);
  uint32_t* const keys = moe_prepare::Shared<uint32_t>(layout.slots);
  const int num_slots = p.tokens * p.columns;
  const auto mark = [&](int slot, int id) {
    // Those of no expert come last.
    const bool valid =
        static_cast<uint32_t>(id) < static_cast<uint32_t>(p.num_experts);
    keys[slot] = (valid ? id : 0xffffu) << 16 | slot;
  };
  if (p.router.logits.present()) {
    RouteTokens<kValues>(p, layout, 0, p.tokens,
                         [&](int token, int column, int id) {
                           mark(token * p.columns + column, id);
                         });
  } else {
    const int32_t* ids = p.topk_ids.As<const int32_t>();
    for (int s = threadIdx.x; s < num_slots; s += blockDim.x) {
      const int token = s / p.columns;
      mark(s, ids[token * p.topk_ids.stride[0] + s - token * p.columns]);
    }
  }
  if (threadIdx.x < 3) keys[num_slots + threadIdx.x] = ~0u;
  __syncthreads();
  for (int i = threadIdx.x; i <= p.num_experts + num_slots; i += blockDim.x) {
    const int slot = i - p.num_experts - 1;
    const uint32_t key = slot < 0 ? static_cast<uint32_t>(i) << 16 : keys[slot];
    int below = 0;
    for (int j = 0; j < num_slots; j += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + j);
      below +=
          (four.x < key) + (four.y < key) + (four.z < key) + (four.w < key);
    }
    if (slot < 0) {
      p.expert_offsets[i] = below;
    } else {
      p.sorted_slots[below] = key >> 16 == 0xffffu ? -1 : slot;
    }
  }
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
  // Two experts to a thread, and blocks spread over the threads.
  const int pairs = p.counts_stride / 2;
  const int step = kPlaceThreads / pairs;
  const int first_block = threadIdx.x / pairs;
  const int pair = threadIdx.x - first_block * pairs;
  __syncthreads();
  cuda::WaitForPreviousKernels();
  if (first_block < step) {
    const uint32_t* counts = reinterpret_cast<const uint32_t*>(p.counts) + pair;
    int total[2] = {};
    int before[2] = {};
#pragma unroll 8
    for (int b = first_block; b < p.num_routing_blocks; b += step) {
      const uint32_t both = counts[b * pairs];
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
  block.MarkGivenIds();
  block.Sync();
  moe_prepare::MakePositions(block, [&](int e) {
    return ExpertSlots{block.total[e], block.first[e]};
  });
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

// Most that one block does alone, and one cluster.
constexpr int kMaxFewTokens = 16;
constexpr int kMaxFewSlots = 128;
constexpr int kMaxClusterTokens = 448;
// More tokens than this are quantised by a launch of its own, which has all
// multiprocessors: routing blocks leave no room beside them.
constexpr int kMaxQuantizingTokens = 1024;
// Up to here a cluster of 4 does, then 8, as far as the GPU lets it.
constexpr int kSmallClusterTokens = 32;
constexpr int kMediumClusterTokens = 128;

int RoundUp(int64_t value, int step) {
  return static_cast<int>(cuda::CeilDiv(value, int64_t{step}) * step);
}

// Largest cluster to use. Code for clusters is that for Hopper alone; 8 blocks
// fit on all of them, 16 are for whole GPUs.
Status MaxCluster(Device device, int* max_cluster) {
  int major = 0;
  int processors = 0;
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                             device.index),
      kOp));
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                             device.index),
      kOp));
  *max_cluster = major != 9 ? 1 : processors < 100 ? 8 : 16;
  return Status();
}

// Blocks of the cluster for more tokens than a block takes; 0: two launches.
int ClusterBlocks(int64_t tokens, int max_cluster) {
  if (max_cluster == 1 || tokens > kMaxClusterTokens) return 0;
  if (tokens <= kSmallClusterTokens) return 4;
  return tokens <= kMediumClusterTokens ? 8 : max_cluster;
}

Plan MakePlan(const Params& p, int max_threads, int max_cluster) {
  Plan plan;
  const int64_t tokens = p.tokens;
  const int64_t slots = tokens * p.columns;
  // A warp to a token, or a thread to a given id; a thread to an expert.
  const int64_t per_token = p.router.logits.present() ? 32 : p.columns;
  if (tokens <= kMaxFewTokens && slots <= kMaxFewSlots) {
    plan.cluster = 1;
    plan.tokens_per_block = p.tokens;
    plan.threads = RoundUp(
        std::max<int64_t>(per_token * tokens, p.num_experts + 1 + slots), 32);
    max_threads = 512;
  } else {
    plan.cluster = ClusterBlocks(tokens, max_cluster);
    plan.tokens_per_block = static_cast<int>(
        plan.cluster > 0 ? cuda::CeilDiv(tokens, int64_t{plan.cluster})
                         : MoePrepareBlockTokens(tokens));
    plan.threads = RoundUp(
        std::max<int64_t>(per_token * plan.tokens_per_block, p.num_experts),
        32);
  }
  plan.threads = std::min(plan.threads, max_threads);
  plan.quantizing_blocks = 0;
  if (p.x_fp8 != nullptr && tokens <= kMaxQuantizingTokens) {
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

Status Prepare(Params p, const Plan& plan, bool hopper, void* workspace,
               Stream stream) {
  p.tokens_per_block = plan.tokens_per_block;
  p.num_routing_blocks = plan.cluster > 0
                             ? plan.cluster
                             : cuda::CeilDiv(p.tokens, plan.tokens_per_block);
  p.counts = plan.cluster > 0 ? nullptr : static_cast<uint16_t*>(workspace);
  p.counts_stride = (p.num_experts + 1) / 2 * 2;
  const Layout layout = LayOut(p, plan.cluster, plan.threads / 32);

  const int64_t routed =
      p.router.logits.present() ? p.router.logits.shape[1] : 0;
  const bool few = plan.cluster == 1;
  auto* kernel = few ? PrepareFewKernel<4> : PrepareKernel<4>;
  if (routed > 128) kernel = few ? PrepareFewKernel<8> : PrepareKernel<8>;
  if (routed > 256) kernel = few ? PrepareFewKernel<32> : PrepareKernel<32>;
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
  config.numAttrs = !hopper ? 0 : plan.cluster > 1 ? 2 : 1;
  TENON_RETURN_IF_ERROR(LaunchPrepare(stream, config, kernel, p, layout));
  if (plan.cluster > 0) return Status();
  if (p.x_fp8 != nullptr && plan.quantizing_blocks == 0) {
    const cuda::Fp8Groups groups = {p.x_fp8, p.x.shape[1], p.x_scales,
                                    NumFp8Groups(p.x.shape[1]), 1};
    TENON_RETURN_IF_ERROR(
        cuda::LaunchQuantizeFp8Groups(kOp, p.x, groups, stream));
  }
  return cuda::LaunchDependent(
      kOp, stream, dim3(static_cast<unsigned>(p.num_routing_blocks)),
      dim3(kPlaceThreads), layout.words * size_t{4}, PlaceKernel, p, layout);
}

}  // namespace

Status MoePrepareCuda(const MoeParams& chunk, const MoeScratch& scratch,
                      Stream stream) {
  const cuda::DeviceGuard guard(chunk.x.device);
  TENON_RETURN_IF_ERROR(guard.status());
  int max_cluster = 1;
  TENON_RETURN_IF_ERROR(MaxCluster(chunk.x.device, &max_cluster));
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
  const Plan plan = MakePlan(p, many ? MaxThreads<32>() : 1024, max_cluster);
  return Prepare(p, plan, max_cluster > 1, scratch.align, stream);
}

}  // namespace tenon
