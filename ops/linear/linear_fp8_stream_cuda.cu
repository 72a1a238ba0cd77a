#include "ops/linear/linear_fp8_cuda.cuh"
#include "ops/linear/linear_fp8_x_cuda.cuh"
#include "ops/linear/linear_stream_cuda.cuh"

// Streaming of fp8 weights. Every block norms (if that is asked for) and
// quantises all of x itself, while its weights are on their way; two tiles of
// the weight are the rows of an mma, tokens its columns. The sums of every
// block of 128 columns go to shared memory and are added in order: the same
// products in the same instructions, and the same sums, as in the other fp8
// kernels.

namespace tenon {
namespace {

using linear_fp8::kBlock;
using linear_stream::Args;
using linear_stream::kGroup;
using linear_stream::kMaxStages;
using linear_stream::kMultiplyThreads;
using linear_stream::kRows;
using linear_stream::kWarps;
using linear_stream::Range;
static_assert(kGroup == 2, "the rows of an mma");

constexpr int kPassBytes = 2048;  // of a row; as many columns
constexpr int kPassBlocks = kPassBytes / kBlock;

// Of weights on their way to one multiprocessor at a time; measured.
constexpr int kInFlightBytes = 34 * 1024;

constexpr int kTokens = kLinearFp8StreamTokens;
static_assert(kTokens <= 8, "the columns of an mma");
// Of two tiles in one pass over the depth.
constexpr int kOutputs = kTokens * kGroup * kRows;
// Of these whose sums are added up at one time: every thread has an element.
constexpr int kSteps = kMultiplyThreads / kOutputs;
static_assert(kSteps * kOutputs == kMultiplyThreads);
constexpr int kSumsPitch = 2 * kRows + 4;  // no bank conflicts

// What is in shared memory first; then x, its scales and the ring.
struct Shared {
  using Sums = float[kPassBlocks][kTokens][kSumsPitch];

  linear_stream::Barriers barriers;
  float squares[kTokens][kWarps];
  Sums sums[kSteps];
};

constexpr int Passes(int in_features) {
  return (in_features + kPassBytes - 1) / kPassBytes;
}

#if TENON_SM90A

using linear_stream::SyncMultiplying;

// Of a pass that a warp multiplies, kWarps blocks apart.
constexpr int kWarpBlocks = kPassBlocks / kWarps;

// Two tiles (the second may not exist) in one pass over the depth.
struct Step {
  int tile = 0;  // the first of the two, counted from the block's first
  int pass = 0;

  __device__ __forceinline__ Step Next(int passes) const {
    return pass + 1 < passes ? Step{tile, pass + 1} : Step{tile + kGroup, 0};
  }
};

// Of the weight's blocks that a warp multiplies in a step, for either tile.
struct BlockScales {
  __device__ __forceinline__ BlockScales(const Args& a, const Range& range,
                                         const Step& step) {
    constexpr int kTilesOfBlock = kBlock / kRows;
    const int groups = static_cast<int>(NumFp8Groups(a.in_features));
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      const int tile = min(range.first + step.tile + t, a.tiles - 1);
      const float* const row =
          a.block_scales + tile / kTilesOfBlock * a.block_scales_stride;
#pragma unroll
      for (int i = 0; i < kWarpBlocks; ++i) {
        const int block =
            step.pass * kPassBlocks + i * kWarps + threadIdx.x / 32;
        v[i][t] =
            a.block_scales != nullptr && block < groups ? row[block] : 1.0f;
      }
    }
  }

  float v[kWarpBlocks][kGroup];
};

__device__ __forceinline__ uint4 LoadOrZero(const char* from, bool exists) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (exists) v = *reinterpret_cast<const uint4*>(from);
  return v;
}

