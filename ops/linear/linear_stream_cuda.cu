#include <algorithm>

#include "ops/core/hopper_cuda.cuh"
#include "ops/linear/linear_backend.h"
#include "ops/rms_norm/rms_norm_cuda.cuh"

// Few tokens on Hopper: the time is that of reading the weights, once, at the
// bandwidth of memory. Every multiprocessor has one block, and every block a
// range of tiles of kRows rows of the weight. One warp copies them to a ring of
// stages in shared memory, from before the kernels ahead of this one have
// ended; eight warps share the depth of every tile, multiply on tensor cores
// (tokens as rows, weights as columns of an mma) and add their sums in order.
// An element's bits depend on its rows of x and weight and on the depth alone.

namespace tenon {
namespace {

using cuda::Vec;

constexpr int kWarps = 8;  // that multiply
constexpr int kMultiplyThreads = 32 * kWarps;
constexpr int kThreads = kMultiplyThreads + 32;
static_assert(kMultiplyThreads == cuda::kRmsNormThreads, "for its bits");

constexpr int kRows = 8;         // of the weight in a tile
constexpr int kWarpBytes = 512;  // of a row that a warp multiplies at a time
constexpr int kWarpVecs = kWarpBytes / 16 / 4;  // of a lane
constexpr int kPassBytes = kWarps * kWarpBytes;
constexpr int kTiles = 2;  // whose sums a warp keeps at once
constexpr int kMaxStages = 32;

// A stage is a tile of one pass over the depth. More shared memory than this
// would leave none to the blocks of other kernels.
constexpr int kMaxSharedBytes = 200 * 1024;

// Stages that may be on their way at one time: enough to keep memory busy.
// With more, everything else on the GPU waits in the queues behind them.
constexpr int kInFlight = 2;

struct Args {
  const void* x;
  const void* weight;
  const void* bias;      // may be null, as may residual and norm_weight
  const void* residual;  // of out's dtype
  void* out;
  const void* norm_weight;
  void* normed;
  int64_t x_stride, weight_stride, residual_stride, out_stride, normed_stride;
  float epsilon;
  int tokens, out_features, in_features;
  int tiles;
  int x_pitch, pitch;  // bytes between rows in shared memory
  int stages;
  bool cast_first, float_out, weights_are_constant;
};

// What is in shared memory, in this order; then the ring.
struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};
template <int kHalves>
struct Shared {
  Barriers barriers;
  float squares[kLinearFewTokens][kWarps];
  // Two sets, so that one can be filled while the other is still read.
  float sums[2][kTiles][kWarps][kHalves * 64];
};

// The tiles of this block.
struct Range {
  int first, count;
};

constexpr int Passes(int in_features) {
  return (in_features * 2 + kPassBytes - 1) / kPassBytes;
}

#if TENON_SM90A

// Copies 16 * n bytes to shared memory; `barrier` counts them.
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from,
                                         int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// A place in the ring, and the phase of its barriers.
struct Slot {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next(int stages) {
    if (++index < stages) return;
    index = 0;
    parity ^= 1;
  }
};

__device__ __forceinline__ uint32_t At(const uint64_t& barrier) {
  return cuda::SharedAddress(&barrier);
}

// For the loading warp. Calls `started` once, with copies under way.
template <class F>
__device__ __forceinline__ void LoadWeights(const Args& a, const Range& range,
                                            const Barriers& barriers,
                                            uint32_t ring, const F& started) {
  const int lane = threadIdx.x % 32;
  const int passes = Passes(a.in_features);
  const int at_first = min(kInFlight, a.stages);
  int n = 0;
  Slot slot;
  Slot arriving;  // the one to wait for before the next is asked for
  for (int group = 0; group < range.count; group += kTiles) {
    const int end = min(group + kTiles, range.count);
    for (int pass = 0; pass < passes; ++pass) {
      const int bytes = min(a.in_features * 2 - pass * kPassBytes, kPassBytes);
      for (int tile = group; tile < end; ++tile, ++n) {
        if (n == at_first) started();
        if (n >= at_first) {
          cuda::Wait(At(barriers.full[arriving.index]), arriving.parity);
          arriving.Next(a.stages);
        }
        const uint32_t full = At(barriers.full[slot.index]);
        cuda::Wait(At(barriers.empty[slot.index]), slot.parity ^ 1);
        if (lane == 0) cuda::ArriveExpectBytes(full, bytes * kRows);
        __syncwarp();
        if (lane < kRows) {
          // Rows past the end repeat the last one, and are not stored.
          const int64_t row =
              min((range.first + tile) * kRows + lane, a.out_features - 1);
          CopyBulk(ring + (slot.index * kRows + lane) * a.pitch,
                   static_cast<const char*>(a.weight) +
                       row * a.weight_stride * 2 + pass * kPassBytes,
                   bytes, full);
        }
        slot.Next(a.stages);
      }
    }
  }
  if (n <= at_first) started();
}

// For the other warps.
__device__ __forceinline__ void SyncMultiplying() {
  cuda::SyncThreads(1, kMultiplyThreads);
}

// Calls f(at) for the vectors of a row that are this thread's.
template <class F>
__device__ __forceinline__ void ForEachVec(const Args& a, const F& f) {
  for (int at = threadIdx.x; at < a.in_features / 8; at += kMultiplyThreads) {
    f(at);
  }
}

// Normalises kTokens rows in shared memory, each thread its own vectors, and
// writes this block's share of them to a.normed.
template <class T, bool kCastFirst, int kTokens>
__device__ __forceinline__ void Normalize(const Args& a, int first, char* xs,
                                          const Vec<T, 8>& first_weights,
                                          const float (&inverse)[kTokens]) {
  const int share = (a.in_features / 8 + gridDim.x - 1) / gridDim.x;
  const int share_begin = blockIdx.x * share;
  ForEachVec(a, [&](int at) {
    const Vec<T, 8> weights =
        at < kMultiplyThreads
            ? first_weights
            : static_cast<const Vec<T, 8>*>(a.norm_weight)[at];
    const bool mine = at >= share_begin && at < share_begin + share;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const int token = first + m;
      if (token >= a.tokens) break;
      char* const in_shared = xs + token * a.x_pitch + at * 16;
      const auto v = *reinterpret_cast<const Vec<T, 8>*>(in_shared);
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f[j] = cuda::Normalized<T>(cuda::ToFloat(v.v[j]), inverse[m],
                                   cuda::ToFloat(weights.v[j]), kCastFirst);
      }
      const uint4 packed = {
          cuda::Pack<T>(f[0], f[1]), cuda::Pack<T>(f[2], f[3]),
          cuda::Pack<T>(f[4], f[5]), cuda::Pack<T>(f[6], f[7])};
      *reinterpret_cast<uint4*>(in_shared) = packed;
      if (mine) {
        reinterpret_cast<uint4*>(static_cast<T*>(a.normed) +
                                 token * a.normed_stride)[at] = packed;
      }
    }
  });
}

