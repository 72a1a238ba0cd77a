#ifndef TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_

#include "ops/sampler/sampler_block_cuda.cuh"

// One row between its summaries and its token.

namespace tenon::cuda {

// Of a sub-tile a lane has 8 consecutive places.
inline constexpr int kIdsPerLane = kSubTile / 32;

// No smaller key belongs to a token that can be drawn.
inline constexpr uint32_t kLowestKey =
    OrderedKey(-std::numeric_limits<float>::max());

// The type of logits is not a template parameter: it matters where they are
// loaded only, and one kernel compiles in a third of the time.
struct DecideRow {
  const void* logits;
  DType dtype;
  int vocab;
  int num_tiles;
  bool aligned;
  RowEdits edits;
  const int32_t* first_edit;
  const RowPlan* plan;       // in shared memory, as the next
  const uint32_t* tile_key;  // OrderedKey of the maximum, 0 for -inf
  float best;                // the largest logit, finite
  uint64_t total;            // of the sub-tiles' TileMass(kMassBits)
  float scale;               // of the plan

  __device__ __forceinline__ uint64_t Mass(float x) const {
    return FixedMass(strict::Weight(x, best, scale));
  }
};

// The id of the lane's first place.
__device__ __forceinline__ int FirstIdOfLane(const DecideRow& row, int tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return (lane / 2 * row.num_tiles + tile) * kChunk + lane % 2 * kIdsPerLane;
}

__device__ __forceinline__ float LogitAt(const DecideRow& row, int id) {
  switch (row.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(row.logits)[id];
    case DType::kFloat16:
      return ToFloat(static_cast<const __half*>(row.logits)[id]);
    default:
      return ToFloat(static_cast<const __nv_bfloat16*>(row.logits)[id]);
  }
}

// A lane's logits of a sub-tile as stored; 16-bit ones have the first words.
struct LanePart {
  uint4 words[2];
};

template <class T>
__device__ __forceinline__ LanePart LoadPartSlowly(const DecideRow& row,
                                                   int first) {
  LanePart part;
#pragma unroll
  for (int i = 0; i < kIdsPerLane / Piece<T>::kSize; ++i) {
    const Piece<T> piece =
        LoadPieceSlowly(static_cast<const T*>(row.logits),
                        first + i * Piece<T>::kSize, row.vocab);
    memcpy(&part.words[i], &piece, sizeof(piece));
  }
  return part;
}
__device__ __noinline__ inline LanePart LoadPartSlowly(const DecideRow& row,
                                                       int first) {
  switch (row.dtype) {
    case DType::kFloat32:
      return LoadPartSlowly<float>(row, first);
    case DType::kFloat16:
      return LoadPartSlowly<__half>(row, first);
    default:
      return LoadPartSlowly<__nv_bfloat16>(row, first);
  }
}

__device__ __forceinline__ LanePart LoadPart(const DecideRow& row, int tile) {
  const int first = FirstIdOfLane(row, tile);
  const bool is_wide = row.dtype == DType::kFloat32;
  const bool exists = row.aligned && first + kIdsPerLane <= row.vocab;
  const char* const from = static_cast<const char*>(row.logits) +
                           static_cast<int64_t>(first) * (is_wide ? 4 : 2);
  const uint32_t fill = LowestWord(row.dtype);
  return {{Load16If<false>(exists, from, fill),
           Load16If<false>(exists && is_wide, from + 16, fill)}};
}

// Whether loading leaves ids out, for later, so that loads need not wait for
// each other.
__device__ __forceinline__ bool PartIsSlow(int first, int vocab, bool aligned) {
  return first < vocab && (!aligned || first + kIdsPerLane > vocab);
}

struct LaneLogits {
  float x[kIdsPerLane];
};

// Whether the row's mask lets the lane's logits pass, a bit for each.
__device__ __forceinline__ unsigned AllowedOf(const DecideRow& row, int first) {
  unsigned allowed = row.edits.only_allowed ? 0u : ~0u;
  if (row.edits.mask != nullptr && first < row.vocab) {
    allowed &= row.edits.mask[first / 8];
  }
  return allowed;
}

// Masks and edits one sub-tile. The whole warp calls this.
__device__ __noinline__ inline LaneLogits ApplyEdits(const DecideRow& row,
                                                     int tile,
                                                     LaneLogits logits) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const LaneLogits raw = logits;
  const unsigned allowed = AllowedOf(row, FirstIdOfLane(row, tile));
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if ((allowed >> e & 1) == 0) logits.x[e] = -INFINITY;
  }
  if (row.edits.end == 0) return logits;
  const int end_order = (tile + 1) * kSubTile;
  for (int from = row.first_edit[tile]; from < row.edits.end; from += 32) {
    int order = end_order;
    LogitEdit edit;
    bool applies = false;
    bool masked = false;
    if (from + lane < row.edits.end) {
      edit = row.edits.edits[from + lane];
      order = DrawOrder(edit.id, row.vocab);
      applies = order / kSubTile == tile && order >= 0 && edit.id >= 0 &&
                edit.id < row.vocab;
      masked = applies && row.edits.Masked(edit.id);
    }
    for (unsigned left = __ballot_sync(~0u, applies); left != 0;
         left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const int place = __shfl_sync(~0u, order, source) % kSubTile;
      LogitEdit other;
      other.state = __shfl_sync(~0u, edit.state, source);
      other.bias = __shfl_sync(~0u, edit.bias, source);
      other.offset = __shfl_sync(~0u, edit.offset, source);
      const bool other_masked = __shfl_sync(~0u, masked ? 1 : 0, source) != 0;
#pragma unroll
      for (int e = 0; e < kIdsPerLane; ++e) {
        if (place == lane * kIdsPerLane + e) {
          logits.x[e] =
              other_masked ? -INFINITY : ApplyEdit(*row.plan, other, raw.x[e]);
        }
      }
    }
    if (__any_sync(~0u, order >= end_order)) break;
  }
  return logits;
}

