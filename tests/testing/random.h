#ifndef TENON_TESTS_TESTING_RANDOM_H_
#define TENON_TESTS_TESTING_RANDOM_H_

#include <cstdint>
#include <random>
#include <vector>

namespace tenon::testing {

// `count` normal draws; the same for a seed on every run.
inline std::vector<float> Normal(int64_t count, uint64_t seed,
                                 float mean = 0.0f, float stddev = 1.0f) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(mean, stddev);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

// `count` integers of [low, high].
inline std::vector<int64_t> UniformIntegers(int64_t count, uint64_t seed,
                                            int64_t low, int64_t high) {
  std::mt19937_64 rng(seed);
  std::uniform_int_distribution<int64_t> uniform(low, high);
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t& v : values) v = uniform(rng);
  return values;
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_RANDOM_H_