// Brings x to shared memory, and normalises it there if that is asked for,
// kTokens rows at a time.
template <class T, int kTokens>
__device__ __forceinline__ void PrepareX(
    const Args& a, float (&squares)[kLinearFewTokens][kWarps], char* xs,
    const Vec<T, 8>& norm_weights) {
  const uint32_t to = cuda::SharedAddress(xs);
  for (int token = 0; token < a.tokens; ++token) {
    const T* const row = static_cast<const T*>(a.x) + token * a.x_stride;
    ForEachVec(a, [&](int at) {
      cuda::CopyOrZero16(to + token * a.x_pitch + at * 16, row + at * 8, true);
    });
  }
  cuda::CommitCopies();
  cuda::WaitForCopies<0>();
  if (a.norm_weight == nullptr) return SyncMultiplying();

  for (int first = 0; first < a.tokens; first += kTokens) {
    float sum[kTokens] = {};
    ForEachVec(a, [&](int at) {
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        if (first + m >= a.tokens) break;
        const char* const v = xs + (first + m) * a.x_pitch + at * 16;
        sum[m] =
            cuda::AddSquares(*reinterpret_cast<const Vec<T, 8>*>(v), sum[m]);
      }
    });
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      sum[m] = cuda::WarpSum(sum[m]);
      if (threadIdx.x % 32 == 0) squares[first + m][threadIdx.x / 32] = sum[m];
    }
  }
  const float inverse_hidden = 1.0f / static_cast<float>(a.in_features);
  SyncMultiplying();
  for (int first = 0; first < a.tokens; first += kTokens) {
    // A lane makes the factor of one token.
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += squares[first + threadIdx.x % kTokens][w];
    }
    const float mine = cuda::InverseRms(total, inverse_hidden, a.epsilon);
    float inverse[kTokens];
