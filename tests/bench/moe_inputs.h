#ifndef TENON_TESTS_BENCH_MOE_INPUTS_H_
#define TENON_TESTS_BENCH_MOE_INPUTS_H_

#include <cstdint>
#include <deque>

#include "ops/moe/moe.h"
#include "ops/moe/moe_router.h"
#include "tests/bench/bench.h"
#include "tests/bench/router_logits.h"
#include "tests/testing/shapes.h"

namespace tenon::bench {

// How the weights of a layer are held.
struct MoeFormat {
  DType dtype = DType::kBFloat16;
  bool per_channel = false;  // scales of fp8: per output row, not per block

  bool fp8() const { return dtype == DType::kFloat8E4M3; }
  // With fp8 weights x is bfloat16.
  DType x_dtype() const { return fp8() ? DType::kBFloat16 : dtype; }
};

// Random weights of one layer.
struct MoeWeights {
  ExpertMatrices gate, up, down;
};
MoeWeights MakeMoeWeights(Tensors* tensors, const testing::ModelShape& shape,
                          const MoeFormat& format);

// Of one expert's weights, scales included.
double MoeExpertBytes(const testing::ModelShape& shape,
                      const MoeFormat& format);

MoeRouterParams MakeMoeRouter(Tensors* tensors,
                              const testing::ModelShape& shape, int64_t tokens,
                              Routing routing, int seed);

// Sets of inputs of one layer, so many that weights are cold when it is their
// turn again. `moe` starts at the router's choice, which has been made.
struct MoeCalls {
  struct Set {
    MoeRouterParams router;
    MoeParams moe;
  };
  std::deque<Set> sets;
  double experts = 0.0;  // distinct ones hit, the mean of the sets

  int num_sets() const { return static_cast<int>(sets.size()); }
};

// One after the other of `layers`. The workspace, which all share, has room for
// calls with router as well.
MoeCalls MakeMoeCalls(const Bench& bench, Tensors* tensors,
                      const testing::ModelShape& shape, int64_t tokens,
                      Routing routing, const MoeFormat& format,
                      const std::vector<MoeWeights>& layers);

// Sets bytes, flops, experts and what tells the case apart, for the layer from
// the router's choice to the output.
void CountMoe(const testing::ModelShape& shape, const MoeFormat& format,
              double experts, Case* what);

}  // namespace tenon::bench

#endif  // TENON_TESTS_BENCH_MOE_INPUTS_H_
