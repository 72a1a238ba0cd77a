#ifndef TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_

#include "ops/sampler/sampler_candidates_cuda.cuh"

// Filters where few tokens can pass them: what they keep is a range of ranks.
// By one warp, which needs no barriers.

namespace tenon::cuda {

// What a draw needs beside the row.
struct DrawInputs {
  uint64_t numerator;   // of u
  double min_p_offset;  // of a logit that min-p just keeps, from the best
  float mu;
  bool xtc_acts;

  __device__ float MinPThreshold(float best) const {
    return FloatAbove(strict::Add(static_cast<double>(best), min_p_offset));
  }
};

class NarrowFilters {
 public:
  // Of the ranks [low, high), at least one.
  __device__ NarrowFilters(const CandidateScratch& candidates,
                           const DecideRow& row, const RowPlan& plan, int low,
                           int high)
      : c_(candidates), row_(row), plan_(plan), low_(low), high_(high) {}

  __device__ uint64_t mass() const {
    return c_.prefix[high_] - c_.prefix[low_];
  }

  // Applies the filters and draws; the scratch has `places` ranks. top-n-sigma
  // keeps logits from sigma_floor on.
  __device__ __forceinline__ Drawn Run(const DrawInputs& inputs,
                                       float sigma_floor, int places) {
    const bool typical = plan_.typical_p < 1.0f;
    const bool typical_first = plan_.typical_first();
    if (plan_.top_n_sigma > 0.0f) {
      high_ = low_ + CountRanks(low_, high_, [&](int r) {
                return c_.Logit(r) >= sigma_floor;
              });
    }
    if (plan_.top_k != 0) high_ = min(high_, plan_.top_k);
    if (typical_first) CallKeepTypical();
    KeepTopPAndMinP(inputs);
    if (typical && !typical_first) CallKeepTypical();
    if (inputs.xtc_acts) {
      const uint64_t least = XtcMass(plan_, mass());
      const int choices = CountRanks(low_, high_, [&](int r) {
        return c_.prefix[r + 1] - c_.prefix[r] >= least;
      });
      low_ += max(choices - 1, 0);
    }
    return Draw(inputs, places);
  }

  // Ranks [low, high) are kept.
  __device__ int low() const { return low_; }
  __device__ int high() const { return high_; }

 private:
  static __device__ int Lane() { return static_cast<int>(threadIdx.x % 32); }

  // How many ranks of [begin, end) a predicate holds for.
  template <class Predicate>
  __device__ int CountRanks(int begin, int end, Predicate holds) {
    int count = 0;
#pragma unroll 1
    for (int base = begin; base < end; base += 32) {
      const int rank = base + Lane();
      count += __popc(__ballot_sync(~0u, rank < end && holds(rank)));
    }
    return count;
  }
  // The sum of value(rank) over what is kept.
  template <class Value>
  __device__ uint64_t SumRanks(Value value) {
    uint64_t own = 0;
    for (int r = low_ + Lane(); r < high_; r += 32) own += value(r);
    return WarpSum64(own);
  }

  __device__ void KeepTopPAndMinP(const DrawInputs& inputs) {
    const bool typical_first = plan_.typical_first();
    uint64_t target = ~uint64_t{0};
    if (plan_.top_p < 1.0f) {
      const bool of_kept =
          plan_.top_p_of_kept() && (plan_.narrowed() || typical_first);
      target = MassTarget(plan_.top_p, of_kept ? mass() : row_.total);
    }
    float threshold = -INFINITY;
    if (plan_.min_p > 0.0f) {
      const float best = typical_first ? c_.Logit(low_) : row_.best;
      threshold = fminf(inputs.MinPThreshold(best), best);
    }
    const uint64_t before = c_.prefix[low_];
    int by_mass = 1;  // and that which reaches the target
    int by_logit = 0;
#pragma unroll 1
    for (int base = low_; base < high_; base += 32) {
      const int rank = min(base + Lane(), high_ - 1);
      const bool exists = base + Lane() < high_;
      by_mass += __popc(
          __ballot_sync(~0u, exists && c_.prefix[rank + 1] - before < target));
      by_logit +=
          __popc(__ballot_sync(~0u, exists && c_.Logit(rank) >= threshold));
    }
    high_ = min(high_, low_ + min(by_mass, by_logit));
  }

  __device__ __forceinline__ void KeepTypical();
  // Rare, and so not in line. Of an object of its own: what a function takes by
  // reference is in memory.
  struct Range {
    int low;
    int high;
  };
  static __device__ __noinline__ Range
  RangeOfTypical(const CandidateScratch& candidates, const DecideRow& row,
                 const RowPlan& plan, Range range) {
    NarrowFilters filters(candidates, row, plan, range.low, range.high);
    filters.KeepTypical();
    return {filters.low_, filters.high_};
  }
  __device__ void CallKeepTypical() {
    const Range range = RangeOfTypical(c_, row_, plan_, {low_, high_});
    low_ = range.low;
    high_ = range.high;
  }

