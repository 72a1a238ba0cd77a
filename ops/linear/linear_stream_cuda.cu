#include "ops/linear/linear_stream_cuda.cuh"
#include "ops/rms_norm/rms_norm_cuda.cuh"

// Streaming of 16-bit weights: tokens are the rows of an mma, weights its
// columns.

namespace tenon {
namespace {

using cuda::Vec;
using linear_stream::Args;
using linear_stream::kGroup;
using linear_stream::kMaxStages;
using linear_stream::kMultiplyThreads;
using linear_stream::kRows;
using linear_stream::kWarps;
using linear_stream::Range;
static_assert(kMultiplyThreads == cuda::kRmsNormThreads, "for its bits");

constexpr int kWarpBytes = 512;  // of a row that a warp multiplies at a time
constexpr int kPassBytes = kWarps * kWarpBytes;

// See Args; measured.
constexpr int kInFlight = 2;

// See TakesTokens.
constexpr int64_t kMostTokens = 64;

// What is in shared memory first; then x and the ring.
template <int kHalves>
struct Shared {
  linear_stream::Barriers barriers;
  float squares[kLinearFewTokens][kWarps];
  // Two sets, so that one can be filled while the other is still read.
  float sums[2][kGroup][kWarps][kHalves * 64];
};

constexpr int Passes(int in_features) {
  return (in_features * 2 + kPassBytes - 1) / kPassBytes;
}

#if TENON_SM90A

using linear_stream::SyncMultiplying;

// Of those bytes, that a lane multiplies.
constexpr int kWarpVecs = kWarpBytes / 16 / 4;

// Calls f(at) for the vectors of a row that are this thread's.
template <class F>
__device__ __forceinline__ void ForEachVec(const Args& a, const F& f) {
  for (int at = threadIdx.x; at < a.in_features / 8; at += kMultiplyThreads) {
    f(at);
  }
}

// The tokens of a block.
struct Tokens {
  __device__ __forceinline__ explicit Tokens(const Args& a)
      : first(blockIdx.y * kLinearFewTokens),
        count(min(a.tokens - first, static_cast<int>(kLinearFewTokens))) {}

  const int first, count;
};

// Normalises kTokens rows in shared memory, each thread its own vectors, and
// writes this block's share of them to a.normed.
template <class T, bool kCastFirst, int kTokens>
__device__ __forceinline__ void Normalize(const Args& a, const Tokens& tokens,
                                          int first, char* xs,
                                          const Vec<T, 8>& first_weights,
                                          const float (&inverse)[kTokens]) {
  const int share_begin = blockIdx.x * a.normed_share;
  ForEachVec(a, [&](int at) {
    const Vec<T, 8> weights =
        at < kMultiplyThreads
            ? first_weights
            : static_cast<const Vec<T, 8>*>(a.norm_weight)[at];
    const bool mine = at >= share_begin && at < share_begin + a.normed_share;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const int token = first + m;
      if (token >= tokens.count) break;
      char* const in_shared = xs + token * a.x_pitch + at * 16;
      const auto v = *reinterpret_cast<const Vec<T, 8>*>(in_shared);
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f[j] = cuda::Normalized<T>(cuda::ToFloat(v.v[j]), inverse[m],
                                   cuda::ToFloat(weights.v[j]), kCastFirst);
      }
      const uint4 packed = {
          cuda::Pack<T>(f[0], f[1]), cuda::Pack<T>(f[2], f[3]),
          cuda::Pack<T>(f[4], f[5]), cuda::Pack<T>(f[6], f[7])};
      *reinterpret_cast<uint4*>(in_shared) = packed;
      if (mine) {
        T* const row = static_cast<T*>(a.normed) +
                       (tokens.first + token) * a.normed_stride;
        reinterpret_cast<uint4*>(row)[at] = packed;
      }
    }
  });
}

// Brings x to shared memory, and normalises it there if that is asked for,
// kTokens rows at a time.
template <class T, int kTokens, bool kTerms>
__device__ __forceinline__ void PrepareX(
    const Args& a, const Tokens& tokens,
    float (&squares)[kLinearFewTokens][kWarps], char* xs,
    const Vec<T, 8>& norm_weights) {
  const uint32_t to = cuda::SharedAddress(xs);
  if constexpr (kTerms) {
    ForEachVec(a, [&](int at) {
      reinterpret_cast<uint4*>(xs)[at] = linear_stream::WithTerms<T>(a, at);
    });
  }
  for (int token = 0; !kTerms && token < tokens.count; ++token) {
    const T* const row =
        static_cast<const T*>(a.x) + (tokens.first + token) * a.x_stride;
    ForEachVec(a, [&](int at) {
      cuda::CopyOrZero16(to + token * a.x_pitch + at * 16, row + at * 8, true);
    });
  }
  cuda::CommitCopies();
  cuda::WaitForCopies<0>();
  if (a.norm_weight == nullptr) return SyncMultiplying();

  for (int first = 0; first < tokens.count; first += kTokens) {
    float sum[kTokens] = {};
    ForEachVec(a, [&](int at) {
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        if (first + m >= tokens.count) break;
        const char* const v = xs + (first + m) * a.x_pitch + at * 16;
        sum[m] =
            cuda::AddSquares(*reinterpret_cast<const Vec<T, 8>*>(v), sum[m]);
      }
    });
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      sum[m] = cuda::WarpSum(sum[m]);
      if (threadIdx.x % 32 == 0) squares[first + m][threadIdx.x / 32] = sum[m];
    }
  }
  SyncMultiplying();
  for (int first = 0; first < tokens.count; first += kTokens) {
    // A lane makes the factor of one token.
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += squares[first + threadIdx.x % kTokens][w];
    }
    const float mine =
        cuda::InverseRms(total, a.inverse_in_features, a.epsilon);
    float inverse[kTokens];
