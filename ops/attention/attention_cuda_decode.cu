#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cuda_mma.cuh"

// Split-KV attention of single queries: a block takes the up to 16 query heads
// that share a KV head through one part of the context, so that K and V are
// read once. Its warps take every kWarps-th tile of keys, each through a
// cp.async pipeline of its own without a barrier, and merge at the end.

namespace tenon::cuda {
namespace {

constexpr int kKeys = 16;  // of a warp's tile

// C is the element of the caches: T, or uint8_t for float8.
template <class T, class C, int kDim_>
struct DecodeShape {
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kDim == 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr bool kWiden = sizeof(C) == 1;
  // Of the K or the V of a tile.
  static constexpr int kStageBytes = kKeys * kDim * sizeof(C);
  static constexpr int kTileBytes = kKeys * kDim * sizeof(T);
  // Three blocks of 64 KiB fit an SM of Hopper, two any other.
  static constexpr int kStages =
      kWiden ? 3 : 64 * 1024 / kWarps / (2 * kStageBytes);
  static constexpr int kWarpBytes =
      kStages * 2 * kStageBytes + (kWiden ? 2 * kTileBytes : 0);
  static constexpr int kQueryBytes = kHeadsPerBlock * kDim * sizeof(T);
  static constexpr int kSharedBytes = kQueryBytes + kWarps * kWarpBytes;
  static_assert(kStages >= 2, "a pipeline");
  static_assert(kWarpBytes >= kHeadsPerBlock * kDim * 4, "room to merge");
};

// Starts the copies of a warp's tile of keys, zeros from end_key on.
template <class C, class Shape>
__device__ __forceinline__ void LoadTile(const AttentionParams& p,
                                         int64_t sequence, int64_t kv_head,
                                         int32_t first_key, int32_t end_key,
                                         uint32_t stage) {
  constexpr int kChunks = Shape::kDim * sizeof(C) / 16;  // of a row
  const int lane = threadIdx.x % 32;
  Slot slot;  // of key lane % kKeys
  if (first_key + lane % kKeys < end_key) {
    slot = FindSlot(p, sequence, first_key + lane % kKeys);
  }
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks;
    const int chunk = (i * 32 + lane) % kChunks;
    Slot from;
    from.page = __shfl_sync(~0u, slot.page, row);
    from.offset = __shfl_sync(~0u, slot.offset, row);
    const bool exists = first_key + row < end_key;
    const int64_t element = chunk * (16 / sizeof(C));
    const uint32_t to = stage + StageOffset<Shape::kDim, sizeof(C)>(row, chunk);
    CopyOrZero16(to,
                 p.k_cache.As<const C>() +
                     CacheOffset(p.k_cache, from, kv_head) + element,
                 exists);
    CopyOrZero16(to + Shape::kStageBytes,
                 p.v_cache.As<const C>() +
                     CacheOffset(p.v_cache, from, kv_head) + element,
                 exists);
  }
}

// Copies the heads' queries to the tile at `to`, zeros for heads that do not
// exist.
template <class T, class Shape>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p,
                                            int64_t token, int64_t first_head,
                                            int heads, unsigned char* to) {
  constexpr int kChunks = Shape::kDim * sizeof(T) / 16;
  const T* q = p.q.As<const T>() + token * p.q.stride[0];
  for (int i = threadIdx.x; i < kHeadsPerBlock * kChunks;
       i += Shape::kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < heads) {
      v = reinterpret_cast<const uint4*>(q + (first_head + row) *
                                                 p.q.stride[1])[chunk];
    }
    *reinterpret_cast<uint4*>(to + TileOffset<Shape::kDim>(row, chunk)) = v;
  }
}

// One warp's rows over its tiles of the keys.
template <class T, class C, class Shape>
__device__ __forceinline__ void AttendWarp(const AttentionParams& p,
                                           const Query& query, int64_t kv_head,
                                           const KeyRange& keys,
                                           const QueryRows<Shape::kDim>& q,
                                           unsigned char* warp_shared,
                                           RowState<Shape::kDim>& state) {
  constexpr int kTileStep = Shape::kWarps * kKeys;
  const float scale = p.scale * p.k_scale * kLog2E;
  const int32_t length[2] = {keys.end, keys.end};
  const uint32_t stages = SharedAddress(warp_shared);
  int stage = 0;
  for (int32_t key = keys.begin + threadIdx.x / 32 * kKeys; key < keys.end;
       key += kTileStep) {
    WaitForCopies<Shape::kStages - 1>();
    __syncwarp();
    const uint32_t at = stages + stage * 2 * Shape::kStageBytes;
    const auto refill = [&] {
      const int32_t next = key + Shape::kStages * kTileStep;
      if (next < keys.end) {
        LoadTile<C, Shape>(p, query.sequence, kv_head, next, keys.end, at);
      }
      CommitCopies();
    };
    uint32_t k_tile = at;
    if constexpr (Shape::kWiden) {
      unsigned char* wide =
          warp_shared + Shape::kStages * 2 * Shape::kStageBytes;
      WidenTile<T, Shape::kDim>(warp_shared + stage * 2 * Shape::kStageBytes,
                                2 * kKeys, wide, threadIdx.x % 32, 32);
      __syncwarp();
      refill();
      k_tile = SharedAddress(wide);
    }
    FoldTile<T, Shape::kDim, kKeys>(q, k_tile, k_tile + Shape::kTileBytes, key,
                                    length, key + kKeys > keys.end, scale,
                                    state);
    __syncwarp();
    if constexpr (!Shape::kWiden) refill();
    if (++stage == Shape::kStages) stage = 0;
  }
  WaitForCopies<0>();
  state.FinishSums();
}

