#include "ops/core/cpu_matmul.h"

#include <algorithm>

#include "ops/core/cpu_matmul_isa.h"

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#define HWY_BROKEN_EMU128 1  // no emulated vectors, whatever the compiler
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/core/cpu_matmul.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include "ops/core/cpu_matmul_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {
namespace cpu_matmul {  // other files have kernels of the same name

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
    case DType::kFloat8E4M3:
      return Convert(static_cast<const Float8E4M3*>(from), count, to);
    default:
      std::copy_n(static_cast<const float*>(from), count, to);
  }
}

void ConvertFromFloat(DType dtype, const float* from, int64_t count, void* to) {
  switch (dtype) {
    case DType::kFloat16:
      return Convert(from, count, static_cast<Float16*>(to));
    case DType::kBFloat16:
      return Convert(from, count, static_cast<BFloat16*>(to));
    default:
      std::copy_n(from, count, static_cast<float*>(to));
  }
}

constexpr int kL2 = 2;  // __builtin_prefetch: into the L2 cache

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
                            const W* const (&w)[kTileCols], Tile<kRows>& tile) {
  Floats xs[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) xs[r] = Load(x[r]);
#pragma GCC unroll 8
  for (int c = 0; c < kTileCols; ++c) {
    Floats ws = Load(w[c]);
    KeepInRegister(ws);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      tile.sum[r][c] = MultiplyAdd(xs[r], ws, tile.sum[r][c]);
    }
  }
}

// Weights of fp8 have scales, one for 128 of the depth.
template <class W>
constexpr bool kScaled = false;
template <>
constexpr bool kScaled<Float8E4M3> = true;
constexpr int64_t kScaleBlock = 128;

// Adds the sums of block `block` of the depth, times its scales, to those of
// the blocks before it. All columns of the tile are in one row of weight
// blocks, the first of p.scales.
template <int kRows>
HWY_INLINE void AddScaled(const CpuMatmulParams& p, int64_t row, int64_t block,
                          const Tile<kRows>& tile, Tile<kRows>& total) {
  const CpuMatmulScales& s = p.scales;
  const float of_weight = s.block_rows == 1 ? 1.0f : s.weight[block];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Floats scale = Fill(s.x[(row + r) * s.x_stride + block] * of_weight);
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) {
      total.sum[r][c] = MultiplyAdd(tile.sum[r][c], scale, total.sum[r][c]);
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

// Adds the products of the next `count` of the depth and moves x and w past
// whole blocks of lanes; a partial one ends the depth.
template <int kRows, class W>
HWY_INLINE void AddDepth(int64_t count, int64_t ahead, const float* (&x)[kRows],
                         const W* (&w)[kTileCols], Tile<kRows>& tile) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) {
      __builtin_prefetch(w[c] + ahead, 0, kL2);
    }
    AddProducts(x, w, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] += kLanes;
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) w[c] += kLanes;
  }
  if (whole < count) {
    float x_block[kRows][kLanes];
    W w_block[kTileCols][kLanes];
    for (int r = 0; r < kRows; ++r) {
      x[r] = PadBlock(x[r], count - whole, x_block[r]);
    }
    for (int c = 0; c < kTileCols; ++c) {
      w[c] = PadBlock(w[c], count - whole, w_block[c]);
    }
    AddProducts(x, w, tile);
  }
}

// Few rows: weights go from memory to registers, converted on the way, while
// the next tile's are fetched into L2, so that this runs at the speed of
// memory.
template <int kRows, class W>
void StreamTile(const CpuMatmulParams& p, int64_t row, int64_t col) {
  const int64_t cols = std::min<int64_t>(p.cols - col, kTileCols);
  const float* x[kRows];
  const W* w[kTileCols];
  for (int r = 0; r < kRows; ++r) x[r] = p.x + (row + r) * p.x_stride;
  for (int c = 0; c < kTileCols; ++c) {  // columns past the end repeat the last
    w[c] = static_cast<const W*>(p.weight) +
           (col + std::min<int64_t>(c, cols - 1)) * p.weight_stride;
  }
  const int64_t ahead =
      col + 2 * kTileCols <= p.cols ? kTileCols * p.weight_stride : 0;
  Tile<kRows> tile;
  Clear(tile);
  if constexpr (kScaled<W>) {
    for (int64_t begin = 0; begin < p.depth; begin += kScaleBlock) {
      Tile<kRows> block;
      Clear(block);
      AddDepth(std::min(p.depth - begin, kScaleBlock), ahead, x, w, block);
      AddScaled(p, row, begin / kScaleBlock, block, tile);
    }
  } else {
    AddDepth(p.depth, ahead, x, w, tile);
  }
  StoreTile(tile, p.out + row * p.out_stride + col, p.out_stride, cols);
}

