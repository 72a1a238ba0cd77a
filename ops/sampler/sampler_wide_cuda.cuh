#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"

// Filters where many tokens can pass them. What they keep is a KeptRange; its
// ends are found by histograms of the row's keys, in a bounded number of passes
// over what is kept so far.

namespace tenon::cuda {

class WideFilters {
 public:
  // Of all tokens with at least the logit `floor`. `tile_mass` has room for all
  // sub-tiles.
  __device__ WideFilters(Block& block, const DecideRow& row, float floor,
                         uint64_t* tile_mass)
      : block_(block),
        s_(block.s),
        row_(row),
        plan_(*row.plan),
        tile_mass_(tile_mass) {
    range_.to.value = fmaxf(floor, -std::numeric_limits<float>::max());
  }

  __device__ __noinline__ Drawn Run(const DrawInputs& inputs);

  // Keeps the `count` best.
  __device__ void KeepBest(int count) {
    KeepFromTop(static_cast<uint64_t>(count),
                [](float) { return uint64_t{1}; });
  }
  __device__ void SetRange(const KeptRange& range) { range_ = range; }
  // Makes candidates of what is kept, at most kMaxCandidates tokens.
  __device__ int CollectKept();

 private:
  // The key at which the weights of all larger or equal keys reach a target.
  struct Selection {
    bool found;
    uint32_t key;
    uint64_t needed;  // of the weight of this key, at least 1
  };

  // visit(x, id, kept), by whole warps, for at least what is kept.
  template <class Visit>
  __device__ __forceinline__ void ForEach(Visit visit) {
    ForEachTile<1>(row_, OrderedKey(range_.to.value),
                   [&](int tile, const LaneLogits& logits) {
                     const int first = FirstIdOfLane(row_, tile);
#pragma unroll
                     for (int e = 0; e < kIdsPerLane; ++e) {
                       const float x = logits.x[e];
                       visit(x, first + e, range_.Keeps(x, first + e));
                     }
                   });
  }
  // The sum of weight(x) over what is kept.
  template <class Weight>
  __device__ uint64_t Sum(Weight weight) {
    uint64_t own = 0;
    ForEach([&](float x, int, bool kept) {
      if (kept) own += weight(x);
    });
    return block_.Sum(own);
  }
  __device__ uint64_t Mass() {
    return Sum([&](float x) { return row_.Mass(x); });
  }
  // The largest kept logit.
  __device__ float Best() {
    if (range_.from.value == INFINITY) return row_.best;
    uint32_t best = 0;
    ForEach([&](float x, int, bool kept) {
      if (kept) best = max(best, OrderedKey(x));
    });
    return FromOrderedKey(block_.Max(best));
  }

  __device__ __forceinline__ void AddToBin(uint32_t bin, uint64_t weight,
                                           bool active);
  // key(x, id) from `lowest` to `highest`, weight(x).
  template <class Key, class Weight>
  __device__ Selection Select(uint32_t lowest, uint32_t highest,
                              uint64_t target, Key key, Weight weight);
  template <class Weight>
  __device__ bool KeepFromTop(uint64_t target, Weight weight);
  __device__ void KeepMinP(float best) {
    const float threshold = fminf(MinPThreshold(plan_, best), best);
    if (threshold > range_.to.value) range_.to = Cutoff{threshold};
  }
  __device__ void KeepTypical();
  __device__ void DropTopChoices();
  __device__ Drawn Draw(const DrawInputs& inputs);

  Block& block_;
  BlockScratch& s_;
  const DecideRow& row_;
  const RowPlan& plan_;
  uint64_t* tile_mass_;
  KeptRange range_;
};

// The whole warp calls this.
__device__ __forceinline__ void WideFilters::AddToBin(uint32_t bin,
                                                      uint64_t weight,
                                                      bool active) {
  const unsigned adding = __ballot_sync(~0u, active);
  if (adding == 0) return;
  const int leader = __ffs(static_cast<int>(adding)) - 1;
  const uint32_t leaders_bin = __shfl_sync(~0u, bin, leader);
  // Rows of equal logits would otherwise take turns 32 times each.
  if (__popc(adding) > 4 && __all_sync(~0u, !active || bin == leaders_bin)) {
    weight = WarpSum64(active ? weight : 0);
    active = static_cast<int>(threadIdx.x % 32) == leader;
  }
  if (!active) return;
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&s_.bins[0][bin], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&s_.bins[1][bin], high);
}

