#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cuda_mma.cuh"

// A copy of float8 caches in the queries' dtype, for the sequences of many
// queries, as every tile of their rows would widen them again. A sequence has
// one page there, of plan.widened_keys slots; those past its end hold anything.

namespace tenon::cuda {
namespace {

constexpr char kOp[] = "Attention";
constexpr int kThreads = 256;
constexpr int kKeys = 16;  // of a piece of work
constexpr int kBlocksPerSm = 8;

template <class T>
struct Copies {
  T* k;
  T* v;
  int32_t* block_table;
};

template <class T>
__device__ __forceinline__ void WidenChunk(const uint8_t* from, T* to) {
  const uint4 in = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {in.x, in.y, in.z, in.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    wide[i] =
        WidenFloat8<T>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
  }
  auto* out = reinterpret_cast<uint4*>(to);
  out[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  out[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    WidenCachesKernel(const __grid_constant__ AttentionArgs args,
                      Copies<T> to) {
  WaitForPreviousKernels();
  const AttentionParams& p = args.params;
  const auto num_seqs = static_cast<int32_t>(p.block_table.shape[0]);
  const auto kv_heads = static_cast<uint32_t>(p.k_cache.shape[2]);
  const auto head_chunks = static_cast<uint32_t>(p.k_cache.shape[3] / 16);
  const uint32_t chunks = kv_heads * head_chunks;  // of a slot
  if (blockIdx.x == 0) {
    for (int32_t s = threadIdx.x; s < num_seqs; s += kThreads) {
      to.block_table[s] = s;
    }
  }
  const int64_t pieces = args.plan.widened_keys / kKeys;
  for (int64_t i = blockIdx.x; i < num_seqs * pieces; i += gridDim.x) {
    const int64_t sequence = i / pieces;
    const int64_t queries = NumQueries(p, sequence);
    if (queries <= 0 ||
        (args.plan.num_rows > 0 && queries <= kMaxDecodeQueries)) {
      continue;  // not served by tiles
    }
    const auto first = static_cast<int32_t>((i - sequence * pieces) * kKeys);
    const int32_t keys =
        min(ContextLength(args, sequence, queries - 1, queries) - first, kKeys);
#pragma unroll 2
    for (int j = threadIdx.x; j < keys * static_cast<int>(chunks);
         j += kThreads) {
      const uint32_t key = j / chunks;
      const uint32_t chunk = j - key * chunks;
      const uint32_t head = chunk / head_chunks;
      const Slot slot =
          FindSlot(p, sequence, first + static_cast<int32_t>(key));
      const int64_t element = (chunk - head * head_chunks) * 16;
      const int64_t at =
          ((sequence * args.plan.widened_keys + first + key) * chunks + chunk) *
          16;
      WidenChunk(p.k_cache.As<const uint8_t>() +
                     CacheOffset(p.k_cache, slot, head) + element,
                 to.k + at);
      WidenChunk(p.v_cache.As<const uint8_t>() +
                     CacheOffset(p.v_cache, slot, head) + element,
                 to.v + at);
    }
  }
}

template <class T>
Status Launch(const AttentionArgs& args, const AttentionParams& widened,
              Stream stream) {
  const int64_t work =
      args.params.block_table.shape[0] * (args.plan.widened_keys / kKeys);
  int cores = 0;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaDeviceGetAttribute(&cores, cudaDevAttrMultiProcessorCount,
                                      args.params.q.device.index),
               kOp));
  const Copies<T> to = {widened.k_cache.As<T>(), widened.v_cache.As<T>(),
                        widened.block_table.As<int32_t>()};
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(work, int64_t{cores} * kBlocksPerSm));
  return LaunchDependent(kOp, stream, dim3(blocks), dim3(kThreads), 0,
                         WidenCachesKernel<T>, args, to);
}

}  // namespace

Status LaunchWidenCaches(const AttentionArgs& args, Stream stream,
                         AttentionParams* widened) {
  const AttentionParams& p = args.params;
  const int64_t num_seqs = p.block_table.shape[0];
  const int64_t size = num_seqs * args.plan.widened_keys * p.k_cache.shape[2] *
                       p.k_cache.shape[3] *
                       static_cast<int64_t>(DTypeSize(p.q.dtype));
  char* const k = static_cast<char*>(p.workspace) + args.plan.widened_at;
  const std::initializer_list<int64_t> shape = {
      num_seqs, args.plan.widened_keys, p.k_cache.shape[2], p.k_cache.shape[3]};
  *widened = p;
  widened->k_cache = MakeTensor(k, p.q.dtype, p.q.device, shape);
  widened->v_cache = MakeTensor(k + size, p.q.dtype, p.q.device, shape);
  widened->block_table = MakeTensor(k + 2 * size, DType::kInt32, p.q.device,
                                    {num_seqs, int64_t{1}});
  return p.q.dtype == DType::kFloat16
             ? Launch<__half>(args, *widened, stream)
             : Launch<__nv_bfloat16>(args, *widened, stream);
}

}  // namespace tenon::cuda
