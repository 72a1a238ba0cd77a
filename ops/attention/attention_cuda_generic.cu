#include "ops/attention/attention_cuda.cuh"

// Attention on plain float32 arithmetic and element-wise loads: for float32,
// and for views that the tensor-core kernels cannot read 16 bytes at a time.

namespace tenon::cuda {
namespace {

constexpr int kThreads = 256;  // one for each element of the widest head
constexpr int kKeys = 16;
constexpr int kHeads = kHeadsPerBlock;

__device__ __forceinline__ float CacheToFloat(__nv_fp8_e4m3 v) {
  return static_cast<float>(v);
}
template <class C>
__device__ __forceinline__ float CacheToFloat(C v) {
  return ToFloat(v);
}

// Rows of q and k are padded by one float, so that a column's elements are in
// different banks.
struct Tiles {
  float* q;        // [kHeads, dim + 1]
  float* k;        // [kKeys, dim + 1]
  float* v;        // [kKeys, dim]
  float* weights;  // [kHeads, kKeys]: scores, then 2^(score - max)
  float* max;      // [kHeads]
  float* sum;
  float* rescale;  // of what was summed before this tile

  __device__ Tiles(float* shared, int dim)
      : q(shared),
        k(q + kHeads * (dim + 1)),
        v(k + kKeys * (dim + 1)),
        weights(v + kKeys * dim),
        max(weights + kHeads * kKeys),
        sum(max + kHeads),
        rescale(sum + kHeads) {}
};
constexpr size_t SharedBytes(int64_t dim) {
  return static_cast<size_t>(kHeads * (dim + 1) + kKeys * (dim + 1) +
                             kKeys * dim + kHeads * kKeys + 3 * kHeads) *
         sizeof(float);
}

template <class T>
__device__ void LoadQueries(const AttentionParams& p, const Query& query,
                            int64_t first_head, int heads, const Tiles& tiles) {
  const int dim = static_cast<int>(p.q.shape[2]);
  const T* q = p.q.As<const T>() + query.token * p.q.stride[0];
  const float scale = p.scale * p.k_scale * kLog2E;
  for (int i = threadIdx.x; i < kHeads * dim; i += kThreads) {
    const int head = i / dim;
    const int d = i % dim;
    tiles.q[head * (dim + 1) + d] =
        head < heads
            ? ToFloat(q[(first_head + head) * p.q.stride[1] + d]) * scale
            : 0.0f;
  }
  if (threadIdx.x < kHeads) {
    tiles.max[threadIdx.x] = -INFINITY;
    tiles.sum[threadIdx.x] = 0.0f;
  }
}

template <class C>
__device__ void LoadKeys(const AttentionParams& p, const Query& query,
                         int64_t kv_head, int32_t first_key, int count,
                         const Tiles& tiles) {
  const int dim = static_cast<int>(p.q.shape[2]);
  for (int i = threadIdx.x; i < kKeys * dim; i += kThreads) {
    const int row = i / dim;
    const int d = i % dim;
    float k = 0.0f;
    float v = 0.0f;
    if (row < count) {
      const Slot slot = FindSlot(p, query.sequence, first_key + row);
      k = CacheToFloat(
          p.k_cache.As<const C>()[CacheOffset(p.k_cache, slot, kv_head) + d]);
      v = CacheToFloat(
          p.v_cache.As<const C>()[CacheOffset(p.v_cache, slot, kv_head) + d]);
    }
    tiles.k[row * (dim + 1) + d] = k;
    tiles.v[row * dim + d] = v;
  }
}

// Scores of the tile, then the weights that they make, head by head.
__device__ void WeighKeys(int dim, int count, const Tiles& tiles) {
  for (int i = threadIdx.x; i < kHeads * kKeys; i += kThreads) {
    const float* q = tiles.q + i / kKeys * (dim + 1);
    const float* k = tiles.k + i % kKeys * (dim + 1);
    float score = 0.0f;
    for (int d = 0; d < dim; ++d) score += q[d] * k[d];
    tiles.weights[i] = i % kKeys < count ? score : -INFINITY;
  }
  __syncthreads();
  if (threadIdx.x < kHeads) {
    float* weights = tiles.weights + threadIdx.x * kKeys;
    const float before = tiles.max[threadIdx.x];
    float max = before;
    for (int i = 0; i < kKeys; ++i) max = fmaxf(max, weights[i]);
    const float rescale = exp2f(before - max);
    float sum = 0.0f;
    for (int i = 0; i < kKeys; ++i) {
      weights[i] = exp2f(weights[i] - max);
      sum += weights[i];
    }
    tiles.max[threadIdx.x] = max;
    tiles.sum[threadIdx.x] = tiles.sum[threadIdx.x] * rescale + sum;
    tiles.rescale[threadIdx.x] = rescale;
  }
  __syncthreads();
}

// Grid: blocks of heads, rows of the pass, parts.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    GenericKernel(const __grid_constant__ AttentionArgs args) {
  extern __shared__ float shared[];
  const AttentionParams& p = args.params;
  const Query query = FindQuery(args, args.first_row + blockIdx.y);
  if (query.token < 0) return;
  const int32_t part = static_cast<int32_t>(blockIdx.z);
  const KeyRange keys = FindPart(args, query.length, part);
  if (keys.begin == keys.end && part > 0) return;

