#ifndef TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_

#include "ops/sampler/sampler_team_cuda.cuh"

// The tokens that filters choose from, in shared memory, so that a row is read
// once: of every sub-tile of a block the logits from some floor on and their
// places. Sub-tiles that find no room are read again by every pass.

namespace tenon::cuda {

// The shared memory of it. A block has the sub-tiles rank, rank + size, ... of
// its team: those are its own, counted from 0.
class TokenStore {
 public:
  // Room for one sub-tile that is not stored, for each warp.
  static constexpr int kStaged = kDecideWarps * kSubTile;

  struct alignas(8) Token {
    float logit;
    int order;  // of drawing
  };

  // Without room for tokens that stay.
  static constexpr __host__ __device__ int LeastBytes(int own_tiles) {
    return TokensAt(own_tiles) + kStaged * static_cast<int>(sizeof(Token));
  }

  TokenStore() = default;
  __device__ TokenStore(Room room, int own_tiles)
      : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(room.memory))),
        own_tiles_(own_tiles),
        capacity_(min((room.bytes - LeastBytes(own_tiles)) /
                          static_cast<int>(sizeof(Token)),
                      own_tiles * kSubTile)) {}

  // Of a sub-tile: where its tokens begin, above their number.
  static constexpr uint32_t kNotStored = ~0u;
  static constexpr uint32_t SegmentOf(int begin, int count) {
    return static_cast<uint32_t>(begin) << 9 | static_cast<uint32_t>(count);
  }
  __device__ __forceinline__ uint32_t* segments() const {
    return At<uint32_t>(8);
  }
  // First those of warps' own.
  __device__ __forceinline__ Token* tokens() const {
    return At<Token>(TokensAt(own_tiles_));
  }
  // How many tokens wanted to be stored, and how many are.
  __device__ __forceinline__ int* wanted() const { return At<int>(0); }
  __device__ __forceinline__ int* stored() const { return At<int>(4); }
  __device__ int own_tiles() const { return own_tiles_; }
  __device__ int capacity() const { return capacity_; }

 private:
  // Behind two numbers and the segments.
  static constexpr __host__ __device__ int TokensAt(int own_tiles) {
    return (own_tiles + 3) / 2 * 8;
  }
  // A compiler that sees this knows that it is shared memory.
  template <class T>
  __device__ __forceinline__ T* At(int offset) const {
    return static_cast<T*>(__cvta_shared_to_generic(shared_ + offset));
  }

  uint32_t shared_ = 0;
  int own_tiles_ = 0;
  int capacity_ = 0;
};

// How the sub-tiles of a row are read: its type, where all of its logits are
// loaded as LoadPart() does it and count as they are.
__device__ __forceinline__ DType PlainTypeOf(const DecideRow& row) {
  const bool plain =
      row.aligned && row.vocab % kIdsPerLane == 0 && !row.edits.any();
  return plain ? row.dtype : DType::kInvalid;
}

// Puts the logits from `floor` on of a block's own-th sub-tile into the store,
// where `keep` and there is room, or to where the warp has room for one.
// Returns its segment. The whole warp calls this.
__device__ __noinline__ inline uint32_t PutTile(const DecideRow& row,
                                                DType plain_type,
                                                TokenStore store, int own,
                                                int tile, LanePart part,
                                                float floor, bool keep) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  LaneLogits logits;
  switch (plain_type) {
    case DType::kFloat32:
      logits = FloatsOf<float>(part);
      break;
    case DType::kFloat16:
      logits = FloatsOf<__half>(part);
      break;
    case DType::kBFloat16:
      logits = FloatsOf<__nv_bfloat16>(part);
      break;
    default:
      logits = LogitsOfPart(row, tile, part);
  }
  int count = 0;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) count += logits.x[e] >= floor ? 1 : 0;
  const int upto = WarpInclusiveSum(count);
  const int total = __shfl_sync(~0u, upto, 31);
  int begin = static_cast<int>(threadIdx.x / 32) * kSubTile;
  __syncwarp();  // what was there has been read
  if (keep) {
    int stored = 0;
    if (lane == 0) {
      stored = atomicAdd(store.wanted(), total);
      // From the first that finds no room on, none does.
      if (stored <= store.capacity()) {
        atomicMax(store.stored(),
                  stored + total <= store.capacity() ? stored + total : stored);
      }
    }
    stored = __shfl_sync(~0u, stored, 0);
    if (stored + total <= store.capacity()) {
      begin = TokenStore::kStaged + stored;
      if (lane == 0) {
        store.segments()[own] = TokenStore::SegmentOf(begin, total);
      }
    }
  }
  int at = begin + upto - count;
  TokenStore::Token* const to = store.tokens();
  const int first = tile * kSubTile + lane * kIdsPerLane;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if (logits.x[e] >= floor) to[at++] = {logits.x[e], first + e};
  }
  __syncwarp();
  return TokenStore::SegmentOf(begin, total);
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_
