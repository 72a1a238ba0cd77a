#include <type_traits>

#include "ops/linear/linear_backend.h"
#include "ops/linear/linear_fp8_cuda.cuh"

namespace tenon {
namespace {

using cuda::Vec;
using linear_fp8::Args;
using linear_fp8::kBlock;

constexpr int kRows = 16;  // of the weight, for one thread block

// Its warps share the blocks of depth, each of which leaves scaled sums in
// shared memory; they are then added in order.
constexpr int kPitch = kRows + 4;  // no bank conflicts

// Blocks of depth whose sums are in shared memory at one time, for kTiles times
// 8 tokens.
template <int kTiles>
constexpr int kBlocksAtOnce = kTiles == 1 ? 32 : 64 / kTiles;

// With few tokens the time is latency: more warps have more loads under way.
// With more they would lack registers.
template <int kTiles>
constexpr int kWarps = kTiles == 1 ? 16 : 8;

// Thread blocks that a multiprocessor must have room for: small matrices then
// run in few waves. Three of 16 warps would have 40 registers a thread, and
// spill.
template <int kTiles>
constexpr int kResident = kTiles == 1 ? 2 : 3;

// Used once, so that it needs no place in L1.
__device__ __forceinline__ uint4 LoadOnce(const uint8_t* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// The first of this lane's 16 columns of half a block of depth.
__device__ __forceinline__ int64_t ColumnOf(int block, int half) {
  return int64_t{block} * kBlock + half * 64 + threadIdx.x % 4 * 16;
}

// x as it was quantised before: a lane has bytes of one token of each tile, and
// the scales of the two whose sums it gets.
template <int kTiles>
struct QuantizedX {
  __device__ __forceinline__ void Load(const Args& a, int block) {
    if (kTiles <= 2) LoadScales(a, block);
  }

  // After the products where registers are few.
  __device__ __forceinline__ void Finish(const Args& a, int block) {
    if (kTiles > 2) LoadScales(a, block);
  }

  __device__ __forceinline__ void LoadScales(const Args& a, int block) {
    const int tokens = static_cast<int>(a.p.x.shape[0]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile * 8 + threadIdx.x % 4 * 2 + i;
        scale[tile][i] = token < tokens
                             ? a.x.scales[token * a.x.scale_row_stride +
                                          block * a.x.scale_group_stride]
                             : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void Half(const Args& a, int block, int half,
                                       uint4 (&q)[kTiles]) const {
    const int64_t col = ColumnOf(block, half);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = tile * 8 + threadIdx.x % 32 / 4;
      q[tile] = make_uint4(0, 0, 0, 0);
      if (token < a.p.x.shape[0] && col < a.p.x.shape[1]) {
        q[tile] = *reinterpret_cast<const uint4*>(a.x.q +
                                                  token * a.x.row_stride + col);
      }
    }
  }

  float scale[kTiles][2];
};

// x as it was given, for one tile: the four lanes that hold a token's block
// quantise it.
template <class T>
class RawX {
 public:
  __device__ __forceinline__ void Load(const Args& a, int block) {
    const LinearParams& p = a.p;
    const int token = threadIdx.x % 32 / 4;
    Vec<T, kVec> raw[2][kVecs];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = ColumnOf(block, half);
      const bool exists = token < p.x.shape[0] && col < p.x.shape[1];
      const auto* from = reinterpret_cast<const Vec<T, kVec>*>(
          p.x.As<const T>() + token * p.x.stride[0] + col);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        if (exists) {
          raw[half][i] = from[i];
        } else {
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            raw[half][i].v[j] = cuda::FromFloat<T>(0.0f);
          }
        }
      }
    }
    Quantize(raw);
  }

  __device__ __forceinline__ void Finish(const Args&, int) {}

  __device__ __forceinline__ void Half(const Args&, int, int half,
                                       uint4 (&to)[1]) const {
    to[0] = q[half];
  }

  float scale[1][2];

 private:
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kVecs = 16 / kVec;

  __device__ __forceinline__ void Quantize(
      const Vec<T, kVec> (&raw)[2][kVecs]) {
    float amax = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          amax = fmaxf(amax, fabsf(cuda::ToFloat(raw[half][i].v[j])));
        }
      }
    }
    const Fp8Scale s = Fp8ScaleOf(cuda::LanesMax<4>(amax));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto value = [&](int k) {
          const int at = 4 * w + k;
          return cuda::ToFloat(raw[half][at / kVec].v[at % kVec]) * s.inverse;
        };
        words[w] = cuda::ToFp8x4(value(0), value(1), value(2), value(3));
      }
      q[half] = make_uint4(words[0], words[1], words[2], words[3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of = threadIdx.x % 4 * 2 + i;
      scale[0][i] = __shfl_sync(~0u, s.scale, of * 4);
    }
  }

  uint4 q[2];
};

template <class T, int kTiles>
using X =
    std::conditional_t<std::is_same_v<T, uint8_t>, QuantizedX<kTiles>, RawX<T>>;

