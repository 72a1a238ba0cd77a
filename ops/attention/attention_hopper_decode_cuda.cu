#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_hopper_attend_cuda.cuh"
#include "ops/attention/attention_hopper_decode_cuda.cuh"

// Split-KV attention of few queries on Hopper. A cluster takes a tile of
// queries and a KV head; each team of warps in its blocks takes some parts of
// the context, through a ring of stages that one of them fills by TMA, and
// sends their results to where they are combined: every block combines a slice
// of the tile's output, all parts in order, once a barrier of its own has
// counted their bytes. One launch, no scratch memory, and no bit depends on the
// number of blocks or teams.

namespace tenon::cuda {
namespace {

namespace decode = hopper_decode;
using decode::Args;

#if TENON_SM90A

template <class S>
__device__ __forceinline__ void LoadQueries(const Args& a,
                                            const decode::Tile& tile,
                                            int32_t kv_head,
                                            unsigned char* to) {
  using T = typename S::T;
  constexpr int kChunks = S::kDim / 8;
  const int rows = tile.num_queries * a.group;
  for (int i = threadIdx.x; i < S::kRows * kChunks;
       i += a.teams * decode::kAttendThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < rows) {
      const T* q = static_cast<const T*>(a.q) +
                   (tile.token + row / a.group) * a.q_stride[0] +
                   (kv_head * a.group + row % a.group) * a.q_stride[1];
      v = reinterpret_cast<const uint4*>(q)[chunk];
    }
    *reinterpret_cast<uint4*>(to + TileOffset<S::kDim>(row, chunk)) = v;
  }
}

// What all parts send to this block.
template <class S>
__device__ __forceinline__ int BytesToCombine(const Args& a,
                                              const decode::Tile& tile,
                                              int32_t stages) {
  const int rows = tile.num_queries * a.group;
  const int begin = static_cast<int>(blockIdx.x) << a.log2_slice;
  const int floats = max(0, min(1 << a.log2_slice, rows * S::kDim - begin));
  return decode::NumParts<S>(stages) * (floats * 4 + rows * 8);
}

// Combines this block's slice of the tile's output.
template <class S>
__device__ __forceinline__ void Combine(const Args& a, const decode::Tile& tile,
                                        int32_t kv_head, int32_t stages,
                                        const float* parts) {
  using T = typename S::T;
  const int tile_rows = a.queries_per_tile * a.group;
  const int slice = 1 << a.log2_slice;
  const auto* softmax =
      reinterpret_cast<const float2*>(parts + decode::kParts * slice);
  const auto exists = [&](int part) {
    return decode::PartBegin<S>(stages, part) <
           decode::PartBegin<S>(stages, part + 1);
  };
  for (int i = 2 * threadIdx.x; i < slice;
       i += 2 * a.teams * decode::kAttendThreads) {
    const int element = static_cast<int>(blockIdx.x) * slice + i;
    const int row = element / S::kDim;
    if (row >= tile.num_queries * a.group) break;
    // All parts are read at once, also those that do not exist.
    float2 softmax_of[decode::kParts];
    float2 values_of[decode::kParts];
#pragma unroll
    for (int part = 0; part < decode::kParts; ++part) {
      softmax_of[part] = softmax[part * tile_rows + row];
      values_of[part] =
          *reinterpret_cast<const float2*>(parts + part * slice + i);
    }
    float max = -INFINITY;
#pragma unroll
    for (int part = 0; part < decode::kParts; ++part) {
      if (exists(part)) max = fmaxf(max, softmax_of[part].x);
    }
    float2 value = make_float2(0.0f, 0.0f);
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < decode::kParts; ++part) {
      const float weight = decode::PowerOf2(softmax_of[part].x - max);
      if (exists(part)) {
        value.x = fmaf(values_of[part].x, weight, value.x);
        value.y = fmaf(values_of[part].y, weight, value.y);
        sum = fmaf(softmax_of[part].y, weight, sum);
      }
    }
    T* out = static_cast<T*>(a.out) +
             (tile.token + row / a.group) * a.out_stride[0] +
             (kv_head * a.group + row % a.group) * a.out_stride[1];
    *reinterpret_cast<uint32_t*>(out + element % S::kDim) = Pack<T>(
        Normalize(value.x, sum, a.v_scale), Normalize(value.y, sum, a.v_scale));
  }
}