template <class Key, class Weight>
__device__ WideFilters::Selection WideFilters::Select(uint32_t lowest,
                                                      uint32_t highest,
                                                      uint64_t target, Key key,
                                                      Weight weight) {
  uint32_t range = highest - lowest;
  for (;;) {
    const int shift = range < kBins ? 0 : 21 - __clz(static_cast<int>(range));
    for (int i = static_cast<int>(threadIdx.x); i < kBins;
         i += kDecideThreads) {
      s_.bins[0][i] = 0;
      s_.bins[1][i] = 0;
    }
    __syncthreads();
    ForEach([&](float x, int id, bool kept) {
      const uint32_t offset = key(x, id) - lowest;
      const bool active = kept && offset <= range;
      AddToBin(active ? offset >> shift : 0, active ? weight(x) : 0, active);
    });
    __syncthreads();
    const auto from_top = [&](int i) {
      const int bin = kBins - 1 - i;
      return (uint64_t{s_.bins[1][bin]} << 32) | s_.bins[0][bin];
    };
    const Block::Pick pick = block_.PickByWeight(kBins, target - 1, from_top);
    if (pick.index < 0) return {false, 0, 0};
    target -= pick.before;
    lowest += static_cast<uint32_t>(kBins - 1 - pick.index) << shift;
    if (shift == 0) return {true, lowest, target};
    range = (1u << shift) - 1;
  }
}

// Keeps the best whose weights reach the target, ties by id; false, and all
// kept, where they do not.
template <class Weight>
__device__ bool WideFilters::KeepFromTop(uint64_t target, Weight weight) {
  const Selection value = Select(
      OrderedKey(range_.to.value), OrderedKey(row_.best), target,
      [](float x, int) { return OrderedKey(x); }, weight);
  if (!value.found) return false;
  const float cut = FromOrderedKey(value.key);
  const uint64_t each = weight(cut);
  const uint64_t ties = (value.needed + each - 1) / each;
  // Of the tokens with just this logit, the first.
  const int32_t last_id =
      range_.to.value == cut ? range_.to.last_id : Cutoff().last_id;
  range_.to = Cutoff{cut, last_id};
  const uint32_t last = static_cast<uint32_t>(row_.vocab - 1);
  const Selection id = Select(
      0, last, ties,
      [&](float x, int i) {
        return x == cut ? last - static_cast<uint32_t>(i) : ~0u;
      },
      [](float) { return uint64_t{1}; });
  if (id.found) range_.to.last_id = static_cast<int32_t>(last - id.key);
  return true;
}

__device__ inline void WideFilters::KeepTypical() {
  const uint64_t mass = Mass();
  const float centre = TypicalCentre(
      plan_, row_.best,
      Sum([&](float x) { return FixedSurprise(x, row_.best, plan_.scale); }),
      mass);
  const auto key = [&](float x, int) {
    return OrderedKey(-TypicalDistance(x, centre));
  };
  const Selection nearest = Select(OrderedKey(-INFINITY), OrderedKey(0.0f),
                                   MassTarget(plan_.typical_p, mass), key,
                                   [&](float x) { return row_.Mass(x); });
  if (!nearest.found) return;
  uint32_t high = 0;
  uint32_t low = ~0u;
  ForEach([&](float x, int id, bool kept) {
    if (!kept || key(x, id) < nearest.key) return;
    high = max(high, OrderedKey(x));
    low = min(low, OrderedKey(x));
  });
  high = block_.Max(high);
  low = block_.Min(low);
  const float from = FromOrderedKey(high);
  const float to = FromOrderedKey(low);
  if (from < range_.from.value) range_.from = Ceiling{from};
  if (to > range_.to.value) range_.to = Cutoff{to};
}