template <class T>
__device__ __forceinline__ LaneLogits FloatsOf(const LanePart& part) {
  constexpr int kSize = Piece<T>::kSize;
  LaneLogits logits;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    logits.x[e] = Piece<T>{part.words[e / kSize]}.At(e % kSize);
  }
  return logits;
}

// As they are stored.
__device__ __forceinline__ LaneLogits StoredLogitsOf(const DecideRow& row,
                                                     int tile, LanePart part) {
  const int first = FirstIdOfLane(row, tile);
  if (PartIsSlow(first, row.vocab, row.aligned)) {
    part = LoadPartSlowly(row, first);
  }
  switch (row.dtype) {
    case DType::kFloat32:
      return FloatsOf<float>(part);
    case DType::kFloat16:
      return FloatsOf<__half>(part);
    default:
      return FloatsOf<__nv_bfloat16>(part);
  }
}
// kEdited: the row may have edits or a mask.
template <bool kEdited = true>
__device__ __forceinline__ LaneLogits LogitsOf(const DecideRow& row, int tile,
                                               const LanePart& part) {
  const LaneLogits logits = StoredLogitsOf(row, tile, part);
  return kEdited && row.edits.any() ? ApplyEdits(row, tile, logits) : logits;
}
template <bool kEdited = true>
__device__ __forceinline__ LaneLogits LogitsOfTile(const DecideRow& row,
                                                   int tile) {
  return LogitsOf<kEdited>(row, tile, LoadPart(row, tile));
}

// The first token of a sub-tile at which the running sum of weigh(x, id)
// exceeds target(its end); it does. The whole warp calls this and gets it.
struct TokenInTile {
  int id;
  float x;
};
template <class Weigh, class Target>
__device__ __forceinline__ TokenInTile PickInTile(const DecideRow& row,
                                                  int tile,
                                                  const LaneLogits& logits,
                                                  Weigh weigh, Target target) {
  const int first = FirstIdOfLane(row, tile);
  uint64_t weights[kIdsPerLane];
  uint64_t own = 0;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    weights[e] = weigh(logits.x[e], first + e);
    own += weights[e];
  }
  const uint64_t upto = WarpInclusiveSum(own);
  const uint64_t wanted = target(__shfl_sync(~0u, upto, 31));
  TokenInTile token = {first, logits.x[0]};
  uint64_t before = upto - own;
  const bool mine = before <= wanted && wanted < upto;
