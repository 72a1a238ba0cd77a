#include <algorithm>

#include "ops/attention/attention_hopper_prefill_attender_cuda.cuh"
#include "ops/attention/attention_hopper_prefill_loader_cuda.cuh"
#include "ops/attention/attention_hopper_prefill_widen_cuda.cuh"

// Persistent blocks, one on each multiprocessor, that are dealt out the tiles
// of rows. One warpgroup fills rings of tiles of K and V in shared memory,
// pages by TMA, and runs ahead into the next tile of rows; two (for head_dim 64
// three) multiply with wgmma. A row sees tiles of keys that begin at multiples
// of kKeys, and a tile that is masked for it leaves its state as it is: so its
// bits do not depend on the rows it shares a tile with.
//
// float8 caches are widened ahead, to a copy that all tiles of rows read, or,
// with the same bits, by the loading warpgroup.

namespace tenon::cuda {
namespace {

using hopper_prefill::Params;
using hopper_prefill::Shape;

constexpr char kOp[] = "Attention";

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    HopperPrefillKernel(const __grid_constant__ Params p) {
#if TENON_SM90A
  using hopper_prefill::CacheLoader;
  extern __shared__ __align__(1024) char shared_memory[];
  const hopper_prefill::SharedMemory<S> shared(SharedAddress(shared_memory));
  if (threadIdx.x == 0) {
    shared.InitBarriers();
    PrefetchTensorMap(&p.k);
    PrefetchTensorMap(&p.v);
  }
  __syncthreads();
  WaitForPreviousKernels();
  if (threadIdx.x < 128) {
    DecreaseRegisters<S::kLoadRegisters>();
    if constexpr (S::kWiden) {
      hopper_prefill::WideningLoader<S>(p, shared).Load();
    } else if (threadIdx.x < 32) {
      CacheLoader<S, false>(p, shared).Load();
    } else if (threadIdx.x < 64) {
      CacheLoader<S, true>(p, shared).Load();
    } else {
      hopper_prefill::LoadAllQueries<S>(p, shared, threadIdx.x - 64);
    }
  } else {
    IncreaseRegisters<S::kMultiplyRegisters>();
    hopper_prefill::Attender<S>(p, shared).Attend();
  }
#endif
}

// Keys of one box: as many of a page as fit a tile, in a power of two.
int BoxRows(int64_t page_size, int keys) {
  int rows = 8;
  while (keys % (2 * rows) == 0 && page_size % (2 * rows) == 0) rows *= 2;
  return rows;
}

// A map whose dimensions are the elements of 128 bytes of a row, 8 slots, such
// pieces of all rows of a slot, groups of 8 slots, and pages. A box has all of
// box_rows slots of one KV head.
Status MakeCacheMap(const TensorView& cache, int box_rows, CUtensorMap* map) {
  const int64_t head_dim = cache.shape[3];
  const int64_t row = (cache.shape[2] - 1) * cache.stride[2] + head_dim;
  const auto piece = 128 / static_cast<int64_t>(DTypeSize(cache.dtype));
  const int64_t shape[5] = {piece, 8, row / piece, cache.shape[1] / 8,
                            cache.shape[0]};
  const int64_t strides[4] = {cache.stride[1], piece, 8 * cache.stride[1],
                              cache.stride[0]};
  const int box[5] = {static_cast<int>(piece), 8,
                      static_cast<int>(head_dim / piece), box_rows / 8, 1};
  return MakeTensorMap(kOp, cache.dtype, cache.data, 5, shape, strides, box,
                       map);
}

template <class S>
Status LaunchShape(const AttentionArgs& args, Stream stream) {
  const AttentionParams& a = args.params;
  Params p;
  p.args = args;
  p.box_rows = BoxRows(a.k_cache.shape[1], S::kWiden ? S::kRawKeys : S::kKeys);
  TENON_RETURN_IF_ERROR(MakeCacheMap(a.k_cache, p.box_rows, &p.k));
  TENON_RETURN_IF_ERROR(MakeCacheMap(a.v_cache, p.box_rows, &p.v));
  p.kv_heads = static_cast<int32_t>(a.k_cache.shape[2]);
  p.group = static_cast<uint32_t>(a.q.shape[1] / p.kv_heads);
  p.num_tiles = MaxRowTiles<S::kRows>(a) * p.kv_heads;
  int cores = 0;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaDeviceGetAttribute(&cores, cudaDevAttrMultiProcessorCount,
                                      a.q.device.index),
               kOp));
  const int64_t blocks = std::min<int64_t>(p.num_tiles, cores);
  return LaunchDependent(kOp, stream, dim3(static_cast<unsigned>(blocks)),
                         dim3(S::kThreads), S::kSharedBytes,
                         HopperPrefillKernel<S>, p);
}

template <class T>
Status LaunchType(const AttentionArgs& args, Stream stream) {
  if (args.params.k_cache.dtype == DType::kFloat8E4M3) {
    return LaunchShape<Shape<T, __nv_fp8_e4m3, 128, 2>>(args, stream);
  }
  return args.params.q.shape[2] == 64
             ? LaunchShape<Shape<T, T, 64, 3>>(args, stream)
             : LaunchShape<Shape<T, T, 128, 2>>(args, stream);
}

}  // namespace

Status LaunchHopperPrefill(const AttentionArgs& args, Stream stream) {
  AttentionArgs a = args;
  if (args.plan.widened_keys > 0) {
    TENON_RETURN_IF_ERROR(LaunchWidenCaches(args, stream, &a.params));
  }
  return a.params.q.dtype == DType::kFloat16
             ? LaunchType<__half>(a, stream)
             : LaunchType<__nv_bfloat16>(a, stream);
}

}  // namespace tenon::cuda
