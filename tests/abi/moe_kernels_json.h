#ifndef TENON_TESTS_ABI_MOE_KERNELS_JSON_H_
#define TENON_TESTS_ABI_MOE_KERNELS_JSON_H_

namespace tenon::testing {

// What tools/tune writes: one row, for every call with 16-bit weights, of sizes
// that are built in for none.
inline constexpr char kMoeKernelsJson[] = R"({
  "format": "tenon-moe-kernels-1", "device": "any", "source": "a test",
  "float16": [{"max_hidden": null, "max_intermediate": null,
    "max_slots_per_expert": null,
    "gate_up": {"token_tile": 32, "row_warpgroups": 2, "blocks_per_sm": 1},
    "down": {"token_tile": 8, "row_warpgroups": 1, "blocks_per_sm": 1},
    "mma_tile_rows": 128}]})";

}  // namespace tenon::testing

#endif  // TENON_TESTS_ABI_MOE_KERNELS_JSON_H_
