#include "ops/linear/linear_fp8_cluster_cuda.cuh"

namespace tenon {
namespace linear_fp8_cluster {
namespace {

// kCols: rows of the weight that a team multiplies at one time.
template <class T, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    Fp8ClusterKernel(const __grid_constant__ Args a,
                     const __grid_constant__ CUtensorMap weight) {
#if TENON_SM90A
  extern __shared__ __align__(1024) char memory[];
  const Work work(a);
  const Layout layout = MakeLayout(
      a, kCols,
      cuda::CeilDiv(a.passes, static_cast<int>(gridDim.x) / a.slices));
  auto& barriers = *reinterpret_cast<Barriers*>(memory + layout.barriers);
  if (!a.linear.weights_are_constant) cuda::WaitForPreviousKernels();
  if (threadIdx.x == kMultiplyThreads) {
    cuda::PrefetchTensorMap(&weight);
    for (int i = 0; i < a.stages; ++i) {
      cuda::InitBarrier(At(barriers.full[i]), 1);
      cuda::InitBarrier(At(barriers.empty[i]), kTeamThreads);
    }
    for (int i = 0; i < work.blocks; ++i) {
      cuda::InitBarrier(At(barriers.x[i]), 1);
    }
    cuda::InitBarrier(At(barriers.received), 1);
    cuda::FenceBarrierInit();
    cuda::ArriveExpectBytes(
        At(barriers.received),
        a.slices * a.finished * work.passes * kTeams * kCols * 4);
  }
  __syncthreads();
  ArriveAtCluster();

  if (threadIdx.x >= kMultiplyThreads) {
    if (threadIdx.x == kMultiplyThreads) {
      LoadWeights<kCols>(a, work, weight, barriers,
                         cuda::SharedAddress(memory) + layout.ring);
    }
    __syncwarp();
    WaitForCluster();
    return;
  }
  LoadWeightScales<kCols>(
      a, work, reinterpret_cast<float*>(memory + layout.weight_scales));
  SyncMultiplying();
  cuda::WaitForPreviousKernels();
  LoadX(a, work, barriers, cuda::SharedAddress(memory),
        cuda::SharedAddress(memory + layout.x_scales));
  Multiplier<kCols> multiplier(a, work, memory, layout, barriers);
  auto* const received = reinterpret_cast<float*>(memory + layout.received);
#pragma unroll 1
  for (int pass = 0; pass < work.passes; ++pass) {
    float sums[kCols / 2];
    multiplier.Run(pass, sums);
    if (pass == 0) WaitForCluster();
    SendSums<kCols>(a, work, pass, cuda::SharedAddress(received),
                    At(barriers.received), sums);
  }
  Finish<T, kCols>(a, work, received, At(barriers.received));
#endif
}

// Sizes for a call; no stages: it does not fit.
struct Plan {
  int cols = 0;
  int clusters = 0;
  int passes = 0;
  int stages = 0;
  int bytes = 0;
};

constexpr int kCols[] = {16, 24, 40, 48, 88};

// As few passes of a cluster as possible, and no wider than needed.
Plan MakePlan(Args* a, int most_clusters) {
  Plan plan;
  const auto of_cluster = [&](int cols) {
    return cuda::CeilDiv(cuda::CeilDiv(a->linear.out_features, kTeams * cols),
                         most_clusters);
  };
  int64_t best = INT64_MAX;
  for (const int cols : kCols) {
    // Rows of the weight that the busiest cluster multiplies; a pass costs as
    // much as some more.
    const int64_t cost = of_cluster(cols) * int64_t{kTeams * cols + 8};
    if (cost >= best) continue;
    best = cost;
    plan.cols = cols;
  }
  plan.passes = cuda::CeilDiv(a->linear.out_features, kTeams * plan.cols);
  const int passes = of_cluster(plan.cols);
  plan.clusters = cuda::CeilDiv(plan.passes, passes);
  a->passes = plan.passes;
  a->received_pitch = (passes * kTeams * plan.cols + 31) / 32 * 32 + 8;
  const int blocks = cuda::CeilDiv(a->blocks, a->slices);
  const int stage = plan.cols * kBlockBytes;
  a->stages = 0;
  const Layout fixed = MakeLayout(*a, plan.cols, passes);
  int stages = std::min({passes * blocks * kTeams, kMaxStages,
                         (linear_stream::kMaxSharedBytes - fixed.bytes) /
                             stage / kTeams * kTeams});
  if (blocks > kMaxSliceBlocks ||
      stages < std::min(passes * blocks, 2) * kTeams) {
    return plan;
  }
  a->stages = plan.stages = stages;
  a->in_flight = std::max(1, std::min(stages, kInFlightBytes / stage));
  plan.bytes = MakeLayout(*a, plan.cols, passes).bytes;
  return plan;
}

// A launch in clusters.
struct ClusterLaunch {
  ClusterLaunch(Stream stream, int slices, int clusters, int shared_bytes)
      : config(cuda::LaunchConfig(
            stream, dim3(static_cast<unsigned>(clusters * slices)),
            dim3(kThreads), static_cast<size_t>(shared_bytes))) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(slices);
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config;
};

template <class T, int kCols>
Status Launch(const Args& a, const Plan& plan, const CUtensorMap& weight,
              Stream stream) {
  const ClusterLaunch launch(
      stream, a.slices, plan.clusters,
      std::max(plan.bytes, linear_stream::kMinSharedBytes));
  return cuda::LaunchWithConfig("Linear", launch.config,
                                Fp8ClusterKernel<T, kCols>, a, weight);
}

template <class T>
Status Launch(const Args& a, const Plan& plan, const CUtensorMap& weight,
              Stream stream) {
  switch (plan.cols) {
    case 16:
      return Launch<T, 16>(a, plan, weight, stream);
    case 24:
      return Launch<T, 24>(a, plan, weight, stream);
    case 40:
      return Launch<T, 40>(a, plan, weight, stream);
    case 48:
      return Launch<T, 48>(a, plan, weight, stream);
    default:
      return Launch<T, 88>(a, plan, weight, stream);
  }
}

// How many clusters run side by side: multiprocessors come in parts of a GPU
// that are not multiples of a cluster, and differ from one to the next.
Status MostClusters(int slices, int* clusters) {
  auto* const kernel = Fp8ClusterKernel<__nv_bfloat16, 40>;
  ClusterLaunch launch(Stream(), slices, 1, linear_stream::kMaxSharedBytes);
  launch.config.numAttrs = 1;
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           linear_stream::kMaxSharedBytes),
      "Linear"));
  return cuda::ToStatus(
      cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config),
      "Linear");
}

