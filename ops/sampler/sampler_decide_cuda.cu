#include "ops/sampler/sampler_kernels_cuda.cuh"
#include "ops/sampler/sampler_nucleus_cuda.cuh"
#include "ops/sampler/sampler_wide_cuda.cuh"

// The kernel that makes a token of a row's summaries.

namespace tenon {
namespace {

using cuda::Block;
using cuda::BlockScratch;
using cuda::DecideRow;
using cuda::DrawInputs;
using cuda::Drawn;
using cuda::kDecideThreads;
using cuda::kMaxCandidates;
using cuda::LaneLogits;
using cuda::NarrowFilters;
using cuda::SamplerCall;
using cuda::TokenInTile;
using cuda::WideFilters;

struct DecideShared {
  BlockScratch scratch;
  RowPlan plan;
  RowPlan raw_plan;
  DrawInputs inputs;
  float sigma_floor;
};

// Of every sub-tile, in shared memory.
struct TileArrays {
  uint32_t* key;  // OrderedKey of the maximum, 0 for -inf
  // Its sum times the weight of its maximum, exactly; later WideFilters'
  // masses.
  double* weight;

  __device__ TileArrays(void* shared, int num_tiles)
      : key(reinterpret_cast<uint32_t*>(static_cast<double*>(shared) +
                                        num_tiles)),
        weight(static_cast<double*>(shared)) {}
  // A multiple of 8.
  static constexpr size_t Bytes(int num_tiles) {
    const size_t tiles = static_cast<size_t>(num_tiles);
    return tiles * sizeof(double) + (tiles + 1) / 2 * 2 * sizeof(uint32_t);
  }
  __device__ __forceinline__ uint64_t Mass(int tile, int bits) const {
    const uint64_t unit = static_cast<uint64_t>(1023 + bits) << 52;
    return static_cast<uint64_t>(
        strict::Mul(weight[tile], __builtin_bit_cast(double, unit)));
  }
};

// Fills the arrays; returns the largest maximum, NaN where any is.
__device__ float ReadTiles(Block& block, const SubTile* tiles, int num_tiles,
                           const TileArrays& arrays) {
  uint32_t best = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_tiles;
       i += kDecideThreads) {
    const SubTile tile = tiles[i];
    const uint32_t key = isnan(tile.max)         ? ~0u
                         : tile.max == -INFINITY ? 0
                                                 : OrderedKey(tile.max);
    arrays.key[i] = key;
    arrays.weight[i] = static_cast<double>(tile.sum);
    best = max(best, key);
  }
  best = block.Max(best);
  return best == 0 ? -INFINITY : FromOrderedKey(best);
}

// Completes the arrays' weights; returns the sum of their masses.
__device__ uint64_t Total(Block& block, const RowPlan& plan, float best,
                          int num_tiles, const TileArrays& arrays) {
  uint64_t own = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_tiles;
       i += kDecideThreads) {
    const uint32_t key = arrays.key[i];
    const float weight =
        key == 0 ? 0.0f : strict::Weight(FromOrderedKey(key), best, plan.scale);
    arrays.weight[i] =
        strict::Mul(arrays.weight[i], static_cast<double>(weight));
    own += arrays.Mass(i, kMassBits);
  }
  return block.Sum(own);
}

// The lowest id with the largest logit.
__device__ int FirstBestToken(Block& block, const DecideRow& row) {
  BlockScratch& s = block.s;
  const uint32_t best = OrderedKey(row.best);
  if (threadIdx.x == 0) s.count = std::numeric_limits<int>::max();
  __syncthreads();
  const auto first_so_far = [&] {
    const int first = threadIdx.x % 32 == 0
                          ? atomicMin(&s.count, std::numeric_limits<int>::max())
                          : 0;
    return __shfl_sync(~0u, first, 0);
  };
  // Of sub-tiles with the same maximum, few can have a lower id than the first.
  const auto wanted = [&](int tile) { return row.tile_key[tile] == best; };
  cuda::ForEachTile<1>(
      row, wanted, [] { return false; },
      [&](int tile, const LaneLogits& logits) {
        if (tile * kChunk > first_so_far()) return;
        const int first = FirstIdOfLane(row, tile);
        int id = std::numeric_limits<int>::max();
#pragma unroll
        for (int e = cuda::kIdsPerLane - 1; e >= 0; --e) {
          if (OrderedKey(logits.x[e]) == best) id = first + e;
        }
        id =
            static_cast<int>(__reduce_min_sync(~0u, static_cast<unsigned>(id)));
        if (threadIdx.x % 32 == 0) atomicMin(&s.count, id);
      });
  __syncthreads();
  const int id = s.count;
  __syncthreads();
  return id;
}

