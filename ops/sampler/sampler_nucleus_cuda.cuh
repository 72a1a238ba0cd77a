#ifndef TENON_OPS_SAMPLER_SAMPLER_NUCLEUS_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_NUCLEUS_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"

// top-p alone where many tokens pass it, in two passes over the row: the first
// counts tokens by logit, which tells within a few of them where the cutoff is;
// the second adds up exactly what is above these, and sorts these.

namespace tenon::cuda {

class Nucleus {
 public:
  // Of the tokens with at least the logit `floor`. `tile_mass` has room for all
  // sub-tiles.
  __device__ Nucleus(Block& block, const DecideRow& row, float floor,
                     uint64_t* tile_mass)
      : block_(block),
        s_(block.s),
        row_(row),
        floor_(floor),
        to_bin_(static_cast<float>(kBins) / (row.best - floor)),
        tile_mass_(tile_mass) {}

  // No token where too many logits are nearly the same: then nothing is known.
  __device__ __noinline__ Drawn Draw(uint64_t target, uint64_t numerator);

 private:
  // Bin 0 has the largest logits. Rises with falling x, however it rounds.
  __device__ __forceinline__ int BinOf(float x) const {
    return min(static_cast<int>((row_.best - x) * to_bin_), kBins - 1);
  }
  // What one token of a bin weighs at most and at least, in units of the
  // best's.
  __device__ double HighestWeight(int bin) const {
    return EdgeWeight(bin) * (1.0 + kRounding);
  }
  __device__ double LowestWeight(int bin) const {
    return EdgeWeight(bin + 1) * (1.0 - kRounding);
  }
  __device__ double EdgeWeight(int bin) const {
    const float gap = static_cast<float>(bin) / to_bin_;
    return static_cast<double>(strict::Exp2(-gap * row_.plan->scale));
  }
  static constexpr double kRounding = 1e-4;

  __device__ void Count();
  __device__ bool FindWindow(uint64_t target);
  __device__ int CollectWindow();

  Block& block_;
  BlockScratch& s_;
  const DecideRow& row_;
  float floor_;
  float to_bin_;
  uint64_t* tile_mass_;
  // The bins that the cutoff may be in, and the exact mass above them.
  int first_bin_ = 0;
  int last_bin_ = 0;
  uint64_t above_ = 0;
};

__device__ inline void Nucleus::Count() {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kDecideThreads) {
    s_.bins[0][i] = 0;
  }
  __syncthreads();
  ForEachTile<2>(row_, OrderedKey(floor_), [&](int, const LaneLogits& logits) {
    // Lanes that add to one bin take turns: not where all of a chunk is equal.
    bool equal = true;
#pragma unroll
    for (int e = 1; e < kIdsPerLane; ++e) {
      equal = equal && logits.x[e] == logits.x[0];
    }
    if (equal) {
      if (logits.x[0] >= floor_) {
        atomicAdd(&s_.bins[0][BinOf(logits.x[0])],
                  static_cast<uint32_t>(kIdsPerLane));
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      if (logits.x[e] >= floor_) {
        atomicAdd(&s_.bins[0][BinOf(logits.x[e])], 1u);
      }
    }
  });
  __syncthreads();
}

// False where there are too many tokens where the cutoff may be.
__device__ inline bool Nucleus::FindWindow(uint64_t target) {
  // Sums of bounds, in fixed point with room for rounding.
  const auto bound = [&](int bin, double weight) {
    return static_cast<uint64_t>(static_cast<double>(s_.bins[0][bin]) * weight *
                                 kMassOfBest);
  };
  const Block::Pick first = block_.PickByWeight(
      kBins, target - 1, [&](int i) { return bound(i, HighestWeight(i)); });
  const Block::Pick last = block_.PickByWeight(
      kBins, target - 1, [&](int i) { return bound(i, LowestWeight(i)); });
  if (first.index < 0) return false;
  first_bin_ = first.index;
  last_bin_ = last.index < 0 ? kBins - 1 : last.index;
  uint64_t own = 0;
  for (int i = first_bin_ + static_cast<int>(threadIdx.x); i <= last_bin_;
       i += kDecideThreads) {
    own += s_.bins[0][i];
  }
  return block_.Sum(own) <= kMaxCandidates;
}

__device__ inline int Nucleus::CollectWindow() {
  if (threadIdx.x == 0) s_.count = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row_.num_tiles;
       i += kDecideThreads) {
    tile_mass_[i] = 0;
  }
  __syncthreads();
  uint64_t own = 0;
  ForEachTile<2>(row_, OrderedKey(floor_),
                 [&](int tile, const LaneLogits& logits) {
                   const int first = FirstIdOfLane(row_, tile);
                   uint64_t mass = 0;
#pragma unroll
                   for (int e = 0; e < kIdsPerLane; ++e) {
                     const float x = logits.x[e];
                     if (!(x >= floor_)) continue;
                     const int bin = BinOf(x);
                     if (bin < first_bin_) {
                       mass += row_.Mass(x);
                     } else if (bin <= last_bin_) {
                       const int at = atomicAdd(&s_.count, 1);
                       if (at < kMaxCandidates) {
                         s_.keys[at] = CandidateKey(OrderedKey(x), first + e);
                       }
                     }
                   }
                   mass = WarpSum64(mass);
                   if (threadIdx.x % 32 == 0) {
                     tile_mass_[tile] = mass;
                     own += mass;
                   }
                 });
  above_ = block_.Sum(own);
  const int count = min(s_.count, kMaxCandidates);
  __syncthreads();
  return count;
}

__device__ __noinline__ inline Drawn Nucleus::Draw(uint64_t target,
                                                   uint64_t numerator) {
  Count();
  if (!FindWindow(target)) return {};
  const int count = CollectWindow();
  block_.Sort(count);
  const auto weigh = [&](int rank) {
    return row_.Mass(LogitOfCandidate(s_.sorted[rank]));
  };
  if (target <= above_) return {};
  const Block::Pick cut =
      block_.PickByWeight(count, target - above_ - 1, weigh);
  // Rounding near 1: all is kept, or it would have been in the window.
  if (cut.index < 0 && last_bin_ != kBins - 1) return {};
  const int kept = cut.index < 0 ? count : cut.index + 1;
  uint64_t own = 0;
  for (int r = static_cast<int>(threadIdx.x); r < kept; r += kDecideThreads) {
    const uint64_t mass = weigh(r);
    const int id = IdOfCandidate(s_.sorted[r]);
    atomicAdd(reinterpret_cast<unsigned long long*>(
                  &tile_mass_[id / kChunk % row_.num_tiles]),
              static_cast<unsigned long long>(mass));
    own += mass;
  }
  Drawn drawn;
  drawn.best = row_.best;
  drawn.mass = above_ + block_.Sum(own);
  drawn.kept.to.value = floor_;
  if (kept > 0) {
    const uint64_t worst = s_.sorted[kept - 1];
    drawn.kept.to = {LogitOfCandidate(worst), IdOfCandidate(worst)};
  }
  const uint64_t draw_target = DrawTarget(numerator, drawn.mass);
  const Block::Pick tile = block_.PickByWeight(
      row_.num_tiles, draw_target, [&](int i) { return tile_mass_[i]; });
  const TokenInTile token =
      PickInTile(row_, tile.index, LogitsOfTile(row_, tile.index),
                 draw_target - tile.before, [&](float x, int id) {
                   return drawn.kept.Keeps(x, id) ? row_.Mass(x) : uint64_t{0};
                 });
  drawn.token = token.id;
  drawn.x = token.x;
  return drawn;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_NUCLEUS_CUDA_CUH_
