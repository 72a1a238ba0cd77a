#include "ops/core/cpu_matmul.h"

#include <algorithm>
#include <cstring>

#include "ops/core/cpu_matmul_isa.h"

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/core/cpu_matmul.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include "ops/core/cpu_matmul_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {

// An x-by-weight tile of sums that fits the vector registers beside its inputs:
// 24 of 32 with AVX-512, 12 of 16 elsewhere.
constexpr int kTileRows = 3;
constexpr int kTileCols = HWY_TARGET == HWY_AVX3 ? 8 : 4;

// The last elements go through a padded copy, so that all take one path.
template <class From, class To>
void Convert(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(Load(from + i), to + i);
  if (i == count) return;
  From padded_from[kLanes] = {};
  To padded_to[kLanes];
  std::copy(from + i, from + count, padded_from);
  Store(Load(padded_from), padded_to);
  std::copy(padded_to, padded_to + (count - i), to + i);
}

void ConvertToFloat(DType dtype, const void* from, int64_t count, float* to) {
  switch (dtype) {
    case DType::kFloat16:
      return Convert(static_cast<const Float16*>(from), count, to);
    case DType::kBFloat16:
      return Convert(static_cast<const BFloat16*>(from), count, to);
    default:
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  }
}

void ConvertFromFloat(DType dtype, const float* from, int64_t count, void* to) {
  switch (dtype) {
    case DType::kFloat16:
      return Convert(from, count, static_cast<Float16*>(to));
    case DType::kBFloat16:
      return Convert(from, count, static_cast<BFloat16*>(to));
    default:
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  }
}

// ---------------------------------------------------------------------------
// Matrix product
// ---------------------------------------------------------------------------
//
// The vector lanes run along depth. An output element has one vector of sums,
// to which blocks of kLanes products are added in order, the last block padded
// with zeros; AddLanes() then adds its lanes in a fixed tree. All paths below
// do exactly that, so they give the same bits.

template <int kRows>
struct Tile {
  Floats sum[kRows][kTileCols];
};

template <int kRows>
HWY_INLINE void Clear(Tile<kRows>& tile) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) tile.sum[r][c] = Zero();
  }
}

// Adds the products of one block of kLanes.
template <int kRows, class W>
HWY_INLINE void AddProducts(const float* const (&x)[kRows],
                            const W* const (&w)[kTileCols], int64_t k,
                            Tile<kRows>& tile) {
  Floats xs[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) xs[r] = Load(x[r] + k);
#pragma GCC unroll 8
  for (int c = 0; c < kTileCols; ++c) {
    const Floats ws = Load(w[c] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      tile.sum[r][c] = MultiplyAdd(xs[r], ws, tile.sum[r][c]);
    }
  }
}

// Writes the first `cols` columns of the tile.
template <int kRows>
HWY_INLINE void StoreTile(const Tile<kRows>& tile, float* out,
                          int64_t out_stride, int64_t cols) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* row = out + r * out_stride;
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; c += 4) {
      const Floats(&sum)[kTileCols] = tile.sum[r];
      if (c + 4 <= cols) {
        AddLanes(sum[c], sum[c + 1], sum[c + 2], sum[c + 3], row + c);
      } else if (c < cols) {
        float sums[4];
        AddLanes(sum[c], sum[c + 1], sum[c + 2], sum[c + 3], sums);
        std::copy(sums, sums + (cols - c), row + c);
      }
    }
  }
}

// A zero-padded copy of the last, partial block.
template <class T>
HWY_INLINE const T* PadBlock(const T* from, int64_t count, T* padded) {
  std::fill(std::copy(from, from + count, padded), padded + kLanes, T{});
  return padded;
}