__device__ Drawn DrawPlain(Block& block, const DecideRow& row,
                           const TileArrays& arrays, uint64_t numerator) {
  const int bits = DrawBits(row.total);
  uint64_t own = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.num_tiles;
       i += kDecideThreads) {
    own += arrays.Mass(i, bits);
  }
  const uint64_t target = DrawTarget(numerator, block.Sum(own));
  const Block::Pick pick = block.PickByWeight(
      row.num_tiles, target, [&](int i) { return arrays.Mass(i, bits); });
  // Every warp does the same: that is sooner than telling the others.
  const float max = FromOrderedKey(row.tile_key[pick.index]);
  const LaneLogits logits = LogitsOfTile(row, pick.index);
  const auto weigh = [&](float x, int) {
    return FixedMass(strict::Weight(x, max, row.plan->scale));
  };
  uint64_t weight = 0;
#pragma unroll
  for (int e = 0; e < cuda::kIdsPerLane; ++e) weight += weigh(logits.x[e], 0);
  weight = cuda::WarpSum64(weight);
  const TokenInTile token = PickInTile(
      row, pick.index, logits,
      TargetInTile(target - pick.before, arrays.Mass(pick.index, bits), weight),
      weigh);
  Drawn drawn;
  drawn.token = token.id;
  drawn.x = token.x;
  drawn.best = row.best;
  drawn.mass = row.total;
  return drawn;
}

// top-n-sigma keeps logits from here on.
__device__ float SigmaFloor(const SamplerCall& call, int64_t index,
                            const RowPlan& plan, float best,
                            DecideShared& shared) {
  if (threadIdx.x < 32) {
    const cuda::SamplerScratch& scratch = call.scratch;
    const Moments* moments = scratch.moments + index * call.num_tiles;
    double sum = 0.0;
    double squares = 0.0;
    int count = 0;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < call.num_tiles; i += 32) {
      sum = strict::Add(sum, moments[i].sum);
      squares = strict::Add(squares, moments[i].squares);
      count += static_cast<int>(moments[i].count);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum = strict::Add(sum, __shfl_down_sync(~0u, sum, offset));
      squares = strict::Add(squares, __shfl_down_sync(~0u, squares, offset));
    }
    count = __reduce_add_sync(~0u, count);
    if (threadIdx.x == 0) {
      shared.sigma_floor = SigmaThreshold(plan, best, {sum, squares, count});
    }
  }
  __syncthreads();
  return shared.sigma_floor;
}

// Ids below which ties with the worst candidate are collected where there are
// too many of them.
constexpr int kFirstIds = 1024;

// Candidates that have the `count` best tokens among them, if there are so
// many; -1 where there would have to be too many of them. `*floor` is raised to
// a bound.
__device__ int CollectBest(Block& block, const DecideRow& row, int count,
                           uint32_t* floor) {
  if (count <= row.num_tiles) {
    uint32_t highest = 0;
    uint32_t lowest = ~0u;
    for (int i = static_cast<int>(threadIdx.x); i < row.num_tiles;
         i += kDecideThreads) {
      const uint32_t key = row.tile_key[i];
      highest = max(highest, key);
      if (key != 0) lowest = min(lowest, key);
    }
    highest = OrderedKey(row.best);
    lowest = block.Min(lowest);
    *floor =
        max(*floor, block.LowerBoundOfKth(
                        row.num_tiles, static_cast<uint32_t>(count), lowest,
                        highest, [&](int i) { return row.tile_key[i]; }));
  }
  if (count > kMaxCandidates) return -1;
  int found = Collect(block, row, *floor, row.vocab);
  if (found <= kMaxCandidates) return found;
  found = Collect(block, row, *floor, kFirstIds);
  return found >= count && found <= kMaxCandidates ? found : -1;
}

__device__ __noinline__ Drawn DrawNarrow(Block& block, const DecideRow& row,
                                         int count, const DrawInputs& inputs) {
  return NarrowFilters(block, row, count).Run(inputs);
}

