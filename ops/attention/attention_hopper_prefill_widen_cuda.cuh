#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_WIDEN_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_WIDEN_CUDA_CUH_

#include <cstdint>

#include "ops/attention/attention_cuda_mma.cuh"
#include "ops/attention/attention_hopper_prefill_loader_cuda.cuh"

// The warpgroup that loads float8 caches for the Hopper attention kernel.

namespace tenon::hopper_prefill {

#if TENON_SM90A

// Each of the four warps brings a quarter of the keys of every tile of K and V:
// by TMA into two buffers of its own, and from there, widened, to where wgmma
// reads it. They bring the queries too.
//
// Tiles come in the order in which they are multiplied: scores are a tile ahead
// of values.
template <class S>
class WideningLoader {
 public:
  __device__ __forceinline__ WideningLoader(const Params& p,
                                            const SharedMemory<S>& shared)
      : p_(p),
        a_(p.args.params),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Load() {
    Tiles<S> tiles(p_);
    Tile next;
    bool more = tiles.Next(next);
    while (true) {
      // A buffer for queries gets free when all that was loaded for an earlier
      // tile is used, and that may have been the last one with keys.
      if (!more || next.key_tiles == 0) FinishLoads();
      if (!more) break;
      LoadQueries<S>(p_, shared_, next, queries_, threadIdx.x);
      queries_.Next();
      sequence_ = next.rows.sequence;
      kv_head_ = next.kv_head;
      end_ = CachedKeys(p_, next) - warp_ * S::kRawKeys;
      const int count = next.key_tiles;
      Box ahead = FindBox(count - 1);
      Box values = {};
      for (int i = count - 1; i >= -1; --i) {
        const Box keys = ahead;
        ahead = FindBox(i - 1);
#pragma unroll 1
        for (int j = 0; j < 2; ++j) {  // K of tile i, V of the one after it
          if (i + j >= 0 && i + j < count) {
            StartLoad(j == 0 ? keys : values, i + j, j == 1);
          }
        }
        values = keys;
        // While the first keys are on their way.
        if (i == count - 1) more = tiles.Next(next);
      }
    }
  }

 private:
  // A lane loads the box it is the number of, of the warp's share of a tile.
  struct Box {
    int32_t page, slot;
  };
  // What a buffer holds.
  struct Part {
    int32_t rows = -1;  // before the end of the sequence; -1: nothing
    bool values = false;
  };

  // Keys of the warp's share of tile i before the end of the sequence; those
  // past it may hold anything.
  __device__ __forceinline__ int32_t Rows(int i) const {
    return max(0, min(end_ - i * S::kKeys, S::kRawKeys));
  }

  __device__ __forceinline__ Box FindBox(int i) const {
    if (i < 0 || lane_ * p_.box_rows >= Rows(i)) return {};
    const cuda::Slot slot = cuda::FindSlot(
        a_, sequence_,
        i * S::kKeys + warp_ * S::kRawKeys + lane_ * p_.box_rows);
    return {slot.page, slot.offset};
  }

  // Starts to load a part of tile i, into the buffer of the oldest one.
  __device__ __forceinline__ void StartLoad(const Box& box, int i,
                                            bool values) {
    WidenOldest();
    newest_.rows = Rows(i);
    newest_.values = values;
    const int buffer = 1 - oldest_buffer_;
    const uint32_t full = shared_.RawFull(warp_, buffer);
    const int box_bytes = p_.box_rows * S::kDim;
    const int count = cuda::CeilDiv(newest_.rows, p_.box_rows);
    if (lane_ == 0) cuda::ArriveExpectBytes(full, count * box_bytes);
    __syncwarp();
    if (lane_ < count) {
      const TensorView& cache = values ? a_.v_cache : a_.k_cache;
      const auto piece = static_cast<int>(kv_head_ * cache.stride[2] / S::kDim);
      cuda::LoadBox(shared_.Raw(warp_, buffer) + lane_ * box_bytes,
                    values ? &p_.v : &p_.k,
                    {0, 0, piece, box.slot / 8, box.page}, full);
    }
  }

