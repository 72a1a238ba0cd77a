#include "ops/sampler/philox.h"
#include "ops/sampler/sampler_backend.h"
#include "ops/sampler/sampler_select_cuda.cuh"

namespace tenon {
namespace {

using cuda::DecideScratch;
using cuda::DeviceLogits;
using cuda::kDecideThreads;
using cuda::kDecideWarps;
using cuda::kIdsPerLane;
using cuda::LanePart;
using cuda::Pick;
using cuda::Selection;

constexpr int kSummarizeWarps = 8;

template <class T>
__device__ __forceinline__ DeviceLogits<T> LogitsOfRow(const SamplerParams& p,
                                                       int64_t row,
                                                       bool aligned) {
  return {p.logits.As<const T>() + row * p.logits.stride[0],
          static_cast<int>(p.logits.shape[1]), aligned};
}

// Kernel A: one warp per sub-tile, so that a summary does not depend on how
// sub-tiles are dealt to blocks.
template <class T>
__global__ void __launch_bounds__(32 * kSummarizeWarps)
    SummarizeKernel(SamplerParams p, bool aligned, int num_tiles,
                    int blocks_per_row, int tiles_per_block) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int begin = blockIdx.x % blocks_per_row * tiles_per_block;
  const int end = min(begin + tiles_per_block, num_tiles);
  const int warp = threadIdx.x / 32;
  if (begin + warp >= end) return;
  const DeviceLogits<T> logits = LogitsOfRow<T>(p, row, aligned);
  SubTile* out = static_cast<SubTile*>(p.workspace) + row * num_tiles;
  LanePart<T> part = cuda::LoadPart(logits, begin + warp);
  const RowPlan plan = MakeRowPlan(p.params[row], logits.vocab);
  const bool with_sum = !plan.greedy || p.logprobs.present();
  for (int tile = begin + warp; tile < end; tile += kSummarizeWarps) {
    LanePart<T> next = part;
    if (tile + kSummarizeWarps < end) {
      next = cuda::LoadPart(logits, tile + kSummarizeWarps);
    }
    SubTile summary = {-INFINITY, 0.0f};
#pragma unroll
    for (int j = 0; j < kIdsPerLane; ++j) {
      summary.max = cuda::MaxOrNan(summary.max, cuda::ToFloat(part.x[j]));
    }
    summary.max = cuda::WarpMaxOrNan(summary.max);
    // Rows with NaN or +inf have no use for sums; -inf has nothing to sum.
    if (with_sum && fabsf(summary.max) < INFINITY) {
#pragma unroll
      for (int j = 0; j < kIdsPerLane; ++j) {
        summary.sum +=
            cuda::Exp2((cuda::ToFloat(part.x[j]) - summary.max) * plan.scale);
      }
      summary.sum = cuda::WarpSum(summary.sum);
    }
    if (threadIdx.x % 32 == 0) out[tile] = summary;
    part = next;
  }
}

// One row between its summary and its token, on one block.
template <class T>
struct DeviceRow {
  DeviceLogits<T> logits;
  int num_tiles;
  RowPlan plan;
  DecideScratch& scratch;
  const float* tile_max;  // in shared memory, as the next
  double* mass;
  float best;
  double total;

  // The probability of a logit in proportion to the best one's.
  __device__ __forceinline__ float Weight(float x) const {
    return cuda::Exp2((x - best) * plan.scale);
  }
};

// mass[i] = sum of weigh(logit, id) over sub-tile i, 0 for those whose logits
// are all less than `lowest`. Call after a __syncthreads(); ends with one.
template <class T, class Weigh>
__device__ void FillMass(const DeviceRow<T>& row, float lowest, Weigh weigh) {
  for (int i = threadIdx.x / 32; i < row.num_tiles; i += kDecideWarps) {
    float sum = 0.0f;
    if (row.tile_max[i] >= lowest) {
      const LanePart<T> part = cuda::LoadPart(row.logits, i);
#pragma unroll
      for (int j = 0; j < kIdsPerLane; ++j) {
        sum += weigh(cuda::ToFloat(part.x[j]), cuda::FirstIdOfLane(i) + j);
      }
      sum = cuda::WarpSum(sum);
    }
    if (threadIdx.x % 32 == 0) row.mass[i] = sum;
  }
  __syncthreads();
}

// Has whole warps call visit(logit, wanted), wanted being true for the logits
// that `within` keeps in [lowest, highest].
template <class T, class Visit>
__device__ void ForEachInRange(const DeviceRow<T>& row, const Cutoff& within,
                               float lowest, float highest, Visit visit) {
  Cutoff cutoff = within;
  if (lowest > within.value) cutoff = Cutoff{lowest};
  for (int i = threadIdx.x / 32; i < row.num_tiles; i += kDecideWarps) {
    if (row.tile_max[i] < cutoff.value) continue;
    const int first = cuda::FirstIdOfLane(i);
    const LanePart<T> part = cuda::LoadPart(row.logits, i);
#pragma unroll
    for (int j = 0; j < kIdsPerLane; ++j) {
      const float x = cuda::ToFloat(part.x[j]);
      visit(x, first + j < row.logits.vocab && x <= highest &&
                   cutoff.Keeps(x, first + j));
    }
  }
}

// Has whole warps call visit(max, exists) for the sub-tiles' maxima.
template <class T, class Visit>
__device__ void ForEachMax(const DeviceRow<T>& row, Visit visit) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x - lane; i < row.num_tiles; i += kDecideThreads) {
    const bool exists = i + lane < row.num_tiles;
    visit(exists ? row.tile_max[i + lane] : 0.0f, exists);
  }
}