// Where top-p is the first filter that counts tokens. No token where there
// would be too many candidates.
__device__ __noinline__ Drawn DrawTopP(Block& block, const DecideRow& row,
                                       uint32_t floor,
                                       const DrawInputs& inputs) {
  const RowPlan& plan = *row.plan;
  const uint64_t target = MassTarget(plan.top_p, row.total);
  if (target / kMaxCandidates > static_cast<uint64_t>(kMassOfBest)) return {};
  // A few tokens are often enough, as many as a few per sub-tile mostly.
  for (int round = 0; round < 3; ++round) {
    uint32_t from = floor;
    int count = 0;
    if (round < 2) {
      const int tiles = round == 0 ? 24 : row.num_tiles - row.num_tiles / 8;
      if (tiles < 24) continue;
      count = CollectBest(block, row, tiles, &from);
      if (count < 0) break;
    } else {
      count = Collect(block, row, from, row.vocab);
      if (count > kMaxCandidates) break;
    }
    NarrowFilters filters(block, row, count);
    if (from == floor || filters.mass() >= target) return filters.Run(inputs);
  }
  return {};
}

__device__ Drawn DrawFiltered(Block& block, const DecideRow& row,
                              float floor_value, uint64_t* tile_mass,
                              const DrawInputs& inputs) {
  const RowPlan& plan = *row.plan;
  const bool typical_first =
      plan.order == FilterOrder::kLlamaCpp && plan.typical_p < 1.0f;
  const bool narrowed = plan.top_k != 0 || plan.top_n_sigma > 0.0f;
  const bool top_p = plan.top_p < 1.0f;
  // Where no later filter needs the sum of what min-p drops.
  if (plan.min_p > 0.0f && !typical_first &&
      !(top_p && narrowed && plan.top_p_of_kept())) {
    floor_value = fmaxf(floor_value, MinPThreshold(plan, row.best));
  }
  uint32_t floor = cuda::kLowestKey;
  const bool has_floor = floor_value > -INFINITY;
  if (has_floor) floor = max(floor, OrderedKey(floor_value));
  int count = -1;
  if (top_p && !narrowed && !typical_first) {
    const float bound = TopPLowerBound(plan, row.best, row.total, row.vocab);
    floor = max(floor, OrderedKey(bound));
    Drawn drawn = DrawTopP(block, row, floor, inputs);
    if (drawn.token < 0 && plan.typical_p >= 1.0f && !inputs.xtc_acts &&
        plan.mirostat_tau == 0.0f && plan.scale == plan.draw_scale) {
      drawn = cuda::Nucleus(block, row, FromOrderedKey(floor), tile_mass)
                  .Draw(MassTarget(plan.top_p, row.total), inputs.numerator);
    }
    if (drawn.token >= 0) return drawn;
  } else if (plan.top_k != 0) {
    count = CollectBest(block, row, plan.top_k, &floor);
  } else if (has_floor) {
    count = Collect(block, row, floor, row.vocab);
    if (count > kMaxCandidates) count = -1;
  }
  if (count >= 0) return DrawNarrow(block, row, count, inputs);
  return WideFilters(block, row, FromOrderedKey(floor), tile_mass).Run(inputs);
}

// What a row has come to.
struct Outcome {
  SampleStatus status = SampleStatus::kOk;
  Drawn drawn;
  bool one_hot = false;  // +inf
  bool kept = false;     // filters have decided

  __device__ bool has_token() const { return drawn.token >= 0; }
};

// log-softmax of the row's logits as they are summarised.
__device__ float LogprobIn(const DecideRow& row, float x) {
  if (isinf(row.best) || isinf(x)) {
    return x == row.best && x > 0.0f ? 0.0f : -INFINITY;
  }
  return LogprobOf(x, row.best, row.plan->temperature, row.total, kMassBits);
}

__device__ float ProcessedLogprob(const RowPlan& plan, const Outcome& outcome,
                                  float x) {
  if (outcome.one_hot || plan.greedy) return 0.0f;
  return LogprobOf(x, outcome.drawn.best,
                   outcome.kept ? plan.draw_temperature : plan.temperature,
                   outcome.drawn.mass, kMassBits);
}