// Zeros for the tokens that belong to no sequence, by a warp of each block of
// the first tile.
template <class S>
__device__ __forceinline__ void ClearUncovered(const Args& a, int32_t kv_head) {
  using T = typename S::T;
  if (blockIdx.z != 0 || !a.zero_uncovered) return;
  WaitForPreviousKernels();
  const int32_t covered = max(0, a.query_start[a.num_seqs]);
  for (int64_t t = covered + blockIdx.x; t < a.num_tokens; t += gridDim.x) {
    for (int i = threadIdx.x % 32; i < a.group * S::kDim; i += 32) {
      const int64_t head = kv_head * a.group + i / S::kDim;
      static_cast<T*>(
          a.out)[t * a.out_stride[0] + head * a.out_stride[1] + i % S::kDim] =
          FromFloat<T>(0.0f);
    }
  }
}

#endif  // TENON_SM90A

// Grid: blocks of a cluster, KV heads, tiles. The warps that attend come first,
// then one of each team that loads.
template <class S>
__global__ void __launch_bounds__(S::kMaxThreads)
    HopperDecodeKernel(const __grid_constant__ Args a) {
#if TENON_SM90A
  extern __shared__ __align__(1024) unsigned char shared[];
  const int ring_bytes = a.num_stages * S::kStageBytes;
  unsigned char* const tail = shared + a.teams * ring_bytes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const bool loads = warp >= a.teams * decode::kWarps;
  const int team =
      loads ? warp - a.teams * decode::kWarps : warp / decode::kWarps;
  const int32_t kv_head = static_cast<int32_t>(blockIdx.y);
  const int blocks = static_cast<int>(gridDim.x);
  const uint32_t barriers = SharedAddress(tail + S::kBarriersAt);
  const uint32_t received = SharedAddress(tail + S::kReceivedAt);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.teams; ++i) {
      const uint32_t full = barriers + i * S::kRingBarriers;
      for (int j = 0; j < a.num_stages; ++j) {
        InitBarrier(full + 8 * j, 1);
        InitBarrier(full + 8 * (decode::kMaxStages + j), decode::kWarps);
      }
    }
    InitBarrier(received, 1);
    FenceBarrierInit();
    PrefetchTensorMap(&a.k_map);
    PrefetchTensorMap(&a.v_map);
  }
  if (!a.early_reads) WaitForPreviousKernels();
  const decode::Tile tile =
      decode::FindTile(a, static_cast<int32_t>(blockIdx.z));
  if (tile.num_queries == 0) {  // nor have the other blocks of the cluster any
    WaitForPreviousKernels();
    if (loads && team == 0) ClearUncovered<S>(a, kv_head);
    return;
  }
  const int32_t stages = CeilDiv(tile.length, decode::kKeys);
  const int rank = static_cast<int>(blockIdx.x) * a.teams + team;
  const int begin = decode::kParts * rank / (blocks * a.teams);
  const int end = decode::kParts * (rank + 1) / (blocks * a.teams);
  const int32_t end_stage = decode::PartBegin<S>(stages, end);
  __syncthreads();  // barriers are initialised
  decode::SignalCluster();

  decode::Ring ring;
  ring.stages = SharedAddress(shared + team * ring_bytes);
  ring.full = barriers + team * S::kRingBarriers;
  ring.empty = ring.full + 8 * decode::kMaxStages;
  ring.count = a.num_stages;
  if (loads) {
    decode::LoadStages<S>(a, tile, kv_head, decode::PartBegin<S>(stages, begin),
                          end_stage, ring);
    if (team == 0) ClearUncovered<S>(a, kv_head);
    return;
  }
  if (threadIdx.x == 0) {
    ArriveExpectBytes(received, BytesToCombine<S>(a, tile, stages));
  }
  WaitForPreviousKernels();
  LoadQueries<S>(a, tile, kv_head, tail);
  SyncThreads(1 + decode::kMaxTeams, a.teams * decode::kAttendThreads);
  const int tile_rows = a.queries_per_tile * a.group;
  const int slice = 1 << a.log2_slice;
  float* const parts = reinterpret_cast<float*>(tail + S::kPartsAt);
  const uint32_t to = SharedAddress(parts);
  const uint32_t to_softmax = to + decode::kParts * slice * 4;

  decode::Attend<S> attend(a, tile, tail);
  bool cluster_runs = false;
  for (int part = begin; part < end; ++part) {
    const int32_t part_end = decode::PartBegin<S>(stages, part + 1);
    int32_t stage = decode::PartBegin<S>(stages, part);
    if (stage == part_end) continue;
    attend.Clear();
    for (;; ++stage) {
      Wait(ring.full + 8 * ring.at, ring.phase);
      const uint32_t at = ring.at * S::kStageBytes;
      attend.AddStage(stage * decode::kKeys, ring.stages + at);
      if (stage + 1 == part_end) {
        if (!cluster_runs) decode::AwaitCluster();  // its memory is there
        cluster_runs = true;
        // The stage is room to merge in until it is given back.
        attend.Finish(
            shared + team * ring_bytes + at,
            [&](int row, int column, float2 v) {
              const int element = row * S::kDim + column;
              const int at_receiver = part * slice + (element & (slice - 1));
              decode::SendInCluster(to + at_receiver * 4, received,
                                    element >> a.log2_slice, v.x, v.y);
            },
            [&](int row, int receiver, float2 softmax) {
              decode::SendInCluster(to_softmax + (part * tile_rows + row) * 8,
                                    received, receiver, softmax.x, softmax.y);
            });
      }
      __syncwarp();
      if (lane == 0) Arrive(ring.empty + 8 * ring.at);
      ring.Advance();
      if (stage + 1 == part_end) break;
    }
  }
  if (!cluster_runs) decode::AwaitCluster();
  Wait(received, 0);
  Combine<S>(a, tile, kv_head, stages, parts);
