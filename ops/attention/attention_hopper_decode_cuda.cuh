#ifndef TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_CUDA_CUH_
#define TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_CUDA_CUH_

#include <cstdint>

#include "ops/attention/attention_cuda_mma.cuh"
#include "ops/attention/attention_hopper_decode.h"
#include "ops/core/hopper_cuda.cuh"

// The pieces of split-KV attention on Hopper: arguments, who attends to what,
// and the warp that loads.

namespace tenon::cuda::hopper_decode {

inline constexpr int kKeys = kDecodeStageKeys;
inline constexpr int kParts = kDecodeParts;
// A team: warps that attend to some parts, a warp that loads them, and the
// ring between them. Teams of a block are alone with their parts, as blocks of
// a cluster are.
inline constexpr int kWarps = 4;  // that attend
inline constexpr int kAttendThreads = 32 * kWarps;
inline constexpr int kTeamThreads = kAttendThreads + 32;
inline constexpr int kMaxTeams = 2;
inline constexpr int kMaxStages = 8;  // of a ring

struct Args {
  CUtensorMap k_map;  // boxes of 128 bytes of min(page_size, kKeys) tokens
  CUtensorMap v_map;
  const void* q;
  void* out;
  int64_t q_stride[2];
  int64_t out_stride[2];
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* query_start;
  const int32_t* kv_len;
  int32_t num_seqs;
  int32_t num_tokens;
  int32_t num_pages;
  int32_t log2_page_size;
  int32_t log2_box_rows;
  int32_t group;             // query heads of a KV head
  int32_t queries_per_tile;  // a power of two if tiles are aligned
  int32_t tiles_per_seq;     // 0: tiles are aligned
  int32_t max_queries;       // of a sequence; those with more are not served
  int32_t max_kv_len;
  int32_t log2_slice;   // floats of a tile that a block combines
  int32_t teams;        // of a block
  int32_t num_stages;   // of a team's ring
  bool zero_uncovered;  // tokens that belong to no sequence
  bool early_reads;
  float scale;  // of a score in units of log2 e
  float v_scale;
};

// C is the element of the caches: T, or uint8_t for float8.
template <class T_, class C, int kDim_>
struct Shape {
  using T = T_;
  // What weights are rounded to: half precision holds float8 values exactly.
  using Weight = std::conditional_t<sizeof(C) == 1, __half, T>;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kDecodeRows;
  // Registers for the output of so many teams, of one block or two.
  static constexpr int kTeamsPerSm = kDim <= 128 ? 2 : 1;
  static constexpr int kMaxThreads = kTeamsPerSm * kTeamThreads;
  static constexpr bool kFloat8 = sizeof(C) == 1;
  // Parts of a short context have two stages: the end of a part takes longer
  // than a stage. Elements of two bytes need all blocks to load them soon.
  static constexpr bool kPairsStages = kFloat8;
  static constexpr int kBoxElements = 128 / sizeof(C);
  static constexpr int kBoxes = kDim / kBoxElements;
  static constexpr int kBoxBytes = kKeys * 128;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;  // K or V of a stage
  static constexpr int kStageBytes = 2 * kTileBytes;