__device__ Outcome Decide(const SamplerCall& call, int64_t index, Block& block,
                          DecideRow& row, DecideShared& shared,
                          const TileArrays& arrays, bool with_total) {
  Outcome outcome;
  const RowPlan& plan = shared.plan;
  if (isnan(row.best)) {
    outcome.status = SampleStatus::kNonFinite;
    return outcome;
  }
  if (row.best == -INFINITY) {
    outcome.status = SampleStatus::kNoSupport;
    return outcome;
  }
  outcome.one_hot = isinf(row.best);
  if (outcome.one_hot || plan.greedy) {
    if (!outcome.one_hot && with_total) {
      row.total = Total(block, plan, row.best, row.num_tiles, arrays);
    }
    outcome.drawn.token = FirstBestToken(block, row);
    outcome.drawn.x = row.best;
    return outcome;
  }
  row.total = Total(block, plan, row.best, row.num_tiles, arrays);
  if (!plan.filtered()) {
    outcome.drawn = DrawPlain(block, row, arrays, shared.inputs.numerator);
    return outcome;
  }
  float floor = -INFINITY;
  if (plan.top_n_sigma > 0.0f) {
    floor = SigmaFloor(call, index, plan, row.best, shared);
  }
  outcome.kept = true;
  outcome.drawn =
      DrawFiltered(block, row, floor,
                   reinterpret_cast<uint64_t*>(arrays.weight), shared.inputs);
  return outcome;
}