  __device__ __forceinline__ void FinishLoads() {
#pragma unroll 1
    for (int i = 0; i < S::kRawBuffers; ++i) WidenOldest();
  }

  // Makes room for one more part.
  __device__ __forceinline__ void WidenOldest() {
    if (oldest_.rows >= 0) {
      cuda::Wait(shared_.RawFull(warp_, oldest_buffer_),
                 raw_parity_ >> oldest_buffer_ & 1);
      raw_parity_ ^= 1u << oldest_buffer_;
      if (oldest_.values) {
        cuda::Wait(shared_.ValuesEmpty(values_.index), values_.parity ^ 1);
        const uint32_t to = shared_.Values(values_.index);
        if (oldest_.rows < S::kRawKeys) {
          Widen<true>(to);
        } else {
          Widen<false>(to);
        }
        cuda::Arrive(shared_.ValuesFull(values_.index));
        values_.Next();
      } else {
        cuda::Wait(shared_.KeysEmpty(keys_.index), keys_.parity ^ 1);
        Widen<false>(shared_.Keys(keys_.index));
        cuda::Arrive(shared_.KeysFull(keys_.index));
        keys_.Next();
      }
      __syncwarp();  // all lanes have read the buffer
    }
    oldest_ = newest_;
    newest_.rows = -1;
    oldest_buffer_ = 1 - oldest_buffer_;
  }

  // Widens the oldest part, at its place in a tile. kCut: zeros after the
  // end of the sequence, where there may be NaN in memory: a weight of zero
  // would not keep that out.
  //
  // 8 lanes that access shared memory together have 4 chunks of 16 elements in
  // each of two rows. Rows r and r ^ 5 differ in bit 2, so that these are
  // different chunks of 128 bytes in the buffer, and in bit 0, so that their
  // even chunks of 8 elements are in a tile.
  template <bool kCut>
  __device__ __forceinline__ void Widen(uint32_t tile) const {
    const int half = lane_ / 16 ^ (lane_ / 4 % 2) * 5;
    const int chunk = lane_ % 4 + lane_ / 8 % 2 * 4;
    const uint32_t from = shared_.Raw(warp_, oldest_buffer_);
    const uint32_t to = tile + warp_ * (S::kRawKeys / 8 * S::kEightBytes);
#pragma unroll 4
    for (int i = 0; i < S::kRawKeys / 4; ++i) {
      const int row = i / 2 * 8 + (half ^ i % 2 * 2);
      uint4 in = make_uint4(0, 0, 0, 0);
      if (!kCut || row < oldest_.rows) {
        in = cuda::LoadShared<uint4>(from + row * S::kDim +
                                     (chunk ^ row % 8) * 16);
      }
      const uint32_t words[4] = {in.x, in.y, in.z, in.w};
      uint32_t wide[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        wide[j] = cuda::WidenFloat8<typename S::T>(
            static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
      }
      const uint32_t at = to + shared_.ChunkOffset(row, 2 * chunk);
      cuda::StoreShared(at, make_uint4(wide[0], wide[1], wide[2], wide[3]));
      cuda::StoreShared(at ^ 16,
                        make_uint4(wide[4], wide[5], wide[6], wide[7]));
    }
    cuda::FenceAsyncProxy();
  }

  const Params& p_;
  const AttentionParams& a_;
  const SharedMemory<S> shared_;
  const int warp_;
  const int lane_;
  // Of the tile of rows: its sequence, KV head, and the keys from the warp's
  // first one on.
  int32_t sequence_ = 0, kv_head_ = 0, end_ = 0;
  Part oldest_, newest_;
  int oldest_buffer_ = 0;
  uint32_t raw_parity_ = 0;  // a bit for each buffer
  Turn<S::kStages> keys_, values_;
  Turn<S::kQueryBuffers> queries_;
};

#endif  // TENON_SM90A

}  // namespace tenon::hopper_prefill

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_PREFILL_WIDEN_CUDA_CUH_