  // Shared memory behind the stages.
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kSoftmaxAt = kQueryBytes;  // of 8 rows of each warp
  static constexpr int kBarriersAt =
      kSoftmaxAt + kMaxTeams * kWarps * 8 * 8;  // of each team's ring
  static constexpr int kRingBarriers = 2 * kMaxStages * 8;
  static constexpr int kReceivedAt = kBarriersAt + kMaxTeams * kRingBarriers;
  static constexpr int kPartsAt = kReceivedAt + 16;
  static_assert(kWarps * 8 * kDim * 4 <= kStageBytes, "room to merge");
};

// What a block gets of the results of all parts: [kParts, slice] floats, then
// [kParts, tile_rows] maxima and sums.
inline int ReceivedBytes(int tile_rows, int log2_slice) {
  return kParts * ((4 << log2_slice) + tile_rows * 8);
}

#if TENON_SM90A

// Some queries of one sequence. num_queries == 0: none.
struct Tile {
  int32_t sequence = 0;
  int32_t token = 0;
  int32_t num_queries = 0;
  int32_t length = 0;      // keys that the last of them attends to
  int32_t old_length = 0;  // keys of earlier calls
};

__device__ __forceinline__ Tile FindTile(const Args& a, int32_t index) {
  Tile t;
  const auto start_of = [&](int32_t sequence) {
    return max(0, min(a.num_tokens, a.query_start[sequence]));
  };
  int32_t of_sequence = 0;  // tiles before it
  if (a.tiles_per_seq == 1) {
    t.sequence = index;
  } else if (a.tiles_per_seq > 0) {
    t.sequence = index / a.tiles_per_seq;
    of_sequence = index % a.tiles_per_seq;
  } else {
    // The last sequence whose tiles begin at or before this one.
    int32_t low = 0;
    int32_t high = a.num_seqs - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (AlignedTileStart(start_of(middle), middle, a.queries_per_tile) <=
          index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    t.sequence = low;
    of_sequence = static_cast<int32_t>(
        index - AlignedTileStart(start_of(low), low, a.queries_per_tile));
  }
  const int32_t start = start_of(t.sequence);
  const int32_t count = start_of(t.sequence + 1) - start;
  const int32_t kv_len = min(a.kv_len[t.sequence], a.max_kv_len);
  t.old_length = kv_len - count;
  if (count > a.max_queries) return t;
  int32_t first = of_sequence * a.queries_per_tile;
  int32_t end = first + a.queries_per_tile;
  if (a.tiles_per_seq == 0) {
    // Query 0 is at position old_length, which may be negative.
    const int32_t into = t.old_length & (a.queries_per_tile - 1);
    end -= into;
    first = max(0, first - into);
  }
  end = min(end, count);
  if (first >= end) return t;
  t.num_queries = end - first;
  t.token = start + first;
  t.length = max(0, t.old_length + end);
  return t;
}

// Stages of the keys before part `part` of a context of `stages`: parts differ
// by a stage at most, or have the two of Shape::kPairsStages.
template <class S>
__device__ __forceinline__ int32_t PartBegin(int32_t stages, int32_t part) {
  const int32_t begin = stages * part / kParts;  // stages are below 2^26
  if (!S::kPairsStages || stages > 2 * kParts) return begin;
  return min(stages, (begin + 1) & ~1);
}
// Those that have a stage.
template <class S>
__device__ __forceinline__ int32_t NumParts(int32_t stages) {
  return min(S::kPairsStages ? CeilDiv(stages, 2) : stages, kParts);
}

struct Ring {
  uint32_t stages;
  uint32_t full;   // barriers: a stage is loaded,
  uint32_t empty;  // and was read
  int32_t count;
  int32_t at = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void Advance() {
    if (++at == count) {
      at = 0;
      phase ^= 1;
    }
  }
};

// Copies a box of a page to shared memory.
__device__ __forceinline__ void LoadPage(uint32_t to, const CUtensorMap* map,
                                         int32_t col, int32_t row, int32_t head,
                                         int32_t page, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(head), "r"(page), "r"(barrier)
      : "memory");
}

// True for one lane. The compiler knows it, and so does not loop over lanes
// where registers of an instruction (TMA) have to be uniform.
__device__ __forceinline__ bool ElectLane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// The warp that loads: stages [begin, end) of a tile's keys. What the kernels
// ahead may still write, it loads last, after these.
template <class S>
__device__ __forceinline__ void LoadStages(const Args& a, const Tile& tile,
                                           int32_t kv_head, int32_t begin,
                                           int32_t end, Ring ring) {
  const int lane = threadIdx.x % 32;
  const int32_t length = tile.length;
  const int32_t log2_boxes = 6 - a.log2_box_rows;  // of a stage, along its keys
  const int32_t boxes = 1 << log2_boxes;
  const int32_t log2_per_page = a.log2_page_size - a.log2_box_rows;
  const int32_t end_box =
      CeilDiv(min(end * kKeys, length), 1 << a.log2_box_rows);
  const int32_t* table = a.block_table + tile.sequence * a.table_stride;
  const auto page_of = [&](int32_t box) {
    const int32_t page = box < end_box ? table[box >> log2_per_page] : 0;
    return page >= 0 && page < a.num_pages ? page : 0;
  };
  static_assert(kKeys == 64, "log2_boxes");
  const int32_t old_length = a.early_reads ? tile.old_length : length;
  // Pages of 32 boxes, and those of the next 32.
  int32_t first_box = begin << log2_boxes;
  int32_t pages = page_of(first_box + lane);
  int32_t next_pages = page_of(first_box + 32 + lane);
  for (int32_t stage = begin; stage < end; ++stage) {
    const int32_t box = stage << log2_boxes;
    if (box >= first_box + 32) {
      first_box += 32;
      pages = next_pages;
      next_pages = page_of(first_box + 32 + lane);
    }
    if (min((stage + 1) * kKeys, length) > old_length) WaitForPreviousKernels();
    const uint32_t full = ring.full + 8 * ring.at;
    uint32_t to = ring.stages + ring.at * S::kStageBytes;
    Wait(ring.empty + 8 * ring.at, ring.phase ^ 1);
    const int32_t exist = min(boxes, end_box - box);
    if (ElectLane()) {
      ArriveExpectBytes(full, (exist << a.log2_box_rows) * 128 * S::kBoxes * 2);
    }
    __syncwarp();
    for (int32_t i = 0; i < exist; ++i) {
      const int32_t page = __shfl_sync(~0u, pages, box - first_box + i);
      const int32_t row = ((box + i) & ((1 << log2_per_page) - 1))
                          << a.log2_box_rows;
      if (ElectLane()) {
#pragma unroll
        for (int col = 0; col < S::kBoxes; ++col) {
          LoadPage(to + col * S::kBoxBytes, &a.k_map, col * S::kBoxElements,
                   row, kv_head, page, full);
          LoadPage(to + S::kTileBytes + col * S::kBoxBytes, &a.v_map,
                   col * S::kBoxElements, row, kv_head, page, full);
        }
      }
      to += 128 << a.log2_box_rows;
    }
    ring.Advance();
  }
}

// ---------------------------------------------------------------------------
// Clusters
// ---------------------------------------------------------------------------

// The two halves of a barrier for all threads of the cluster that have not
// ended: after it, all blocks run, with the barriers that they initialised
// before (FenceBarrierInit). Other stores are not ordered by it: that would
// wait for all of this thread's accesses, global ones as well.
__device__ __forceinline__ void SignalCluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void AwaitCluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Stores to where block `rank` of the cluster has what this one has at `to`;
// that block's barrier counts the 8 bytes.
__device__ __forceinline__ void SendInCluster(uint32_t to, uint32_t barrier,
                                              int rank, float x, float y) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, "
      "%2}, [%3];\n" ::"r"(ClusterAddress(to, rank)),
      "f"(x), "f"(y), "r"(ClusterAddress(barrier, rank))
      : "memory");
}

#endif  // TENON_SM90A

}  // namespace tenon::cuda::hopper_decode

#endif  // TENON_OPS_ATTENTION_ATTENTION_HOPPER_DECODE_CUDA_CUH_
