#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_LOADER_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_LOADER_CUDA_CUH_

#include <cstdint>

#include "ops/attention/attention_cuda_rows.cuh"
#include "ops/core/hopper_cuda.cuh"

// Of the Hopper attention kernel: its shapes, its shared memory, and the warps
// that fill that.

namespace tenon::hopper_prefill {

using cuda::AttentionArgs;
using cuda::RowTile;

struct Params {
  AttentionArgs args;
  CUtensorMap k, v;  // boxes of box_rows keys of one page and KV head
  int32_t box_rows;  // 8 to kKeys, a power of two that divides page_size
  uint32_t group;    // query heads to a KV head
  int32_t kv_heads;
  int64_t num_tiles;  // of all KV heads, an upper bound
};

// C is the element of the caches: T_, or __nv_fp8_e4m3.
template <class T_, class C, int kDim_, int kGroups_>
struct Shape {
  using T = T_;
  static constexpr bool kWiden = sizeof(C) == 1;
  static constexpr int kDim = kDim_;
  // Warpgroups that multiply, 64 rows each; one more loads.
  static constexpr int kGroups = kGroups_;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kRows = 64 * kGroups;
  static constexpr bool kTakeTurns = kGroups == 2;  // at the tensor cores
  static constexpr int kKeys = 128;                 // of a tile of keys
  static constexpr int kStages = kDim == 64 ? 3 : 2;
  static constexpr int kQueryBuffers = 2;
  static constexpr int kQueryThreads = kWiden ? 128 : 64;  // load queries
  static constexpr int kLoadRegisters = kWiden ? 72 : kGroups == 2 ? 56 : 32;
  static constexpr int kMultiplyRegisters = kWiden         ? 216
                                            : kGroups == 2 ? 224
                                                           : 160;
  // Of what a block is launched with; more would be waited for forever.
  static_assert(kLoadRegisters + kGroups * kMultiplyRegisters <=
                    65536 / kThreads / 8 * 8 * (kGroups + 1),
                "registers");

  // Shared memory. Tiles are blocks of 64 columns, 128 bytes, of 8 rows: all
  // columns of 8 rows, then of the next 8 rows. Within a block chunk c of 16
  // bytes of row r lies at chunk c ^ r.
  static constexpr int kBlockBytes = 8 * 128;
  static constexpr int kBlocks = kDim / 64;
  static constexpr int kEightBytes = kBlocks * kBlockBytes;  // of 8 rows
  static constexpr int kQueryBytes = kRows / 8 * kEightBytes;
  static constexpr int kKeyBytes = kKeys / 8 * kEightBytes;
  static constexpr int kValuesAt = kStages * kKeyBytes;
  static constexpr int kQueriesAt = 2 * kStages * kKeyBytes;
  // Of float8, as they are in the caches: a warp's share of a tile of K or V.
  static constexpr int kRawAt = kQueriesAt + kQueryBuffers * kQueryBytes;
  static constexpr int kRawKeys = kKeys / 4;
  static constexpr int kRawBuffers = 2;
  static constexpr int kRawBytes = kRawKeys * kDim;
  static constexpr int kBarriersAt =
      kRawAt + (kWiden ? 4 * kRawBuffers * kRawBytes : 0);
  static constexpr int kSharedBytes = kBarriersAt +
                                      16 * (2 * kStages + kQueryBuffers + 1) +
                                      (kWiden ? 8 * 4 * kRawBuffers : 0);
};

#if TENON_SM90A

// Where things are in shared memory. A buffer has a barrier that tells that it
// is full, and one that tells that all warps are done with it.
template <class S>
class SharedMemory {
 public:
  __device__ __forceinline__ explicit SharedMemory(uint32_t at) : at_(at) {}