#endif  // TENON_SM90A
}

int Log2(int64_t v) {
  int log2 = 0;
  while (v >> (log2 + 1) != 0) ++log2;
  return log2;
}

// Of what each of `blocks` combines of a tile: a power of two, since dividing
// by it is cheap.
int Log2Slice(int tile_floats, int blocks) {
  int log2 = 2;
  while (blocks << log2 < tile_floats) ++log2;
  return log2;
}

Status MakePageMap(const TensorView& cache, CUtensorMap* map) {
  const int64_t shape[4] = {cache.shape[3], cache.shape[1], cache.shape[2],
                            cache.shape[0]};
  const int64_t strides[3] = {cache.stride[1], cache.stride[2],
                              cache.stride[0]};
  const int box[4] = {
      static_cast<int>(128 / DTypeSize(cache.dtype)),
      static_cast<int>(std::min<int64_t>(cache.shape[1], decode::kKeys)), 1, 1};
  return MakeTensorMap("Attention", cache.dtype, cache.data, 4, shape, strides,
                       box, map);
}

Status MakeArgs(const AttentionArgs& args, const HopperDecodePlan& plan,
                Args* a) {
  const AttentionParams& p = args.params;
  TENON_RETURN_IF_ERROR(MakePageMap(p.k_cache, &a->k_map));
  TENON_RETURN_IF_ERROR(MakePageMap(p.v_cache, &a->v_map));
  a->q = p.q.data;
  a->out = p.out.data;
  for (int i = 0; i < 2; ++i) {
    a->q_stride[i] = p.q.stride[i];
    a->out_stride[i] = p.out.stride[i];
  }
  a->block_table = p.block_table.As<const int32_t>();
  a->table_stride = p.block_table.stride[0];
  a->query_start = p.query_start.As<const int32_t>();
  a->kv_len = p.kv_len.As<const int32_t>();
  a->num_seqs = static_cast<int32_t>(p.block_table.shape[0]);
  a->num_tokens = static_cast<int32_t>(p.q.shape[0]);
  a->num_pages = static_cast<int32_t>(p.k_cache.shape[0]);
  a->log2_page_size = Log2(p.k_cache.shape[1]);
  a->log2_box_rows = std::min(a->log2_page_size, Log2(decode::kKeys));
  a->group = static_cast<int32_t>(p.q.shape[1] / p.k_cache.shape[2]);
  a->queries_per_tile = plan.queries_per_tile;
  a->tiles_per_seq = plan.tiles_per_seq;
  const bool with_prefill = args.plan.kernel == AttentionKernel::kPrefill;
  a->max_queries = with_prefill ? kMaxDecodeQueries : a->num_tokens;
  a->zero_uncovered = !with_prefill;
  a->max_kv_len = args.plan.max_kv_len;
  a->early_reads = p.early_reads;
  a->scale = p.scale * p.k_scale * kLog2E;
  a->v_scale = p.v_scale;
  return Status();
}

