#include "ops/attention/attention_cpu_keys.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/reference/attention_reference.h"
#include "tests/testing/random.h"

namespace tenon {
namespace {

using testing::Normal;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Folds `count` keys in blocks of `step` and returns the normalised output.
std::vector<float> Fold(CpuIsa isa, int64_t head_dim, int count, int step,
                        const std::vector<float>& q,
                        const std::vector<float>& k,
                        const std::vector<float>& v) {
  std::vector<float> out(static_cast<size_t>(head_dim), 0.0f);
  float max = -kInfinity;
  float sum = 0.0f;
  for (int first = 0; first < count; first += step) {
    AttentionKeys keys;
    keys.count = std::min(step, count - first);
    for (int i = 0; i < keys.count; ++i) {
      keys.k[i] = &k[static_cast<size_t>((first + i) * head_dim)];
      keys.v[i] = &v[static_cast<size_t>((first + i) * head_dim)];
    }
    FoldKeys(isa, keys, keys.count, head_dim,
             {q.data(), out.data(), &max, &sum});
  }
  for (float& o : out) o /= sum;
  return out;
}

TEST(AttentionCpuKeysTest, EveryInstructionSetMatchesTheReference) {
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    for (int64_t head_dim : {64, 128, 256}) {
      for (int count : {1, 7, 8, 9, 63, 64, 200}) {
        // Scores of tens: weights reach from 1 to nothing.
        const std::vector<float> q = Normal(head_dim, 1, 0.0f, 3.0f);
        const std::vector<float> k = Normal(count * head_dim, 2);
        const std::vector<float> v = Normal(count * head_dim, 3);
        const std::vector<double> k_wide(k.begin(), k.end());
        const std::vector<double> v_wide(v.begin(), v.end());
        const std::vector<double> expected = reference::Attention(
            {q.begin(), q.end()}, count,
            [&](int64_t i) { return &k_wide[i * head_dim]; },
            [&](int64_t i) { return &v_wide[i * head_dim]; }, std::log(2.0));
        const std::vector<float> actual =
            Fold(isa, head_dim, count, 64, q, k, v);
        for (int64_t d = 0; d < head_dim; ++d) {
          ASSERT_NEAR(actual[d], expected[d], 5e-5)
              << CpuIsaName(isa) << " " << count << " keys of " << head_dim;
        }
      }
    }
  }
}

TEST(AttentionCpuKeysTest, TinyWeightsVanish) {
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    std::vector<float> q(64, 0.0f);
    q[0] = 1.0f;
    std::vector<float> k(2 * 64, 0.0f);
    const std::vector<float> v = Normal(2 * 64, 4);
    k[64] = -1e30f;
    for (int step : {1, 2}) {
      const std::vector<float> out = Fold(isa, 64, 2, step, q, k, v);
      for (int d = 0; d < 64; ++d) ASSERT_EQ(out[d], v[d]);
    }
  }
}

}  // namespace
}  // namespace tenon