// Most rows for that. Weights are converted once per tile of rows here, which
// takes longer than their way from memory for fp8.
template <class W>
constexpr int kStreamRows = kScaled<W> ? kTileRows : 9;

template <class W>
void StreamRows(const CpuMatmulParams& p) {
  for (int64_t col = 0; col < p.cols; col += kTileCols) {
    int64_t row = 0;
    for (; row + kTileRows <= p.rows; row += kTileRows) {
      StreamTile<kTileRows, W>(p, row, col);
    }
    if (p.rows - row == 1) StreamTile<1, W>(p, row, col);
    if (p.rows - row == 2) StreamTile<2, W>(p, row, col);
  }
}

// Many rows: kTileCols weight rows are converted a chunk of depth at a time and
// used from the L1 cache by all rows of a block, whose sums wait beside them.
// The block's x stays in L2.
constexpr int kChunk = 512;
constexpr int64_t kMaxBlockRows = 66;
constexpr int64_t kMinBlockRows = 24;
constexpr int64_t kBlockElements = 330 << 10;  // of x: 1.3 MiB

struct Chunk {
  HWY_ALIGN float weight[kChunk / kLanes][kTileCols][kLanes];
  HWY_ALIGN float sums[kMaxBlockRows][kTileCols][kLanes];
  HWY_ALIGN float x_end[kMaxBlockRows][kLanes];  // last blocks of x, padded
};

// Rows [row, row + kRows) of the block that starts at p.x, over depth
// [begin, begin + count).
template <int kRows, bool kWithScales>
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
  for (int r = 0; r < kRows; ++r) x[r] = p.x + (row + r) * p.x_stride + begin;
  // The next tile's x comes from L2 while this one's is used.
  const int64_t ahead = row + 2 * kRows <= p.rows ? kRows * p.x_stride : 0;
  const auto add_block = [&](int64_t block, Tile<kRows>& to) HWY_ATTR {
    const float* w[kTileCols];
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) w[c] = chunk.weight[block][c];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(x[r] + ahead);
    AddProducts(x, w, to);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] += kLanes;
  };
  // Elements [from, to) of the chunk.
  const auto add_elements = [&](int64_t from, int64_t to,
                                Tile<kRows>& sums) HWY_ATTR {
    const int64_t whole = to / kLanes;
    for (int64_t i = from / kLanes; i < whole; ++i) add_block(i, sums);
    if (whole * kLanes < to) {
      for (int r = 0; r < kRows; ++r) x[r] = chunk.x_end[row + r];
      add_block(whole, sums);
    }
  };
  if constexpr (kWithScales) {
    for (int64_t from = 0; from < count; from += kScaleBlock) {
      Tile<kRows> sums;
      Clear(sums);
      add_elements(from, std::min(from + kScaleBlock, count), sums);
      AddScaled(p, row, (begin + from) / kScaleBlock, sums, tile);
    }
  } else {
    add_elements(0, count, tile);
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
    int64_t block = 0;
    for (; (block + 1) * kLanes <= count; ++block) {
      Store(Load(w + block * kLanes), chunk.weight[block][c]);
    }
    const int64_t rest = count - block * kLanes;
    if (rest > 0) {
      W padded[kLanes];
      Store(Load(PadBlock(w + block * kLanes, rest, padded)),
            chunk.weight[block][c]);
    }
  }
}

// Fetches the weights of one chunk into L2, a few lines at a time.
template <class W>
class ChunkPrefetcher {
 public:
  ChunkPrefetcher(const CpuMatmulParams& p, int64_t col, int64_t begin)
      : first_(static_cast<const W*>(p.weight) + col * p.weight_stride + begin),
        stride_(p.weight_stride),
        end_(col + kTileCols <= p.cols ? kTileCols * kRowLines : 0) {}

  void Fetch(int64_t lines) {
    for (const int64_t to = std::min(next_ + lines, end_); next_ < to;
         ++next_) {
      const W* row = first_ + next_ / kRowLines * stride_;
      __builtin_prefetch(row + next_ % kRowLines * kLine, 0, kL2);
    }
  }

  static constexpr int64_t kLine = 64 / sizeof(W);
  static constexpr int64_t kRowLines = kChunk / kLine;

 private:
  const W* first_;
  int64_t stride_;
  int64_t next_ = 0;
  int64_t end_;
};

