#ifndef TENON_OPS_MOE_MOE_PREPARE_CUDA_CUH_
#define TENON_OPS_MOE_MOE_PREPARE_CUDA_CUH_

#include "ops/core/core_cuda.cuh"
#include "ops/moe/moe_router_cuda.cuh"

// The parts of a thread block's work in preparing a layer: which of its tokens
// chose which expert, and where in the order of experts their slots go. Private
// to moe_prepare_cuda.cu.

namespace tenon::moe_prepare {

inline constexpr int kMaxCluster = 16;

// What a launch works on. A routing block has tokens_per_block consecutive
// tokens (the last ones fewer or none); blocks from num_routing_blocks on
// quantise x.
struct Params {
  MoeRouterParams router;  // no logits: the ids are given
  TensorView topk_ids;     // [tokens, columns]
  int32_t tokens = 0;
  int32_t columns = 0;
  int32_t num_experts = 0;
  int32_t* expert_offsets = nullptr;
  int32_t* sorted_slots = nullptr;

  int32_t tokens_per_block = 0;
  int32_t num_routing_blocks = 0;
  // Slots of every expert in every block, [num_routing_blocks][counts_stride],
  // for a second launch to place them; null: the routing blocks are one cluster
  // and place them themselves.
  uint16_t* counts = nullptr;
  int32_t counts_stride = 0;  // even

  TensorView x;
  bool x_aligned = false;    // as LoadForFp8 says
  uint8_t* x_fp8 = nullptr;  // [tokens, hidden], null: x is not quantised
  float* x_scales = nullptr;
};

// Shared memory of a routing block, as offsets in 32-bit words.
struct Layout {
  int32_t masks;  // [words of 32 tokens][num_experts]
  int32_t slots;  // [tokens_per_block * columns], and up to 3 more
  int32_t total;  // [num_experts], over all blocks
  int32_t first;  // [num_experts], of this block's slots in sorted_slots
  int32_t cluster_counts;  // [cluster][num_experts]
  int32_t picks;           // [warps][top_k], 64 bits each
  int32_t group_keys;      // [warps][num_expert_groups]
  int32_t words;           // of all that
};

inline Layout LayOut(const Params& p, int cluster, int warps) {
  Layout layout;
  int32_t words = 0;
  const auto take = [&](int32_t count) {
    const int32_t begin = words;
    words += (count + 3) / 4 * 4;
    return begin;
  };
  layout.masks = take(cuda::CeilDiv(p.tokens_per_block, 32) * p.num_experts);
  layout.slots = take(p.tokens_per_block * p.columns + 3);
  layout.total = take(p.num_experts);
  layout.first = take(p.num_experts);
  layout.cluster_counts = take(cluster * p.num_experts);
  layout.picks = take(warps * p.router.top_k * 2);
  layout.group_keys = take(
      moe_router::IsGrouped(p.router) ? warps * p.router.num_expert_groups : 0);
  layout.words = words;
  return layout;
}

extern __shared__ uint4 shared_memory[];

template <class T>
__device__ __forceinline__ T* Shared(int32_t words) {
  return reinterpret_cast<T*>(reinterpret_cast<uint32_t*>(shared_memory) +
                              words);
}

// A routing block's tokens. Tokens and slots are counted from its first one.
struct Block {
  const Params& p;
  uint32_t* masks;  // bit t % 32 of word t / 32: token t chose the expert
  uint32_t* slots;  // token << 16 | expert, or kNoExpert
  int32_t* total;
  int32_t* first;
  int first_token;
  int num_tokens;
  // Whether a token has an expert twice (given ids may). A mask can not tell
  // how often, so then slots are compared with each other.
  bool repeated = false;

  static constexpr uint32_t kNoExpert = ~0u;

  __device__ Block(const Params& params, const Layout& layout)
      : p(params),
        masks(Shared<uint32_t>(layout.masks)),
        slots(Shared<uint32_t>(layout.slots)),
        total(Shared<int32_t>(layout.total)),
        first(Shared<int32_t>(layout.first)),
        first_token(blockIdx.x * params.tokens_per_block),
        num_tokens(min(params.tokens_per_block,
                       max(params.tokens - first_token, 0))) {}

  __device__ int num_slots() const { return num_tokens * p.columns; }

  __device__ void ClearMasks() {
    const int words = cuda::CeilDiv(p.tokens_per_block, 32) * p.num_experts;
    for (int i = threadIdx.x; i < words; i += blockDim.x) masks[i] = 0;
  }

