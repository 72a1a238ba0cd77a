#ifndef TENON_OPS_LINEAR_LINEAR_STREAM_CUDA_CUH_
#define TENON_OPS_LINEAR_LINEAR_STREAM_CUDA_CUH_

#include <algorithm>

#include "ops/core/hopper_cuda.cuh"
#include "ops/linear/linear_backend.h"

// Few tokens on Hopper: the time is that of reading the weights, once, at the
// bandwidth of memory. Every multiprocessor has one block, and every block a
// range of tiles of kRows rows of the weight. One warp copies them to a ring of
// stages in shared memory, from before the kernels ahead of this one have
// ended; eight warps share the depth of every tile, multiply on tensor cores
// and add their sums in order. An element's bits depend on its rows of x and
// weight and on the depth alone.
//
// Here is what the kernels for 16-bit weights (linear_stream_cuda.cu) and for
// fp8 (linear_fp8_stream_cuda.cu) share: all but how products are made.

namespace tenon::linear_stream {

inline constexpr int kWarps = 8;  // that multiply
inline constexpr int kMultiplyThreads = 32 * kWarps;
inline constexpr int kThreads = kMultiplyThreads + 32;

inline constexpr int kRows = 8;   // of the weight in a tile
inline constexpr int kGroup = 2;  // tiles, whose passes take turns in the ring
inline constexpr int kMaxStages = 32;

// A stage is a tile of one pass over the depth. More shared memory than the
// maximum would leave none to the blocks of other kernels. A launch that fills
// the GPU takes the minimum, more than half of a multiprocessor's, so that none
// gets two of its blocks while another one gets none.
inline constexpr int kMinSharedBytes = 115 * 1024;
inline constexpr int kMaxSharedBytes = 200 * 1024;

struct Args {
  const void* x;
  const void* weight;
  const void* bias;      // may be null, as may residual and norm_weight
  const void* residual;  // of out's dtype
  void* out;
  const void* norm_weight;
  void* normed;
  // Of one token: may be null.
  const void* term_rows;
  const int32_t* term_ids;
  void* terms_sum;
  // Of fp8: of blocks of the weight, or of its rows; else null.
  const float* block_scales;
  const float* row_scales;
  // In elements.
  int64_t x_stride, weight_stride, residual_stride, out_stride, normed_stride;
  int64_t block_scales_stride;
  float epsilon, inverse_in_features;
  int tokens, out_features, in_features;
  int tiles, tiles_per_block;
  int tiles_left;    // the blocks before this one have one more
  int normed_share;  // vectors of 16 bytes of a row of normed that a block
                     // writes
  int num_terms, num_term_ids;
  int x_vecs;  // vectors of 16 bytes of a row of x that a thread has, at most
  int x_vecs_at_once;  // of all rows; of fp8, see PrepareFp8X
  int x_pitch, pitch;  // bytes between rows in shared memory
  int stages;
  // Stages that may be on their way at one time: enough to keep memory busy.
  // With more, everything else on the GPU waits in the queues behind them.
  int in_flight;
  bool cast_first, float_out, weights_are_constant;
};

struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};

// The tiles of a block.
struct Range {
  int first, count;
};

// ---------------------------------------------------------------------------
// Host
// ---------------------------------------------------------------------------

// Bytes between rows of `bytes` in shared memory: two rows next to each other
// never meet in a bank.
inline int Pitch(int64_t bytes) {
  return static_cast<int>((bytes + 127) / 128 * 128 + 64);
}

inline int64_t NumTiles(const LinearParams& p) {
  return cuda::CeilDiv(p.weight.shape[0], int64_t{kRows});
}

inline int XVecs(int64_t in_features) {
  return static_cast<int>(
      cuda::CeilDiv(in_features / 8, int64_t{kMultiplyThreads}));
}

// Whether norm is one that the kernels take.
inline bool NormIsAligned(const LinearParams& p) {
  return p.norm.weight.dtype == p.x.dtype &&
         cuda::RowsAreAligned(p.norm.weight, 16) &&
         cuda::RowsAreAligned(p.norm.out, 16);
}

