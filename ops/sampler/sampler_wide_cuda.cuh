#ifndef TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_

#include "ops/sampler/sampler_narrow_cuda.cuh"
#include "ops/sampler/sampler_team_cuda.cuh"

// Filters where many tokens can pass them, by several blocks. What they keep is
// a KeptRange; its ends are found by histograms of the row's keys, in a bounded
// number of passes over what is kept so far.

namespace tenon::cuda {

struct WideScratch {
  static constexpr int kBins = 2048;
  uint32_t bins[2][kBins];  // 64-bit bins as two words each
  // What a histogram tells, and for how many tokens of the picked bin.
  int picked;
  uint64_t before_picked;
  uint64_t in_picked;
  // The best, in the leading block.
  int count;
  uint64_t best[kMaxTopLogprobs];
};

class WideFilters {
 public:
  // Of all tokens with at least the logit `floor`. `tile_mass` has room for all
  // sub-tiles.
  __device__ WideFilters(Team& team, WideScratch* scratch, const DecideRow& row,
                         float floor, uint64_t* tile_mass)
      : team_(team),
        s_(*scratch),
        row_(row),
        plan_(*row.plan),
        tile_mass_(tile_mass) {
    range_.to.value = fmaxf(floor, -std::numeric_limits<float>::max());
  }

  // The token is known to the leading block alone.
  __device__ __noinline__ Drawn Run(const DrawInputs& inputs);

  // Keeps the `count` best.
  __device__ void KeepBest(int count) {
    KeepFromTop(static_cast<uint64_t>(count),
                [](float) { return uint64_t{1}; });
  }
  __device__ void SetRange(const KeptRange& range) { range_ = range; }
  // Leaves what is kept, at most kMaxTopLogprobs tokens, in the leading block's
  // scratch, best first; returns how many they are.
  __device__ int CollectKept();

 private:
  // The key at which the weights of all larger or equal keys reach a target.
  struct Selection {
    bool found;
    uint32_t key;
    uint64_t needed;  // of the weight of this key, at least 1
    uint64_t there;   // of the weight of this key
  };