  __device__ __forceinline__ uint32_t Keys(int i) const {
    return at_ + i * S::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t Values(int i) const {
    return at_ + S::kValuesAt + i * S::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t Queries(int i) const {
    return at_ + S::kQueriesAt + i * S::kQueryBytes;
  }
  // Of a chunk of 16 bytes of a row of a tile.
  static __device__ __forceinline__ uint32_t ChunkOffset(int row, int chunk) {
    return row / 8 * S::kEightBytes + chunk / 8 * S::kBlockBytes +
           row % 8 * 128 + ((chunk ^ row) % 8) * 16;
  }

  __device__ __forceinline__ uint32_t KeysFull(int i) const {
    return at_ + S::kBarriersAt + i * 16;
  }
  __device__ __forceinline__ uint32_t KeysEmpty(int i) const {
    return KeysFull(i) + 8;
  }
  __device__ __forceinline__ uint32_t ValuesFull(int i) const {
    return KeysFull(S::kStages + i);
  }
  __device__ __forceinline__ uint32_t ValuesEmpty(int i) const {
    return ValuesFull(i) + 8;
  }
  __device__ __forceinline__ uint32_t QueriesFull(int i) const {
    return KeysFull(2 * S::kStages + i);
  }
  __device__ __forceinline__ uint32_t QueriesEmpty(int i) const {
    return QueriesFull(i) + 8;
  }
  // Tells that a sequence's last values are there, but not yet the zeros after
  // them.
  __device__ __forceinline__ uint32_t LastValues() const {
    return KeysFull(2 * S::kStages + S::kQueryBuffers);
  }

  // A warp's buffers of float8.
  __device__ __forceinline__ uint32_t Raw(int warp, int i) const {
    return at_ + S::kRawAt + (warp * S::kRawBuffers + i) * S::kRawBytes;
  }
  __device__ __forceinline__ uint32_t RawFull(int warp, int i) const {
    return LastValues() + 16 + (warp * S::kRawBuffers + i) * 8;
  }

  __device__ __forceinline__ void InitBarriers() const {
    constexpr int kWarps = 4 * S::kGroups;
    constexpr int kLoaders = S::kWiden ? 128 : 1;
    for (int i = 0; i < S::kStages; ++i) {
      cuda::InitBarrier(KeysFull(i), kLoaders);
      cuda::InitBarrier(KeysEmpty(i), kWarps);
      cuda::InitBarrier(ValuesFull(i), kLoaders);
      cuda::InitBarrier(ValuesEmpty(i), kWarps);
    }
    for (int i = 0; i < S::kQueryBuffers; ++i) {
      cuda::InitBarrier(QueriesFull(i), S::kQueryThreads);
      cuda::InitBarrier(QueriesEmpty(i), 32 * kWarps);
    }
    cuda::InitBarrier(LastValues(), 1);
    if (S::kWiden) {
      for (int i = 0; i < 4 * S::kRawBuffers; ++i) {
        cuda::InitBarrier(RawFull(0, i), 1);
      }
    }
    cuda::FenceBarrierInit();
  }

 private:
  const uint32_t at_;
};

// The buffer that comes next, and the parity of the phase in which it is full.
template <int kCount>
struct Turn {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++index == kCount) {
      index = 0;
      parity ^= 1;
    }
  }
};

// A tile of rows and the keys that its last row attends to, in tiles.
struct Tile {
  RowTile rows;
  int32_t kv_head;
  int32_t num_keys;
  int32_t key_tiles;
};

// The tiles of this block. The last rows of a sequence have the most keys: they
// go first. Every second round of the blocks is in reverse, so that none always
// has the longest.
template <class S>
class Tiles {
 public:
  __device__ __forceinline__ explicit Tiles(const Params& p) : p_(p) {}

  // False after the last.
  __device__ __forceinline__ bool Next(Tile& tile) {
    while (round_ < p_.num_tiles) {
      const int64_t index =
          round_ + (reverse_ ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      round_ += gridDim.x;
      reverse_ = !reverse_;
      if (index >= p_.num_tiles) continue;
      const int64_t from_last = index / p_.kv_heads;
      tile.kv_head = static_cast<int32_t>(index - from_last * p_.kv_heads);
      tile.rows = cuda::FindRowTile<S::kRows>(
          p_.args, p_.group, p_.num_tiles / p_.kv_heads - 1 - from_last);
      if (tile.rows.rows == 0) continue;
      tile.num_keys =
          cuda::RowLength(p_.args, tile.rows, p_.group, tile.rows.rows - 1);
      tile.key_tiles = cuda::CeilDiv(tile.num_keys, S::kKeys);
      return true;
    }
    return false;
  }

 private:
  const Params& p_;
  int64_t round_ = 0;
  bool reverse_ = false;
};

// Keys that the cache has of a tile's sequence.
__device__ __forceinline__ int32_t CachedKeys(const Params& p,
                                              const Tile& tile) {
  if (tile.rows.sequence < 0) return 0;
  return cuda::ContextLength(p.args, tile.rows.sequence,
                             tile.rows.num_queries - 1, tile.rows.num_queries);
}

// A warp that loads the tiles of K, or of V, from the last to the first.
template <class S, bool kValues>
class CacheLoader {
 public:
  __device__ __forceinline__ CacheLoader(const Params& p,
                                         const SharedMemory<S>& shared)
      : p_(p),
        a_(p.args.params),
        cache_(kValues ? a_.v_cache : a_.k_cache),
        shared_(shared),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Load() {
    Tiles<S> tiles(p_);
    for (Tile tile; tiles.Next(tile);) {
      end_ = CachedKeys(p_, tile);
      Boxes next = FindBoxes(tile, tile.key_tiles - 1);
      for (int i = tile.key_tiles - 1; i >= 0; --i) {
        const Boxes boxes = next;
        if (i > 0) next = FindBoxes(tile, i - 1);
        LoadTile(tile, boxes);
      }
    }
  }

