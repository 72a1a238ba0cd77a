#ifndef TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_

#include "ops/sampler/sampler_team_cuda.cuh"

// The tokens that filters choose from, in shared memory, so that a row is read
// once: of every sub-tile of a block those with logits in some range. What
// finds no room is read again by every pass.

namespace tenon::cuda {

// The shared memory of it. A block has the sub-tiles rank, rank + size, ... of
// its team: those are its own, counted from 0.
class TokenStore {
 public:
  struct alignas(8) Token {
    float logit;
    int order;  // of drawing
  };

  // Without room for tokens.
  static constexpr __host__ __device__ int LeastBytes(int own_tiles) {
    return (8 + own_tiles + 7) / 8 * 8;
  }

  TokenStore() = default;
  // `most_tiles`: that a block of the team has. All have the same capacity,
  // from which they guess alike.
  __device__ TokenStore(Room room, int own_tiles, int most_tiles)
      : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(room.memory))),
        own_tiles_(own_tiles),
        capacity_(min((room.bytes - LeastBytes(most_tiles)) /
                          static_cast<int>(sizeof(Token)),
                      most_tiles * kSubTile)) {}

  // How many tokens wanted to be stored, and how many are.
  __device__ __forceinline__ int* wanted() const { return At<int>(0); }
  __device__ __forceinline__ int* stored() const { return At<int>(4); }
  // Of a sub-tile: not 0 where its tokens are stored; or how many they are,
  // where they are only counted.
  __device__ __forceinline__ uint8_t* marks() const { return At<uint8_t>(8); }
  __device__ __forceinline__ Token* tokens() const {
    return At<Token>(LeastBytes(own_tiles_));
  }
  __device__ int own_tiles() const { return own_tiles_; }
  __device__ int capacity() const { return capacity_; }
  __device__ __forceinline__ bool has_all() const {
    return *wanted() <= capacity_;
  }

  __device__ __forceinline__ void Clear() const {
    uint8_t* const to = marks();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < own_tiles_;
         i += kDecideThreads) {
      to[i] = 0;
    }
    if (threadIdx.x == 0) {
      *wanted() = 0;
      *stored() = 0;
    }
  }

  // Stores those of a lane's logits that `mask` has a bit for, the first of
  // them having this order, if there is room for the whole warp's. All of the
  // warp calls this and gets whether there was.
  __device__ __forceinline__ bool Put(const float (&x)[kIdsPerLane],
                                      unsigned mask, int first_order) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int count = __popc(mask);
    const int upto = WarpInclusiveSum(count);
    int begin = 0;
    if (lane == 31) {
      begin = atomicAdd(wanted(), upto);
      // From the first that finds no room on, none does.
      if (begin <= capacity_) {
        atomicMax(stored(), begin + upto <= capacity_ ? begin + upto : begin);
      }
    }
    begin = __shfl_sync(~0u, begin, 31);
    if (begin + __shfl_sync(~0u, upto, 31) > capacity_) return false;
    Token* const to = tokens();
    int at = begin + upto - count;
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
      if ((mask >> e & 1) != 0) to[at++] = {x[e], first_order + e};
    }
    return true;
  }

 private:
  // A compiler that sees this knows that it is shared memory.
  template <class T>
  __device__ __forceinline__ T* At(int offset) const {
    return static_cast<T*>(__cvta_shared_to_generic(shared_ + offset));
  }

  uint32_t shared_ = 0;
  int own_tiles_ = 0;
  int capacity_ = 0;
};

// What a lane has of what a pass visits: of a sub-tile, or of the store. Logits
// that are not kept are -inf.
struct LaneTokens {
  float x[kIdsPerLane];
  int id[kIdsPerLane];
  int tile[kIdsPerLane];
  int own;  // the sub-tile among the block's
};

__device__ __forceinline__ LaneTokens StoredTokens(const TokenStore& store,
                                                   int num_tiles, int begin,
                                                   int stored) {
  const TokenStore::Token* const from = store.tokens();
  LaneTokens tokens;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    TokenStore::Token token = {-INFINITY, 0};
    const int at = begin + e * kDecideThreads + static_cast<int>(threadIdx.x);
    if (at < stored) token = from[at];
    const int place = token.order % kSubTile;
    tokens.x[e] = token.logit;
    tokens.tile[e] = token.order / kSubTile;
    tokens.id[e] = place / kChunk * num_tiles * kChunk +
                   tokens.tile[e] * kChunk + place % kChunk;
  }
  tokens.own = -1;
  return tokens;
}

// How the sub-tiles of a row are read: its type, where all of its logits are
// loaded as LoadPart() does it and count as they are.
__device__ __forceinline__ DType PlainTypeOf(const DecideRow& row) {
  const bool plain =
      row.aligned && row.vocab % kIdsPerLane == 0 && !row.edits.any();
  return plain ? row.dtype : DType::kInvalid;
}

__device__ __forceinline__ LaneTokens TokensOf(const DecideRow& row,
                                               DType plain_type, int own,
                                               int tile, const LanePart& part) {
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
  LaneTokens tokens;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    tokens.x[e] = logits.x[e];
    tokens.id[e] = FirstIdOfLane(row, tile) + e;
    tokens.tile[e] = tile;
  }
  tokens.own = own;
  return tokens;
}

// Makes logits that are not kept -inf.
__device__ __forceinline__ void DropOthers(const KeptRange& range, bool by_id,
                                           LaneTokens& tokens) {
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    tokens.x[e] = tokens.x[e] >= range.to.value ? tokens.x[e] : -INFINITY;
  }
  if (!by_id) return;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    // Without branches.
    const float x = tokens.x[e];
    const int id = tokens.id[e];
    const bool kept = (x <= range.from.value) &
                      !((x == range.to.value) & (id > range.to.last_id)) &
                      !((x == range.from.value) & (id < range.from.first_id));
    tokens.x[e] = kept ? x : -INFINITY;
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_TOKEN_STORE_CUDA_CUH_