// With the residual, if there is one, which is of out's type.
template <class Out>
__device__ __forceinline__ void StoreAs(const LinearParams& p, int64_t token,
                                        int64_t row, float value) {
  Out out = cuda::FromFloat<Out>(value);
  if (p.residual.present()) {
    const Out residual =
        p.residual.As<const Out>()[token * p.residual.stride[0] + row];
    out = cuda::FromFloat<Out>(cuda::ToFloat(residual) + cuda::ToFloat(out));
  }
  p.out.As<Out>()[token * p.out.stride[0] + row] = out;
}

__device__ __forceinline__ void Store(const LinearParams& p, int64_t token,
                                      int64_t row, float value) {
  switch (p.out.dtype) {
    case DType::kFloat32:
      return StoreAs<float>(p, token, row, value);
    case DType::kFloat16:
      return StoreAs<__half>(p, token, row, value);
    default:
      return StoreAs<__nv_bfloat16>(p, token, row, value);
  }
}

// Up to 8 * kTiles tokens. T is x's type where this kernel quantises it, and
// uint8_t where that was done before. Rows of weight (and x) are aligned to 16
// bytes and whole chunks of 16 elements.
template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kWarps<kTiles>, kResident<kTiles>)
    Fp8GemvKernel(Args a) {
  constexpr int kThreads = 32 * kWarps<kTiles>;
  constexpr int kOuts = kTiles * 8 * kRows;
  constexpr int kOutsPerThread = cuda::CeilDiv(kOuts, kThreads);
  __shared__ float sums[kBlocksAtOnce<kTiles>][kTiles * 8][kPitch];
  const LinearParams& p = a.p;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t last_row = p.weight.shape[0] - 1;
  const int64_t depth = p.weight.shape[1];
  const int num_blocks = static_cast<int>(cuda::CeilDiv(depth, kBlock));
  if (threadIdx.x < kRows && first_row + threadIdx.x <= last_row) {
    cuda::PrefetchToL2(p.weight.As<const uint8_t>() +
                           (first_row + threadIdx.x) * p.weight.stride[0],
                       static_cast<uint32_t>(depth));
  }
  // Rows past the end repeat the last one, and are not stored.
  const uint8_t* w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    w[i] = p.weight.As<const uint8_t>() +
           min(first_row + lane / 4 + 8 * i, last_row) * p.weight.stride[0];
  }
  const float* const block_scales = linear_fp8::BlockScales(p, first_row);
  cuda::WaitForPreviousKernels();

  // Of token i / kRows, row i % kRows, for i = threadIdx.x, + kThreads, ...
  float total[kOutsPerThread] = {};
  for (int begin = 0; begin < num_blocks; begin += kBlocksAtOnce<kTiles>) {
    const int end = min(begin + kBlocksAtOnce<kTiles>, num_blocks);
    for (int block = begin + warp; block < end; block += kWarps<kTiles>) {
      uint4 weight[2][2];  // [half of the block][row]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t col = ColumnOf(block, half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          weight[half][i] =
              col < depth ? LoadOnce(w[i] + col) : make_uint4(0, 0, 0, 0);
        }
      }
      const float weight_scale =
          block_scales != nullptr ? block_scales[block] : 1.0f;
      X<T, kTiles> x;
      x.Load(a, block);
      float c[1][kTiles][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 q[kTiles];
        x.Half(a, block, half, q);
        linear_fp8::MultiplyAdd64<1, kTiles>(c, {weight[half][0]},
                                             {weight[half][1]}, q);
      }
      x.Finish(a, block);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tile * 8 + lane % 4 * 2 + i % 2;
          sums[block - begin][token][lane / 4 + i / 2 * 8] = linear_fp8::Scaled(
              c[0][tile][i], x.scale[tile][i % 2], weight_scale);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOutsPerThread; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i >= kOuts) break;
#pragma unroll 8
      for (int block = 0; block < end - begin; ++block) {
        total[k] = __fadd_rn(total[k], sums[block][i / kRows][i % kRows]);
      }
    }
    if (end < num_blocks) __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kOutsPerThread; ++k) {
    const int i = threadIdx.x + k * kThreads;
    const int64_t row = first_row + i % kRows;
    if (i >= kOuts || i / kRows >= p.x.shape[0] || row > last_row) break;
    Store(p, i / kRows, row, linear_fp8::Finished(p, total[k], row));
  }
}

template <class T, int kTiles>
Status Launch(const Args& args, Stream stream) {
  const int64_t rows = args.p.weight.shape[0];
  return cuda::LaunchDependent(
      "Linear", stream,
      dim3(static_cast<unsigned>(cuda::CeilDiv(rows, int64_t{kRows}))),
      dim3(32 * kWarps<kTiles>), 0, Fp8GemvKernel<T, kTiles>, args);
}

}  // namespace

Status LinearFp8Gemv(const Args& args, Stream stream) {
  static_assert(kLinearFp8GemvTokens == 32, "the largest kernel below");
  const int64_t tokens = args.p.x.shape[0];
  if (tokens <= 8) return Launch<uint8_t, 1>(args, stream);
  if (tokens <= 16) return Launch<uint8_t, 2>(args, stream);
  return Launch<uint8_t, 4>(args, stream);
}

Status LinearFp8QuantizingGemv(const LinearParams& p, Stream stream) {
  static_assert(kLinearFp8QuantizingTokens <= 8, "one tile");
  Args args;
  args.p = p;
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return Launch<decltype(zero), 1>(args, stream);
  });
}

}  // namespace tenon