#pragma unroll
  for (int e = 0; e < kIdsPerLane; ++e) {
    if (before <= wanted) token = {first + e, logits.x[e]};
    before += weights[e];
  }
  const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, mine))) - 1;
  token.id = __shfl_sync(~0u, token.id, max(lane, 0));
  token.x = __shfl_sync(~0u, token.x, max(lane, 0));
  return token;
}

// Candidates: ~OrderedKey(logit) above the id, so that the best is the
// smallest.
__device__ __forceinline__ uint64_t CandidateKey(uint32_t key, int id) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float LogitOfCandidate(uint64_t candidate) {
  return FromOrderedKey(~static_cast<uint32_t>(candidate >> 32));
}
__device__ __forceinline__ int IdOfCandidate(uint64_t candidate) {
  return static_cast<int>(static_cast<uint32_t>(candidate));
}

// Of every sub-tile, in shared memory.
struct TileArrays {
  uint32_t* key;  // OrderedKey of the maximum, 0 for -inf
  // Its sum times the weight of its maximum, exactly; later masses of the
  // filters that choose from many tokens.
  double* weight;

  __device__ TileArrays(void* shared, int num_tiles)
      : key(static_cast<uint32_t*>(shared)),
        weight(static_cast<double*>(shared) + (num_tiles + 1) / 2) {}
  // A multiple of 8.
  static constexpr __host__ __device__ size_t Bytes(int num_tiles) {
    const size_t tiles = static_cast<size_t>(num_tiles);
    return ((tiles + 1) / 2 + tiles) * sizeof(double);
  }
  __device__ __forceinline__ uint64_t Mass(int tile, int bits) const {
    return MassOf(weight[tile], bits);
  }
  static __device__ __forceinline__ uint64_t MassOf(double weight, int bits) {
    const uint64_t unit = static_cast<uint64_t>(1023 + bits) << 52;
    return static_cast<uint64_t>(
        strict::Mul(weight, __builtin_bit_cast(double, unit)));
  }
};

// Calls visit(i) for i < count, dealt out to the threads, a few at a time so
// that their loads do not wait for each other; `count` for those past the end.
template <int kAtOnce, class Load, class Visit>
__device__ __forceinline__ void ForEachOfThread(int count, Load load,
                                                Visit visit) {
  for (int base = static_cast<int>(threadIdx.x); base < count;
       base += kAtOnce * kDecideThreads) {
    decltype(load(0)) loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      loaded[u] = load(min(base + u * kDecideThreads, count - 1));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (base + u * kDecideThreads < count) {
        visit(base + u * kDecideThreads, loaded[u]);
      }
    }
  }
}

// Shared memory for what is read again: at a multiple of 16 bytes.
struct Room {
  void* memory;
  int bytes;
};

// What ReadTiles() finds of the maxima.
struct TileBounds {
  float best;       // NaN where any is
  uint32_t lowest;  // key above 0
  float raw_best;   // as `best`, of the logits as they are, where it is wanted
};

// The key of a sub-tile's maximum: 0 for -inf, the largest for NaN.
__device__ __forceinline__ uint32_t KeyOfMax(float max) {
  return isnan(max) ? ~0u : max == -INFINITY ? 0 : OrderedKey(max);
}
__device__ __forceinline__ float MaxOfKey(uint32_t key) {
  return key == 0 ? -INFINITY : FromOrderedKey(key);
}