// What a lane multiplies in a step: of each of the warp's blocks 16 bytes of
// both halves of the depth.
struct Operands {
  // The lane's rows of either tile, from the pass on, and of x.
  __device__ __forceinline__ void Load(const Args& a, const Step& step,
                                       const char* low_row,
                                       const char* high_row, bool has_high,
                                       const char* x_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = (i * kWarps + threadIdx.x / 32) * kBlock +
                           half * 64 + lane % 4 * 16;
        const int of_row = step.pass * kPassBytes + column;
        const bool exists = of_row < a.in_features;
        low[i][half] = LoadOrZero(low_row + column, exists);
        high[i][half] = LoadOrZero(high_row + column, exists && has_high);
        x[i][half] = LoadOrZero(x_row + of_row, exists && lane / 4 < a.tokens);
      }
    }
  }

  // The warp's blocks take turns, each in the order of MultiplyAdd64.
  __device__ __forceinline__ void Multiply(float (&c)[kWarpBlocks][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          uint32_t weights[4];
          linear_fp8::WeightsToHalf(linear_fp8::Word(low[i][half], j),
                                    linear_fp8::Word(high[i][half], j),
                                    weights);
          uint32_t b[2];
          cuda::Fp8x4ToHalf(linear_fp8::Word(x[i][half], j), b);
          cuda::Mma<__half>(c[i], weights, b[0], b[1]);
        }
      }
    }
  }

  uint4 low[kWarpBlocks][2];
  uint4 high[kWarpBlocks][2];
  uint4 x[kWarpBlocks][2];
};

template <class T>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const Args& a, const Range& range,
                                        Shared& shared, const char* xs,
                                        const float* x_scales, const char* ring)
      : a_(a),
        range_(range),
        shared_(shared),
        xs_(xs),
        x_scales_(x_scales),
        ring_(ring),
        passes_(Passes(a.in_features)),
        groups_(static_cast<int>(NumFp8Groups(a.in_features))),
        reader_(a, shared.barriers, range.count * passes_) {}

  // `scales`: of the first step.
  __device__ __forceinline__ void Run(BlockScales scales) {
    Step first;
    while (first.tile < range_.count) {
      Step step = first;
#pragma unroll 1
      for (int s = 0; s < kSteps && step.tile < range_.count; ++s) {
        if (step.pass == 0 && IsMine(step)) Begin(step);
        const Step next = step.Next(passes_);
        const BlockScales of_next(a_, range_, next);
        float c[kWarpBlocks][4] = {};
        Multiply(step, c);
        // The sums of the last steps have been added up.
        if (s == 0 && (first.tile > 0 || first.pass > 0)) SyncMultiplying();
        Keep(step, scales, c, shared_.sums[s]);
        scales = of_next;
        step = next;
      }
      SyncMultiplying();
#pragma unroll 1
      for (int s = 0; s < kSteps && first.tile < range_.count; ++s) {
        if (IsMine(first)) AddUp(first, shared_.sums[s]);
        first = first.Next(passes_);
      }
    }
  }

 private:
  // Threads take turns with the tiles.
  __device__ __forceinline__ static bool IsMine(const Step& step) {
    return step.tile / kGroup % kSteps ==
           static_cast<int>(threadIdx.x / kOutputs);
  }
  __device__ __forceinline__ static int MyToken() {
    return threadIdx.x % kOutputs / (kGroup * kRows);
  }
  __device__ __forceinline__ static int MyRow() {
    return threadIdx.x % (kGroup * kRows);
  }

  __device__ __forceinline__ void Begin(const Step& step) {
    total_ = 0.0f;
    output_.exists = false;
    if (step.tile + MyRow() / kRows >= range_.count) return;
    output_.Begin(a_, MyToken(), (range_.first + step.tile) * kRows + MyRow());
  }

  __device__ __forceinline__ void Multiply(const Step& step,
                                           float (&c)[kWarpBlocks][4]) {
    const int row = threadIdx.x % 32 / 4;
    const bool has_high = step.tile + 1 < range_.count;
    const auto weights = [&](int stage) {
      return ring_ + (stage * kRows + row) * a_.pitch;
    };
    const char* const low = weights(reader_.Wait());
    const char* const high = has_high ? weights(reader_.Wait(1)) : low;
    Operands operands;
    operands.Load(a_, step, low, high, has_high, xs_ + row * a_.x_pitch);
    operands.Multiply(c);
    reader_.Release();
    if (has_high) reader_.Release();
  }

  // Leaves a step's scaled sums in shared memory.
  __device__ __forceinline__ void Keep(const Step& step,
                                       const BlockScales& scales,
                                       const float (&c)[kWarpBlocks][4],
                                       Shared::Sums& sums) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpBlocks; ++i) {
      const int in_pass = i * kWarps + threadIdx.x / 32;
      const int block = step.pass * kPassBlocks + in_pass;
      if (block >= groups_) break;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int token = lane % 4 * 2 + t;
        if (token >= a_.tokens) continue;
        const float x_scale = x_scales_[token * groups_ + block];
        float* const to = &sums[in_pass][token][lane / 4];
        to[0] = linear_fp8::Scaled(c[i][t], x_scale, scales.v[i][0]);
        to[kRows] = linear_fp8::Scaled(c[i][2 + t], x_scale, scales.v[i][1]);
      }
    }
  }

  __device__ __forceinline__ void AddUp(const Step& step,
                                        const Shared::Sums& sums) {
    if (!output_.exists) return;
    const int blocks = min(kPassBlocks, groups_ - step.pass * kPassBlocks);
#pragma unroll 8
    for (int block = 0; block < blocks; ++block) {
      total_ = __fadd_rn(total_, sums[block][MyToken()][MyRow()]);
    }
    if (step.pass == passes_ - 1) output_.Store(a_, total_);
  }

  const Args& a_;
  const Range& range_;
  Shared& shared_;
  const char* const xs_;
  const float* const x_scales_;
  const char* const ring_;
  const int passes_;
  const int groups_;
  linear_stream::Reader reader_;
  linear_stream::Output<T, true> output_;
  float total_;
};

