#include "ops/sampler/sampler_block_cuda.cuh"
#include "ops/sampler/speculative_backend.h"

// A block per sequence: all drafts are judged at once, then one more token is
// drawn from one row of probabilities.

namespace tenon {
namespace {

using cuda::Block;
using cuda::kDecideThreads;
using cuda::kDecideWarps;

// Ids of which a warp adds up the masses.
constexpr int kSegment = 1024;
constexpr int kMaxSegments = static_cast<int>(kMaxVocab / kSegment);

struct SpeculativeShared {
  Block::Scratch scratch;
  uint64_t segment_mass[kMaxSegments];
};

// One place of one sequence.
struct Place {
  const float* p;
  const float* q;  // null: the draft is certain
  int32_t draft;
  bool aligned;

  __device__ float DraftProbability(int id) const {
    return q != nullptr ? q[id] : id == draft ? 1.0f : 0.0f;
  }
  __device__ uint64_t Mass(int id, bool residual) const {
    return FixedMass(residual ? Residual(p[id], DraftProbability(id))
                              : Probability(p[id]));
  }
};

// The masses of a segment's ids, several of which a lane loads at once.
__device__ uint64_t SegmentMass(const Place& place, int vocab, int first,
                                bool residual) {
  using Piece = cuda::Piece<float>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kLoads = kSegment / 32 / Piece::kSize;
  Piece p[kLoads];
  Piece q[kLoads];
  const bool reads_q = residual && place.q != nullptr;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int id = first + (i * 32 + lane) * Piece::kSize;
    p[i] = cuda::LoadPiece<false>(place.p, id, vocab, place.aligned);
    if (reads_q) {
      q[i] = cuda::LoadPiece<false>(place.q, id, vocab, place.aligned);
    }
  }
  uint64_t sum = 0;
  // What these loads leave out, or have as -inf: no weight.
  const auto slow = [&](int i) {
    return cuda::IsSlow<float>(first + (i * 32 + lane) * Piece::kSize, vocab,
                               place.aligned);
  };
  for (int i = 0; i < kLoads; ++i) {
    if (!slow(i)) continue;
    const int id = first + (i * 32 + lane) * Piece::kSize;
    for (int e = 0; e < Piece::kSize && id + e < vocab; ++e) {
      sum += place.Mass(id + e, residual);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
#pragma unroll
    for (int e = 0; e < Piece::kSize; ++e) {
      const int id = first + (i * 32 + lane) * Piece::kSize + e;
      float weight = Probability(p[i].At(e));
      if (reads_q) weight = Residual(p[i].At(e), q[i].At(e));
      if (residual && !reads_q && id == place.draft) {
        weight = Residual(p[i].At(e), 1.0f);
      }
      sum += FixedMass(weight);
    }
  }
  return cuda::WarpSum64(sum);
}

// -1 where nothing weighs.
__device__ int DrawFrom(Block& block, uint64_t* segment_mass,
                        const Place& place, int vocab, uint64_t numerator,
                        bool residual) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int segments = cuda::CeilDiv(vocab, kSegment);
  uint64_t own = 0;
  for (int i = warp; i < segments; i += kDecideWarps) {
    const uint64_t mass = SegmentMass(place, vocab, i * kSegment, residual);
    if (threadIdx.x % 32 == 0) {
      segment_mass[i] = mass;
      own += mass;
    }
  }
  const uint64_t total = block.Sum(own);
  if (total == 0) return -1;
  const Block::Pick segment =
      block.PickByWeight(segments, DrawTarget(numerator, total),
                         [&](int i) { return segment_mass[i]; });
  const int first = segment.index * kSegment;
  const Block::Pick id = block.PickByWeight(
      min(kSegment, vocab - first),
      DrawTarget(numerator, total) - segment.before,
      [&](int i) { return place.Mass(first + i, residual); });
  return first + id.index;
}

struct Outcome {
  int accepted;
  int token;  // after these
};

__device__ Outcome ByProbabilities(const SpeculativeParams& p, bool aligned,
                                   int64_t sequence, const int32_t* drafts,
                                   int num_drafts, SpeculativeShared& shared) {
  Block block(&shared.scratch);
  const int64_t max_drafts = p.draft_tokens.shape[1];
  const int vocab = static_cast<int>(p.target_probabilities.shape[1]);
  const uint64_t seed = p.params[sequence].seed;
  const uint64_t position = p.params[sequence].position;
  const auto place_of = [&](int i) {
    Place place = {p.target_probabilities.As<const float>() +
                       (sequence * (max_drafts + 1) + i) *
                           p.target_probabilities.stride[0],
                   nullptr, -1, aligned};
    if (i == num_drafts) return place;
    place.draft = drafts[i];
    if (p.draft_probabilities.present()) {
      place.q = p.draft_probabilities.As<const float>() +
                (sequence * max_drafts + i) * p.draft_probabilities.stride[0];
    }
    return place;
  };
  const auto bits_at = [&](int i, RandomStream stream) {
    return RandomBitsAt(seed, position + static_cast<uint64_t>(i), stream);
  };

  const int thread = static_cast<int>(threadIdx.x);
  uint32_t rejected = static_cast<uint32_t>(num_drafts);
  if (thread < num_drafts) {
    const Place place = place_of(thread);
    const int32_t draft = place.draft;
    const double uniform =
        UniformFromBits(bits_at(thread, RandomStream::kAccept));
    if (draft < 0 || draft >= vocab ||
        !Accepts(uniform, place.p[draft], place.DraftProbability(draft))) {
      rejected = static_cast<uint32_t>(thread);
    }
  }
  const int accepted = static_cast<int>(block.Min(rejected));
  const bool all = accepted == num_drafts;
  const uint64_t numerator = UniformNumerator(
      bits_at(accepted, all ? RandomStream::kTarget : RandomStream::kResidual));
  const Place place = place_of(accepted);
  int token = -1;
  if (!all) {
    token = DrawFrom(block, shared.segment_mass, place, vocab, numerator, true);
  }
  if (token < 0) {
    token =
        DrawFrom(block, shared.segment_mass, place, vocab, numerator, false);
  }
  return {accepted, token};
}

__device__ Outcome ByTokens(const SpeculativeParams& p, int64_t sequence,
                            const int32_t* drafts, int num_drafts) {
  const int32_t* target = p.target_tokens.As<const int32_t>() +
                          sequence * p.target_tokens.stride[0];
  int accepted = 0;
  while (accepted < num_drafts && drafts[accepted] >= 0 &&
         drafts[accepted] == target[accepted]) {
    ++accepted;
  }
  return {accepted, target[accepted]};
}

__global__ void __launch_bounds__(kDecideThreads)
    SpeculativeKernel(const __grid_constant__ SpeculativeParams p,
                      bool aligned) {
  extern __shared__ uint64_t shared_memory[];
  cuda::WaitForPreviousKernels();
  const int64_t sequence = blockIdx.x;
  const int32_t* drafts =
      p.draft_tokens.As<const int32_t>() + sequence * p.draft_tokens.stride[0];
  const int num_drafts = NumDrafts(p, sequence);
  const Outcome outcome =
      p.target_tokens.present()
          ? ByTokens(p, sequence, drafts, num_drafts)
          : ByProbabilities(
                p, aligned, sequence, drafts, num_drafts,
                *reinterpret_cast<SpeculativeShared*>(shared_memory));
  const int thread = static_cast<int>(threadIdx.x);
  int32_t* tokens = p.tokens.As<int32_t>() + sequence * p.tokens.stride[0];
  if (thread <= p.draft_tokens.shape[1]) {
    tokens[thread] = thread < outcome.accepted    ? drafts[thread]
                     : thread == outcome.accepted ? outcome.token
                                                  : -1;
  }
  if (thread != 0) return;
  p.num_accepted.As<int32_t>()[sequence] = outcome.accepted;
  p.statuses.As<int32_t>()[sequence] = static_cast<int32_t>(
      outcome.token >= 0 ? SampleStatus::kOk : SampleStatus::kNoSupport);
}

}  // namespace

Status SpeculativeCuda(const SpeculativeParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.draft_tokens.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const bool by_tokens = p.target_tokens.present();
  const bool aligned = !by_tokens &&
                       cuda::RowsAreAligned(p.target_probabilities, 16) &&
                       (!p.draft_probabilities.present() ||
                        cuda::RowsAreAligned(p.draft_probabilities, 16));
  return cuda::LaunchDependent(
      "Speculative", stream,
      dim3(static_cast<unsigned>(p.draft_tokens.shape[0])),
      dim3(kDecideThreads), by_tokens ? 0 : sizeof(SpeculativeShared),
      SpeculativeKernel, p, aligned);
}

}  // namespace tenon
