#include "ops/core/gemm_tile_cuda.cuh"
#include "ops/linear/linear_backend.h"
#include "ops/linear/linear_fp8_cuda.cuh"

namespace tenon {
namespace {

using linear_fp8::Args;
using linear_fp8::kBlock;

// A tile of out: kF rows of weight (output features) by kT tokens, on kWarpsF x
// kWarpsT warps. A stage of the pipeline is one block of depth: 128 bytes of
// every row, and the scales of x.
template <int kF_, int kT_, int kWarpsF_, int kWarpsT_, int kStages_>
struct TileShape {
  static constexpr int kF = kF_;
  static constexpr int kT = kT_;
  static constexpr int kWarpsF = kWarpsF_;
  static constexpr int kWarpsT = kWarpsT_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsF * kWarpsT;
  static constexpr int kScalesAt = (kF + kT) * kBlock;
  static constexpr int kStageBytes = kScalesAt + kT * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Of one warp, in instructions of 16 features by 8 tokens.
  static constexpr int kTilesF = kF / kWarpsF / 16;
  static constexpr int kTilesT = kT / kWarpsT / 8;
  static_assert(kBlock % kF == 0, "within one row of the weight's blocks");
};
// Few tokens: narrow, so that there are many.
using SmallShape = TileShape<32, 64, 1, 4, 6>;
using MediumShape = TileShape<64, 64, 1, 4, 4>;
using LargeShape = TileShape<128, 128, 2, 4, 3>;

// A row of shared memory is 8 chunks of 16 bytes. The lanes of an instruction's
// quarter read four chunks of each of two rows, which must lie in different
// banks: every other row has its halves exchanged. Features f and f + 2 *
// kTilesF are neighbours among the rows of an instruction (see Store).
template <int kTilesF>
__device__ __forceinline__ int FeatureChunk(int row, int chunk) {
  return chunk ^ (row / (2 * kTilesF) % 2 * 4);
}
__device__ __forceinline__ int TokenChunk(int row, int chunk) {
  return chunk ^ (row % 2 * 4);
}

// Copies stages from global memory. A thread always loads the same chunk of the
// same rows.
template <class Shape, bool kAligned>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Args& a, char* shared,
                                    int64_t first_feature, int64_t first_token)
      : shared_(shared), depth_(a.p.weight.shape[1]) {
    const int row = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < kRoundsF; ++i) {
      const int64_t feature = first_feature + row + i * kRows;
      w_[i] = feature < a.p.weight.shape[0] ? a.p.weight.As<const uint8_t>() +
                                                  feature * a.p.weight.stride[0]
                                            : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kRoundsT; ++i) {
      const int64_t token = first_token + row + i * kRows;
      x_[i] = token < a.p.x.shape[0] ? a.x.q + token * a.x.row_stride : nullptr;
    }
    const int64_t token = first_token + threadIdx.x;
    has_scale_ = threadIdx.x < Shape::kT && token < a.p.x.shape[0];
    scale_ = a.x.scales + (has_scale_ ? token * a.x.scale_row_stride : 0);
    scale_stride_ = a.x.scale_group_stride;
  }

  __device__ __forceinline__ void Load(int block, int stage) const {
    const int row = threadIdx.x / 8;
    const int chunk = threadIdx.x % 8;
    char* const to = shared_ + stage * Shape::kStageBytes;
    const int64_t k = int64_t{block} * kBlock + chunk * 16;
#pragma unroll
    for (int i = 0; i < kRoundsF; ++i) {
      const int r = row + i * kRows;
      LoadChunk(to + r * kBlock + FeatureChunk<Shape::kTilesF>(r, chunk) * 16,
                w_[i], k);
    }
#pragma unroll
    for (int i = 0; i < kRoundsT; ++i) {
      const int r = row + i * kRows;
      LoadChunk(to + (Shape::kF + r) * kBlock + TokenChunk(r, chunk) * 16,
                x_[i], k);
    }
    if (threadIdx.x < Shape::kT) {
      cuda::CopyOrZero4(
          cuda::SharedAddress(to + Shape::kScalesAt + threadIdx.x * 4),
          scale_ + (has_scale_ ? block * scale_stride_ : 0), has_scale_);
    }
  }

 private:
  static constexpr int kRows = Shape::kThreads / 8;  // loaded at once
  static constexpr int kRoundsF = Shape::kF / kRows;
  static constexpr int kRoundsT = Shape::kT / kRows;
  static_assert(Shape::kF % kRows == 0 && Shape::kT % kRows == 0,
                "whole rounds");
  static_assert(Shape::kT <= Shape::kThreads, "a thread per scale");

  __device__ __forceinline__ void LoadChunk(char* to, const uint8_t* row,
                                            int64_t k) const {
    if constexpr (kAligned) {
      const bool exists = row != nullptr && k < depth_;
      cuda::CopyOrZero16(cuda::SharedAddress(to), exists ? row + k : row,
                         exists);
    } else {
      Vec16 v;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        v.v[i] = row != nullptr && k + i < depth_ ? row[k + i] : uint8_t{0};
      }
      *reinterpret_cast<Vec16*>(to) = v;
    }
  }
  using Vec16 = cuda::Vec<uint8_t, 16>;

  char* shared_;
  int64_t depth_;
  const uint8_t* w_[kRoundsF];
  const uint8_t* x_[kRoundsT];
  const float* scale_;
  int64_t scale_stride_;
  bool has_scale_;
};