// kRaw: `raw` may be there, the sub-tiles of the logits as they are.
template <bool kRaw>
__device__ __forceinline__ TileBounds ReadTiles(Block& block,
                                                const SubTile* tiles,
                                                const SubTile* raw,
                                                int num_tiles,
                                                const TileArrays& arrays) {
  Block::Pair bounds = {0, 0};
  ForEachOfThread<3>(
      num_tiles, [&](int i) { return tiles[i]; },
      [&](int i, const SubTile& tile) {
        const uint32_t key = KeyOfMax(tile.max);
        arrays.key[i] = key;
        arrays.weight[i] = static_cast<double>(tile.sum);
        bounds.a = max(bounds.a, key);
        bounds.b = max(bounds.b, key != 0 ? ~key : 0);
      });
  block.Post(Block::WarpMax(bounds));
  if constexpr (kRaw) {
    uint32_t best = 0;
    if (raw != nullptr) {
      ForEachOfThread<3>(
          num_tiles, [&](int i) { return raw[i].max; },
          [&](int, float max_of_tile) {
            best = max(best, KeyOfMax(max_of_tile));
          });
    }
    block.Post(__reduce_max_sync(~0u, best), Block::kSecond);
  }
  __syncthreads();
  const uint64_t* const posted = block.Posted();
  bounds = Block::MaxOf(posted);
  TileBounds result = {MaxOfKey(bounds.a), ~bounds.b, 0.0f};
  if constexpr (kRaw) {
    result.raw_best = MaxOfKey(Block::MaxOf(posted + Block::kSecond).b);
  }
  return result;
}

// Completes the arrays' weights; returns this thread's share of the sum of
// their masses.
__device__ __forceinline__ uint64_t OwnTotal(const RowPlan& plan, float best,
                                             int num_tiles,
                                             const TileArrays& arrays) {
  constexpr int kAtOnce = 2;
  const float scale = plan.scale;
  uint64_t own = 0;
  for (int base = static_cast<int>(threadIdx.x); base < num_tiles;
       base += kAtOnce * kDecideThreads) {
    // Without branches, so that none of them waits for another.
    double weights[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int next = base + u * kDecideThreads;
      const int i = next < num_tiles ? next : base;
      weights[u] = strict::Mul(arrays.weight[i],
                               static_cast<double>(strict::Weight(
                                   MaxOfKey(arrays.key[i]), best, scale)));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = base + u * kDecideThreads;
      const uint64_t mass = TileArrays::MassOf(weights[u], kMassBits);
      if (i < num_tiles) {
        arrays.weight[i] = weights[u];
        own += mass;
      }
    }
  }
  return own;
}
// The same of the logits as they are, without arrays.
__device__ __forceinline__ uint64_t OwnRawTotal(const SubTile* raw, float best,
                                                int num_tiles) {
  uint64_t own = 0;
  if (raw == nullptr || !(fabsf(best) < INFINITY)) return own;
  ForEachOfThread<3>(
      num_tiles, [&](int i) { return raw[i]; },
      [&](int, const SubTile& tile) {
        if (tile.max == -INFINITY) return;
        own += TileMass(tile.sum, strict::Weight(tile.max, best, kRawScale),
                        kMassBits);
      });
  return own;
}

