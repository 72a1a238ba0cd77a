#ifndef TENON_TESTS_TESTING_SHAPES_H_
#define TENON_TESTS_TESTING_SHAPES_H_

#include <cstdint>

namespace tenon::testing {

// Per-rank shapes of the models that matter, for tests and benches.
struct ModelShape {
  const char* name;
  int64_t hidden;
  int32_t num_heads;  // query heads of this rank
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;
  int32_t num_experts;
  int32_t top_k;
  int64_t intermediate;  // of one expert, of this rank
  int64_t vocab;

  int64_t qkv_width() const {
    return int64_t{num_heads + 2 * num_kv_heads} * head_dim;
  }
};

inline constexpr ModelShape kModelShapes[] = {
    {"qwen3-30b-a3b-tp1", 2048, 32, 4, 128, 128, 128, 8, 768, 151936},
    {"qwen3-30b-a3b-tp4", 2048, 8, 1, 128, 128, 128, 8, 192, 151936},
    {"qwen3-235b-a22b-tp4", 4096, 16, 1, 128, 128, 128, 8, 384, 151936},
    {"glm-4.6-tp4", 5120, 24, 2, 128, 64, 160, 8, 384, 151552},
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_SHAPES_H_