// A warp's part of the tile.
template <class Shape>
class WarpTile {
 public:
  __device__ __forceinline__ WarpTile() {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    feature_ = warp / Shape::kWarpsT * (16 * kTilesF) + lane / 4 * 2 * kTilesF;
    token_ = warp % Shape::kWarpsT * (8 * kTilesT);
  }

  // Adds one block of depth out of `stage`.
  __device__ __forceinline__ void Add(const char* stage, float weight_scale) {
    const int lane = threadIdx.x % 32;
    float c[kTilesF][kTilesT][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = half * 4 + lane % 4;
      uint4 low[kTilesF];
      uint4 high[kTilesF];
      uint4 x[kTilesT];
      const auto read = [&](int row, int at) {
        return *reinterpret_cast<const uint4*>(stage + row * kBlock + at * 16);
      };
#pragma unroll
      for (int i = 0; i < kTilesF; ++i) {
        const int at = FeatureChunk<kTilesF>(feature_, chunk);
        low[i] = read(feature_ + 2 * i, at);
        high[i] = read(feature_ + 2 * i + 1, at);
      }
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
        const int row = token_ + n * 8 + lane / 4;
        x[n] = read(Shape::kF + row, TokenChunk(row, chunk));
      }
      linear_fp8::MultiplyAdd64<kTilesF, kTilesT>(c, low, high, x);
    }
    const float* const scales =
        reinterpret_cast<const float*>(stage + Shape::kScalesAt) + token_ +
        lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTilesT; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + n * 8);
#pragma unroll
      for (int i = 0; i < kTilesF; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total_[i][n][j] = __fadd_rn(
              total_[i][n][j],
              linear_fp8::Scaled(c[i][n][j], j % 2 == 0 ? scale.x : scale.y,
                                 weight_scale));
        }
      }
    }
  }

  // Calls store(token, feature, values of 2 * kTilesF features) for all of the
  // part, relative to the tile: row r of instruction i is feature r % 8 * 2 *
  // kTilesF + 2 * i + r / 8, so that a lane's features are consecutive.
  template <class Store>
  __device__ __forceinline__ void ForEach(const Store& store) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float values[2 * kTilesF];
#pragma unroll
        for (int i = 0; i < kTilesF; ++i) {
          values[2 * i] = total_[i][n][j];
          values[2 * i + 1] = total_[i][n][2 + j];
        }
        store(token_ + n * 8 + lane % 4 * 2 + j, feature_, values);
      }
    }
  }

  static constexpr int kTilesF = Shape::kTilesF;
  static constexpr int kTilesT = Shape::kTilesT;

 private:
  float total_[kTilesF][kTilesT][4] = {};
  int feature_;  // the lane's first
  int token_;    // the warp's first
};

