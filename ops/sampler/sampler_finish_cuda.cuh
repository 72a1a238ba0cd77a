#ifndef TENON_OPS_SAMPLER_SAMPLER_FINISH_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_FINISH_CUDA_CUH_

#include "ops/sampler/sampler_wide_cuda.cuh"

// What a row's first block leaves undone, by all of the row's blocks: filters
// that choose from many tokens, top tokens among many ties, probabilities.

namespace tenon::cuda {

struct WideShared {
  Team::Scratch team;
  WideScratch filters;
  RowPlan plan;
  RowPlan raw_plan;
  DecideRow row;
  DecideRow raw;
  DrawInputs inputs;
  Outcome outcome;
};

// A warp for each of what takes long.
__device__ __forceinline__ void PrepareWide(const SamplerCall& call,
                                            int64_t index,
                                            const TileArrays& arrays,
                                            const TokenStore& store,
                                            WideShared& shared) {
  const SamplingParams params = call.params[index];
  if (threadIdx.x == 0) {
    shared.plan = PlanOf(call, params);
    shared.row =
        RowOf(call, index, shared.plan, arrays, EditsOf(call, index, params));
  } else if (threadIdx.x == 32) {
    const uint64_t bits =
        call.random_bits != nullptr
            ? static_cast<uint64_t>(call.random_bits[index])
            : RandomBitsAt(params.seed, params.position, call.stream);
    shared.inputs.numerator = UniformNumerator(bits);
  } else if (threadIdx.x == 64) {
    const RowPlan plan = PlanOf(call, params);
    shared.inputs.xtc_acts = XtcActs(plan, params);
    shared.inputs.mu =
        plan.mirostat_tau > 0.0f ? call.mirostat.MuOf(index, params) : 0.0f;
  } else if (threadIdx.x == 96) {
    shared.raw_plan = RawPlan();
    shared.raw = RowOf(call, index, shared.raw_plan, arrays, {});
    shared.outcome = call.scratch.outcomes[index];
    shared.filters.store = store;
  }
  __syncthreads();
}

// Makes `row` the one that the arrays are of.
__device__ __noinline__ inline void ReadRow(Block& block, const SubTile* tiles,
                                            const TileArrays& arrays,
                                            DecideRow& row) {
  __syncthreads();
  const TileBounds bounds =
      ReadTiles<false>(block, tiles, nullptr, row.num_tiles, arrays);
  const uint64_t total =
      fabsf(bounds.best) < INFINITY
          ? block.Sum(OwnTotal(*row.plan, bounds.best, row.num_tiles, arrays))
          : 0;
  if (threadIdx.x == 0) {
    row.best = bounds.best;
    row.total = total;
  }
  __syncthreads();
}

__device__ inline Drawn DrawWide(Team& team, const SamplerCall& call,
                                 int64_t index, uint64_t* tile_mass,
                                 WideShared& shared) {
  const DecideRow& row = shared.row;
  const RowPlan& plan = shared.plan;
  float floor = -INFINITY;
  // Every warp for itself: that is sooner than telling the others.
  if (plan.top_n_sigma > 0.0f) {
    floor = SigmaFloor(call.scratch.moments + index * call.num_tiles,
                       call.num_tiles, plan, row.best);
  }
  if (plan.min_p_first()) {
    floor = fmaxf(floor, MinPThreshold(plan, row.best));
  }
  return WideFilters(team, &shared.filters, row, floor, tile_mass)
      .Run(shared.inputs);
}

__device__ __noinline__ inline void WriteTopWide(
    Team& team, const SamplerCall& call, int64_t index, const DecideRow& row,
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
    const float x = LogitOfCandidate(key);
    token = IdOfCandidate(key);
    logprob = processed ? ProcessedLogprob(shared.plan, outcome, x)
                        : LogprobOf(x, row.best, row.plan->temperature,
                                    row.total, kMassBits);
  }
  WriteTopColumn(call, index, column, token, logprob);
}

__device__ __noinline__ inline void WriteProbabilities(const Team& team,
                                                       const SamplerCall& call,
                                                       int64_t index,
                                                       const DecideRow& row,
                                                       const Outcome& outcome) {
  float* const out = call.probabilities + index * call.probabilities_stride;
  const Drawn& drawn = outcome.drawn;
  const float scale = outcome.kept ? row.plan->draw_scale : row.plan->scale;
  const bool single =
      !outcome.has_token() || outcome.one_hot || row.plan->greedy;
  ForEachTile(team, row, [&](int tile, const LaneLogits& logits) {
    const int first = FirstIdOfLane(row, tile);
#pragma unroll
    for (int e = 0; e < kIdsPerLane; ++e) {
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

__device__ __noinline__ inline void FinishRow(Team& team,
                                              const SamplerCall& call,
                                              int64_t index, uint32_t tasks,
                                              const TileArrays& arrays,
                                              Room room, WideShared& shared) {
  const bool draw = (tasks & kDrawRow) != 0;
  const int64_t first_tile = index * call.num_tiles;
  uint64_t* const tile_mass = reinterpret_cast<uint64_t*>(arrays.weight);
  const int own_tiles = CeilDiv(call.num_tiles - team.rank(), team.size());
  const int most_tiles = CeilDiv(call.num_tiles, team.size());
  PrepareWide(call, index, arrays, TokenStore(room, own_tiles, most_tiles),
              shared);
  ReadRow(team.block(), call.scratch.tiles + first_tile, arrays, shared.row);
  if (draw) {
    const Drawn drawn = DrawWide(team, call, index, tile_mass, shared);
    if (threadIdx.x == 0) {
      shared.outcome = Outcome();
      shared.outcome.drawn = drawn;
      shared.outcome.kept = true;
    }
    __syncthreads();
  }
  const bool top =
      call.top_tokens != nullptr && call.top_kind != LogprobKind::kRaw;
  if ((tasks & kTopOfRow) != 0 || (draw && top)) {
    WriteTopWide(team, call, index, shared.row, tile_mass, shared);
  }
  if ((tasks & kProbabilitiesOfRow) != 0) {
    WriteProbabilities(team, call, index, shared.row, shared.outcome);
  }
  const bool raw = call.scratch.raw_tiles != nullptr;
  if (raw && (draw || (tasks & kTopOfRaw) != 0)) {
    ReadRow(team.block(), call.scratch.raw_tiles + first_tile, arrays,
            shared.raw);
  }
  if (draw && team.leads() && threadIdx.x < 32) {
    WriteRow(call, index, shared.plan, shared.row, shared.raw, shared.outcome,
             shared.inputs.mu, LogOfMass(shared.row.total, kMassBits),
             LogOfMass(shared.raw.total, kMassBits));
  }
  if ((tasks & kTopOfRaw) != 0) {
    WriteTopWide(team, call, index, shared.raw, tile_mass, shared);
  }
  team.Sync();
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_FINISH_CUDA_CUH_
