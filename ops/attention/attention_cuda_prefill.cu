#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cuda_mma.cuh"
#include "ops/attention/attention_cuda_rows.cuh"
#include "ops/attention/attention_hopper_prefill.h"
#include "ops/core/hopper_cuda.cuh"

// Attention of sequences with many queries: a block takes 64 rows of one
// sequence and KV head, a row being a (query, head of the group), through all
// keys up to its last query's. Warps own 16 rows each and share the tiles of
// keys.

namespace tenon::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kThreads = 128;

// C is the element of the caches: T, or uint8_t for float8.
template <class T, class C, int kDim_>
struct PrefillShape {
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = kDim == 256 ? 32 : 64;
  static constexpr bool kWiden = sizeof(C) == 1;
  static constexpr int kStageBytes = kKeys * kDim * sizeof(C);
  static constexpr int kTileBytes = kKeys * kDim * sizeof(T);
  static constexpr int kQueryBytes = kRows * kDim * sizeof(T);
  static constexpr int kSharedBytes =
      kQueryBytes + 2 * 2 * kStageBytes + (kWiden ? 2 * kTileBytes : 0);
};

template <class T, int kDim>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p,
                                            const RowTile& rows, uint32_t group,
                                            int64_t kv_head,
                                            unsigned char* to) {
  constexpr int kChunks = kDim * sizeof(T) / 16;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < rows.rows) {
      v = reinterpret_cast<const uint4*>(
          p.q.As<const T>() +
          RowOffset(p.q, rows, group, kv_head, row))[i % kChunks];
    }
    *reinterpret_cast<uint4*>(to + TileOffset<kDim>(row, i % kChunks)) = v;
  }
}

// Where the keys of a tile are in the caches; -1 past the last.
template <int kKeys>
struct KeyOffsets {
  int64_t k[kKeys];
  int64_t v[kKeys];

  __device__ __forceinline__ void Find(const AttentionParams& p,
                                       int64_t sequence, int64_t kv_head,
                                       int32_t first_key, int32_t end_key) {
    const int i = threadIdx.x;
    if (i >= kKeys) return;
    k[i] = v[i] = -1;
    if (first_key + i >= end_key) return;
    const Slot slot = FindSlot(p, sequence, first_key + i);
    k[i] = CacheOffset(p.k_cache, slot, kv_head);
    v[i] = CacheOffset(p.v_cache, slot, kv_head);
  }
};

// Starts the copies of a tile of keys, zeros for those past the last.
template <class C, class Shape>
__device__ __forceinline__ void LoadTile(
    const AttentionParams& p, const KeyOffsets<Shape::kKeys>& offsets,
    uint32_t stage) {
  constexpr int kChunks = Shape::kDim * sizeof(C) / 16;
#pragma unroll
  for (int i = 0; i < Shape::kKeys * kChunks / kThreads; ++i) {
    const int row = (i * kThreads + threadIdx.x) / kChunks;
    const int chunk = (i * kThreads + threadIdx.x) % kChunks;
    const bool exists = offsets.k[row] >= 0;
    const int64_t element = chunk * (16 / sizeof(C));
    const uint32_t to = stage + StageOffset<Shape::kDim, sizeof(C)>(row, chunk);
    CopyOrZero16(
        to, p.k_cache.As<const C>() + (exists ? offsets.k[row] + element : 0),
        exists);
    CopyOrZero16(
        to + Shape::kStageBytes,
        p.v_cache.As<const C>() + (exists ? offsets.v[row] + element : 0),
        exists);
  }
}

// Stores the warp's 16 rows, through its rows of the queries' tile so that a
// row leaves in 16-byte pieces.
template <class T, int kDim>
__device__ __forceinline__ void StoreRows(const AttentionParams& p,
                                          const RowTile& rows, uint32_t group,
                                          int64_t kv_head,
                                          const RowState<kDim>& state,
                                          unsigned char* tile) {
  constexpr int kChunks = kDim * sizeof(T) / 16;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes are done with the queries
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = Normalize(1.0f, state.sum[r], p.v_scale);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(
          tile + TileOffset<kDim>(lane / 4 + 8 * r, j) + lane % 4 * 4) =
          Pack<T>(state.out[j][2 * r] * factor,
                  state.out[j][2 * r + 1] * factor);
    }
  }
  __syncwarp();
  const int first = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = first + i / kChunks;
    if (row >= rows.rows) break;
    reinterpret_cast<uint4*>(p.out.As<T>() + RowOffset(p.out, rows, group,
                                                       kv_head,
                                                       row))[i % kChunks] =
        *reinterpret_cast<const uint4*>(
            tile + TileOffset<kDim>(i / kChunks, i % kChunks));
  }
}

