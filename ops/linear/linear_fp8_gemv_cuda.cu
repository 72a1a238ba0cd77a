#include <type_traits>

#include "ops/linear/linear_backend.h"
#include "ops/linear/linear_fp8_cuda.cuh"

namespace tenon {
namespace {

using cuda::Vec;
using linear_fp8::Args;
using linear_fp8::kBlock;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;  // of the weight, for one thread block

// Its warps share the blocks of depth, each of which leaves scaled sums in
// shared memory; they are then added in order. This many at a time.
constexpr int kBlocksAtOnce = 32;
constexpr int kPitch = kRows + 4;  // no bank conflicts

// A warp has this many blocks of weight under way.
constexpr int kUnroll = 2;

// Used once, so that it needs no place in L1.
__device__ __forceinline__ uint4 LoadOnce(const uint8_t* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// This lane's part of one block of depth of x, for tiles of 8 tokens, and the
// scales of the tokens whose sums it gets.
template <int kTiles>
struct XBlock {
  uint4 q[2][kTiles];  // [half of the block][tile]
  float scale[kTiles][2];
};

template <int kTiles>
__device__ __forceinline__ void LoadX(const Args& a, int block,
                                      XBlock<kTiles>& x) {
  const int lane = threadIdx.x % 32;
  const int tokens = static_cast<int>(a.p.x.shape[0]);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = tile * 8 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = int64_t{block} * kBlock + half * 64 + lane % 4 * 16;
      x.q[half][tile] = make_uint4(0, 0, 0, 0);
      if (token < tokens && col < a.p.x.shape[1]) {
        x.q[half][tile] = *reinterpret_cast<const uint4*>(
            a.x.q + token * a.x.row_stride + col);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of = tile * 8 + lane % 4 * 2 + i;
      x.scale[tile][i] = of < tokens
                             ? a.x.scales[of * a.x.scale_row_stride +
                                          block * a.x.scale_group_stride]
                             : 0.0f;
    }
  }
}

// The same of x as it was given: the four lanes that hold a token's block
// quantise it.
template <class T>
__device__ __forceinline__ void QuantizeX(const LinearParams& p, int block,
                                          XBlock<1>& x) {
  constexpr int kVec = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int token = lane / 4;
  float values[32] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t col = int64_t{block} * kBlock + half * 64 + lane % 4 * 16;
    if (token < p.x.shape[0] && col < p.x.shape[1]) {
      const auto* from = reinterpret_cast<const Vec<T, kVec>*>(
          p.x.As<const T>() + token * p.x.stride[0] + col);
#pragma unroll
      for (int i = 0; i < 16; i += kVec) {
        const Vec<T, kVec> v = from[i / kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          values[half * 16 + i + j] = cuda::ToFloat(v.v[j]);
        }
      }
    }
  }
  const Fp8Scale scale =
      Fp8ScaleOf(cuda::LanesMax<4>(cuda::MaxMagnitude(values)));
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    words[i] = cuda::ToFp8x4(
        values[4 * i] * scale.inverse, values[4 * i + 1] * scale.inverse,
        values[4 * i + 2] * scale.inverse, values[4 * i + 3] * scale.inverse);
  }
  x.q[0][0] = make_uint4(words[0], words[1], words[2], words[3]);
  x.q[1][0] = make_uint4(words[4], words[5], words[6], words[7]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int of = lane % 4 * 2 + i;
    x.scale[0][i] = __shfl_sync(~0u, scale.scale, of * 4);
  }
}

