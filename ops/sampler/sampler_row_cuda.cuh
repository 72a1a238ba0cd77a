#ifndef TENON_OPS_SAMPLER_SAMPLER_ROW_CUDA_CUH_
#define TENON_OPS_SAMPLER_SAMPLER_ROW_CUDA_CUH_

#include <cstddef>
#include <cstring>

#include "ops/core/core_cuda.cuh"
#include "ops/sampler/row_plan.h"

// How the CUDA kernels of the sampler read logits, edits and masks, and what
// they leave for each other.

namespace tenon::cuda {

// What a row is drawn from.
struct Drawn {
  int token = -1;
  float x = 0.0f;
  float best = 0.0f;  // of the kept tokens
  uint64_t mass = 0;  // of the kept tokens, by draw_scale
  KeptRange kept;
};

// What a row has come to.
struct Outcome {
  SampleStatus status = SampleStatus::kOk;
  Drawn drawn;
  bool one_hot = false;  // +inf
  bool kept = false;     // filters have decided

  __device__ bool has_token() const { return drawn.token >= 0; }
};

// What the first block of a row leaves to all of them.
enum RowTasks : uint32_t {
  kDrawRow = 1u << 0,  // and what is told of the token, and top tokens not raw
  kTopOfRow = 1u << 1,
  kTopOfRaw = 1u << 2,
  kProbabilitiesOfRow = 1u << 3,
};

// What a call leaves in the workspace, rows after rows.
struct SamplerScratch {
  SubTile* tiles = nullptr;       // [rows, num_tiles]
  Outcome* outcomes = nullptr;    // [rows], of rows with RowTasks
  SubTile* raw_tiles = nullptr;   // as tiles, of the logits as they are
  Moments* moments = nullptr;     // of rows with top-n-sigma
  int32_t* first_edit = nullptr;  // [rows, num_tiles]
};

// What kernels are told of a call: SamplerParams without shapes, for every line
// of arguments that a kernel touches costs it a miss. What all rows need comes
// first.
struct SamplerCall {
  const void* logits = nullptr;
  int64_t logits_stride = 0;  // in bytes
  const SamplingParams* params = nullptr;
  SamplerScratch scratch;
  int32_t rows = 0;
  int32_t vocab = 0;
  int32_t num_tiles = 0;
  DType dtype = DType::kInvalid;
  bool aligned = false;  // rows begin at multiples of 16 bytes
  bool fast = false;
  bool is_hopper = false;
  RandomStream stream = RandomStream::kTarget;
  int32_t* tokens = nullptr;
  int32_t* statuses = nullptr;
  // The rest is null where it is not given.
  float* logprobs = nullptr;
  const int64_t* random_bits = nullptr;
  float* raw_logprobs = nullptr;
  float* processed_logprobs = nullptr;
  const LogitEdit* edits = nullptr;
  const int32_t* edit_offsets = nullptr;
  int64_t num_edits = 0;
  const uint8_t* bitmask = nullptr;
  int64_t bitmask_stride = 0;  // in bytes
  MirostatState mirostat;
  int32_t* top_tokens = nullptr;
  float* top_logprobs = nullptr;
  int64_t top_tokens_stride = 0;
  int64_t top_logprobs_stride = 0;
  int32_t top_columns = 0;
  LogprobKind top_kind = LogprobKind::kUnfiltered;
  float* probabilities = nullptr;
  int64_t probabilities_stride = 0;

  __device__ __forceinline__ const void* LogitsOf(int64_t row) const {
    return static_cast<const char*>(logits) + row * logits_stride;
  }
  // Whether a row needs the sums of its sub-tiles even if it is greedy.
  __device__ __forceinline__ bool WantsSums() const {
    return logprobs != nullptr ||
           (top_tokens != nullptr && top_kind == LogprobKind::kUnfiltered);
  }
};

// The row's parameters, all on their way at once: field by field, some would be
// waited for before others are asked for. kWords: a bit for each eight bytes
// that are wanted; the rest is 0. Volatile keeps them behind the wait for the
// kernels that write them.
inline constexpr uint32_t kAllWords = 0x1fff;
template <uint32_t kWords = kAllWords>
__device__ __forceinline__ SamplingParams ParamsOf(const SamplerCall& call,
                                                   int64_t row) {
  constexpr int kCount = sizeof(SamplingParams) / 8;
  static_assert(offsetof(SamplingParams, reserved) <= 8 * 13, "all words");
  const uint64_t* const from =
      reinterpret_cast<const uint64_t*>(call.params + row);
  uint64_t words[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if ((kWords >> i & 1) != 0) {
      asm volatile("ld.global.u64 %0, [%1];\n"
                   : "=l"(words[i])
                   : "l"(from + i));
    }
  }
  SamplingParams params;
  memcpy(&params, words, sizeof(params));
  return params;
}

__device__ __forceinline__ RowPlan PlanOf(const SamplerCall& call,
                                          const SamplingParams& params) {
  RowPlan plan = MakeRowPlan(params, call.vocab);
  if (call.bitmask == nullptr) plan.use_bitmask = false;
  if (call.mirostat.mu == nullptr) plan.mirostat_tau = 0.0f;
  return plan;
}

template <class T>
inline constexpr DType kDTypeOfLogits =
    std::is_same_v<T, float>    ? DType::kFloat32
    : std::is_same_v<T, __half> ? DType::kFloat16
                                : DType::kBFloat16;

// 16 bytes of logits, consecutive ids of one chunk, as stored: converting only
// where it is used leaves loads in flight. Words, for of single 16-bit elements
// a compiler makes a register each.
template <class T>
struct Piece {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  uint4 words;