// top-n-sigma keeps logits from here on. A whole warp calls this.
__device__ __noinline__ inline float SigmaFloor(const Moments* moments,
                                                int num_tiles,
                                                const RowPlan& plan,
                                                float best) {
  constexpr int kAtOnce = 4;
  double sum = 0.0;
  double squares = 0.0;
  int count = 0;
  for (int base = static_cast<int>(threadIdx.x % 32); base < num_tiles;
       base += 32 * kAtOnce) {
    Moments some[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      some[u] = moments[min(base + 32 * u, num_tiles - 1)];
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (base + 32 * u < num_tiles) {
        sum = strict::Add(sum, some[u].sum);
        squares = strict::Add(squares, some[u].squares);
        count += static_cast<int>(some[u].count);
      }
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sum = strict::Add(sum, __shfl_down_sync(~0u, sum, offset));
    squares = strict::Add(squares, __shfl_down_sync(~0u, squares, offset));
  }
  sum = __shfl_sync(~0u, sum, 0);
  squares = __shfl_sync(~0u, squares, 0);
  count = __reduce_add_sync(~0u, count);
  return SigmaThreshold(plan, best, {sum, squares, count});
}

__device__ __forceinline__ DecideRow RowOf(const SamplerCall& call,
                                           int64_t index, const RowPlan& plan,
                                           const TileArrays& arrays,
                                           const RowEdits& edits) {
  return {call.LogitsOf(index),
          call.dtype,
          call.vocab,
          call.num_tiles,
          call.aligned,
          edits,
          call.scratch.first_edit + index * call.num_tiles,
          &plan,
          arrays.key,
          0.0f,
          0,
          plan.scale};
}

// Of the logits as they are.
__device__ __forceinline__ RowPlan RawPlan() {
  RowPlan plan;
  plan.scale = kRawScale;
  return plan;
}

// log-softmax at logit x of what has `best` and a mass of this logarithm.
__device__ __forceinline__ float LogprobIn(float x, float best,
                                           double temperature,
                                           double log_mass) {
  if (isnan(best)) return NAN;
  if (isinf(best) || isinf(x)) {
    return x == best && x > 0.0f ? 0.0f : -INFINITY;
  }
  return LogprobOf(x, best, temperature, log_mass);
}

__device__ __forceinline__ float ProcessedLogprob(const RowPlan& plan,
                                                  const Outcome& outcome,
                                                  float x) {
  if (outcome.one_hot || plan.greedy) return 0.0f;
  return LogprobOf(x, outcome.drawn.best,
                   outcome.kept ? plan.draw_temperature : plan.temperature,
                   outcome.drawn.mass, kMassBits);
}

// The outputs of a row but top tokens and probabilities, by one warp: a lane
// for each, as logarithms take long; those of row.total and raw.total are
// known. `raw` has its best.
__device__ __forceinline__ void WriteRow(
    const SamplerCall& call, int64_t index, const RowPlan& plan,
    const DecideRow& row, const DecideRow& raw, const Outcome& outcome,
    float mu, double log_total, double log_raw_total) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Drawn& drawn = outcome.drawn;
  const bool has_token = outcome.has_token();
  if (lane == 0) {
    call.tokens[index] = drawn.token;
    call.statuses[index] = static_cast<int32_t>(outcome.status);
  }
  // Lane 0: unfiltered; 1: processed; 2: of the logits as they are.
  float* const outputs[3] = {call.logprobs, call.processed_logprobs,
                             call.raw_logprobs};
  float* output = nullptr;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (lane == i) output = outputs[i];
  }
  if (output != nullptr) {
    float x = drawn.x;
    float best = row.best;
    double temperature = plan.temperature;
    double log_mass = log_total;
    if (lane == 1) {
      best = drawn.best;
      if (outcome.kept) temperature = plan.draw_temperature;
      log_mass = LogOfMass(drawn.mass, kMassBits);
    }
    if (lane == 2) {
      x = has_token ? LogitAt(raw, drawn.token) : 0.0f;
      best = raw.best;
      temperature = 1.0;
      log_mass = log_raw_total;
    }
    float logprob = NAN;
    if (has_token) {
      logprob = lane == 1 && (outcome.one_hot || plan.greedy)
                    ? 0.0f
                    : LogprobIn(x, best, temperature, log_mass);
    }
    output[index] = logprob;
  }
  if (lane == 3 && plan.mirostat_tau > 0.0f) {
    if (outcome.kept && has_token) {
      mu = NextMirostatMu(plan, drawn.best, drawn.mass, mu, drawn.x);
    }
    call.mirostat.Leave(index, mu);
  }
}

// A column of a row's top tokens.
__device__ __forceinline__ void WriteTopColumn(const SamplerCall& call,
                                               int64_t index, int column,
                                               int token, float logprob) {
  call.top_tokens[index * call.top_tokens_stride + column] = token;
  call.top_logprobs[index * call.top_logprobs_stride + column] = logprob;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_DECIDE_ROW_CUDA_CUH_