// Up to 8 * kTiles tokens. T is x's type where this kernel quantises it, and
// uint8_t where that was done before. Rows of weight (and x) are aligned to 16
// bytes and whole chunks of 16 elements.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) Fp8GemvKernel(Args a) {
  __shared__ float sums[kBlocksAtOnce][kTiles * 8][kPitch];
  const LinearParams& p = a.p;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t last_row = p.weight.shape[0] - 1;
  const int64_t depth = p.weight.shape[1];
  const int num_blocks = static_cast<int>(cuda::CeilDiv(depth, kBlock));
  // Rows past the end repeat the last one, and are not stored.
  const uint8_t* w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    w[i] = p.weight.As<const uint8_t>() +
           min(first_row + lane / 4 + 8 * i, last_row) * p.weight.stride[0];
  }
  const float* const block_scales = linear_fp8::BlockScales(p, first_row);
  cuda::WaitForPreviousKernels();

  // Of token threadIdx.x / kRows, row threadIdx.x % kRows.
  float total = 0.0f;
  for (int begin = 0; begin < num_blocks; begin += kBlocksAtOnce) {
    const int end = min(begin + kBlocksAtOnce, num_blocks);
    for (int first = begin + warp; first < end; first += kUnroll * kWarps) {
      uint4 weight[kUnroll][2][2];  // [block][half of it][row]
      float weight_scale[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int block = first + u * kWarps;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t col =
              int64_t{block} * kBlock + half * 64 + lane % 4 * 16;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            weight[u][half][i] = block < end && col < depth
                                     ? LoadOnce(w[i] + col)
                                     : make_uint4(0, 0, 0, 0);
          }
        }
        weight_scale[u] =
            block_scales != nullptr && block < end ? block_scales[block] : 1.0f;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int block = first + u * kWarps;
        if (block >= end) break;
        XBlock<kTiles> x;
        if constexpr (std::is_same_v<T, uint8_t>) {
          LoadX(a, block, x);
        } else {
          QuantizeX<T>(p, block, x);
        }
        float c[1][kTiles][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          linear_fp8::MultiplyAdd64<1, kTiles>(c, {weight[u][half][0]},
                                               {weight[u][half][1]}, x.q[half]);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = tile * 8 + lane % 4 * 2 + i % 2;
            sums[block - begin][token][lane / 4 + i / 2 * 8] =
                linear_fp8::Scaled(c[0][tile][i], x.scale[tile][i % 2],
                                   weight_scale[u]);
          }
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kTiles * 8 * kRows) {
      for (int block = 0; block < end - begin; ++block) {
        total = __fadd_rn(
            total, sums[block][threadIdx.x / kRows][threadIdx.x % kRows]);
      }
    }
    if (end < num_blocks) __syncthreads();
  }

  const int64_t token = threadIdx.x / kRows;
  const int64_t row = first_row + threadIdx.x % kRows;
  if (token >= p.x.shape[0] || token >= kTiles * 8 || row > last_row) return;
  const float value = linear_fp8::Finished(p, total, row);
  const int64_t at = token * p.out.stride[0] + row;
  switch (p.out.dtype) {
    case DType::kFloat32:
      p.out.As<float>()[at] = value;
      break;
    case DType::kFloat16:
      p.out.As<__half>()[at] = cuda::FromFloat<__half>(value);
      break;
    default:
      p.out.As<__nv_bfloat16>()[at] = cuda::FromFloat<__nv_bfloat16>(value);
      break;
  }
}

template <class T, int kTiles>
Status Launch(const Args& args, Stream stream) {
  const int64_t rows = args.p.weight.shape[0];
  return cuda::LaunchDependent(
      "Linear", stream,
      dim3(static_cast<unsigned>(cuda::CeilDiv(rows, int64_t{kRows}))),
      dim3(kThreads), 0, Fp8GemvKernel<T, kTiles>, args);
}

}  // namespace

Status LinearFp8Gemv(const Args& args, Stream stream) {
  return args.p.x.shape[0] <= 8 ? Launch<uint8_t, 1>(args, stream)
                                : Launch<uint8_t, 2>(args, stream);
}

Status LinearFp8QuantizingGemv(const LinearParams& p, Stream stream) {
  Args args;
  args.p = p;
  return cuda::WithFloatType(p.x.dtype, [&](auto zero) {
    return Launch<decltype(zero), 1>(args, stream);
  });
}

}  // namespace tenon