// Keeps what is larger than `value`, and the first `count` tokens that equal
// it.
template <class T>
__device__ Cutoff CutoffAtTie(const DeviceRow<T>& row, float value,
                              uint64_t count) {
  const auto is_tie = [value](float x, int) { return x == value ? 1.f : 0.f; };
  FillMass(row, value, is_tie);
  const Pick tile = cuda::PickByWeight(
      row.scratch, row.mass, row.num_tiles,
      [count](double) { return static_cast<double>(count) - 0.5; });
  return {value, cuda::PickInTile(row.scratch, row.logits, tile, is_tie)};
}

template <class T>
__device__ Cutoff SelectTopK(const DeviceRow<T>& row) {
  const uint64_t k = static_cast<uint64_t>(row.plan.top_k);
  Cutoff at_least;
  // The k-th largest of the sub-tiles' maxima is a lower bound of the k-th
  // largest logit, and leaves few sub-tiles to read.
  if (row.plan.top_k <= row.num_tiles) {
    const auto for_each_max = [&](float, float, auto add) {
      ForEachMax(row, [&](float max, bool exists) { add(max, 1, exists); });
    };
    at_least.value = cuda::SelectFromTop(row.scratch, k, for_each_max).value;
  }
  const auto for_each_logit = [&](float lowest, float highest, auto add) {
    ForEachInRange(row, at_least, lowest, highest,
                   [&](float x, bool wanted) { add(x, 1, wanted); });
  };
  const Selection kth = cuda::SelectFromTop(row.scratch, k, for_each_logit);
  return CutoffAtTie(row, kth.value, kth.needed);
}

// Narrows `within` to its best tokens that make up the target.
template <class T>
__device__ Cutoff SelectTopP(const DeviceRow<T>& row, const Cutoff& within,
                             uint64_t target, float lower_bound) {
  Cutoff searched = within;
  if (lower_bound > searched.value) searched = Cutoff{lower_bound};
  // Where the sub-tiles' maxima alone reach the target, the cutoff is not below
  // where they do.
  const auto for_each_max = [&](float, float, auto add) {
    ForEachMax(row, [&](float max, bool exists) {
      const bool active = exists && max > searched.value;
      add(max, active ? FixedMass(row.Weight(max)) : 0, active);
    });
  };
  const Selection bound =
      cuda::SelectFromTop(row.scratch, target, for_each_max);
  if (bound.found && bound.value > searched.value) {
    searched = Cutoff{bound.value};
  }
  const auto for_each_logit = [&](float lowest, float highest, auto add) {
    ForEachInRange(row, searched, lowest, highest, [&](float x, bool wanted) {
      add(x, wanted ? FixedMass(row.Weight(x)) : 0, wanted);
    });
  };
  const Selection selection =
      cuda::SelectFromTop(row.scratch, target, for_each_logit);
  if (!selection.found) return within;
  const uint64_t each = FixedMass(row.Weight(selection.value));
  return CutoffAtTie(row, selection.value,
                     (selection.needed + each - 1) / each);
}

template <class T>
__device__ uint64_t KeptMass(const DeviceRow<T>& row, const Cutoff& cutoff) {
  uint64_t own = 0;
  ForEachInRange(row, cutoff, -INFINITY, row.best, [&](float x, bool wanted) {
    own += wanted ? FixedMass(row.Weight(x)) : 0;
  });
  uint64_t total;
  cuda::InclusiveScan(own, row.scratch.warp_masses, &total);
  return total;
}