  // Notes choice `column` of a token; returns whether that token has the expert
  // already.
  __device__ __forceinline__ bool Mark(int token, int column, int id) {
    if (static_cast<uint32_t>(id) >= static_cast<uint32_t>(p.num_experts)) {
      slots[token * p.columns + column] = kNoExpert;
      return false;
    }
    const uint32_t bit = 1u << token % 32;
    slots[token * p.columns + column] =
        static_cast<uint32_t>(token) << 16 | static_cast<uint32_t>(id);
    return (atomicOr(&masks[token / 32 * p.num_experts + id], bit) & bit) != 0;
  }

  // Marks all tokens by their ids in memory.
  __device__ void MarkGivenIds() {
    const int32_t* ids = p.topk_ids.As<const int32_t>();
    for (int s = threadIdx.x; s < num_slots(); s += blockDim.x) {
      const int token = s / p.columns;
      const int column = s - token * p.columns;
      const int id = ids[(first_token + token) * p.topk_ids.stride[0] + column];
      repeated |= Mark(token, column, id);
    }
  }

  // Ends the marking.
  __device__ void Sync() { repeated = __syncthreads_or(repeated); }

  // The number of this block's slots of an expert.
  __device__ int Count(int expert) const {
    int count = 0;
    if (repeated) {
      for (int s = 0; s < num_slots(); ++s) count += IsOf(slots[s], expert);
      return count;
    }
    const int words = cuda::CeilDiv(num_tokens, 32);
    for (int w = 0; w < words; ++w) {
      count += __popc(masks[w * p.num_experts + expert]);
    }
    return count;
  }

  // Writes the slots to their places, first[expert] on.
  __device__ void Place() const {
    const int first_slot = first_token * p.columns;
    for (int s = threadIdx.x; s < num_slots(); s += blockDim.x) {
      if (slots[s] == kNoExpert) continue;
      const int expert = static_cast<int>(slots[s] & 0xffff);
      p.sorted_slots[first[expert] + Rank(s, expert)] = first_slot + s;
    }
  }

 private:
  static __device__ bool IsOf(uint32_t slot, int expert) {
    return slot != kNoExpert && (slot & 0xffff) == expert;
  }

  // The number of the expert's slots before slot s.
  __device__ int Rank(int s, int expert) const {
    int rank = 0;
    if (repeated) {
      for (int i = 0; i < s; ++i) rank += IsOf(slots[i], expert);
      return rank;
    }
    const int token = static_cast<int>(slots[s] >> 16);
    const uint32_t* mask = masks + expert;
    for (int w = 0; w < token / 32; ++w, mask += p.num_experts) {
      rank += __popc(*mask);
    }
    return rank + __popc(*mask & ((1u << token % 32) - 1));
  }
};

// Slots of an expert: in all blocks, and in those before this one.
struct ExpertSlots {
  int total;
  int before;
};

// Fills block.first from slots(e), an ExpertSlots. Block 0 writes
// expert_offsets, all their part of the end of sorted_slots. Contains two
// __syncthreads(), the second one at the end.
template <class Slots>
__device__ __forceinline__ void MakePositions(const Block& block,
                                              const Slots& slots) {
  __shared__ int warp_sums[32];
  const Params& p = block.p;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // A thread has one expert, or two where there are more than threads.
  const int log_per_thread = p.num_experts > blockDim.x ? 1 : 0;
  const int per_thread = 1 << log_per_thread;
  const int begin = min(threadIdx.x * per_thread, p.num_experts);
  const int end = min(begin + per_thread, p.num_experts);
  int sum = 0;
  for (int e = begin; e < end; ++e) {
    const ExpertSlots s = slots(e);
    block.first[e] = sum + s.before;  // for now without those of other threads
    block.total[e] = s.total;
    sum += s.total;
  }
  const int inclusive = cuda::WarpInclusiveSum(sum);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int num_warps =
      (p.num_experts + (32 << log_per_thread) - 1) >> (5 + log_per_thread);
  int offset = inclusive - sum;
  int all = 0;
#pragma unroll 4
  for (int w = 0; w < num_warps; ++w) {
    if (w < warp) offset += warp_sums[w];
    all += warp_sums[w];
  }
  const bool writes = blockIdx.x == 0;
  int of_expert = offset;
  for (int e = begin; e < end; ++e) {
    if (writes) p.expert_offsets[e] = of_expert;
    block.first[e] += offset;
    of_expert += block.total[e];
  }
  if (writes && threadIdx.x == 0) p.expert_offsets[p.num_experts] = all;
  const int num_slots = p.tokens * p.columns;
  for (int i = all + blockIdx.x * blockDim.x + threadIdx.x; i < num_slots;
       i += p.num_routing_blocks * blockDim.x) {
    p.sorted_slots[i] = -1;
  }
  __syncthreads();
}

}  // namespace tenon::moe_prepare

#endif  // TENON_OPS_MOE_MOE_PREPARE_CUDA_CUH_
