#ifndef TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_

#include "ops/sampler/sampler_decide_row_cuda.cuh"

// Filters where few tokens can pass them: these candidates are sorted by rank,
// and what filters keep is a range of ranks.

namespace tenon::cuda {

// What a filtered row is drawn from.
struct Drawn {
  int token = -1;
  float x = 0.0f;
  float best = 0.0f;  // of the kept tokens
  uint64_t mass = 0;  // of the kept tokens, by draw_scale
  KeptRange kept;
};

// What a draw needs beside the row.
struct DrawInputs {
  uint64_t numerator;  // of u
  bool xtc_acts;
  float mu;
};

class NarrowFilters {
 public:
  // The candidates are in block.s.keys.
  __device__ NarrowFilters(Block& block, const DecideRow& row, int count)
      : block_(block), s_(block.s), row_(row), plan_(*row.plan), high_(count) {
    block_.Sort(count);
    AddUp(count);
  }

  // Of all candidates.
  __device__ uint64_t mass() const {
    return s_.prefix[high_] - s_.prefix[low_];
  }

  // Applies the filters and draws.
  __device__ Drawn Run(const DrawInputs& inputs) {
    const bool llama = plan_.order == FilterOrder::kLlamaCpp;
    const bool typical = plan_.typical_p < 1.0f;
    if (plan_.top_k != 0) high_ = min(high_, plan_.top_k);
    if (llama && typical) KeepTypical();
    KeepTopPAndMinP(llama && typical);
    if (!llama && typical) KeepTypical();
    if (inputs.xtc_acts) {
      const uint64_t least = XtcMass(plan_, mass());
      const int choices =
          CountRanks([&](int r) { return row_.Mass(Logit(r)) >= least; });
      low_ += max(choices - 1, 0);
    }
    return Draw(inputs);
  }

 private:
  __device__ float Logit(int rank) const {
    return LogitOfCandidate(s_.sorted[rank]);
  }

  __device__ void AddUp(int count) {
    const int each = CeilDiv(count, kDecideThreads);
    const int begin = min(static_cast<int>(threadIdx.x) * each, count);
    const int end = min(begin + each, count);
    uint64_t own = 0;
    for (int r = begin; r < end; ++r) own += row_.Mass(Logit(r));
    uint64_t total;
    uint64_t before = block_.InclusiveSum(own, &total) - own;
    for (int r = begin; r < end; ++r) {
      s_.prefix[r] = before;
      before += row_.Mass(Logit(r));
    }
    if (threadIdx.x == 0) s_.prefix[count] = total;
    __syncthreads();
  }

  // How many ranks of [begin, end) a predicate holds for.
  template <class Predicate>
  __device__ int CountRanks(int begin, int end, Predicate holds) {
    int count = 0;
    for (int base = begin; base < end; base += kDecideThreads) {
      const int rank = base + static_cast<int>(threadIdx.x);
      count += __syncthreads_count(rank < end && holds(rank) ? 1 : 0);
    }
    return count;
  }
  template <class Predicate>
  __device__ int CountRanks(Predicate holds) {
    return CountRanks(low_, high_, holds);
  }

  __device__ void KeepTopPAndMinP(bool after_typical) {
    int high = high_;
    if (plan_.top_p < 1.0f) {
      const bool narrowed =
          plan_.top_k != 0 || plan_.top_n_sigma > 0.0f || after_typical;
      const uint64_t of =
          plan_.top_p_of_kept() && narrowed ? mass() : row_.total;
      const uint64_t target = MassTarget(plan_.top_p, of);
      const uint64_t before = s_.prefix[low_];
      high = min(high, low_ + 1 + CountRanks([&](int r) {
                         return s_.prefix[r + 1] - before < target;
                       }));
    }
    if (plan_.min_p > 0.0f) {
      const float best = after_typical ? Logit(low_) : row_.best;
      const float threshold = fminf(MinPThreshold(plan_, best), best);
      high =
          min(high,
              low_ + CountRanks([&](int r) { return Logit(r) >= threshold; }));
    }
    high_ = high;
  }