  const int dim = static_cast<int>(p.q.shape[2]);
  const int64_t group = p.q.shape[1] / p.k_cache.shape[2];
  const int64_t blocks = CeilDiv<int64_t, int64_t>(group, kHeads);
  const int64_t kv_head = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kHeads;
  const int64_t first_head = kv_head * group + first;
  const int heads = static_cast<int>(min(int64_t{kHeads}, group - first));
  const Tiles tiles(shared, dim);
  LoadQueries<T>(p, query, first_head, heads, tiles);

  const int d = threadIdx.x;
  float out[kHeads] = {};
  for (int32_t key = keys.begin; key < keys.end; key += kKeys) {
    const int count = min(kKeys, keys.end - key);
    __syncthreads();  // the tile before is used, the queries are there
    LoadKeys<C>(p, query, kv_head, key, count, tiles);
    __syncthreads();
    WeighKeys(dim, count, tiles);
    if (d >= dim) continue;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) out[head] *= tiles.rescale[head];
#pragma unroll 1
    for (int i = 0; i < kKeys; ++i) {
      const float v = tiles.v[i * dim + d];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        out[head] += tiles.weights[head * kKeys + i] * v;
      }
    }
  }
  __syncthreads();  // the initial maxima and sums, where there was no key
  if (d >= dim) return;
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (head < heads) {
      StorePart<T>(args, blockIdx.y, query, first_head + head, part, d,
                   out[head], tiles.max[head], tiles.sum[head]);
    }
  }
}

template <class T>
Status LaunchGeneric(const AttentionArgs& args, int64_t rows, Stream stream) {
  const AttentionParams& p = args.params;
  const dim3 grid(HeadBlocks(p), static_cast<unsigned>(rows),
                  static_cast<unsigned>(args.plan.max_parts));
  auto* const kernel = p.k_cache.dtype == DType::kFloat8E4M3
                           ? GenericKernel<T, __nv_fp8_e4m3>
                           : GenericKernel<T, T>;
  return Launch("Attention", stream, grid, dim3(kThreads),
                SharedBytes(p.q.shape[2]), kernel, args);
}

}  // namespace

Status LaunchGenericAttention(const AttentionArgs& args, int64_t rows,
                              Stream stream) {
  return WithFloatType(args.params.q.dtype, [&](auto zero) {
    return LaunchGeneric<decltype(zero)>(args, rows, stream);
  });
}

}  // namespace tenon::cuda
