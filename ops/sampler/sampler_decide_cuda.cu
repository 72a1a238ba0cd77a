#include "ops/sampler/sampler_draw_cuda.cuh"
#include "ops/sampler/sampler_finish_cuda.cuh"
#include "ops/sampler/sampler_kernels_cuda.cuh"

// The kernel that makes a token of a row's summaries, by the first of the row's
// blocks. It is made for latency: a row alone is a chain of short steps, and
// code runs once, so that every instruction and every argument is waited for.
// What is rare is left to all of the row's blocks.

namespace tenon {
namespace {

using cuda::Block;
using cuda::Candidates;
using cuda::DecideRow;
using cuda::DecideShared;
using cuda::Followers;
using cuda::kDecideThreads;
using cuda::Outcome;
using cuda::Room;
using cuda::SamplerCall;
using cuda::Team;
using cuda::ThreadEdits;
using cuda::TileArrays;
using cuda::TileBounds;
using cuda::WideShared;

// Before the summaries are there. A warp for each of what takes long.
template <bool kRich>
__device__ __forceinline__ void Prepare(const SamplerCall& call, int64_t index,
                                        const TileArrays& arrays,
                                        DecideShared& shared) {
  if (threadIdx.x == 0) {
    const RowPlan plan = cuda::PlanOf(call, index);
    shared.plan = plan;
    shared.row =
        RowOf(call, index, shared.plan, arrays,
              kRich ? cuda::EditsOf(call, index, plan) : cuda::RowEdits());
    shared.outcome = Outcome();
  } else if (threadIdx.x == 32) {
    const SamplingParams& params = call.params[index];
    const uint64_t bits =
        call.random_bits != nullptr
            ? static_cast<uint64_t>(call.random_bits[index])
            : RandomBitsAt(params.seed, params.position, call.stream);
    shared.inputs.numerator = UniformNumerator(bits);
  } else if (threadIdx.x == 64) {
    const RowPlan plan = cuda::PlanOf(call, index);
    shared.inputs.xtc_acts = XtcActs(plan, call.params[index]);
    shared.inputs.mu = plan.mirostat_tau > 0.0f
                           ? call.mirostat.MuOf(index, call.params[index])
                           : 0.0f;
    if (plan.min_p > 0.0f) {
      shared.inputs.min_p_offset = strict::Mul(
          plan.temperature, strict::Log(static_cast<double>(plan.min_p)));
    }
  }
}

// The row's top tokens, of candidates that it may have already: `count` of
// them, or -1. False where that takes all of the row's blocks.
__device__ __noinline__ bool WriteTop(const SamplerCall& call, int64_t index,
                                      const DecideRow& row,
                                      const TileArrays& arrays,
                                      uint32_t lowest_tile, int count,
                                      const ThreadEdits& edits, Room room,
                                      DecideShared& shared) {
  // Of its own: what a function takes by reference is in memory.
  Block block(&shared.block);
  Candidates candidates(block, &shared.candidates, arrays, room);
  __syncthreads();
  const bool processed = call.top_kind == LogprobKind::kProcessed;
  const Outcome& outcome = shared.outcome;
  const RowPlan& plan = shared.plan;
  const int column = static_cast<int>(threadIdx.x);
  const int wanted = min(call.top_columns, plan.num_top_logprobs);
  int found = 0;
  int first = 0;  // rank
  int token = -1;
  float logprob = NAN;
  if (wanted > 0 && row.best > -INFINITY) {  // and not NaN
    if ((processed && plan.greedy) || isinf(row.best)) {
      const int best = cuda::FirstBestToken<true>(row, arrays, shared);
      if (column == 0) {
        token = best;
        logprob = 0.0f;
      }
    } else if (processed && outcome.kept) {
      first = shared.first_rank;
      found = shared.end_rank - first;
    } else {
      found = count;
      if (count < wanted) {
        found = candidates.Collect<true>(
            row, FloorOfBest(candidates, row, lowest_tile, wanted), edits);
        if (found < 0) return false;
      }
    }
  }
  if (column < min(found, wanted)) {
    token = shared.candidates.Id(first + column);
    const float x = shared.candidates.Logit(first + column);
    logprob = processed ? ProcessedLogprob(plan, outcome, x)
                        : LogprobOf(x, row.best, row.plan->temperature,
                                    row.total, kMassBits);
  }
  if (column < call.top_columns) {
    WriteTopColumn(call, index, column, token, logprob);
  }
  __syncthreads();
  return true;
}

// The outputs of a call that may have all of them. Returns what is left to do.
__device__ __forceinline__ uint32_t FinishRich(
    const SamplerCall& call, int64_t index, Block& block,
    const TileArrays& arrays, const TileBounds& bounds, int count,
    const ThreadEdits& edits, Room room, uint32_t tasks, DecideShared& shared) {
  const bool drawn = tasks == 0;
  const bool top = call.top_tokens != nullptr;
  const bool top_of_raw = top && call.top_kind == LogprobKind::kRaw;
  // Before the raw ones: it needs the keys of the sub-tiles.
  if (drawn && top && !top_of_raw &&
      !WriteTop(call, index, shared.row, arrays, bounds.lowest, count, edits,
                room, shared)) {
    tasks |= cuda::kTopOfRow;
  }
  TileBounds raw_bounds = bounds;
  if (call.scratch.raw_tiles != nullptr) {
    if (threadIdx.x == 0) {
      shared.raw_plan = cuda::RawPlan();
      shared.raw = RowOf(call, index, shared.raw_plan, arrays, {});
    }
    __syncthreads();
    const int num_tiles = call.num_tiles;
    raw_bounds = ReadTiles(block, call.scratch.raw_tiles + index * num_tiles,
                           num_tiles, arrays);
    uint64_t total = 0;
    if (fabsf(raw_bounds.best) < INFINITY) {
      total = Total(block, shared.raw_plan, raw_bounds.best, num_tiles, arrays);
    }
    if (threadIdx.x == 0) {
      shared.raw.best = raw_bounds.best;
      shared.raw.total = total;
    }
    __syncthreads();
  }
  if (drawn && threadIdx.x < 32) {
    WriteRow(call, index, shared.plan, shared.row, shared.raw, shared.outcome,
             shared.inputs.mu, shared.log_total);
  }
  if (top_of_raw && !WriteTop(call, index, shared.raw, arrays,
                              raw_bounds.lowest, -1, {}, room, shared)) {
    tasks |= cuda::kTopOfRaw;
  }
  if (call.probabilities != nullptr) tasks |= cuda::kProbabilitiesOfRow;
  return tasks;
}

// Without waiting for them.
__device__ __forceinline__ void CopyMoments(Moments* to, const Moments* from,
                                            int count) {
  constexpr int kWords = sizeof(Moments) / 8;
  const uint32_t first = cuda::SharedAddress(to);
  const char* const words = reinterpret_cast<const char*>(from);
  for (int i = static_cast<int>(threadIdx.x); i < count * kWords;
       i += kDecideThreads) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(first + i * 8),
        "l"(words + i * 8)
        : "memory");
  }
}