template <class Shape, bool kAligned>
__global__ void __launch_bounds__(Shape::kThreads)
    Fp8TileKernel(Args a, bool out_aligned) {
  extern __shared__ __align__(128) char shared[];
  const LinearParams& p = a.p;
  const int64_t tokens = p.x.shape[0];
  const int64_t features = p.weight.shape[0];
  const int64_t token_tiles = cuda::CeilDiv(tokens, int64_t{Shape::kT});
  const int64_t first_token = blockIdx.x % token_tiles * Shape::kT;
  const int64_t first_feature = blockIdx.x / token_tiles * Shape::kF;
  const int num_blocks =
      static_cast<int>(cuda::CeilDiv(p.weight.shape[1], kBlock));
  const float* const block_scales = linear_fp8::BlockScales(p, first_feature);
  const Loader<Shape, kAligned> loader(a, shared, first_feature, first_token);
  WarpTile<Shape> warp_tile;
  cuda::WaitForPreviousKernels();
#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (s < num_blocks) loader.Load(s, s);
    cuda::CommitCopies();
  }
  for (int block = 0; block < num_blocks; ++block) {
    const float weight_scale =
        block_scales != nullptr ? block_scales[block] : 1.0f;
    cuda::WaitForCopies<Shape::kStages - 2>();
    // Also: every warp is done reading the stage that is loaded next.
    __syncthreads();
    const int next = block + Shape::kStages - 1;
    if (next < num_blocks) loader.Load(next, next % Shape::kStages);
    cuda::CommitCopies();
    warp_tile.Add(shared + block % Shape::kStages * Shape::kStageBytes,
                  weight_scale);
  }
  warp_tile.ForEach([&](int t, int f, float(&values)[2 * Shape::kTilesF]) {
    const int64_t token = first_token + t;
    const int64_t feature = first_feature + f;
    if (token >= tokens) return;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kTilesF; ++i) {
      if (feature + i < features) {
        values[i] = linear_fp8::Finished(p, values[i], feature + i);
      }
    }
    const int64_t row = token * p.out.stride[0];
    switch (p.out.dtype) {
      case DType::kFloat32:
        return cuda::StoreColumns(p.out.As<float>() + row, feature, features,
                                  values, out_aligned);
      case DType::kFloat16:
        return cuda::StoreColumns(p.out.As<__half>() + row, feature, features,
                                  values, out_aligned);
      default:
        return cuda::StoreColumns(p.out.As<__nv_bfloat16>() + row, feature,
                                  features, values, out_aligned);
    }
  });
}

template <class Shape, bool kAligned>
Status Launch(const Args& args, Stream stream) {
  const LinearParams& p = args.p;
  const int64_t tiles = cuda::CeilDiv(p.x.shape[0], int64_t{Shape::kT}) *
                        cuda::CeilDiv(p.weight.shape[0], int64_t{Shape::kF});
  return cuda::LaunchDependent(
      "Linear", stream, dim3(static_cast<unsigned>(tiles)),
      dim3(Shape::kThreads), Shape::kSharedBytes,
      Fp8TileKernel<Shape, kAligned>, args, cuda::RowsAreAligned(p.out, 16));
}

}  // namespace

Status LinearFp8Tile(const Args& args, LinearKernel kernel, bool rows_aligned,
                     Stream stream) {
  if (!rows_aligned) return Launch<MediumShape, false>(args, stream);
  switch (kernel) {
    case LinearKernel::kSmallTile:
      return Launch<SmallShape, true>(args, stream);
    case LinearKernel::kMediumTile:
      return Launch<MediumShape, true>(args, stream);
    default:
      return Launch<LargeShape, true>(args, stream);
  }
}

}  // namespace tenon