#pragma unroll
    for (int m = 0; m < kTokens; ++m) inverse[m] = __shfl_sync(~0u, mine, m);
    if (a.cast_first) {
      Normalize<T, true>(a, tokens, first, xs, norm_weights, inverse);
    } else {
      Normalize<T, false>(a, tokens, first, xs, norm_weights, inverse);
    }
  }
  SyncMultiplying();
}

// A lane's share of a row in shared memory, of up to `count` vectors 64 bytes
// apart, zeros beyond.
__device__ __forceinline__ uint4 VecOrZero(const char* row, int i, int count) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (i < count) v = *reinterpret_cast<const uint4*>(row + i * 64);
  return v;
}

// Multiplies the block's tiles. Lane l has token l / 4 (and those 8, 16, ...
// after it) or row l / 4 of the weight, and of every 64 bytes of the depth the
// bytes from l % 4 * 16. Which place of an instruction's depth a product has
// does not matter as long as x and weight agree.
template <class T, int kHalves>
__device__ __forceinline__ void Multiply(const Args& a, const Tokens& tokens,
                                         const Range& range,
                                         Shared<kHalves>& shared,
                                         const char* xs, const char* ring) {
  constexpr int kOutputs = kHalves * 64;  // of a tile
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int passes = Passes(a.in_features);
  const int lane_bytes = warp * kWarpBytes + lane % 4 * 16;
  const char* const x_row = xs + lane / 4 * a.x_pitch + lane_bytes;
  const char* const weight_row = ring + lane / 4 * a.pitch + lane_bytes;
  linear_stream::Reader reader(a, shared.barriers, range.count * passes);
  int set = 0;
  for (int group = 0; group < range.count; group += kGroup, set ^= 1) {
    const int tiles = min(kGroup, range.count - group);
    const int in_tile = threadIdx.x % kOutputs;
    const int my_tile = threadIdx.x / kOutputs;
    linear_stream::Output<T, false> output;
    output.exists = false;
    if (my_tile < tiles) {
      output.Begin(a, tokens.first + in_tile / kRows,
                   (range.first + group + my_tile) * kRows + in_tile % kRows);
    }
    float c[kGroup][2][4] = {};  // products take turns between two sums
    for (int pass = 0; pass < passes; ++pass) {
      const int left = a.in_features * 2 - pass * kPassBytes - lane_bytes;
      const int count = min((left + 48) / 64, kWarpVecs);
#pragma unroll
      for (int tile = 0; tile < kGroup; ++tile) {
        if (tile >= tiles) break;
        const char* const row = weight_row + reader.Wait() * kRows * a.pitch;
        uint4 w[kWarpVecs];
#pragma unroll
        for (int i = 0; i < kWarpVecs; ++i) w[i] = VecOrZero(row, i, count);
#pragma unroll
        for (int i = 0; i < kWarpVecs; ++i) {
          uint4 x[2] = {};
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            const bool exists = h * 8 + lane / 4 < tokens.count;
            x[h] = VecOrZero(x_row + h * 8 * a.x_pitch + pass * kPassBytes, i,
                             exists ? count : 0);
          }
          cuda::Mma<T>(c[tile][0], {x[0].x, x[1].x, x[0].y, x[1].y}, w[i].x,
                       w[i].y);
          cuda::Mma<T>(c[tile][1], {x[0].z, x[1].z, x[0].w, x[1].w}, w[i].z,
                       w[i].w);
        }
        reader.Release();
      }
    }
#pragma unroll
    for (int tile = 0; tile < kGroup; ++tile) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        // Element (token l / 4, rows l % 4 * 2 and the next) of the half.
        reinterpret_cast<float2*>(shared.sums[set][tile][warp] + h * 64)[lane] =
            make_float2(c[tile][0][h * 2] + c[tile][1][h * 2],
                        c[tile][0][h * 2 + 1] + c[tile][1][h * 2 + 1]);
      }
    }
    SyncMultiplying();
    if (!output.exists) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += shared.sums[set][my_tile][w][in_tile];
    }
    output.Store(a, sum);
  }
}

#endif  // TENON_SM90A