 private:
  // A lane loads the box it is the number of.
  struct Boxes {
    int32_t count;
    int32_t rows;  // before the end of the sequence; the rest hold anything
    int32_t page, slot;
  };

  __device__ __forceinline__ Boxes FindBoxes(const Tile& tile, int i) const {
    Boxes boxes = {};
    if (i < 0) return boxes;
    boxes.rows = min(end_ - i * S::kKeys, S::kKeys);
    boxes.count = cuda::CeilDiv(boxes.rows, p_.box_rows);
    if (lane_ < boxes.count) {
      const cuda::Slot slot = cuda::FindSlot(
          a_, tile.rows.sequence, i * S::kKeys + lane_ * p_.box_rows);
      boxes.page = slot.page;
      boxes.slot = slot.offset;
    }
    return boxes;
  }

  __device__ __forceinline__ void LoadTile(const Tile& tile,
                                           const Boxes& boxes) {
    const uint32_t to =
        kValues ? shared_.Values(turn_.index) : shared_.Keys(turn_.index);
    const uint32_t full = kValues ? shared_.ValuesFull(turn_.index)
                                  : shared_.KeysFull(turn_.index);
    cuda::Wait(full + 8, turn_.parity ^ 1);
    turn_.Next();
    // A weight of zero takes no part, but NaN times zero is NaN: there have to
    // be numbers after the last value.
    const bool cut = kValues && boxes.rows < S::kKeys;
    const uint32_t barrier = cut ? shared_.LastValues() : full;
    const int box_bytes = p_.box_rows / 8 * S::kEightBytes;
    if (lane_ == 0) cuda::ArriveExpectBytes(barrier, boxes.count * box_bytes);
    __syncwarp();
    if (lane_ < boxes.count) {
      const auto block = static_cast<int>(tile.kv_head * cache_.stride[2] / 64);
      cuda::LoadBox(to + lane_ * box_bytes, kValues ? &p_.v : &p_.k,
                    {0, 0, block, boxes.slot / 8, boxes.page}, barrier);
    }
    if (!cut) return;
    cuda::Wait(barrier, cut_parity_);
    cut_parity_ ^= 1;
    for (int i = boxes.rows * S::kDim / 8 + lane_; i < S::kKeys * S::kDim / 8;
         i += 32) {
      cuda::StoreShared(
          to + shared_.ChunkOffset(i / (S::kDim / 8), i % (S::kDim / 8)),
          make_uint4(0, 0, 0, 0));
    }
    cuda::FenceAsyncProxy();
    __syncwarp();
    if (lane_ == 0) cuda::Arrive(full);
  }

  const Params& p_;
  const AttentionParams& a_;
  const TensorView& cache_;
  const SharedMemory<S> shared_;
  const int lane_;
  int32_t end_ = 0;
  Turn<S::kStages> turn_;
  uint32_t cut_parity_ = 0;
};

// Loads the rows of a tile's queries, by kQueryThreads threads; zeros for those
// that do not exist.
template <class S>
__device__ __forceinline__ void LoadQueries(const Params& p,
                                            const SharedMemory<S>& shared,
                                            const Tile& tile,
                                            const Turn<S::kQueryBuffers>& turn,
                                            int thread) {
  using T = typename S::T;
  constexpr int kChunks = S::kDim / 8;
  const TensorView& q = p.args.params.q;
  const int chunk = thread % kChunks;
  cuda::Wait(shared.QueriesEmpty(turn.index), turn.parity ^ 1);
  const uint32_t to = shared.Queries(turn.index);
#pragma unroll 4
  for (int row = thread / kChunks; row < S::kRows;
       row += S::kQueryThreads / kChunks) {
    const bool exists = row < tile.rows.rows;
    const int64_t from =
        cuda::RowOffset(q, tile.rows, p.group, tile.kv_head, exists ? row : 0);
    cuda::CopyOrZero16(to + shared.ChunkOffset(row, chunk),
                       q.As<const T>() + from + chunk * 8, exists);
  }
  cuda::ArriveAfterCopies(shared.QueriesFull(turn.index));
}

// Warps that do nothing else.
template <class S>
__device__ __forceinline__ void LoadAllQueries(const Params& p,
                                               const SharedMemory<S>& shared,
                                               int thread) {
  Turn<S::kQueryBuffers> turn;
  Tiles<S> tiles(p);
  for (Tile tile; tiles.Next(tile);) {
    LoadQueries<S>(p, shared, tile, turn, thread);
    turn.Next();
  }
}

#endif  // TENON_SM90A

}  // namespace tenon::hopper_prefill

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_LOADER_CUDA_CUH_