  __device__ __forceinline__ float At(int e) const {
    const int word = e * static_cast<int>(sizeof(T)) / 4;
    const uint32_t bits = word == 0   ? words.x
                          : word == 1 ? words.y
                          : word == 2 ? words.z
                                      : words.w;
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(bits);
    } else if constexpr (std::is_same_v<T, __half>) {
      __half2 halves;
      memcpy(&halves, &bits, sizeof(halves));
      return e % 2 == 0 ? __low2float(halves) : __high2float(halves);
    } else {
      return __uint_as_float(e % 2 == 0 ? bits << 16 : bits & 0xffff0000u);
    }
  }
};

// 16 bytes not to be read again soon. Volatile keeps them behind the wait for
// the kernels that write them, and together.
template <class T>
__device__ __forceinline__ Piece<T> StreamPiece(const T* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return {words};
}

// 16 bytes where `exists`, otherwise four words of `fill`: without a branch, so
// that many loads are in flight. Volatile keeps them behind the wait for the
// kernels that write them. kStream: not to be read again soon.
template <bool kStream>
__device__ __forceinline__ uint4 Load16If(bool exists, const void* from,
                                          uint32_t fill) {
  uint4 words = {fill, fill, fill, fill};
  if constexpr (kStream) {
    asm volatile(
        "{\n"
        ".reg .pred exists;\n"
        "setp.ne.u32 exists, %5, 0;\n"
        "@exists ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
        : "l"(from), "r"(exists ? 1u : 0u));
  } else {
    asm volatile(
        "{\n"
        ".reg .pred exists;\n"
        "setp.ne.u32 exists, %5, 0;\n"
        "@exists ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
        : "l"(from), "r"(exists ? 1u : 0u));
  }
  return words;
}

// -inf in all of a word.
__device__ __forceinline__ uint32_t LowestWord(DType dtype) {
  return dtype == DType::kFloat32   ? 0xff800000u
         : dtype == DType::kFloat16 ? 0xfc00fc00u
                                    : 0xff80ff80u;
}

// Element by element, -inf past the end of the vocabulary: for rows that are
// not aligned and the last piece of a vocabulary.
template <class T>
__device__ __noinline__ Piece<T> LoadPieceSlowly(const T* row, int first_id,
                                                 int vocab) {
  T x[Piece<T>::kSize];
#pragma unroll
  for (int e = 0; e < Piece<T>::kSize; ++e) {
    x[e] = first_id + e < vocab ? row[first_id + e] : FromFloat<T>(-INFINITY);
  }
  Piece<T> piece;
  memcpy(&piece.words, x, sizeof(x));
  return piece;
}

// Whether 16 bytes at once would read past the end, or cannot be read.
template <class T>
__device__ __forceinline__ bool IsSlow(int first_id, int vocab, bool aligned) {
  return first_id < vocab && (!aligned || first_id + Piece<T>::kSize > vocab);
}

// -inf past the end of the vocabulary.
template <bool kStream, class T>
__device__ __forceinline__ Piece<T> LoadPiece(const T* row, int first_id,
                                              int vocab, bool aligned) {
  const uint4 words =
      Load16If<kStream>(aligned && first_id + Piece<T>::kSize <= vocab,
                        row + first_id, LowestWord(kDTypeOfLogits<T>));
  return {words};
}

// The larger one, NaN where either is.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
// Of two pairs at once.
template <class T>
__device__ __forceinline__ uint32_t MaxOrNan2(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
}

// What changes logits of a row before anything looks at them.
struct RowEdits {
  const uint8_t* mask = nullptr;  // a bit per id; null where none applies
  const LogitEdit* edits = nullptr;
  int end = 0;
  bool only_allowed = false;

  __device__ __forceinline__ bool any() const {
    return mask != nullptr || end > 0 || only_allowed;
  }
  __device__ __forceinline__ bool Masked(int id) const {
    return mask != nullptr && (mask[id / 8] >> (id % 8) & 1) == 0;
  }
};

__device__ __forceinline__ RowEdits EditsOf(const SamplerCall& call,
                                            int64_t row,
                                            const SamplingParams& params) {
  RowEdits edits;
  if (call.bitmask != nullptr && (params.flags & kUseBitmask) != 0) {
    edits.mask = call.bitmask + row * call.bitmask_stride;
  }
  if (call.edits != nullptr) {
    // Inside what there is whatever the offsets are.
    const int32_t begin = max(call.edit_offsets[row], 0);
    const int64_t end =
        min(static_cast<int64_t>(call.edit_offsets[row + 1]), call.num_edits);
    edits.edits = call.edits + begin;
    edits.end = static_cast<int>(max(end - begin, int64_t{0}));
  }
  edits.only_allowed = (params.flags & kOnlyAllowed) != 0;
  return edits;
}

// The first of the row's edits whose place in draw order is not before `order`.
// A whole warp calls this together.
__device__ __forceinline__ int FirstEditFrom(const RowEdits& edits, int order,
                                             int vocab) {
  const int lane = threadIdx.x % 32;
  int begin = 0;
  int end = edits.end;
  while (end > begin) {
    // Lane l looks at the last of the l-th of 32 parts.
    const int step = CeilDiv(end - begin, 32);
    const int at = begin + (lane + 1) * step - 1;
    const bool before =
        at < end && DrawOrder(edits.edits[at].id, vocab) < order;
    begin += __popc(__ballot_sync(~0u, before)) * step;
    end = min(begin + step - 1, end);
  }
  return begin;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_SAMPLER_SAMPLER_ROW_CUDA_CUH_