template <class S>
Status LaunchShape(const AttentionArgs& args, const HopperDecodePlan& plan,
                   Stream stream) {
  const AttentionParams& p = args.params;
  Args a;
  TENON_RETURN_IF_ERROR(MakeArgs(args, plan, &a));
  a.teams = S::kTeamsPerSm == 2 ? plan.teams : 1;
  // Two blocks fit an SM if each has so much shared memory, which lets the next
  // kernel's blocks in as well; else one.
  constexpr int kHalf = 113 * 1024;
  constexpr int kWhole = 227 * 1024;
  constexpr int kMinStages = 2;
  // Blocks of several teams have an SM of their own anyway.
  const int room = a.teams == S::kTeamsPerSm ? kWhole : kHalf;
  const int tile_rows = plan.queries_per_tile * a.group;
  int blocks = plan.cluster_blocks;
  const auto bytes = [&](int num_stages) {
    return a.teams * num_stages * S::kStageBytes + S::kPartsAt +
           decode::ReceivedBytes(tile_rows,
                                 Log2Slice(tile_rows * S::kDim, blocks));
  };
  while (blocks < decode::kParts && bytes(kMinStages) > room) blocks *= 2;
  a.log2_slice = Log2Slice(tile_rows * S::kDim, blocks);
  a.num_stages = kMinStages;
  while (a.num_stages < decode::kMaxStages && bytes(a.num_stages + 1) <= room) {
    ++a.num_stages;
  }
  auto* const kernel = HopperDecodeKernel<S>;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaFuncSetAttribute(
                   kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "Attention"));
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(p.k_cache.shape[2]),
                  static_cast<unsigned>(plan.num_tiles));
  cudaLaunchConfig_t config = LaunchConfig(
      stream, grid, dim3(static_cast<unsigned>(a.teams * decode::kTeamThreads)),
      bytes(a.num_stages));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.x;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  return LaunchWithConfig("Attention", config, kernel, a);
}

template <class T>
Status LaunchType(const AttentionArgs& args, const HopperDecodePlan& plan,
                  Stream stream) {
  using decode::Shape;
  const int64_t dim = args.params.q.shape[2];
  if (args.params.k_cache.dtype == DType::kFloat8E4M3) {
    return dim == 128 ? LaunchShape<Shape<T, uint8_t, 128>>(args, plan, stream)
                      : LaunchShape<Shape<T, uint8_t, 256>>(args, plan, stream);
  }
  switch (dim) {
    case 64:
      return LaunchShape<Shape<T, T, 64>>(args, plan, stream);
    case 128:
      return LaunchShape<Shape<T, T, 128>>(args, plan, stream);
    default:
      return LaunchShape<Shape<T, T, 256>>(args, plan, stream);
  }
}

}  // namespace

Status LaunchHopperDecodeAttention(const AttentionArgs& args, Stream stream) {
  HopperDecodePlan plan = PlanHopperDecode(args.params, args.plan);
  // A GPU can have clusters of 8; whether a part of one has room for 16 blocks
  // side by side is not known.
  int processors = 0;
  TENON_RETURN_IF_ERROR(ToStatus(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                             args.params.q.device.index),
      "Attention"));
  if (processors < 100) plan.cluster_blocks = std::min(plan.cluster_blocks, 8);
  // Blocks of two teams fill an SM each: on fewer than those of the plan, some
  // would wait for others to end.
  const AttentionParams& p = args.params;
  const int64_t blocks = std::min(plan.num_tiles, p.q.shape[0]) *
                         p.k_cache.shape[2] * plan.cluster_blocks;
  if (blocks > processors) plan.teams = 1;
  return args.params.q.dtype == DType::kFloat16
             ? LaunchType<__half>(args, plan, stream)
             : LaunchType<__nv_bfloat16>(args, plan, stream);
}

}  // namespace tenon::cuda