// Whether terms are some that the kernels take: every block adds them up, so
// those of one token.
inline bool TermsAreTaken(const LinearParams& p) {
  return !p.terms.present() ||
         (p.x.shape[0] == 1 && cuda::RowsAreAligned(p.terms.rows, 16) &&
          cuda::RowsAreAligned(p.terms.sum, 16));
}

// All but what is planned: sizes of shared memory. Divisions are made here
// rather than by every thread.
inline Args MakeArgs(const LinearParams& p, int grid) {
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
  a.term_rows = p.terms.rows.data;
  a.term_ids = p.terms.ids.As<const int32_t>();
  a.terms_sum = p.terms.sum.data;
  a.num_terms = p.terms.present() ? static_cast<int>(p.terms.ids.shape[1]) : 0;
  a.num_term_ids = p.terms.num_ids;
  a.epsilon = p.norm.epsilon;
  a.cast_first = p.norm.rounding == NormRounding::kCastThenMultiply;
  a.weights_are_constant = p.weights_are_constant;
  a.tokens = static_cast<int>(p.x.shape[0]);
  a.out_features = static_cast<int>(p.weight.shape[0]);
  a.in_features = static_cast<int>(p.x.shape[1]);
  a.tiles = static_cast<int>(NumTiles(p));
  a.inverse_in_features = 1.0f / static_cast<float>(a.in_features);
  a.tiles_per_block = a.tiles / grid;
  a.tiles_left = a.tiles % grid;
  a.normed_share = cuda::CeilDiv(a.in_features / 8, grid);
  a.x_vecs = XVecs(a.in_features);
  return a;
}

// A block to a multiprocessor.
inline Status GridSize(const LinearParams& p, int* grid, int* processors) {
  TENON_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount,
                             p.x.device.index),
      "Linear"));
  *grid = static_cast<int>(std::min<int64_t>(NumTiles(p), *processors));
  return Status();
}

// `grid` as from GridSize, times `groups` of tokens.
inline Status Launch(const Args& args, int shared_bytes, int grid, int groups,
                     Stream stream, void (*kernel)(Args)) {
  if (grid < args.tiles) shared_bytes = std::max(shared_bytes, kMinSharedBytes);
  return cuda::LaunchDependent(
      "Linear", stream,
      dim3(static_cast<unsigned>(grid), static_cast<unsigned>(groups)),
      dim3(kThreads), static_cast<size_t>(shared_bytes), kernel, args);
}

#if TENON_SM90A

// ---------------------------------------------------------------------------
// Device
// ---------------------------------------------------------------------------

__device__ __forceinline__ Range TilesOfBlock(const Args& a) {
  const int block = blockIdx.x;
  return {block * a.tiles_per_block + min(block, a.tiles_left),
          a.tiles_per_block + (block < a.tiles_left)};
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

// Copies 16 * n bytes to shared memory; `barrier` counts them.
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from,
                                         int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Ids of barriers of warps.
inline constexpr int kMultiplying = 1;  // the warps that multiply
inline constexpr int kInitialized = 2;  // all

// For the loading warp: rows of kElementBytes * in_features bytes, kPassBytes
// of them at a time.
template <int kElementBytes, int kPassBytes>
__device__ __forceinline__ void LoadWeights(const Args& a, const Range& range,
                                            Barriers& barriers, uint32_t ring) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    for (int i = 0; i < a.stages; ++i) {
      cuda::InitBarrier(At(barriers.full[i]), 1);
      cuda::InitBarrier(At(barriers.empty[i]), kMultiplyThreads);
    }
    cuda::FenceBarrierInit();
  }
  __syncwarp();
  cuda::ArriveThreads(kInitialized, kThreads);
  const int row_bytes = a.in_features * kElementBytes;
  const int at_first = min(a.in_flight, a.stages);
  int n = 0;
  Slot slot;
  Slot arriving;  // the one to wait for before the next is asked for
  for (int group = 0; group < range.count; group += kGroup) {
    const int end = min(group + kGroup, range.count);
    for (int begin = 0; begin < row_bytes; begin += kPassBytes) {
      const int bytes = min(row_bytes - begin, kPassBytes);
      for (int tile = group; tile < end; ++tile, ++n) {
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
                       row * a.weight_stride * kElementBytes + begin,
                   bytes, full);
        }
        slot.Next(a.stages);
      }
    }
  }
}

