#ifndef TENON_OPS_SAMPLER_SAMPLER_WARP_TILES_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WARP_TILES_CUDA_CUH_

#include "ops/core/mma_cuda.cuh"
#include "ops/sampler/sampler_decide_row_cuda.cuh"

// Sub-tiles on their way to shared memory, many at a time.

namespace tenon::cuda {

// Sub-tiles that a warp has on their way to shared memory at a time, at most,
// and what they take, for all warps.
inline constexpr int kMaxTilesAhead = 8;
struct TileOnItsWay {
  uint4 pieces[kSubTile / 4];  // as stored, in draw order
};
inline constexpr int kTilesAheadBytes =
    kDecideWarps * static_cast<int>(sizeof(TileOnItsWay));

template <class T>
__device__ __forceinline__ void CopyPiece(uint4* to, const T* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(SharedAddress(to)),
      "l"(from)
      : "memory");
}

// What a lane has of each sub-tile on its way, and copies: a piece, or two 32
// apart, so that the lanes of a warp copy neighbouring ones.
template <class T>
struct LanePieces {
  static constexpr int kSize = Piece<T>::kSize;
  static constexpr int kPieces = kSubTile / 32 / kSize;

  // The place in the sub-tile of the lane's b-th logit, b < kIdsPerLane.
  static __device__ __forceinline__ int Place(int b) {
    return (b / kSize * 32 + static_cast<int>(threadIdx.x % 32)) * kSize +
           b % kSize;
  }
  // The id there.
  static __device__ __forceinline__ int Id(int b, int tile, int num_tiles) {
    const int place = Place(b);
    return (place / kChunk * num_tiles + tile) * kChunk + place % kChunk;
  }
  // Bits of 8 consecutive places a lane, of 8 sub-tiles, as this has them.
  static __device__ __forceinline__ uint64_t BitsOf(uint64_t of_lanes) {
    if constexpr (kPieces == 1) return of_lanes;
    constexpr uint64_t kHalf = 0x0f0f0f0f0f0f0f0f;
    const int lane = static_cast<int>(threadIdx.x % 32);
    uint64_t bits = 0;
#pragma unroll
    for (int r = 0; r < kPieces; ++r) {
      const uint64_t of_source = __shfl_sync(~0u, of_lanes, r * 16 + lane / 2);
      bits |= (of_source >> (lane % 2 * kSize) & kHalf) << (r * kSize);
    }
    return bits;
  }
};

// The sub-tiles that a warp has on their way at a time: every kDecideWarps-th
// of some in the scratch's list. Its loops are not unrolled, as code that runs
// once is waited for.
template <class T>
class WarpTiles {
 public:
  using Lane = LanePieces<T>;
  static constexpr int kSize = Lane::kSize;
  static constexpr int kPieces = Lane::kPieces;