__device__ __noinline__ void WriteTop(const SamplerParams& p, int64_t index,
                                      Block& block, const DecideRow& row,
                                      const RowPlan& plan,
                                      const Outcome& outcome,
                                      uint64_t* tile_mass) {
  const bool processed = p.top_logprobs_kind == LogprobKind::kProcessed;
  const int columns = static_cast<int>(p.top_tokens.shape[1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int wanted = min(columns, plan.num_top_logprobs);
  int found = 0;
  bool single = false;
  int token = -1;
  if (wanted > 0 && row.best > -INFINITY) {  // and not NaN
    single = (processed && plan.greedy) || isinf(row.best);
    if (single) {
      token = FirstBestToken(block, row);
    } else {
      uint32_t floor = cuda::kLowestKey;
      const bool of_kept = processed && outcome.kept;
      if (!of_kept) found = CollectBest(block, row, wanted, &floor);
      if (of_kept || found < 0) {
        WideFilters wide(block, row, FromOrderedKey(floor), tile_mass);
        if (of_kept) wide.SetRange(outcome.drawn.kept);
        wide.KeepBest(wanted);
        found = wide.CollectKept();
      }
      block.Sort(found);
    }
  }
  if (thread >= columns) return;
  float logprob = NAN;
  if (single) {
    if (thread == 0) logprob = 0.0f;
    if (thread > 0) token = -1;
  } else if (thread < min(found, wanted)) {
    const uint64_t candidate = block.s.sorted[thread];
    const float x = cuda::LogitOfCandidate(candidate);
    token = cuda::IdOfCandidate(candidate);
    logprob = processed ? ProcessedLogprob(plan, outcome, x)
                        : LogprobOf(x, row.best, row.plan->temperature,
                                    row.total, kMassBits);
  }
  p.top_tokens.As<int32_t>()[index * p.top_tokens.stride[0] + thread] = token;
  p.top_logprobs.As<float>()[index * p.top_logprobs.stride[0] + thread] =
      logprob;
}

__device__ __noinline__ void WriteProbabilities(const SamplerParams& p,
                                                int64_t index,
                                                const DecideRow& row,
                                                const Outcome& outcome) {
  float* const out =
      p.probabilities.As<float>() + index * p.probabilities.stride[0];
  const Drawn& drawn = outcome.drawn;
  const float scale = outcome.kept ? row.plan->draw_scale : row.plan->scale;
  const bool single =
      !outcome.has_token() || outcome.one_hot || row.plan->greedy;
  const auto write = [&](int tile, const LaneLogits& logits) {
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
  };
  cuda::ForEachTile<1>(
      row, [](int) { return true; }, [] { return false; }, write);
}

// Before the summaries are there.
__device__ void Prepare(const SamplerParams& p, int64_t index,
                        DecideShared& shared) {
  const SamplingParams& params = p.params[index];
  RowPlan plan = MakeRowPlan(params, p.vocab());
  if (!p.bitmask.present()) plan.use_bitmask = false;
  if (!p.mirostat_mu.present()) plan.mirostat_tau = 0.0f;
  const uint64_t bits =
      p.random_bits.present()
          ? static_cast<uint64_t>(p.random_bits.As<const int64_t>()[index])
          : RandomBitsAt(params.seed, params.position, p.stream);
  shared.inputs = {
      UniformNumerator(bits), XtcActs(plan, params),
      plan.mirostat_tau > 0.0f ? MirostatStateOf(p).MuOf(index, params) : 0.0f};
  shared.plan = plan;
  RowPlan raw;
  raw.scale = kRawScale;
  shared.raw_plan = raw;
}

__device__ DecideRow RowOf(const SamplerCall& call, int64_t index,
                           const RowPlan& plan, const TileArrays& arrays,
                           const cuda::RowEdits& edits) {
  const SamplerParams& p = call.p;
  return {p.logits.As<const char>() +
              index * p.logits.stride[0] * DTypeSize(p.logits.dtype),
          p.logits.dtype,
          static_cast<int>(p.vocab()),
          call.num_tiles,
          call.aligned,
          edits,
          call.scratch.first_edit + index * call.num_tiles,
          &plan,
          arrays.key,
          0.0f,
          0};
}

__global__ void __launch_bounds__(kDecideThreads, 2)
    DecideKernel(const __grid_constant__ SamplerCall call) {
  extern __shared__ double shared_memory[];
  const SamplerParams& p = call.p;
  const int64_t index = blockIdx.x;
  const TileArrays arrays(shared_memory, call.num_tiles);
  DecideShared& shared = *reinterpret_cast<DecideShared*>(
      shared_memory + TileArrays::Bytes(call.num_tiles) / sizeof(double));
  Block block(&shared.scratch);
  // What the summarising kernel does not write may be read before it is done:
  // what wrote that was done before it began.
  if (threadIdx.x == 0) Prepare(p, index, shared);
  const EditRange edit_range = EditsOfRow(p, index);
  cuda::WaitForPreviousKernels();

  float best = ReadTiles(block, call.scratch.tiles + index * call.num_tiles,
                         call.num_tiles, arrays);
  const RowPlan& plan = shared.plan;
  DecideRow row = RowOf(call, index, plan, arrays,
                        cuda::EditsOf(p, index, plan, edit_range));
  row.best = best;
  const bool top = p.top_tokens.present();
  const bool with_total =
      p.logprobs.present() ||
      (top && p.top_logprobs_kind == LogprobKind::kUnfiltered);
  const Outcome outcome =
      Decide(call, index, block, row, shared, arrays, with_total);
  const Drawn& drawn = outcome.drawn;
  if (threadIdx.x == 0) {
    p.tokens.As<int32_t>()[index] = drawn.token;
    p.statuses.As<int32_t>()[index] = static_cast<int32_t>(outcome.status);
    if (p.logprobs.present()) {
      p.logprobs.As<float>()[index] =
          outcome.has_token() ? LogprobIn(row, drawn.x) : NAN;
    }
    if (p.processed_logprobs.present()) {
      p.processed_logprobs.As<float>()[index] =
          outcome.has_token() ? ProcessedLogprob(plan, outcome, drawn.x) : NAN;
    }
    if (plan.mirostat_tau > 0.0f) {
      const float mu = shared.inputs.mu;
      MirostatStateOf(p).Leave(
          index, outcome.kept
                     ? NextMirostatMu(plan, drawn.best, drawn.mass, mu, drawn.x)
                     : mu);
    }
  }
  if (p.probabilities.present()) WriteProbabilities(p, index, row, outcome);
  uint64_t* const tile_mass = reinterpret_cast<uint64_t*>(arrays.weight);
  const bool top_of_raw = top && p.top_logprobs_kind == LogprobKind::kRaw;
  if (top && !top_of_raw) {
    WriteTop(p, index, block, row, plan, outcome, tile_mass);
  }
  if (call.scratch.raw_tiles == nullptr) return;
  __syncthreads();
  best = ReadTiles(block, call.scratch.raw_tiles + index * call.num_tiles,
                   call.num_tiles, arrays);
  DecideRow raw = RowOf(call, index, shared.raw_plan, arrays, {});
  raw.best = best;
  if (fabsf(best) < INFINITY) {
    raw.total = Total(block, shared.raw_plan, best, call.num_tiles, arrays);
  }
  if (threadIdx.x == 0 && p.raw_logprobs.present()) {
    p.raw_logprobs.As<float>()[index] =
        outcome.has_token() && !isnan(best)
            ? LogprobIn(raw, LogitAt(raw, drawn.token))
            : NAN;
  }
  if (top_of_raw) WriteTop(p, index, block, raw, plan, outcome, tile_mass);
}

}  // namespace

Status LaunchDecide(const SamplerCall& call, Stream stream) {
  const size_t shared_bytes =
      TileArrays::Bytes(call.num_tiles) + sizeof(DecideShared);
  return cuda::LaunchDependent(
      "Sampler", stream, dim3(static_cast<unsigned>(call.p.logits.shape[0])),
      dim3(kDecideThreads), shared_bytes, DecideKernel, call);
}

}  // namespace tenon