__device__ inline void WideFilters::DropTopChoices() {
  const uint64_t least = XtcMass(plan_, Mass());
  uint32_t lowest = ~0u;
  ForEach([&](float x, int, bool kept) {
    if (kept && row_.Mass(x) >= least) lowest = min(lowest, OrderedKey(x));
  });
  lowest = block_.Min(lowest);
  if (lowest == ~0u) return;
  uint32_t last = 0;
  ForEach([&](float x, int id, bool kept) {
    if (kept && OrderedKey(x) == lowest) {
      last = max(last, static_cast<uint32_t>(id));
    }
  });
  range_.from =
      Ceiling{FromOrderedKey(lowest), static_cast<int32_t>(block_.Max(last))};
}

__device__ __noinline__ inline Drawn WideFilters::Run(
    const DrawInputs& inputs) {
  const bool llama = plan_.order == FilterOrder::kLlamaCpp;
  const bool typical = plan_.typical_p < 1.0f;
  const bool typical_first = llama && typical;
  if (plan_.top_k != 0) KeepBest(plan_.top_k);
  if (typical_first) KeepTypical();
  if (plan_.top_p < 1.0f) {
    const bool narrowed =
        plan_.top_k != 0 || plan_.top_n_sigma > 0.0f || typical_first;
    const uint64_t mass =
        plan_.top_p_of_kept() && narrowed ? Mass() : row_.total;
    if (!narrowed) {
      const float bound =
          TopPLowerBound(plan_, row_.best, row_.total, row_.vocab);
      if (bound > range_.to.value) range_.to = Cutoff{bound};
    }
    KeepFromTop(MassTarget(plan_.top_p, mass),
                [&](float x) { return row_.Mass(x); });
  }
  if (plan_.min_p > 0.0f) KeepMinP(typical_first ? Best() : row_.best);
  if (!llama && typical) KeepTypical();
  if (inputs.xtc_acts) DropTopChoices();
  return Draw(inputs);
}

__device__ inline int WideFilters::CollectKept() {
  if (threadIdx.x == 0) s_.count = 0;
  __syncthreads();
  ForEach([&](float x, int id, bool kept) {
    if (!kept) return;
    const int at = atomicAdd(&s_.count, 1);
    if (at < kMaxCandidates) s_.keys[at] = CandidateKey(OrderedKey(x), id);
  });
  __syncthreads();
  const int count = min(s_.count, kMaxCandidates);
  __syncthreads();
  return count;
}

__device__ inline Drawn WideFilters::Draw(const DrawInputs& inputs) {
  Drawn drawn;
  drawn.best = Best();
  const auto weigh = [&](float x) {
    return FixedMass(strict::Weight(x, drawn.best, plan_.draw_scale));
  };
  if (plan_.mirostat_tau > 0.0f) {
    const float threshold =
        MirostatThreshold(plan_, drawn.best, Sum(weigh), inputs.mu);
    if (threshold > range_.to.value) range_.to = Cutoff{threshold};
  }
  for (int i = static_cast<int>(threadIdx.x); i < row_.num_tiles;
       i += kDecideThreads) {
    tile_mass_[i] = 0;
  }
  __syncthreads();
  uint64_t own = 0;
  ForEachTile<1>(row_, OrderedKey(range_.to.value),
                 [&](int tile, const LaneLogits& logits) {
                   const int first = FirstIdOfLane(row_, tile);
                   uint64_t mass = 0;
#pragma unroll
                   for (int e = 0; e < kIdsPerLane; ++e) {
                     if (range_.Keeps(logits.x[e], first + e)) {
                       mass += weigh(logits.x[e]);
                     }
                   }
                   mass = WarpSum64(mass);
                   if (threadIdx.x % 32 == 0) {
                     tile_mass_[tile] = mass;
                     own += mass;
                   }
                 });
  drawn.mass = block_.Sum(own);
  const uint64_t target = DrawTarget(inputs.numerator, drawn.mass);
  const Block::Pick pick = block_.PickByWeight(
      row_.num_tiles, target, [&](int i) { return tile_mass_[i]; });
  const TokenInTile token =
      PickInTile(row_, pick.index, LogitsOfTile(row_, pick.index),
                 target - pick.before, [&](float x, int id) {
                   return range_.Keeps(x, id) ? weigh(x) : uint64_t{0};
                 });
  drawn.token = token.id;
  drawn.x = token.x;
  drawn.kept = range_;
  return drawn;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
