#include "ops/sampler/sampler_kernels_cuda.cuh"
#include "ops/sampler/sampler_wide_cuda.cuh"

// The kernel for what the deciding one leaves undone: rows whose filters choose
// from many tokens, top tokens among many ties, probabilities. Mostly there is
// none, and it looks at the rows' states only.

namespace tenon {
namespace {

using cuda::DecideRow;
using cuda::DrawInputs;
using cuda::Drawn;
using cuda::kDecideThreads;
using cuda::LaneLogits;
using cuda::Outcome;
using cuda::SamplerCall;
using cuda::Team;
using cuda::TileArrays;
using cuda::TileBounds;
using cuda::WideFilters;

// Teams that share out the rows.
constexpr int kMaxTeams = 32;

struct WideShared {
  Team::Scratch team;
  cuda::WideScratch filters;
  RowPlan plan;
  RowPlan raw_plan;
  DecideRow row;
  DecideRow raw;
  DrawInputs inputs;
  Outcome outcome;
  uint32_t tasks[kDecideThreads];  // of rows to come
};

// By thread 0.
__device__ void Prepare(const SamplerCall& call, int64_t index,
                        const TileArrays& arrays, WideShared& shared) {
  const SamplingParams& params = call.params[index];
  const RowPlan plan = cuda::PlanOf(call, index);
  const uint64_t bits =
      call.random_bits != nullptr
          ? static_cast<uint64_t>(call.random_bits[index])
          : RandomBitsAt(params.seed, params.position, call.stream);
  shared.inputs.numerator = UniformNumerator(bits);
  shared.inputs.xtc_acts = XtcActs(plan, params);
  shared.inputs.mu =
      plan.mirostat_tau > 0.0f ? call.mirostat.MuOf(index, params) : 0.0f;
  shared.plan = plan;
  shared.row =
      RowOf(call, index, shared.plan, arrays, cuda::EditsOf(call, index, plan));
  shared.raw_plan = cuda::RawPlan();
  shared.raw = RowOf(call, index, shared.raw_plan, arrays, {});
  shared.outcome = call.scratch.states[index].outcome;
}

// Makes `row` the one that the arrays are of.
__device__ __noinline__ void ReadRow(cuda::Block& block, const SubTile* tiles,
                                     const TileArrays& arrays, DecideRow& row) {
  __syncthreads();
  const TileBounds bounds = ReadTiles(block, tiles, row.num_tiles, arrays);
  const uint64_t total =
      fabsf(bounds.best) < INFINITY
          ? Total(block, *row.plan, bounds.best, row.num_tiles, arrays)
          : 0;
  if (threadIdx.x == 0) {
    row.best = bounds.best;
    row.total = total;
  }
  __syncthreads();
}

__device__ Drawn DrawFiltered(Team& team, const SamplerCall& call,
                              int64_t index, uint64_t* tile_mass,
                              WideShared& shared) {
  const DecideRow& row = shared.row;
  const RowPlan& plan = shared.plan;
  float floor = -INFINITY;
  // Every warp for itself: that is sooner than telling the others.
  if (plan.top_n_sigma > 0.0f) floor = SigmaFloor(call, index, plan, row.best);
  const bool typical_first =
      plan.order == FilterOrder::kLlamaCpp && plan.typical_p < 1.0f;
  const bool narrowed = plan.top_k != 0 || plan.top_n_sigma > 0.0f;
  // Where no later filter needs the sum of what min-p drops.
  if (plan.min_p > 0.0f && !typical_first &&
      !(plan.top_p < 1.0f && narrowed && plan.top_p_of_kept())) {
    floor = fmaxf(floor, MinPThreshold(plan, row.best));
  }
  return WideFilters(team, &shared.filters, row, floor, tile_mass)
      .Run(shared.inputs);
}

__device__ __noinline__ void WriteTop(Team& team, const SamplerCall& call,
                                      int64_t index, const DecideRow& row,
                                      uint64_t* tile_mass, WideShared& shared) {
  const bool processed = call.top_kind == LogprobKind::kProcessed;
  const Outcome& outcome = shared.outcome;
  const int column = static_cast<int>(threadIdx.x);
  const int wanted = min(call.top_columns, shared.plan.num_top_logprobs);
  int found = 0;
  if (wanted > 0 && fabsf(row.best) < INFINITY) {
    WideFilters wide(team, &shared.filters, row, -INFINITY, tile_mass);
    if (processed && outcome.kept) wide.SetRange(outcome.drawn.kept);
    wide.KeepBest(wanted);
    found = wide.CollectKept();
  }
  if (!team.leads() || column >= call.top_columns) return;
  int token = -1;
  float logprob = NAN;
  if (column < min(found, wanted)) {
    const uint64_t key = shared.filters.best[column];
    const float x = cuda::LogitOfCandidate(key);
    token = cuda::IdOfCandidate(key);
    logprob = processed ? ProcessedLogprob(shared.plan, outcome, x)
                        : LogprobOf(x, row.best, row.plan->temperature,
                                    row.total, kMassBits);
  }
  WriteTopColumn(call, index, column, token, logprob);
}

__device__ __noinline__ void WriteProbabilities(const Team& team,
                                                const SamplerCall& call,
                                                int64_t index,
                                                const DecideRow& row,
                                                const Outcome& outcome) {
  float* const out = call.probabilities + index * call.probabilities_stride;
  const Drawn& drawn = outcome.drawn;
  const float scale = outcome.kept ? row.plan->draw_scale : row.plan->scale;
  const bool single =
      !outcome.has_token() || outcome.one_hot || row.plan->greedy;
  ForEachTile(team, row, 0, [&](int tile, const LaneLogits& logits) {
    const int first = FirstIdOfLane(row, tile);
#pragma unroll
    for (int e = 0; e < cuda::kIdsPerLane; ++e) {
      const int id = first + e;
      float probability = 0.0f;
      if (single) {
        probability = id == drawn.token ? 1.0f : 0.0f;
      } else if (drawn.kept.Keeps(logits.x[e], id)) {
        probability = ProbabilityOf(
            strict::Weight(logits.x[e], drawn.best, scale), drawn.mass);
      }
      if (id < row.vocab) out[id] = probability;
    }
  });
}

__device__ __noinline__ void FinishRow(Team& team, const SamplerCall& call,
                                       int64_t index, uint32_t tasks,
                                       const TileArrays& arrays,
                                       WideShared& shared) {
  const bool draw = (tasks & cuda::kDrawRow) != 0;
  const int64_t first_tile = index * call.num_tiles;
  uint64_t* const tile_mass = reinterpret_cast<uint64_t*>(arrays.weight);
  if (threadIdx.x == 0) Prepare(call, index, arrays, shared);
  __syncthreads();
  ReadRow(team.block(), call.scratch.tiles + first_tile, arrays, shared.row);
  if (draw) {
    const Drawn drawn = DrawFiltered(team, call, index, tile_mass, shared);
    if (threadIdx.x == 0) {
      shared.outcome = Outcome();
      shared.outcome.drawn = drawn;
      shared.outcome.kept = true;
    }
    __syncthreads();
  }
  const bool top =
      call.top_tokens != nullptr && call.top_kind != LogprobKind::kRaw;
  if ((tasks & cuda::kTopOfRow) != 0 || (draw && top)) {
    WriteTop(team, call, index, shared.row, tile_mass, shared);
  }
  if ((tasks & cuda::kProbabilitiesOfRow) != 0) {
    WriteProbabilities(team, call, index, shared.row, shared.outcome);
  }
  const bool raw = call.scratch.raw_tiles != nullptr;
  if (raw && (draw || (tasks & cuda::kTopOfRaw) != 0)) {
    ReadRow(team.block(), call.scratch.raw_tiles + first_tile, arrays,
            shared.raw);
  }
  if (draw && team.leads() && threadIdx.x < 32) {
    WriteRow(call, index, shared.row, shared.raw, shared.outcome,
             shared.inputs.mu);
  }
  if ((tasks & cuda::kTopOfRaw) != 0) {
    WriteTop(team, call, index, shared.raw, tile_mass, shared);
  }
  team.Sync();
}

__global__ void __launch_bounds__(kDecideThreads, 2)
    WideKernel(const __grid_constant__ SamplerCall call) {
  extern __shared__ double shared_memory[];
  const TileArrays arrays(shared_memory, call.num_tiles);
  WideShared& shared = *reinterpret_cast<WideShared*>(
      shared_memory + TileArrays::Bytes(call.num_tiles) / sizeof(double));
  cuda::WaitForPreviousKernels();
  Team team(&shared.team);
  const int teams = static_cast<int>(gridDim.x) / team.size();
  const int own = static_cast<int>(blockIdx.x) / team.size();
  for (int first = own; first < call.rows; first += teams * kDecideThreads) {
    // A thread looks at a row.
    const int64_t row = first + int64_t{threadIdx.x} * teams;
    const uint32_t tasks = row < call.rows ? call.scratch.states[row].tasks : 0;
    if (__syncthreads_or(static_cast<int>(tasks)) == 0) continue;
    shared.tasks[threadIdx.x] = tasks;
    // Blocks that have not begun yet have no shared memory to write to.
    team.Sync();
    for (int i = 0; i < kDecideThreads; ++i) {
      if (shared.tasks[i] == 0) continue;
      FinishRow(team, call, first + int64_t{i} * teams, shared.tasks[i], arrays,
                shared);
    }
    __syncthreads();
  }
}

}  // namespace

Status LaunchWide(const SamplerCall& call, Stream stream) {
  const int team_blocks = call.is_hopper ? cuda::kTeamBlocks : 1;
  const int teams = call.rows < kMaxTeams ? call.rows : kMaxTeams;
  const size_t shared_bytes =
      TileArrays::Bytes(call.num_tiles) + sizeof(WideShared);
  cudaLaunchConfig_t config = cuda::LaunchConfig(
      stream, dim3(static_cast<unsigned>(teams * team_blocks)),
      dim3(kDecideThreads), shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  if (call.is_hopper) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(team_blocks);
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  return cuda::LaunchWithConfig("Sampler", config, WideKernel, call);
}

}  // namespace tenon