// Grid: blocks that share the weight, times groups of 8 * kHalves tokens, which
// are normalised kTokens at a time.
template <class T, int kTokens, int kHalves, bool kTerms>
__global__ void __launch_bounds__(linear_stream::kThreads, kTerms ? 1 : 2)
    StreamKernel(const __grid_constant__ Args a) {
#if TENON_SM90A
  static_assert(kGroup * kHalves * 64 <= kMultiplyThreads,
                "a thread finishes one element");
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<kHalves>*>(memory);
  char* const xs = memory + sizeof(Shared<kHalves>);
  const Tokens tokens(a);
  char* const ring = xs + tokens.count * a.x_pitch;
  const Range range = linear_stream::TilesOfBlock(a);
  if (!a.weights_are_constant) cuda::WaitForPreviousKernels();

  if (threadIdx.x >= kMultiplyThreads) {
    linear_stream::LoadWeights<2, kPassBytes>(a, range, shared.barriers,
                                              cuda::SharedAddress(ring));
    return;
  }
  Vec<T, 8> norm_weights;
  if (a.norm_weight != nullptr && threadIdx.x < a.in_features / 8) {
    norm_weights = static_cast<const Vec<T, 8>*>(a.norm_weight)[threadIdx.x];
  }
  linear_stream::AwaitBarriers();
  cuda::WaitForPreviousKernels();
  PrepareX<T, kTokens, kTerms>(a, tokens, shared.squares, xs, norm_weights);
  Multiply<T, kHalves>(a, tokens, range, shared, xs, ring);
#endif
}

// Shared memory for `tokens` rows of x, and stages; 0 stages: too much.
struct Plan {
  int halves = 0;
  int x_pitch = 0;
  int pitch = 0;
  int stages = 0;
  int bytes = 0;
};

// `most_stages`: as many as any block needs.
Plan MakePlan(int64_t tokens, int64_t in_features, int64_t most_stages) {
  Plan plan;
  tokens = std::min(tokens, kLinearFewTokens);  // of a block
  plan.halves = tokens <= 8 ? 1 : 2;
  plan.x_pitch = linear_stream::Pitch(in_features * 2);
  plan.pitch =
      linear_stream::Pitch(std::min<int64_t>(in_features * 2, kPassBytes));
  const int64_t fixed =
      (plan.halves == 1 ? sizeof(Shared<1>) : sizeof(Shared<2>)) +
      tokens * plan.x_pitch;
  const int64_t stage = int64_t{kRows} * plan.pitch;
  const int64_t stages =
      std::min({(linear_stream::kMaxSharedBytes - fixed) / stage, most_stages,
                int64_t{kMaxStages}});
  if (stages < std::min<int64_t>(most_stages, kInFlight)) return plan;
  plan.stages = static_cast<int>(stages);
  plan.bytes = static_cast<int>(fixed + stages * stage);
  return plan;
}

int TokenGroups(int64_t tokens) {
  return static_cast<int>(cuda::CeilDiv(tokens, kLinearFewTokens));
}

template <class T>
Status Launch(const Args& args, const Plan& plan, int grid, Stream stream) {
  return linear_stream::Launch(
      args, plan.bytes, grid, TokenGroups(args.tokens), stream,
      args.num_terms > 0 ? StreamKernel<T, 1, 1, true>
      : args.tokens == 1 ? StreamKernel<T, 1, 1, false>
      : plan.halves == 1 ? StreamKernel<T, 8, 1, false>
                         : StreamKernel<T, 8, 2, false>);
}

// Several groups of tokens read the weight as often: only where it is small,
// that of a router.
bool TakesTokens(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  if (tokens <= kLinearFewTokens) return true;
  int grid = 0;
  int processors = 0;
  return tokens <= kMostTokens && !p.norm.present() &&
         linear_stream::GridSize(p, &grid, &processors).ok() &&
         linear_stream::NumTiles(p) * TokenGroups(tokens) <= processors;
}

}  // namespace

bool LinearStreams(const LinearParams& p) {
  const int64_t tokens = p.x.shape[0];
  const int64_t in_features = p.x.shape[1];
  return p.x.dtype != DType::kFloat32 && p.weight.dtype == p.x.dtype &&
         cuda::RowsAreWholeChunks(p.x) && cuda::RowsAreWholeChunks(p.weight) &&
         in_features <= linear_stream::kMaxSharedBytes &&
         (!p.norm.present() || linear_stream::NormIsAligned(p)) &&
         linear_stream::TermsAreTaken(p) &&
         MakePlan(tokens, in_features, kMaxStages).stages > 0 &&
         cuda::IsHopper(p.x.device) && TakesTokens(p);
}

Status LinearStream(const LinearParams& p, Stream stream) {
  int grid = 0;
  int processors = 0;
  TENON_RETURN_IF_ERROR(linear_stream::GridSize(p, &grid, &processors));
  Args a = linear_stream::MakeArgs(p, grid);
  const Plan plan = MakePlan(
      a.tokens, a.in_features,
      cuda::CeilDiv(int64_t{a.tiles}, int64_t{grid}) * Passes(a.in_features));
  a.x_pitch = plan.x_pitch;
  a.pitch = plan.pitch;
  a.stages = plan.stages;
  a.in_flight = kInFlight;
  if (p.x.dtype == DType::kFloat16) {
    return Launch<__half>(a, plan, grid, stream);
  }
  return Launch<__nv_bfloat16>(a, plan, grid, stream);
}

}  // namespace tenon
