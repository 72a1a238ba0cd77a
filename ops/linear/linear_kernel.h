#ifndef TENON_OPS_LINEAR_LINEAR_KERNEL_H_
#define TENON_OPS_LINEAR_LINEAR_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "ops/linear/linear.h"

// How linear chooses among its CUDA kernels. Private to linear and its tests.

namespace tenon {

enum class LinearKernel {
  kStream,      // streams the weights once through shared memory (Hopper)
  kGemv,        // streams them through registers, for a few rows of x
  kSmallTile,   // GEMM tiles of 16 x 32
  kMediumTile,  // 64 x 64
  kLargeTile,   // 128 x 128
  kCublasLt,
};
const char* LinearKernelName(LinearKernel kernel);

// What the choice depends on.
struct LinearProblem {
  int64_t tokens = 0;
  // Rows of x and weight start at multiples of 16 bytes and fill whole ones.
  bool rows_aligned = false;
  bool out_aligned = false;
  // No two rows of a matrix overlap, which cuBLASLt demands.
  bool rows_apart = false;
  bool has_bias = false;
  bool has_cublas_lt = false;
  bool batch_invariant = false;
  bool can_stream = false;  // see LinearStreams
};
LinearProblem MakeLinearProblem(const LinearParams& params);

// The rule: few tokens are a matter of reading the weights, which kStream does
// best, elsewhere kGemv (with 8 it was slower than tiles on an H100); beyond,
// cuBLASLt where there is one. GEMM tiles do the rest, and everything that must
// be batch-invariant: an element's bits do not depend on the tile's size.
inline constexpr int64_t kLinearGemvTokens = 4;
LinearKernel SelectLinearKernel(const LinearProblem& problem);

// Streaming of fp8 weights is best up to this many tokens: every block
// quantises all of them.
inline constexpr int64_t kLinearFp8StreamTokens = 4;

// The same for fp8 weights that LinearFp8Streams does not take, measured on an
// H100 (docs/kernels/linear_fp8.md): kGemv up to kLinearFp8GemvTokens tokens,
// quantising x itself up to kLinearFp8QuantizingTokens; beyond, cuBLASLt where
// it can read the scales. All but cuBLASLt give an element the same bits.
inline constexpr int64_t kLinearFp8QuantizingTokens = 8;
inline constexpr int64_t kLinearFp8GemvTokens = 32;
LinearKernel SelectLinearFp8Kernel(const LinearParams& params);

// Scratch memory that cuBLASLt may use, for split sums.
inline constexpr size_t kCublasLtWorkspaceBytes = size_t{32} << 20;

}  // namespace tenon

#endif  // TENON_OPS_LINEAR_LINEAR_KERNEL_H_