// By the row's first block. Returns what it leaves undone.
template <bool kRich>
__device__ __forceinline__ uint32_t Decide(const SamplerCall& call,
                                           int64_t index,
                                           const TileArrays& arrays, Room room,
                                           Followers& followers,
                                           DecideShared& shared) {
  const int num_tiles = call.num_tiles;
  Block block(&shared.block);
  Candidates candidates(block, &shared.candidates, arrays, room);
  // What the summarising kernel does not write may be read before it is done:
  // what wrote that was done before it began.
  Prepare<kRich>(call, index, arrays, shared);
  const RowPlan& plan = shared.plan;
  DecideRow& row = shared.row;
  ThreadEdits edits = {};
  if constexpr (kRich) {
    __syncthreads();
    if (row.edits.end > 0) edits = ReadEdits(row, 0);
  }
  cuda::WaitForPreviousKernels();

  const TileBounds bounds = ReadTiles(
      block, call.scratch.tiles + index * num_tiles, num_tiles, arrays);
  const float best = bounds.best;
  if (threadIdx.x == 0) row.best = best;
  // Whether nothing is left to others once a token is found.
  const bool tell = call.top_tokens == nullptr && call.probabilities == nullptr;
  if (tell && (plan.greedy || !plan.filtered() || !(fabsf(best) < INFINITY))) {
    followers.Tell(0);
  }
  // What top-n-sigma needs is on its way while the total is made.
  const Moments* const moments = call.scratch.moments + index * num_tiles;
  Moments* const moments_ahead = static_cast<Moments*>(room.memory);
  const bool sigma_ahead =
      plan.top_n_sigma > 0.0f && !plan.greedy && fabsf(best) < INFINITY &&
      num_tiles * static_cast<int>(sizeof(Moments)) <= room.bytes;
  if (sigma_ahead) CopyMoments(moments_ahead, moments, num_tiles);
  int count = -1;  // of candidates
  uint32_t tasks = 0;
  if (isnan(best) || best == -INFINITY) {
    if (threadIdx.x == 0) {
      shared.outcome.status =
          isnan(best) ? SampleStatus::kNonFinite : SampleStatus::kNoSupport;
    }
  } else {
    const bool one_hot = isinf(best);
    uint64_t total = 0;
    if (!one_hot && (!plan.greedy || call.WantsSums())) {
      total = Total(block, plan, best, num_tiles, arrays);
      if (threadIdx.x == 0) row.total = total;
    }
    if (one_hot || plan.greedy) {
      if (threadIdx.x == kDecideThreads - 1 && total > 0) {
        shared.log_total = LogOfMass(total, kMassBits);
      }
      const int token = cuda::FirstBestToken<kRich>(row, arrays, shared);
      if (threadIdx.x == 0) {
        shared.outcome.one_hot = one_hot;
        shared.outcome.drawn.token = token;
        shared.outcome.drawn.x = best;
      }
    } else if (!plan.filtered()) {
      cuda::DrawPlain<kRich>(block, row, arrays, best, total, shared);
    } else {
      if (plan.top_n_sigma > 0.0f) {
        if (sigma_ahead) {
          cuda::CommitCopies();
          cuda::WaitForCopies<0>();
          __syncthreads();
        }
        if (threadIdx.x < 32) {
          const float floor = cuda::SigmaFloor(
              sigma_ahead ? moments_ahead : moments, num_tiles, plan, best);
          if (threadIdx.x == 0) shared.sigma_floor = floor;
        }
        __syncthreads();
      }
      count = cuda::DrawFiltered<kRich>(block, row, bounds, candidates, arrays,
                                        room, edits, total, tell, followers,
                                        shared);
      if (count < 0) tasks = cuda::kDrawRow;
    }
  }
  __syncthreads();
  if constexpr (kRich) {
    tasks = FinishRich(call, index, block, arrays, bounds, count, edits, room,
                       tasks, shared);
  } else if (tasks == 0 && threadIdx.x < 32) {
    WriteRow(call, index, plan, row, row, shared.outcome, shared.inputs.mu,
             shared.log_total);
  }
  return tasks;
}

