#ifndef TENON_TESTS_BENCH_DECODE_PROFILE_H_
#define TENON_TESTS_BENCH_DECODE_PROFILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/model.h"
#include "tests/bench/bench.h"

namespace tenon::bench {

// One kind of op of a decode step.
struct OpProfile {
  std::string name;
  int64_t launches = 0;       // of a step
  double microseconds = 0.0;  // of a step
};

// Times the ops of a decode step of `batch` sequences of `context` tokens, on
// CUDA: for each kind a graph with the ops of that kind alone, of all layers.
// So weights and cache come from memory as in the whole step, but an op finds
// no longer what the one before it left in the L2, and overlaps with another of
// its kind. The last entry is the whole step in one graph. `fuse` is that of
// StepContext.
std::vector<OpProfile> ProfileDecode(const Model& model, Stream stream,
                                     int32_t batch, int32_t context, bool fuse);

// The whole step with fuse = false and, in front of the rotary embedding, Q and
// K split from the packed rows, normed, and put back, six launches a layer:
// what one launch of QkNorm saves is the difference to the step of
// ProfileDecode without fuse.
OpProfile ProfileSplitQkNorm(const Model& model, Stream stream, int32_t batch,
                             int32_t context);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_DECODE_PROFILE_H_