// All filters as one.
template <class T>
__device__ Cutoff SelectKept(const DeviceRow<T>& row) {
  const RowPlan& plan = row.plan;
  Cutoff cutoff;
  uint64_t mass = static_cast<uint64_t>(row.total * kMassOfBest);
  int64_t count = row.logits.vocab;
  if (plan.top_k != 0) {
    cutoff = SelectTopK(row);
    if (plan.top_p_of_kept() && plan.top_p < 1.0f) {
      mass = KeptMass(row, cutoff);
      count = plan.top_k;
    }
  }
  if (plan.min_p > 0.0f) {
    const float value = MinPThreshold(plan, row.best);
    if (value > cutoff.value) cutoff = Cutoff{value};
  }
  if (plan.top_p < 1.0f) {
    cutoff = SelectTopP(row, cutoff, MassTarget(plan.top_p, mass),
                        TopPLowerBound(plan, row.best, mass, count));
  }
  return cutoff;
}

// The token at which the kept distribution's cumulative sum exceeds `uniform`.
template <class T>
__device__ int DrawToken(const DeviceRow<T>& row, double uniform) {
  Cutoff cutoff;
  if (row.plan.filtered()) {
    cutoff = SelectKept(row);
    FillMass(row, cutoff.value, [&](float x, int id) {
      return cutoff.Keeps(x, id) ? row.Weight(x) : 0.0f;
    });
  }
  const Pick tile =
      cuda::PickByWeight(row.scratch, row.mass, row.num_tiles,
                         [uniform](double total) { return uniform * total; });
  // Relative to the sub-tile's own maximum, as its sum was made.
  const float max = row.tile_max[tile.index];
  return cuda::PickInTile(row.scratch, row.logits, tile, [&](float x, int id) {
    return cutoff.Keeps(x, id) ? cuda::Exp2((x - max) * row.plan.scale) : 0.0f;
  });
}

template <class T>
__device__ int FirstBestToken(const DeviceRow<T>& row) {
  __syncthreads();
  for (int i = threadIdx.x; i < row.num_tiles; i += kDecideThreads) {
    row.mass[i] = row.tile_max[i] == row.best ? 1.0 : 0.0;
  }
  __syncthreads();
  const Pick tile = cuda::PickByWeight(row.scratch, row.mass, row.num_tiles,
                                       [](double) { return 0.0; });
  const float best = row.best;
  return cuda::PickInTile(
      row.scratch, row.logits, {tile.index, 0.0},
      [best](float x, int) { return x == best ? 1.0f : 0.0f; });
}

// The largest maximum, NaN where any is.
__device__ float BestLogit(DecideScratch& scratch, const float* tile_max,
                           int num_tiles) {
  float best = -INFINITY;
  for (int i = threadIdx.x; i < num_tiles; i += kDecideThreads) {
    best = cuda::MaxOrNan(best, tile_max[i]);
  }
  best = cuda::WarpMaxOrNan(best);
  if (threadIdx.x % 32 == 0) scratch.warp_max[threadIdx.x / 32] = best;
  __syncthreads();
  return cuda::WarpMaxOrNan(scratch.warp_max[threadIdx.x % 32]);
}

// What these kernels do not have: no token rather than another one.
__device__ bool AsksForMore(const RowPlan& plan) {
  return plan.typical_p < 1.0f || plan.top_n_sigma > 0.0f ||
         plan.xtc_probability > 0.0f || plan.mirostat_tau > 0.0f ||
         plan.order == FilterOrder::kLlamaCpp || plan.only_allowed;
}