// Merges the warps' rows in order and stores them.
template <class T, class Shape>
__device__ __forceinline__ void MergeWarps(const AttentionArgs& args,
                                           const Query& query,
                                           int64_t first_head, int heads,
                                           const unsigned char* warps_shared,
                                           const float2* softmax) {
  for (int i = threadIdx.x; i < heads * Shape::kDim; i += Shape::kThreads) {
    const int row = i / Shape::kDim;
    float max = -INFINITY;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      max = fmaxf(max, softmax[warp * kHeadsPerBlock + row].x);
    }
    float value = 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      const float2 of_warp = softmax[warp * kHeadsPerBlock + row];
      if (of_warp.y == 0.0f) continue;  // it had no keys
      const float weight = Exp2(of_warp.x - max);
      value += weight * reinterpret_cast<const float*>(
                            warps_shared + warp * Shape::kWarpBytes)[i];
      sum += weight * of_warp.y;
    }
    StorePart<T>(args, blockIdx.y, query, first_head + row,
                 static_cast<int32_t>(blockIdx.z), i % Shape::kDim, value, max,
                 sum);
  }
}

// Grid: blocks of heads, rows of the pass, parts.
template <class T, class C, int kDim>
__global__ void __launch_bounds__(DecodeShape<T, C, kDim>::kThreads)
    DecodeKernel(const __grid_constant__ AttentionArgs args) {
  using Shape = DecodeShape<T, C, kDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float2 softmax[Shape::kWarps * kHeadsPerBlock];
  const AttentionParams& p = args.params;
  const Query query = FindQuery(args, args.first_row + blockIdx.y);
  if (query.token < 0) return;
  const KeyRange keys =
      FindPart(args, query.length, static_cast<int32_t>(blockIdx.z));
  if (keys.begin == keys.end && blockIdx.z > 0) return;
  const int64_t group = p.q.shape[1] / p.k_cache.shape[2];
  const int64_t blocks = CeilDiv<int64_t, int64_t>(group, kHeadsPerBlock);
  const int64_t kv_head = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kHeadsPerBlock;
  const int64_t first_head = kv_head * group + first;
  const int heads =
      static_cast<int>(min(int64_t{kHeadsPerBlock}, group - first));

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  unsigned char* const warps_shared = shared + Shape::kQueryBytes;
  unsigned char* const warp_shared = warps_shared + warp * Shape::kWarpBytes;
#pragma unroll
  for (int stage = 0; stage < Shape::kStages; ++stage) {
    const int32_t key = keys.begin + (stage * Shape::kWarps + warp) * kKeys;
    if (key < keys.end) {
      LoadTile<C, Shape>(
          p, query.sequence, kv_head, key, keys.end,
          SharedAddress(warp_shared) + stage * 2 * Shape::kStageBytes);
    }
    CommitCopies();
  }
  LoadQueries<T, Shape>(p, query.token, first_head, heads, shared);
  __syncthreads();
  const QueryRows<kDim> q(SharedAddress(shared));
  RowState<kDim> state;
  AttendWarp<T, C, Shape>(p, query, kv_head, keys, q, warp_shared, state);

  // The warp's stages are free now.
  const float scale = p.scale * p.k_scale * kLog2E;
  float* const out = reinterpret_cast<float*>(warp_shared);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (lane % 4 == 0) {
      softmax[warp * kHeadsPerBlock + row] =
          make_float2(state.max[r] * scale, state.sum[r]);
    }
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      *reinterpret_cast<float2*>(out + row * kDim + j * 8 + lane % 4 * 2) =
          make_float2(state.out[j][2 * r], state.out[j][2 * r + 1]);
    }
  }
  __syncthreads();
  MergeWarps<T, Shape>(args, query, first_head, heads, warps_shared, softmax);
}

template <class T, class C, int kDim>
Status LaunchDecode(const AttentionArgs& args, int64_t rows, Stream stream) {
  using Shape = DecodeShape<T, C, kDim>;
  const dim3 grid(HeadBlocks(args.params), static_cast<unsigned>(rows),
                  static_cast<unsigned>(args.plan.max_parts));
  return Launch("Attention", stream, grid, dim3(Shape::kThreads),
                Shape::kSharedBytes, DecodeKernel<T, C, kDim>, args);
}

template <class T, class C>
Status LaunchDecode(const AttentionArgs& args, int64_t rows, Stream stream) {
  switch (args.params.q.shape[2]) {
    case 64:
      return LaunchDecode<T, C, 64>(args, rows, stream);
    case 128:
      return LaunchDecode<T, C, 128>(args, rows, stream);
    default:
      return LaunchDecode<T, C, 256>(args, rows, stream);
  }
}

template <class T>
Status LaunchDecode(const AttentionArgs& args, int64_t rows, Stream stream) {
  return args.params.k_cache.dtype == DType::kFloat8E4M3
             ? LaunchDecode<T, uint8_t>(args, rows, stream)
             : LaunchDecode<T, T>(args, rows, stream);
}

}  // namespace

Status LaunchDecodeAttention(const AttentionArgs& args, int64_t rows,
                             Stream stream) {
  return args.params.q.dtype == DType::kFloat16
             ? LaunchDecode<__half>(args, rows, stream)
             : LaunchDecode<__nv_bfloat16>(args, rows, stream);
}

}  // namespace tenon::cuda