#pragma unroll
    for (int m = 0; m < kTokens; ++m) inverse[m] = __shfl_sync(~0u, mine, m);
    if (a.cast_first) {
      Normalize<T, true>(a, first, xs, norm_weights, inverse);
    } else {
      Normalize<T, false>(a, first, xs, norm_weights, inverse);
    }
  }
  SyncMultiplying();
}

// The element that a thread finishes in every group of tiles.
template <class T>
struct Output {
  template <int kHalves>
  __device__ __forceinline__ void Begin(const Args& a, int group_row,
                                        int num_rows) {
    const int in_tile = threadIdx.x % (kHalves * 64);
    const int row = threadIdx.x / (kHalves * 64) * kRows + in_tile % kRows;
    token = in_tile / kRows;
    feature = group_row + row;
    exists = row < num_rows && token < a.tokens && feature < a.out_features;
    if (!exists) return;
    if (a.bias != nullptr) {
      bias = cuda::ToFloat(static_cast<const T*>(a.bias)[feature]);
    }
    if (a.residual == nullptr) return;
    const int64_t at = token * a.residual_stride + feature;
    residual = a.float_out
                   ? static_cast<const float*>(a.residual)[at]
                   : cuda::ToFloat(static_cast<const T*>(a.residual)[at]);
  }

  __device__ __forceinline__ void Store(const Args& a, float value) const {
    if (a.bias != nullptr) value += bias;
    if (!a.float_out) value = cuda::ToFloat(cuda::FromFloat<T>(value));
    if (a.residual != nullptr) value += residual;
    const int64_t at = token * a.out_stride + feature;
    if (a.float_out) {
      static_cast<float*>(a.out)[at] = value;
    } else {
      static_cast<T*>(a.out)[at] = cuda::FromFloat<T>(value);
    }
  }

  int token, feature;
  bool exists;
  float bias, residual;  // asked for while the products are made
};

// A lane's share of a row in shared memory, of up to `count` vectors 64 bytes
// apart, zeros beyond.
__device__ __forceinline__ uint4 VecOrZero(const char* row, int i, int count) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (i < count) v = *reinterpret_cast<const uint4*>(row + i * 64);
  return v;
}

// Multiplies the block's tiles. Lane l has token l / 4 (and those 8, 16, ...
// after it) or row l / 4 of the weight, and of every 64 bytes of the depth the
// bytes from l % 4 * 16. Which place of an instruction's depth a product has
// does not matter as long as x and weight agree.
template <class T, int kHalves>
__device__ __forceinline__ void Multiply(const Args& a, const Range& range,
                                         Shared<kHalves>& shared,
                                         const char* xs, const char* ring) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int passes = Passes(a.in_features);
  const int lane_bytes = warp * kWarpBytes + lane % 4 * 16;
  int to_refill = range.count * passes - a.stages;  // stages yet to come
  const char* const x_row = xs + lane / 4 * a.x_pitch + lane_bytes;
  const char* const weight_row = ring + lane / 4 * a.pitch + lane_bytes;
  Slot slot;
  int set = 0;
  for (int group = 0; group < range.count; group += kTiles, set ^= 1) {
    const int tiles = min(kTiles, range.count - group);
    Output<T> output;
    output.template Begin<kHalves>(a, (range.first + group) * kRows,
                                   tiles * kRows);
    float c[kTiles][2][4] = {};  // products take turns between two sums
    for (int pass = 0; pass < passes; ++pass) {
      const int left = a.in_features * 2 - pass * kPassBytes - lane_bytes;
      const int count = min((left + 48) / 64, kWarpVecs);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) break;
        cuda::Wait(At(shared.barriers.full[slot.index]), slot.parity);
        uint4 w[kWarpVecs];
#pragma unroll
        for (int i = 0; i < kWarpVecs; ++i) {
          w[i] = VecOrZero(weight_row + slot.index * kRows * a.pitch, i, count);
        }
#pragma unroll
        for (int i = 0; i < kWarpVecs; ++i) {
          uint4 x[2] = {};
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            const bool exists = h * 8 + lane / 4 < a.tokens;
            x[h] = VecOrZero(x_row + h * 8 * a.x_pitch + pass * kPassBytes, i,
                             exists ? count : 0);
          }
          cuda::Mma<T>(c[tile][0], {x[0].x, x[1].x, x[0].y, x[1].y}, w[i].x,
                       w[i].y);
          cuda::Mma<T>(c[tile][1], {x[0].z, x[1].z, x[0].w, x[1].w}, w[i].z,
                       w[i].w);
        }
        // Every reader gives the stage back, if it is to be filled again.
        if (to_refill-- > 0) {
          cuda::Arrive(At(shared.barriers.empty[slot.index]));
        }
        slot.Next(a.stages);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        // Element (token l / 4, rows l % 4 * 2 and the next) of the half.
        reinterpret_cast<float2*>(shared.sums[set][tile][warp] + h * 64)[lane] =
            make_float2(c[tile][0][h * 2] + c[tile][1][h * 2],
                        c[tile][0][h * 2 + 1] + c[tile][1][h * 2 + 1]);
      }
    }
    SyncMultiplying();
    if (!output.exists) continue;
    const int in_tile = threadIdx.x % (kHalves * 64);
    const int tile = threadIdx.x / (kHalves * 64);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[set][tile][w][in_tile];
    output.Store(a, sum);
  }
}