// Grid: upper bound of the row tiles, KV heads.
template <class T, class C, int kDim>
__global__ void __launch_bounds__(kThreads)
    PrefillKernel(const __grid_constant__ AttentionArgs args) {
  using Shape = PrefillShape<T, C, kDim>;
  constexpr int kKeys = Shape::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyOffsets<kKeys> offsets[2];
  const AttentionParams& p = args.params;
  const auto group = static_cast<uint32_t>(p.q.shape[1] / p.k_cache.shape[2]);
  const int64_t kv_head = blockIdx.y;
  // The last tiles of a sequence have the most keys: they go first.
  const RowTile rows =
      FindRowTile<kRows>(args, group, gridDim.x - 1 - blockIdx.x);
  if (rows.rows == 0) return;

  const int warp = threadIdx.x / 32;
  const int warp_row = warp * 16;
  const int last_row = rows.rows - 1;
  const int32_t num_keys = RowLength(args, rows, group, last_row);
  int32_t length[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    length[r] =
        RowLength(args, rows, group, warp_row + threadIdx.x % 32 / 4 + 8 * r);
  }
  // Keys that all rows of the warp attend to, and that any does.
  const int32_t common = RowLength(args, rows, group, warp_row);
  const int32_t needed =
      RowLength(args, rows, group, min(warp_row + 15, last_row));

  unsigned char* const stages = shared + Shape::kQueryBytes;
  unsigned char* const wide = stages + 2 * 2 * Shape::kStageBytes;
  LoadQueries<T, kDim>(p, rows, group, kv_head, shared);
  offsets[0].Find(p, rows.sequence, kv_head, 0, num_keys);
  offsets[1].Find(p, rows.sequence, kv_head, kKeys, num_keys);
  __syncthreads();
  const QueryRows<kDim> q(SharedAddress(shared) + warp * 16 * kDim * 2);
  RowState<kDim> state;
  if (num_keys > 0) LoadTile<C, Shape>(p, offsets[0], SharedAddress(stages));
  CommitCopies();
  const float scale = p.scale * p.k_scale * kLog2E;
  for (int32_t key = 0; key < num_keys; key += kKeys) {
    const int stage = key / kKeys % 2;
    WaitForCopies<0>();
    __syncthreads();  // the tile is there, the one before is used
    unsigned char* const at = stages + stage * 2 * Shape::kStageBytes;
    if (key + kKeys < num_keys) {
      LoadTile<C, Shape>(
          p, offsets[1 - stage],
          SharedAddress(stages) + (1 - stage) * 2 * Shape::kStageBytes);
      offsets[stage].Find(p, rows.sequence, kv_head, key + 2 * kKeys, num_keys);
    }
    CommitCopies();
    uint32_t k_tile = SharedAddress(at);
    if constexpr (Shape::kWiden) {
      WidenTile<T, kDim>(at, 2 * kKeys, wide, threadIdx.x, kThreads);
      __syncthreads();
      k_tile = SharedAddress(wide);
    }
    if (key < needed) {
      FoldTile<T, kDim, kKeys>(q, k_tile, k_tile + Shape::kTileBytes, key,
                               length, key + kKeys > common, scale, state);
    }
  }
  state.FinishSums();
  StoreRows<T, kDim>(p, rows, group, kv_head, state,
                     shared + warp * 16 * kDim * 2);
}

template <class T, class C, int kDim>
Status LaunchPrefill(const AttentionArgs& args, Stream stream) {
  using Shape = PrefillShape<T, C, kDim>;
  const AttentionParams& p = args.params;
  const dim3 grid(static_cast<unsigned>(MaxRowTiles<kRows>(p)),
                  static_cast<unsigned>(p.k_cache.shape[2]));
  return Launch("Attention", stream, grid, dim3(kThreads), Shape::kSharedBytes,
                PrefillKernel<T, C, kDim>, args);
}

template <class T, class C>
Status LaunchPrefill(const AttentionArgs& args, Stream stream) {
  switch (args.params.q.shape[2]) {
    case 64:
      return LaunchPrefill<T, C, 64>(args, stream);
    case 128:
      return LaunchPrefill<T, C, 128>(args, stream);
    default:
      return LaunchPrefill<T, C, 256>(args, stream);
  }
}

template <class T>
Status LaunchPrefill(const AttentionArgs& args, Stream stream) {
  return args.params.k_cache.dtype == DType::kFloat8E4M3
             ? LaunchPrefill<T, uint8_t>(args, stream)
             : LaunchPrefill<T, T>(args, stream);
}

}  // namespace

Status LaunchPrefillAttention(const AttentionArgs& args, Stream stream) {
  const AttentionParams& p = args.params;
  if (CanUseHopperPrefill(p) && IsHopper(p.q.device)) {
    return LaunchHopperPrefill(args, stream);
  }
  return p.q.dtype == DType::kFloat16
             ? LaunchPrefill<__half>(args, stream)
             : LaunchPrefill<__nv_bfloat16>(args, stream);
}

}  // namespace tenon::cuda