// Shared memory: what has a fixed size, the tiles' arrays, the room.
constexpr size_t kScratch = std::max(sizeof(DecideShared), sizeof(WideShared));
static_assert(kScratch % sizeof(double) == 0, "arrays of doubles follow");
constexpr __host__ __device__ size_t RoomOffset(int num_tiles) {
  return (kScratch + TileArrays::Bytes(num_tiles) + 15) / 16 * 16;
}

// A block is the first of its row, or waits for what that one tells it.
template <bool kRich>
__global__ void __launch_bounds__(kDecideThreads, 2)
    DecideKernel(const __grid_constant__ SamplerCall call, int log2_blocks,
                 int room_bytes) {
  extern __shared__ __align__(16) double shared_memory[];
  void* const scratch = shared_memory;
  // Behind it: what has a fixed place needs no address.
  const TileArrays arrays(shared_memory + kScratch / sizeof(double),
                          call.num_tiles);
  const Room room = {static_cast<char*>(scratch) + RoomOffset(call.num_tiles),
                     room_bytes};
  __shared__ Followers::Scratch told;
  Followers followers(&told, log2_blocks);
  const int64_t index = blockIdx.x >> log2_blocks;
  uint32_t tasks;
  if ((blockIdx.x & ((1u << log2_blocks) - 1)) == 0) {
    DecideShared& shared = *static_cast<DecideShared*>(scratch);
    tasks = Decide<kRich>(call, index, arrays, room, followers, shared);
    if (tasks != 0) {
      if (threadIdx.x == kDecideThreads - 1) {
        call.scratch.outcomes[index] = shared.outcome;
        __threadfence();
      }
      __syncthreads();
    }
    if (!followers.told()) followers.Tell(tasks);
  } else {
    cuda::WaitForPreviousKernels();
    tasks = followers.Wait();
  }
  followers.End();
  if (tasks == 0) return;
  WideShared& shared = *static_cast<WideShared*>(scratch);
  Team team(&shared.team);
  team.Sync();
  FinishRow(team, call, index, tasks, arrays, room, shared);
}