#endif  // TENON_SM90A

// Up to 8 * kHalves tokens, normalised kTokens at a time.
template <class T, int kTokens, int kHalves>
__global__ void __launch_bounds__(kThreads, 2)
    StreamKernel(const __grid_constant__ Args a) {
#if TENON_SM90A
  static_assert(kTiles * kHalves * 64 <= kMultiplyThreads,
                "a thread finishes one element");
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<kHalves>*>(memory);
  char* const xs = memory + sizeof(Shared<kHalves>);
  char* const ring = xs + a.tokens * a.x_pitch;
  const int lane = threadIdx.x % 32;
  const int per_block = a.tiles / gridDim.x;
  const int more = a.tiles % gridDim.x;  // blocks that have one more
  const int block = blockIdx.x;
  const Range range = {block * per_block + min(block, more),
                       per_block + (block < more)};
  if (!a.weights_are_constant) cuda::WaitForPreviousKernels();

  if (threadIdx.x >= kMultiplyThreads) {
    if (lane == 0) {
      for (int i = 0; i < a.stages; ++i) {
        cuda::InitBarrier(At(shared.barriers.full[i]), 1);
        cuda::InitBarrier(At(shared.barriers.empty[i]), kMultiplyThreads);
      }
      cuda::FenceBarrierInit();
    }
    __syncwarp();
    LoadWeights(a, range, shared.barriers, cuda::SharedAddress(ring),
                [] { __syncthreads(); });
    return;
  }
  // With constant weights before the wait: the next kernel may begin to load
  // its own.
  cuda::LetNextKernelStart();
  Vec<T, 8> norm_weights;
  if (a.norm_weight != nullptr && threadIdx.x < a.in_features / 8) {
    norm_weights = static_cast<const Vec<T, 8>*>(a.norm_weight)[threadIdx.x];
  }
  __syncthreads();
  cuda::WaitBeforeReading();
  PrepareX<T, kTokens>(a, shared.squares, xs, norm_weights);
  Multiply<T, kHalves>(a, range, shared, xs, ring);
#endif
}

// Bytes between rows of `bytes` in shared memory: two rows next to each other
// never meet in a bank.
int Pitch(int64_t bytes) {
  return static_cast<int>((bytes + 127) / 128 * 128 + 64);
}

// Shared memory for `tokens` rows of x, and stages; 0 stages: too much.
struct Plan {
  int halves = 0;
  int x_pitch = 0;
  int pitch = 0;
  int stages = 0;
  int bytes = 0;
};