// Few rows: weights go from memory to registers, converted on the way. This
// streams at the speed of memory, given enough lines on their way from it.
template <int kRows, class W>
void StreamTile(const CpuMatmulParams& p, int64_t row, int64_t col) {
  // Far enough ahead to cover the latency; a prefetch past the end is harmless.
  constexpr int64_t kPrefetchBytes = 1024;
  const int64_t cols = std::min<int64_t>(p.cols - col, kTileCols);
  const float* x[kRows];
  const W* w[kTileCols];
  for (int r = 0; r < kRows; ++r) x[r] = p.x + (row + r) * p.x_stride;
  for (int c = 0; c < kTileCols; ++c) {  // columns past the end repeat the last
    w[c] = static_cast<const W*>(p.weight) +
           (col + std::min<int64_t>(c, cols - 1)) * p.weight_stride;
  }
  Tile<kRows> tile;
  Clear(tile);
  const int64_t whole = p.depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) {
      __builtin_prefetch(reinterpret_cast<const char*>(w[c] + k) +
                         kPrefetchBytes);
    }
    AddProducts(x, w, k, tile);
  }
  if (whole < p.depth) {
    float x_block[kRows][kLanes];
    W w_block[kTileCols][kLanes];
    for (int r = 0; r < kRows; ++r) {
      x[r] = PadBlock(x[r] + whole, p.depth - whole, x_block[r]);
    }
    for (int c = 0; c < kTileCols; ++c) {
      w[c] = PadBlock(w[c] + whole, p.depth - whole, w_block[c]);
    }
    AddProducts(x, w, 0, tile);
  }
  StoreTile(tile, p.out + row * p.out_stride + col, p.out_stride, cols);
}

template <int kRows, class W>
void StreamRows(const CpuMatmulParams& p) {
  for (int64_t col = 0; col < p.cols; col += kTileCols) {
    StreamTile<kRows, W>(p, 0, col);
  }
}

// Many rows: kTileCols weight rows are converted a chunk of depth at a time and
// used from the L1 cache by all rows of a block, whose sums wait in L1 too. The
// block's x stays in L2.
constexpr int kChunk = 512;
constexpr int kBlockRows = 48;

struct Chunk {
  HWY_ALIGN float weight[kTileCols][kChunk];
  HWY_ALIGN float sums[kBlockRows][kTileCols][kLanes];
  HWY_ALIGN float x_end[kBlockRows][kLanes];  // last blocks of x, padded
};

// Rows [row, row + kRows) of the block that starts at p.x, over depth
// [begin, begin + count).
template <int kRows>
void ChunkTile(const CpuMatmulParams& p, int64_t row, int64_t col,
               int64_t begin, int64_t count, Chunk& chunk) {
  Tile<kRows> tile;
  if (begin == 0) {
    Clear(tile);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kTileCols; ++c) {
        tile.sum[r][c] = Load(chunk.sums[row + r][c]);
      }
    }
  }
  const float* x[kRows];
  const float* w[kTileCols];
  for (int r = 0; r < kRows; ++r) x[r] = p.x + (row + r) * p.x_stride + begin;
  for (int c = 0; c < kTileCols; ++c) w[c] = chunk.weight[c];
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) AddProducts(x, w, k, tile);
  if (whole < count) {
    for (int r = 0; r < kRows; ++r) x[r] = chunk.x_end[row + r];
    for (int c = 0; c < kTileCols; ++c) w[c] += whole;
    AddProducts(x, w, 0, tile);
  }
  if (begin + count < p.depth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kTileCols; ++c) {
        Store(tile.sum[r][c], chunk.sums[row + r][c]);
      }
    }
  } else {
    StoreTile(tile, p.out + row * p.out_stride + col, p.out_stride,
              std::min<int64_t>(p.cols - col, kTileCols));
  }
}

// Converts the next chunk of weights, padding its last block with zeros.
template <class W>
void LoadChunk(const CpuMatmulParams& p, int64_t col, int64_t begin,
               int64_t count, Chunk& chunk) {
  for (int c = 0; c < kTileCols; ++c) {
    const int64_t weight_row = std::min<int64_t>(col + c, p.cols - 1);
    const W* w =
        static_cast<const W*>(p.weight) + weight_row * p.weight_stride + begin;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Store(Load(w + k), chunk.weight[c] + k);
    }
    if (k < count) {
      W block[kLanes];
      Store(Load(PadBlock(w + k, count - k, block)), chunk.weight[c] + k);
    }
  }
}