  // Of `count` from list[0] on.
  __device__ __forceinline__ WarpTiles(const DecideRow& row, const int* list,
                                       int count, TileOnItsWay* ahead)
      : vocab_(row.vocab), ahead_(ahead) {
    const int own = Slot(LaneOfWarp());
    tile_ = LaneOfWarp() < kMaxTilesAhead && own < count ? list[own] : -1;
    num_ = __popc(__ballot_sync(~0u, tile_ >= 0));
#pragma unroll
    for (int r = 0; r < kPieces; ++r) {
      first_[r] = Lane::Id(r * kSize, 0, row.num_tiles);
    }
  }
  // Asks for all that 16 bytes at a time can be read of. False if that leaves
  // anything out.
  __device__ __forceinline__ bool Copy(const DecideRow& row) {
    const T* const logits = static_cast<const T*>(row.logits);
    const int last = row.aligned ? vocab_ - kSize : -1;
    bool all = true;
#pragma unroll 1
    for (int u = 0; u < num_; ++u) {
      const int tile = __shfl_sync(~0u, tile_, u);
#pragma unroll
      for (int r = 0; r < kPieces; ++r) {
        const int first = first_[r] + tile * kChunk;
        if (first <= last) CopyPiece(PieceAt(u, r), logits + first);
        all &= first <= last || first >= vocab_;
      }
    }
    CommitCopies();
    return all;
  }
  // Whether masks let the lane's logits pass, as bits: asked for, then taken.
  __device__ __forceinline__ void LoadMasks(const DecideRow& row) {
#pragma unroll
    for (int u = 0; u < kMaxTilesAhead; ++u) {
      const int tile = __shfl_sync(~0u, tile_, u);
      masks_[u] = tile >= 0 ? AllowedOf(row, FirstIdOfLane(row, tile)) : 0;
    }
  }
  __device__ __forceinline__ uint64_t Allowed() const {
    uint64_t bits = 0;
#pragma unroll
    for (int u = 0; u < kMaxTilesAhead; ++u) {
      bits |= uint64_t{masks_[u] & 0xffu} << (u * kIdsPerLane);
    }
    return Lane::BitsOf(bits);
  }
  // Bits of the lane's logits, eight for each sub-tile: those from `lowest` on.
  __device__ __forceinline__ uint64_t Find(float lowest) const {
    uint64_t found = 0;
#pragma unroll 1
    for (int u = 0; u < num_; ++u) {
      const int tile = __shfl_sync(~0u, tile_, u);
      unsigned bits = 0;
#pragma unroll
      for (int r = 0; r < kPieces; ++r) {
        const Piece<T> piece = {*PieceAt(u, r)};
        const bool exists = first_[r] + tile * kChunk < vocab_;
        const float least = exists ? lowest : NAN;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          if (piece.At(e) >= least) bits |= 1u << (r * kSize + e);
        }
      }
      found |= uint64_t{bits} << (u * kIdsPerLane);
    }
    return found;
  }
  // The logit of one of Find()'s bits.
  __device__ __forceinline__ float LogitOf(int bit) const {
    const int slot = Slot(bit / kIdsPerLane);
    T stored;
    memcpy(&stored,
           reinterpret_cast<const char*>(ahead_[slot].pieces) +
               Lane::Place(bit % kIdsPerLane) * static_cast<int>(sizeof(T)),
           sizeof(T));
    return ToFloat(stored);
  }
  static __device__ __forceinline__ int Slot(int u) {
    return static_cast<int>(threadIdx.x / 32) + u * kDecideWarps;
  }

 private:
  static __device__ __forceinline__ int LaneOfWarp() {
    return static_cast<int>(threadIdx.x % 32);
  }
  __device__ __forceinline__ uint4* PieceAt(int u, int r) const {
    return &ahead_[Slot(u)].pieces[r * 32 + LaneOfWarp()];
  }

  int vocab_;
  TileOnItsWay* ahead_;
  int tile_;  // of the lane of that number; -1: none
  int num_;
  int first_[kPieces];  // ids of the lane's pieces of sub-tile 0
  unsigned masks_[kMaxTilesAhead];
};

// Reads what is left out by Copy(). Rare, and so not in line.
template <class T>
__device__ __noinline__ void LoadTilesSlowly(const DecideRow& row,
                                             const int* list, int count,
                                             TileOnItsWay* ahead) {
  using Lane = LanePieces<T>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = static_cast<int>(threadIdx.x / 32); i < count;
       i += kDecideWarps) {
    for (int r = 0; r < Lane::kPieces; ++r) {
      const int first = Lane::Id(r * Lane::kSize, list[i], row.num_tiles);
      if (IsSlow<T>(first, row.vocab, row.aligned)) {
        ahead[i].pieces[r * 32 + lane] =
            LoadPieceSlowly(static_cast<const T*>(row.logits), first, row.vocab)
                .words;
      }
    }
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WARP_TILES_CUDA_CUH_