  __device__ __noinline__ void KeepTypical() {
    uint64_t own = 0;
    for (int r = low_ + static_cast<int>(threadIdx.x); r < high_;
         r += kDecideThreads) {
      own += FixedSurprise(Logit(r), row_.best, plan_.scale);
    }
    const float centre =
        TypicalCentre(plan_, row_.best, block_.Sum(own), mass());
    const uint64_t target = MassTarget(plan_.typical_p, mass());
    const auto distance = [&](int r) {
      return TypicalDistance(Logit(r), centre);
    };
    // Distances fall up to here and rise from here.
    const int middle =
        low_ + CountRanks([&](int r) { return Logit(r) >= centre; });
    uint32_t nearest = ~0u;  // the smallest distance that is enough, as bits
    for (int r = low_ + static_cast<int>(threadIdx.x); r < high_;
         r += kDecideThreads) {
      const float d = distance(r);
      const int begin =
          FirstRank(low_, middle, [&](int i) { return distance(i) <= d; });
      const int end =
          FirstRank(middle, high_, [&](int i) { return distance(i) > d; });
      if (s_.prefix[end] - s_.prefix[begin] >= target) {
        nearest = min(nearest, __float_as_uint(d));
      }
    }
    nearest = block_.Min(nearest);
    if (nearest == ~0u) return;
    const float d = __uint_as_float(nearest);
    const int end = middle + CountRanks(middle, high_, [&](int r) {
                      return distance(r) <= d;
                    });
    low_ += CountRanks(low_, middle, [&](int r) { return distance(r) > d; });
    high_ = end;
  }

  // The first rank of [begin, end) at which a predicate holds, `end` if none,
  // by each thread for itself; it holds for all after the first.
  template <class Predicate>
  static __device__ int FirstRank(int begin, int end, Predicate holds) {
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (holds(middle)) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }

  __device__ uint64_t DrawMass(float best) {
    if (best == row_.best && plan_.scale == plan_.draw_scale) return mass();
    uint64_t own = 0;
    for (int r = low_ + static_cast<int>(threadIdx.x); r < high_;
         r += kDecideThreads) {
      own += FixedMass(strict::Weight(Logit(r), best, plan_.draw_scale));
    }
    return block_.Sum(own);
  }

  __device__ Drawn Draw(const DrawInputs& inputs) {
    Drawn drawn;
    drawn.best = Logit(low_);
    drawn.mass = DrawMass(drawn.best);
    if (plan_.mirostat_tau > 0.0f) {
      const float threshold =
          MirostatThreshold(plan_, drawn.best, drawn.mass, inputs.mu);
      high_ = low_ + CountRanks([&](int r) { return Logit(r) >= threshold; });
      drawn.mass = DrawMass(drawn.best);
    }
    const uint64_t first = s_.sorted[low_];
    const uint64_t last = s_.sorted[high_ - 1];
    drawn.kept.from = {LogitOfCandidate(first), IdOfCandidate(first)};
    drawn.kept.to = {LogitOfCandidate(last), IdOfCandidate(last)};
    const uint64_t target = DrawTarget(inputs.numerator, drawn.mass);
    const int count = high_ - low_;
    for (int i = static_cast<int>(threadIdx.x); i < count;
         i += kDecideThreads) {
      const uint64_t candidate = s_.sorted[low_ + i];
      const int place = DrawOrder(IdOfCandidate(candidate), row_.vocab);
      s_.keys[i] = (uint64_t{static_cast<uint32_t>(place)} << 32) |
                   ~static_cast<uint32_t>(candidate >> 32);
    }
    __syncthreads();
    block_.Sort(count);
    const auto logit = [&](int i) {
      return FromOrderedKey(static_cast<uint32_t>(s_.sorted[i]));
    };
    const Block::Pick pick = block_.PickByWeight(count, target, [&](int i) {
      return FixedMass(strict::Weight(logit(i), drawn.best, plan_.draw_scale));
    });
    const int place = static_cast<int>(s_.sorted[pick.index] >> 32);
    drawn.x = logit(pick.index);
    drawn.token = static_cast<int>(
        IdAt(place / kSubTile, place % kSubTile, row_.num_tiles));
    return drawn;
  }

  Block& block_;
  BlockScratch& s_;
  const DecideRow& row_;
  const RowPlan& plan_;
  int low_ = 0;
  int high_;
};

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_NARROW_CUDA_CUH_