#endif  // TENON_SM90A

constexpr int XScalesBytes(int64_t tokens, int64_t in_features) {
  return static_cast<int>((tokens * NumFp8Groups(in_features) * 4 + 15) / 16 *
                          16);
}

// kCount: vectors of x that a thread keeps at one time.
template <class T, int kCount>
__global__ void __launch_bounds__(linear_stream::kThreads, 2)
    Fp8StreamKernel(const __grid_constant__ Args a) {
#if TENON_SM90A
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  char* const xs = memory + sizeof(Shared);
  auto* const x_scales = reinterpret_cast<float*>(xs + a.tokens * a.x_pitch);
  char* const ring =
      reinterpret_cast<char*>(x_scales) + XScalesBytes(a.tokens, a.in_features);
  const Range range = linear_stream::TilesOfBlock(a);
  if (!a.weights_are_constant) cuda::WaitForPreviousKernels();

  if (threadIdx.x >= kMultiplyThreads) {
    linear_stream::LoadWeights<1, kPassBytes>(a, range, shared.barriers,
                                              cuda::SharedAddress(ring));
    return;
  }
  const BlockScales scales(a, range, Step());
  uint4 norm_weights;
  if (a.norm_weight != nullptr && threadIdx.x < a.in_features / 8) {
    norm_weights = static_cast<const uint4*>(a.norm_weight)[threadIdx.x];
  }
  linear_stream::AwaitBarriers();
  cuda::WaitForPreviousKernels();
  if (a.x_vecs == 1) {
    linear_stream::PrepareFp8X<true, T, kCount>(a, shared.squares, xs, x_scales,
                                                norm_weights);
  } else {
    linear_stream::PrepareFp8X<false, T, kCount>(a, shared.squares, xs,
                                                 x_scales, norm_weights);
  }
  Multiplier<T>(a, range, shared, xs, x_scales, ring).Run(scales);
#endif
}