  // visit(x, id, kept), by whole warps, for at least what is kept.
  template <class Visit>
  __device__ __forceinline__ void ForEach(Visit visit) {
    ForEachTile(team_, row_, OrderedKey(range_.to.value),
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
    return team_.Sum(own);
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
    return FromOrderedKey(team_.Max(best));
  }

  __device__ __forceinline__ void AddToBin(uint32_t bin, uint64_t weight);
  template <class Key, class Weight>
  __device__ void FillBins(uint32_t lowest, uint32_t range, int shift, Key key,
                           Weight weight);
  __device__ __noinline__ void PickBin(uint64_t target);
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

  Team& team_;
  WideScratch& s_;
  const DecideRow& row_;
  const RowPlan& plan_;
  uint64_t* tile_mass_;
  KeptRange range_;
};

__device__ __forceinline__ void WideFilters::AddToBin(uint32_t bin,
                                                      uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&s_.bins[0][bin], low);
  const uint32_t carry = before + low < before ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomicAdd(&s_.bins[1][bin], high);
}

// This block's share of a histogram.
template <class Key, class Weight>
__device__ void WideFilters::FillBins(uint32_t lowest, uint32_t range,
                                      int shift, Key key, Weight weight) {
  for (int i = static_cast<int>(threadIdx.x); i < WideScratch::kBins;
       i += kDecideThreads) {
    s_.bins[0][i] = 0;
    s_.bins[1][i] = 0;
  }
  if (threadIdx.x == 0) s_.picked = -1;
  __syncthreads();
  ForEachTile(team_, row_, OrderedKey(range_.to.value),
              [&](int tile, const LaneLogits& logits) {
                const int first = FirstIdOfLane(row_, tile);
                uint32_t offsets[kIdsPerLane];
                unsigned active = 0;
                uint32_t low = ~0u;
                uint32_t high = 0;
#pragma unroll
                for (int e = 0; e < kIdsPerLane; ++e) {
                  const float x = logits.x[e];
                  offsets[e] = key(x, first + e) - lowest;
                  if (range_.Keeps(x, first + e) && offsets[e] <= range) {
                    active |= 1u << e;
                    low = min(low, offsets[e]);
                    high = max(high, offsets[e]);
                  }
                }
                low = __reduce_min_sync(~0u, low);
                if (low == ~0u) return;
                // Equal tokens, as one: they would take turns at their bin.
                if (__reduce_max_sync(~0u, high) == low) {
                  const unsigned count = __reduce_add_sync(~0u, __popc(active));
                  const unsigned lanes = __ballot_sync(~0u, active != 0);
                  if (static_cast<int>(threadIdx.x % 32) + 1 == __ffs(lanes)) {
                    float x = logits.x[0];
#pragma unroll
                    for (int e = 1; e < kIdsPerLane; ++e) {
                      if ((active >> e & 1) != 0) x = logits.x[e];
                    }
                    AddToBin(low >> shift, weight(x) * count);
                  }
                  return;
                }
#pragma unroll
                for (int e = 0; e < kIdsPerLane; ++e) {
                  if ((active >> e & 1) != 0) {
                    AddToBin(offsets[e] >> shift, weight(logits.x[e]));
                  }
                }
              });
}

// Adds up all blocks' bins, each block a part of them, and finds the one, from
// the last, at which the sum reaches the target.
__device__ __noinline__ inline void WideFilters::PickBin(uint64_t target) {
  team_.Sync();
  constexpr int kBins = WideScratch::kBins;
  const int part = kBins / team_.size();
  const int each = CeilDiv(part, kDecideThreads);
  const int from_top =
      team_.rank() * part + static_cast<int>(threadIdx.x) * each;
  constexpr int kMaxEach = kBins / kDecideThreads;
  uint64_t sums[kMaxEach];
  uint64_t own = 0;
#pragma unroll
  for (int i = 0; i < kMaxEach; ++i) {
    sums[i] = 0;
    if (i < each) {
      const int bin = kBins - 1 - from_top - i;
      for (int r = 0; r < team_.size(); ++r) {
        sums[i] += (uint64_t{*team_.In(r, &s_.bins[1][bin])} << 32) +
                   *team_.In(r, &s_.bins[0][bin]);
      }
    }
    own += sums[i];
  }
  uint64_t of_block;
  const uint64_t upto = team_.block().InclusiveSum(own, &of_block);
  const uint64_t* const of_blocks = team_.Exchange(of_block);
  uint64_t before = upto - own;
  for (int r = 0; r < team_.rank(); ++r) before += of_blocks[r];
#pragma unroll
  for (int i = 0; i < kMaxEach; ++i) {
    if (before < target && target <= before + sums[i]) {
      for (int r = 0; r < team_.size(); ++r) {
        *team_.In(r, &s_.picked) = kBins - 1 - from_top - i;
        *team_.In(r, &s_.before_picked) = before;
        *team_.In(r, &s_.in_picked) = sums[i];
      }
    }
    before += sums[i];
  }
  team_.Sync();
}

template <class Key, class Weight>
__device__ WideFilters::Selection WideFilters::Select(uint32_t lowest,
                                                      uint32_t highest,
                                                      uint64_t target, Key key,
                                                      Weight weight) {
  constexpr int kLog2Bins = 11;
  static_assert(WideScratch::kBins == 1 << kLog2Bins, "digits of keys");
  uint32_t range = highest - lowest;
  for (;;) {
    const int shift = max(32 - kLog2Bins - __clz(static_cast<int>(range)), 0);
    FillBins(lowest, range, shift, key, weight);
    PickBin(target);
    const int picked = s_.picked;
    const uint64_t before = s_.before_picked;
    const uint64_t there = s_.in_picked;
    __syncthreads();  // before they are reset
    if (picked < 0) return {false, 0, 0, 0};
    target -= before;
    lowest += static_cast<uint32_t>(picked) << shift;
    if (shift == 0) return {true, lowest, target, there};
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
  if (ties * each >= value.there) return true;
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
  high = team_.Max(high);
  low = team_.Min(low);
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
  lowest = team_.Min(lowest);
  if (lowest == ~0u) return;
  uint32_t last = 0;
  ForEach([&](float x, int id, bool kept) {
    if (kept && OrderedKey(x) == lowest) {
      last = max(last, static_cast<uint32_t>(id));
    }
  });
  range_.from =
      Ceiling{FromOrderedKey(lowest), static_cast<int32_t>(team_.Max(last))};
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
  team_.Sync();
  ForEach([&](float x, int id, bool kept) {
    if (!kept) return;
    const int at = atomicAdd(team_.In(0, &s_.count), 1);
    if (at < kMaxTopLogprobs) {
      *team_.In(0, &s_.best[at]) = CandidateKey(OrderedKey(x), id);
    }
  });
  team_.Sync();
  const int count = min(s_.count, kMaxTopLogprobs);
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t key = thread < count ? s_.best[thread] : 0;
  int rank = 0;
  for (int i = 0; i < count; ++i) {
    rank += s_.best[i] < key || (s_.best[i] == key && i < thread) ? 1 : 0;
  }
  __syncthreads();
  if (thread < count) s_.best[rank] = key;
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
  if (team_.leads()) {
    for (int i = static_cast<int>(threadIdx.x); i < row_.num_tiles;
         i += kDecideThreads) {
      tile_mass_[i] = 0;
    }
  }
  team_.Sync();
  uint64_t own = 0;
  ForEachTile(team_, row_, OrderedKey(range_.to.value),
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
                  *team_.In(0, &tile_mass_[tile]) = mass;
                  own += mass;
                }
              });
  drawn.mass = team_.Sum(own);
  drawn.kept = range_;
  if (!team_.leads()) {
    drawn.token = 0;  // there is one
    return drawn;
  }
  const uint64_t target = DrawTarget(inputs.numerator, drawn.mass);
  const Block::Pick pick = team_.block().PickByWeight(
      row_.num_tiles, target, [&](int i) { return tile_mass_[i]; });
  // Only edits that are not what they should be leave none.
  const int tile = max(pick.index, 0);
  const TokenInTile token = PickInTile(
      row_, tile, LogitsOfTile(row_, tile),
      [&](float x, int id) {
        return range_.Keeps(x, id) ? weigh(x) : uint64_t{0};
      },
      [&](uint64_t) { return target - pick.before; });
  drawn.token = min(token.id, row_.vocab - 1);
  drawn.x = token.x;
  return drawn;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_WIDE_CUDA_CUH_