// For the other warps: until the loading warp has initialised the ring's
// barriers.
__device__ __forceinline__ void AwaitBarriers() {
  cuda::SyncThreads(kInitialized, kThreads);
}
__device__ __forceinline__ void SyncMultiplying() {
  cuda::SyncThreads(kMultiplying, kMultiplyThreads);
}

// Where a multiplying thread is in the ring.
class Reader {
 public:
  // `count`: stages that the block has in all.
  __device__ __forceinline__ Reader(const Args& a, Barriers& barriers,
                                    int count)
      : barriers_(barriers), stages_(a.stages), to_refill_(count - a.stages) {}

  // Waits for the next stage, or for the one `ahead` of it.
  __device__ __forceinline__ int Wait(int ahead = 0) const {
    Slot slot = slot_;
    for (int i = 0; i < ahead; ++i) slot.Next(stages_);
    cuda::Wait(At(barriers_.full[slot.index]), slot.parity);
    return slot.index;
  }

  // Every reader gives a stage back, if it is to be filled again.
  __device__ __forceinline__ void Release() {
    if (to_refill_-- > 0) cuda::Arrive(At(barriers_.empty[slot_.index]));
    slot_.Next(stages_);
  }

 private:
  Barriers& barriers_;
  Slot slot_;
  int stages_;
  int to_refill_;
};

// Vector `at` of x with the terms added, which the block whose share it is
// leaves in terms_sum as well. All loads of eight terms are under way at once,
// those that will not count too.
template <class T>
__device__ __forceinline__ uint4 WithTerms(const Args& a, int at) {
  using V = cuda::Vec<T, 8>;
  constexpr int kAtOnce = 8;
  const int vecs = a.in_features / 8;
  const V x = static_cast<const V*>(a.x)[at];
  const V* const rows = static_cast<const V*>(a.term_rows) + at;
  float sums[8] = {};
#pragma unroll 1
  for (int first = 0; first < a.num_terms; first += kAtOnce) {
    V terms[kAtOnce];
    uint32_t ids[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      ids[j] = ~0u;
      if (first + j >= a.num_terms) continue;
      ids[j] = static_cast<uint32_t>(a.term_ids[first + j]);
      terms[j] = rows[(first + j) * vecs];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (ids[j] >= static_cast<uint32_t>(a.num_term_ids)) continue;
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[c] += cuda::ToFloat(terms[j].v[c]);
    }
  }
  float f[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    f[c] = cuda::ToFloat(x.v[c]) + cuda::ToFloat(cuda::FromFloat<T>(sums[c]));
  }
  const uint4 sum = {cuda::Pack<T>(f[0], f[1]), cuda::Pack<T>(f[2], f[3]),
                     cuda::Pack<T>(f[4], f[5]), cuda::Pack<T>(f[6], f[7])};
  const int begin = blockIdx.x * a.normed_share;
  if (at >= begin && at < begin + a.normed_share) {
    static_cast<uint4*>(a.terms_sum)[at] = sum;
  }
  return sum;
}

// An element that a thread finishes. T: the dtype of bias, and of out and
// residual where they are not float32. kScaled: rows of the weight may have
// scales.
template <class T, bool kScaled>
struct Output {
  // Asks for what is added to the products while they are made.
  __device__ __forceinline__ void Begin(const Args& a, int token_of,
                                        int feature_of) {
    token = token_of;
    feature = feature_of;
    exists = token < a.tokens && feature < a.out_features;
    if (!exists) return;
    if (kScaled && a.row_scales != nullptr) scale = a.row_scales[feature];
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
    if (kScaled && a.row_scales != nullptr) value = __fmul_rn(value, scale);
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
  float scale, bias, residual;
};

#endif  // TENON_SM90A

}  // namespace tenon::linear_stream

#endif  // TENON_OPS_LINEAR_LINEAR_STREAM_CUDA_CUH_