// Kernel B: one block per row.
template <class T>
__global__ void __launch_bounds__(kDecideThreads)
    DecideKernel(SamplerParams p, bool aligned, int num_tiles) {
  extern __shared__ uint4 shared[];
  auto* const scratch = reinterpret_cast<DecideScratch*>(shared);
  double* const mass = reinterpret_cast<double*>(scratch + 1);
  float* const tile_max = reinterpret_cast<float*>(mass + num_tiles);

  const int64_t index = blockIdx.x;
  const SamplingParams& params = p.params[index];
  const SubTile* tiles =
      static_cast<const SubTile*>(p.workspace) + index * num_tiles;
  for (int i = threadIdx.x; i < num_tiles; i += kDecideThreads) {
    tile_max[i] = tiles[i].max;
  }
  const bool with_logprob = p.logprobs.present();
  DeviceRow<T> row = {LogitsOfRow<T>(p, index, aligned),
                      num_tiles,
                      MakeRowPlan(params, p.logits.shape[1]),
                      *scratch,
                      tile_max,
                      mass,
                      BestLogit(*scratch, tile_max, num_tiles),
                      0.0};

  SampleStatus status = SampleStatus::kOk;
  int token = -1;
  if (isnan(row.best)) {
    status = SampleStatus::kNonFinite;
  } else if (row.best == -INFINITY || AsksForMore(row.plan)) {
    status = SampleStatus::kNoSupport;
  } else if (row.best == INFINITY) {
    token = FirstBestToken(row);
  } else {
    if (!row.plan.greedy || with_logprob) {
      for (int i = threadIdx.x; i < num_tiles; i += kDecideThreads) {
        mass[i] = static_cast<double>(tiles[i].sum) *
                  static_cast<double>(row.Weight(tile_max[i]));
      }
      __syncthreads();
      row.total = cuda::SumWeights(*scratch, mass, num_tiles);
    }
    token = row.plan.greedy
                ? FirstBestToken(row)
                : DrawToken(row, UniformAt(params.seed, params.position,
                                           RandomStream::kTarget));
  }
  if (threadIdx.x != 0) return;
  p.tokens.As<int32_t>()[index] = token;
  p.statuses.As<int32_t>()[index] = static_cast<int32_t>(status);
  if (!with_logprob) return;
  double logprob = NAN;
  if (row.best == INFINITY) {
    logprob = 0.0;
  } else if (token >= 0) {
    const double gap =
        static_cast<double>(cuda::ToFloat(row.logits.data[token])) -
        static_cast<double>(row.best);
    logprob = gap / row.plan.temperature - log(row.total);
  }
  p.logprobs.As<float>()[index] = static_cast<float>(logprob);
}

template <class T>
Status LaunchSampler(const SamplerParams& p, Stream stream) {
  const int64_t rows = p.logits.shape[0];
  const int num_tiles = static_cast<int>(NumSubTiles(p.logits.shape[1]));
  const bool aligned = cuda::RowsAreAligned(p.logits, 16);
  // Several sub-tiles a warp where there are enough to fill the device anyway.
  constexpr int64_t kMany = 16384;
  const int tiles_per_block =
      rows * num_tiles >= kMany ? 4 * kSummarizeWarps : kSummarizeWarps;
  const int blocks_per_row = cuda::CeilDiv(num_tiles, tiles_per_block);
  TENON_RETURN_IF_ERROR(cuda::Launch(
      "Sampler", stream, dim3(static_cast<unsigned>(rows * blocks_per_row)),
      dim3(32 * kSummarizeWarps), 0, SummarizeKernel<T>, p, aligned, num_tiles,
      blocks_per_row, tiles_per_block));
  const size_t shared_bytes =
      sizeof(DecideScratch) +
      static_cast<size_t>(num_tiles) * (sizeof(double) + sizeof(float));
  return cuda::Launch("Sampler", stream, dim3(static_cast<unsigned>(rows)),
                      dim3(kDecideThreads), shared_bytes, DecideKernel<T>, p,
                      aligned, num_tiles);
}

}  // namespace

size_t SamplerCudaWorkspaceBytes(const SamplerParams& p) {
  return static_cast<size_t>(p.logits.shape[0] * NumSubTiles(p.vocab())) *
         sizeof(SubTile);
}

Status SamplerCuda(const SamplerParams& p, Stream stream) {
  const char* missing = p.edits != nullptr               ? "edits"
                        : p.bitmask.present()            ? "bitmask"
                        : p.random_bits.present()        ? "random_bits"
                        : p.mirostat_mu.present()        ? "mirostat_mu"
                        : p.raw_logprobs.present()       ? "raw_logprobs"
                        : p.processed_logprobs.present() ? "processed_logprobs"
                        : p.top_tokens.present()         ? "top_tokens"
                        : p.probabilities.present()      ? "probabilities"
                        : p.stream != RandomStream::kTarget ? "stream"
                        : p.vocab() != p.logits.shape[1]    ? "valid_vocab"
                                                            : nullptr;
  if (missing != nullptr) {
    return UnimplementedError("Sampler: ", missing, " on ",
                              DeviceTypeName(p.logits.device.type));
  }
  const cuda::DeviceGuard guard(p.logits.device);
  TENON_RETURN_IF_ERROR(guard.status());
  return cuda::WithFloatType(p.logits.dtype, [&](auto zero) {
    return LaunchSampler<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