  // Whether the draw is by the masses that filters see.
  __device__ bool MassesAreOfDraw(float best) const {
    return best == row_.best && plan_.scale == plan_.draw_scale;
  }
  __device__ uint64_t DrawMass(float best, int rank) {
    return FixedMass(strict::Weight(c_.Logit(rank), best, plan_.draw_scale));
  }
  __device__ uint64_t DrawMass(float best) {
    if (MassesAreOfDraw(best)) return mass();
    return SumRanks([&](int r) { return DrawMass(best, r); });
  }

  __device__ Drawn Draw(const DrawInputs& inputs, int places) {
    Drawn drawn;
    drawn.best = c_.Logit(low_);
    drawn.mass = DrawMass(drawn.best);
    if (plan_.mirostat_tau > 0.0f) {
      const float threshold =
          MirostatThreshold(plan_, drawn.best, drawn.mass, inputs.mu);
      high_ = low_ + CountRanks(low_, high_, [&](int r) {
                return c_.Logit(r) >= threshold;
              });
      drawn.mass = DrawMass(drawn.best);
    }
    drawn.kept.from = {drawn.best, c_.Id(low_)};
    drawn.kept.to = {c_.Logit(high_ - 1), c_.Id(high_ - 1)};
    // Each lane has some neighbours in draw order.
    const int each = CeilDiv(places, 32);
    const int begin = min(Lane() * each, places);
    const int end = min(begin + each, places);
    const bool as_ranked = MassesAreOfDraw(drawn.best);
    const auto mass_of = [&](int rank) -> uint64_t {
      if (rank < low_ || rank >= high_) return 0;
      return as_ranked ? c_.prefix[rank + 1] - c_.prefix[rank]
                       : DrawMass(drawn.best, rank);
    };
    uint64_t own = 0;
#pragma unroll 1
    for (int i = begin; i < end; ++i) own += mass_of(c_.by_place[i]);
    const uint64_t upto = WarpInclusiveSum(own);
    const uint64_t target = DrawTarget(inputs.numerator, drawn.mass);
    uint64_t before = upto - own;
    const bool mine = before <= target && target < upto;
    int rank = low_;
#pragma unroll 1
    for (int i = begin; i < end && before <= target; ++i) {
      const int next = c_.by_place[i];
      const uint64_t mass = mass_of(next);
      if (mass > 0) rank = next;
      before += mass;
    }
    const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, mine))) - 1;
    rank = __shfl_sync(~0u, rank, max(lane, 0));
    drawn.x = c_.Logit(rank);
    drawn.token = c_.Id(rank);
    return drawn;
  }

  const CandidateScratch& c_;
  const DecideRow& row_;
  const RowPlan& plan_;
  int low_;
  int high_;
};

__device__ __forceinline__ void NarrowFilters::KeepTypical() {
  const float centre =
      TypicalCentre(plan_, row_.best, SumRanks([&](int r) {
                      return FixedSurprise(c_.Logit(r), row_.best, plan_.scale);
                    }),
                    mass());
  const uint64_t target = MassTarget(plan_.typical_p, mass());
  const auto distance = [&](int r) {
    return TypicalDistance(c_.Logit(r), centre);
  };
  // The first rank of [begin, end) at which a predicate holds, which it does
  // for all after it; `end` if none. By each lane for itself.
  const auto first_rank = [](int begin, int end, auto holds) {
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (holds(middle)) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  };
  // Distances fall up to here and rise from here.
  const int middle = low_ + CountRanks(low_, high_, [&](int r) {
                       return c_.Logit(r) >= centre;
                     });
  uint32_t nearest = ~0u;  // the smallest distance that is enough, as bits
  for (int r = low_ + Lane(); r < high_; r += 32) {
    const float d = distance(r);
    const int begin =
        first_rank(low_, middle, [&](int i) { return distance(i) <= d; });
    const int end =
        first_rank(middle, high_, [&](int i) { return distance(i) > d; });
    if (c_.prefix[end] - c_.prefix[begin] >= target) {
      nearest = min(nearest, __float_as_uint(d));
    }
  }
  nearest = __reduce_min_sync(~0u, nearest);
  if (nearest == ~0u) return;
  const float d = __uint_as_float(nearest);
  const int end = middle + CountRanks(middle, high_,
                                      [&](int r) { return distance(r) <= d; });
  low_ += CountRanks(low_, middle, [&](int r) { return distance(r) > d; });
  high_ = end;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_