// p.rows <= kBlockRows.
template <class W>
void MultiplyBlock(const CpuMatmulParams& p, Chunk& chunk) {
  const int64_t whole = p.depth / kLanes * kLanes;
  for (int64_t r = 0; r < p.rows && whole < p.depth; ++r) {
    PadBlock(p.x + r * p.x_stride + whole, p.depth - whole, chunk.x_end[r]);
  }
  for (int64_t col = 0; col < p.cols; col += kTileCols) {
    for (int64_t begin = 0; begin < p.depth; begin += kChunk) {
      const int64_t count = std::min<int64_t>(p.depth - begin, kChunk);
      LoadChunk<W>(p, col, begin, count, chunk);
      int64_t row = 0;
      for (; row + kTileRows <= p.rows; row += kTileRows) {
        ChunkTile<kTileRows>(p, row, col, begin, count, chunk);
      }
      if (p.rows - row == 1) ChunkTile<1>(p, row, col, begin, count, chunk);
      if (p.rows - row == 2) ChunkTile<2>(p, row, col, begin, count, chunk);
    }
  }
}

template <class W>
void Multiply(const CpuMatmulParams& p) {
  switch (p.rows) {
    case 1:
      return StreamRows<1, W>(p);
    case 2:
      return StreamRows<2, W>(p);
    case 3:
      return StreamRows<3, W>(p);
    default:
      break;
  }
  Chunk chunk;
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    CpuMatmulParams block = p;
    block.x += row * p.x_stride;
    block.out += row * p.out_stride;
    block.rows = std::min<int64_t>(p.rows - row, kBlockRows);
    MultiplyBlock<W>(block, chunk);
  }
}

void Matmul(const CpuMatmulParams& p) {
  if (p.depth == 0) {
    for (int64_t r = 0; r < p.rows; ++r) {
      std::fill_n(p.out + r * p.out_stride, p.cols, 0.0f);
    }
    return;
  }
  switch (p.weight_dtype) {
    case DType::kFloat16:
      return Multiply<Float16>(p);
    case DType::kBFloat16:
      return Multiply<BFloat16>(p);
    default:
      return Multiply<float>(p);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace tenon {

void CpuMatmul(CpuIsa isa, const CpuMatmulParams& params) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::Matmul(params);
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::Matmul(params);
#endif
    default:
      return HWY_STATIC_DISPATCH(Matmul)(params);
  }
}

void CpuConvertToFloat(CpuIsa isa, DType dtype, const void* from, int64_t count,
                       float* to) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::ConvertToFloat(dtype, from, count, to);
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::ConvertToFloat(dtype, from, count, to);
#endif
    default:
      return HWY_STATIC_DISPATCH(ConvertToFloat)(dtype, from, count, to);
  }
}

void CpuConvertFromFloat(CpuIsa isa, DType dtype, const float* from,
                         int64_t count, void* to) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::ConvertFromFloat(dtype, from, count, to);
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::ConvertFromFloat(dtype, from, count, to);
#endif
    default:
      return HWY_STATIC_DISPATCH(ConvertFromFloat)(dtype, from, count, to);
  }
}

void CpuMatmul(const CpuMatmulParams& params) {
  CpuMatmul(DetectCpuIsa(), params);
}

void CpuConvertToFloat(DType dtype, const void* from, int64_t count,
                       float* to) {
  CpuConvertToFloat(DetectCpuIsa(), dtype, from, count, to);
}

void CpuConvertFromFloat(DType dtype, const float* from, int64_t count,
                         void* to) {
  CpuConvertFromFloat(DetectCpuIsa(), dtype, from, count, to);
}

}  // namespace tenon

#endif  // HWY_ONCE