// Shared memory for `tokens` rows of x, and stages; 0 stages: too much.
struct Plan {
  int x_pitch = 0;
  int pitch = 0;
  int stages = 0;
  int in_flight = 0;
  int bytes = 0;
};

// `most_stages`: as many as any block needs.
Plan MakePlan(int64_t tokens, int64_t in_features, int64_t most_stages) {
  constexpr int64_t kFewestStages = 2 * kGroup;
  Plan plan;
  plan.x_pitch = linear_stream::Pitch(in_features);
  plan.pitch = linear_stream::Pitch(std::min<int64_t>(in_features, kPassBytes));
  const int64_t fixed = sizeof(Shared) + tokens * plan.x_pitch +
                        XScalesBytes(tokens, in_features);
  const int64_t stage = int64_t{kRows} * plan.pitch;
  const int64_t stages =
      std::min({(linear_stream::kMaxSharedBytes - fixed) / stage, most_stages,
                int64_t{kMaxStages}});
  if (stages < std::min(most_stages, kFewestStages)) return plan;
  plan.stages = static_cast<int>(stages);
  plan.in_flight = static_cast<int>(kInFlightBytes / stage);
  plan.bytes = static_cast<int>(fixed + stages * stage);
  return plan;
}

constexpr int Slots(int64_t tokens) { return tokens == 1 ? 4 : 8; }

template <class T>
Status Launch(const Args& args, const Plan& plan, int grid, Stream stream) {
  return linear_stream::Launch(args, plan.bytes, grid, 1, stream,
                               args.tokens == 1
                                   ? Fp8StreamKernel<T, Slots(1)>
                                   : Fp8StreamKernel<T, Slots(kTokens)>);
}

}  // namespace

bool LinearFp8Streams(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  const bool takes_norm =
      !p.norm.present() || (linear_stream::NormIsAligned(p) &&
                            p.norm.rounding == NormRounding::kFloat32Multiply &&
                            linear_stream::XVecs(in_features) <= Slots(tokens));
  return p.weight.dtype == DType::kFloat8E4M3 && tokens <= kTokens &&
         p.x.dtype != DType::kFloat32 && cuda::RowsAreWholeChunks(p.x) &&
         cuda::RowsAreWholeChunks(p.weight) && takes_norm &&
         in_features <= linear_stream::kMaxSharedBytes && !p.terms.present() &&
         MakePlan(tokens, in_features, kMaxStages).stages > 0 &&
         cuda::IsHopper(p.x.device);
}

Status LinearFp8Stream(const LinearParams& p, Stream stream) {
  int grid = 0;
  int processors = 0;
  TENON_RETURN_IF_ERROR(linear_stream::GridSize(p, &grid, &processors));
  Args a = linear_stream::MakeArgs(p, grid);
  const auto* const scales = p.weight_scales.As<const float>();
  if (p.weight_scales.rank == 1) {
    a.row_scales = scales;
  } else {
    a.block_scales = scales;
    a.block_scales_stride = p.weight_scales.stride[0];
  }
  const Plan plan = MakePlan(
      a.tokens, a.in_features,
      cuda::CeilDiv(int64_t{a.tiles}, int64_t{grid}) * Passes(a.in_features));
  // Whole rows, as the norm needs them, or parts of one.
  const int slots = Slots(a.tokens);
  a.x_vecs_at_once = a.x_vecs <= slots ? slots / a.x_vecs * a.x_vecs : slots;
  a.x_pitch = plan.x_pitch;
  a.pitch = plan.pitch;
  a.stages = plan.stages;
  a.in_flight = plan.in_flight;
  if (p.x.dtype == DType::kFloat16) {
    return Launch<__half>(a, plan, grid, stream);
  }
  return Launch<__nv_bfloat16>(a, plan, grid, stream);
}

}  // namespace tenon