// `most_stages`: as many as any block needs.
Plan MakePlan(int64_t tokens, int64_t in_features, int64_t most_stages) {
  Plan plan;
  plan.halves = tokens <= 8 ? 1 : 2;
  plan.x_pitch = Pitch(in_features * 2);
  plan.pitch = Pitch(std::min<int64_t>(in_features * 2, kPassBytes));
  const int64_t fixed =
      (plan.halves == 1 ? sizeof(Shared<1>) : sizeof(Shared<2>)) +
      tokens * plan.x_pitch;
  const int64_t stage = int64_t{kRows} * plan.pitch;
  const int64_t stages = std::min(
      {(kMaxSharedBytes - fixed) / stage, most_stages, int64_t{kMaxStages}});
  if (stages < std::min<int64_t>(most_stages, kInFlight)) return plan;
  plan.stages = static_cast<int>(stages);
  plan.bytes = static_cast<int>(fixed + stages * stage);
  return plan;
}

int64_t NumTiles(const LinearParams& p) {
  return cuda::CeilDiv(p.weight.shape[0], int64_t{kRows});
}

template <class T, int kTokens, int kHalves>
Status Launch(const Args& args, const Plan& plan, int grid, Stream stream) {
  return cuda::LaunchDependent(
      "Linear", stream, dim3(static_cast<unsigned>(grid)), dim3(kThreads),
      static_cast<size_t>(plan.bytes), StreamKernel<T, kTokens, kHalves>, args);
}

template <class T>
Status Launch(const Args& args, const Plan& plan, int grid, Stream stream) {
  if (args.tokens == 1) return Launch<T, 1, 1>(args, plan, grid, stream);
  if (plan.halves == 1) return Launch<T, 8, 1>(args, plan, grid, stream);
  return Launch<T, 8, 2>(args, plan, grid, stream);
}

Status Attribute(cudaDeviceAttr attribute, Device device, int* value) {
  return cuda::ToStatus(cudaDeviceGetAttribute(value, attribute, device.index),
                        "Linear");
}

}  // namespace

bool LinearStreams(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  if (tokens > kLinearFewTokens || p.x.dtype == DType::kFloat32 ||
      p.weight.dtype != p.x.dtype || !cuda::RowsAreWholeChunks(p.x) ||
      !cuda::RowsAreWholeChunks(p.weight) || in_features > kMaxSharedBytes) {
    return false;
  }
  if (p.norm.present() && (p.norm.weight.dtype != p.x.dtype ||
                           !cuda::RowsAreAligned(p.norm.weight, 16) ||
                           !cuda::RowsAreAligned(p.norm.out, 16))) {
    return false;
  }
  if (MakePlan(tokens, in_features, kMaxStages).stages == 0) return false;
  int major = 0;
  return Attribute(cudaDevAttrComputeCapabilityMajor, p.x.device, &major)
             .ok() &&
         major == 9;
}

Status LinearStream(const LinearParams& p, Stream stream) {
  int processors = 0;
  TENON_RETURN_IF_ERROR(
      Attribute(cudaDevAttrMultiProcessorCount, p.x.device, &processors));
  const int64_t tiles = NumTiles(p);
  const int grid = static_cast<int>(std::min<int64_t>(tiles, processors));
  Args a = {};
  a.x = p.x.data;
  a.x_stride = p.x.stride[0];
  a.weight = p.weight.data;
  a.weight_stride = p.weight.stride[0];
  a.bias = p.bias.data;
  a.residual = p.residual.data;
  a.residual_stride = p.residual.stride[0];
  a.out = p.out.data;
  a.out_stride = p.out.stride[0];
  a.float_out = p.out.dtype == DType::kFloat32;
  a.norm_weight = p.norm.weight.data;
  a.normed = p.norm.out.data;
  a.normed_stride = p.norm.out.stride[0];
  a.epsilon = p.norm.epsilon;
  a.cast_first = p.norm.rounding == NormRounding::kCastThenMultiply;
  a.weights_are_constant = p.weights_are_constant;
  a.tokens = static_cast<int>(p.x.shape[0]);
  a.out_features = static_cast<int>(p.weight.shape[0]);
  a.in_features = static_cast<int>(p.x.shape[1]);
  a.tiles = static_cast<int>(tiles);
  const Plan plan =
      MakePlan(a.tokens, a.in_features,
               cuda::CeilDiv(tiles, int64_t{grid}) * Passes(a.in_features));
  a.x_pitch = plan.x_pitch;
  a.pitch = plan.pitch;
  a.stages = plan.stages;
  if (p.x.dtype == DType::kFloat16) {
    return Launch<__half>(a, plan, grid, stream);
  }
  return Launch<__nv_bfloat16>(a, plan, grid, stream);
}

}  // namespace tenon