// p.rows <= kMaxBlockRows.
template <class W>
void MultiplyBlock(const CpuMatmulParams& p, Chunk& chunk) {
  const int64_t whole = p.depth / kLanes * kLanes;
  for (int64_t r = 0; r < p.rows && whole < p.depth; ++r) {
    PadBlock(p.x + r * p.x_stride + whole, p.depth - whole, chunk.x_end[r]);
  }
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t lines =
      (kTileCols * ChunkPrefetcher<W>::kRowLines + tiles - 1) / tiles;
  for (int64_t col = 0; col < p.cols; col += kTileCols) {
    for (int64_t begin = 0; begin < p.depth; begin += kChunk) {
      const int64_t count = std::min<int64_t>(p.depth - begin, kChunk);
      LoadChunk<W>(p, col, begin, count, chunk);
      ChunkPrefetcher<W> next = begin + count < p.depth
                                    ? ChunkPrefetcher<W>(p, col, begin + count)
                                    : ChunkPrefetcher<W>(p, col + kTileCols, 0);
      int64_t row = 0;
      for (; row + kTileRows <= p.rows; row += kTileRows) {
        next.Fetch(lines);
        ChunkTile<kTileRows, kScaled<W>>(p, row, col, begin, count, chunk);
      }
      if (p.rows - row == 1) {
        ChunkTile<1, kScaled<W>>(p, row, col, begin, count, chunk);
      }
      if (p.rows - row == 2) {
        ChunkTile<2, kScaled<W>>(p, row, col, begin, count, chunk);
      }
    }
  }
}

template <class W>
void Multiply(const CpuMatmulParams& p) {
  if (p.rows <= kStreamRows<W>) return StreamRows<W>(p);
  // Blocks of about equal size, in whole tiles.
  const int64_t max_rows =
      std::clamp(kBlockElements / p.depth, kMinBlockRows, kMaxBlockRows);
  const int64_t blocks = (p.rows + max_rows - 1) / max_rows;
  const int64_t block_rows =
      ((p.rows + blocks - 1) / blocks + kTileRows - 1) / kTileRows * kTileRows;
  Chunk chunk;
  for (int64_t row = 0; row < p.rows; row += block_rows) {
    CpuMatmulParams block = p;
    block.x += row * p.x_stride;
    block.out += row * p.out_stride;
    if (kScaled<W>) block.scales.x += row * p.scales.x_stride;
    block.rows = std::min<int64_t>(p.rows - row, block_rows);
    MultiplyBlock<W>(block, chunk);
  }
}

// A row of weight blocks at a time, whose scales come first in `scales` then;
// scales of single rows multiply what was summed without them.
void MultiplyScaled(const CpuMatmulParams& p) {
  const CpuMatmulScales& s = p.scales;
  if (s.block_rows == 1) {
    Multiply<Float8E4M3>(p);
    const float* const scales = s.weight + s.first_row * s.weight_stride;
    for (int64_t r = 0; r < p.rows; ++r) {
      float* const out = p.out + r * p.out_stride;
      for (int64_t c = 0; c < p.cols; ++c)
        out[c] *= scales[c * s.weight_stride];
    }
    return;
  }
  for (int64_t col = 0; col < p.cols;) {
    const int64_t row = s.first_row + col;
    CpuMatmulParams part = p;
    part.weight =
        static_cast<const Float8E4M3*>(p.weight) + col * p.weight_stride;
    part.out += col;
    part.cols = std::min(p.cols - col, kScaleBlock - row % kScaleBlock);
    part.scales.weight += row / kScaleBlock * s.weight_stride;
    Multiply<Float8E4M3>(part);
    col += part.cols;
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
    case DType::kFloat8E4M3:
      return MultiplyScaled(p);
    default:
      return Multiply<float>(p);
  }
}

CpuKernels Kernels() { return {Matmul, ConvertToFloat, ConvertFromFloat}; }

}  // namespace cpu_matmul
}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace tenon {

CpuKernels CpuKernelsFor(CpuIsa isa) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::cpu_matmul::Kernels();
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::cpu_matmul::Kernels();
#endif
    default:
      return HWY_STATIC_DISPATCH(cpu_matmul::Kernels)();
  }
}

void CpuMatmul(const CpuMatmulParams& params) {
  CpuKernelsFor(DetectCpuIsa()).matmul(params);
}

void CpuConvertToFloat(DType dtype, const void* from, int64_t count,
                       float* to) {
  CpuKernelsFor(DetectCpuIsa()).convert_to_float(dtype, from, count, to);
}

void CpuConvertFromFloat(DType dtype, const float* from, int64_t count,
                         void* to) {
  CpuKernelsFor(DetectCpuIsa()).convert_from_float(dtype, from, count, to);
}

}  // namespace tenon

#endif  // HWY_ONCE