// The logarithm of how many blocks a row has, in case its filters choose from
// many tokens: as many as there is room for and have a sub-tile for each warp.
int Log2Blocks(const SamplerCall& call) {
  constexpr int64_t kMultiprocessors = 132;
  int log2 = 0;
  if (call.is_hopper) {
    while ((2 << log2) <= cuda::kTeamBlocks &&
           call.num_tiles >> (log2 + 1) >= cuda::kDecideWarps &&
           (int64_t{call.rows} << (log2 + 1)) <= kMultiprocessors) {
      ++log2;
    }
  }
  return log2;
}

// Two blocks can share a multiprocessor. More room for wide rows slows down all
// others.
int RoomBytes(const SamplerCall& call, int log2_blocks) {
  const int tiles_of_block = cuda::CeilDiv(call.num_tiles, 1 << log2_blocks);
  const int least = std::max(2 * cuda::kTilesAheadBytes,
                             cuda::TokenStore::LeastBytes(tiles_of_block));
  const int most = call.is_hopper ? 96 << 10 : 0;
  const int offset = static_cast<int>(RoomOffset(call.num_tiles));
  return std::max(least, most - offset);
}

}  // namespace

Status LaunchDecide(const SamplerCall& call, Stream stream) {
  const int log2_blocks = Log2Blocks(call);
  const int room_bytes = RoomBytes(call, log2_blocks);
  const size_t shared_bytes =
      RoomOffset(call.num_tiles) + static_cast<size_t>(room_bytes);
  const bool rich = call.edits != nullptr || call.bitmask != nullptr ||
                    call.top_tokens != nullptr ||
                    call.probabilities != nullptr ||
                    call.scratch.raw_tiles != nullptr;
  cudaLaunchConfig_t config = cuda::LaunchConfig(
      stream, dim3(static_cast<unsigned>(call.rows) << log2_blocks),
      dim3(kDecideThreads), shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  if (call.is_hopper) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = 1u << log2_blocks;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = log2_blocks > 0 ? 2 : 1;
  }
  return cuda::LaunchWithConfig("Sampler", config,
                                rich ? DecideKernel<true> : DecideKernel<false>,
                                call, log2_blocks, room_bytes);
}

}  // namespace tenon