// Two blocks have half as many sums to exchange as four, but more of x to read,
// and longer sums. Measured.
int Slices(int blocks, int64_t out_features) {
  const int most = out_features >= 4096 ? 16 : 8;
  return blocks <= most ? 2 : kMaxSlices;
}

Status Prepare(const LinearParams& p, Args* a, Plan* plan) {
  a->linear = linear_stream::MakeArgs(p, 1);
  a->blocks = static_cast<int>(p.x.shape[1] / kFp8GroupSize);
  a->slices = Slices(a->blocks, p.weight.shape[0]);
  a->x.rows = static_cast<int>((p.x.shape[0] + 7) / 8 * 8);
  a->finished = cuda::CeilDiv(a->x.rows, 8 * a->slices) * 8;
  int most_clusters = 0;
  TENON_RETURN_IF_ERROR(MostClusters(a->slices, &most_clusters));
  if (most_clusters < 1) {
    return UnavailableError("Linear: no cluster of blocks fits the GPU");
  }
  *plan = MakePlan(a, most_clusters);
  return Status();
}

}  // namespace
}  // namespace linear_fp8_cluster

using linear_fp8_cluster::Args;
using linear_fp8_cluster::Plan;

bool LinearFp8Clusters(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  Args a = {};
  Plan plan;
  return p.weight.dtype == DType::kFloat8E4M3 && p.cublas_lt != nullptr &&
         !p.batch_invariant && tokens > kLinearFp8QuantizingTokens &&
         tokens <= kLinearFewFp8Tokens && !p.terms.present() &&
         p.x.dtype != DType::kFloat32 && p.x.shape[1] % kFp8GroupSize == 0 &&
         p.x.shape[1] >= linear_fp8_cluster::kMaxSlices * kFp8GroupSize &&
         cuda::RowsAreWholeChunks(p.x) && cuda::RowsAreWholeChunks(p.weight) &&
         (!p.norm.present() || linear_fp8::PackTakesNorm(p)) &&
         cuda::IsHopper(p.x.device) &&
         linear_fp8_cluster::Prepare(p, &a, &plan).ok() && plan.stages > 0;
}

Status LinearFp8Cluster(const LinearParams& p, Stream stream) {
  Args a = {};
  Plan plan;
  TENON_RETURN_IF_ERROR(linear_fp8_cluster::Prepare(p, &a, &plan));
  const auto* const scales = p.weight_scales.As<const float>();
  if (p.weight_scales.rank == 1) {
    a.linear.row_scales = scales;
  } else {
    a.linear.block_scales = scales;
    a.linear.block_scales_stride = p.weight_scales.stride[0];
  }
  const LinearFp8Workspace workspace = CutLinearFp8Workspace(p, nullptr);
  a.x.q = workspace.q;
  a.x.scales = workspace.scales;
  // The distance of rows of which there is one may be anything.
  const int64_t rows = p.weight.shape[0];
  const int64_t stride = rows > 1 ? p.weight.stride[0] : p.weight.shape[1];
  CUtensorMap weight;
  TENON_RETURN_IF_ERROR(
      cuda::MakeTensorMap("Linear", p.weight.dtype, p.weight.data, 1, 0, rows,
                          stride, p.weight.shape[1], plan.cols, &weight));
  TENON_RETURN_IF_ERROR(linear_fp8::LaunchPack(p, a.x, stream));
  return p.x.dtype == DType::kFloat16
             ? linear_fp8_cluster::Launch<__half>(a, plan, weight, stream)
             : linear_fp8_cluster::Launch<__nv_bfloat16>(a, plan, weight,
                                                         stream);
}

}  // namespace tenon
