#ifndef TENON_TESTS_OPS_SAMPLER_TEST_BASE_H_
#define TENON_TESTS_OPS_SAMPLER_TEST_BASE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "ops/sampler/philox.h"
#include "ops/sampler/sampler.h"
#include "tests/reference/sampler_reference.h"
#include "tests/testing/op_test.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

namespace tenon::testing {

// What one call of Sampler returned.
struct Drawn {
  std::vector<int64_t> tokens;
  std::vector<double> logprobs;
  std::vector<int64_t> statuses;

  bool operator==(const Drawn& other) const {
    return tokens == other.tokens && logprobs == other.logprobs &&
           statuses == other.statuses;
  }
};

inline SamplingParams Filters(int32_t top_k, float top_p, float min_p,
                              FilterOrder order = FilterOrder::kSequential) {
  SamplingParams sampling;
  sampling.top_k = top_k;
  sampling.top_p = top_p;
  sampling.min_p = min_p;
  sampling.filter_order = order;
  sampling.seed = 0x0123456789abcdef;
  return sampling;
}

class SamplerTestBase : public OpTest {
 protected:
  // On Hopper the blocks of a cluster share a row of more tokens where there
  // are fewer rows; they wait for each other, which racecheck does not see the
  // end of. In small tests every row has one block.
  static constexpr int64_t kOneBlockVocab = 3840;
  static constexpr int64_t kOneBlockRows = 67;

  static constexpr float kInf = std::numeric_limits<float>::infinity();
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  // One row of logits of a vocabulary.
  TestTensor Logits(const std::vector<float>& row) {
    return TestTensor(device(), dtype(), {1, static_cast<int64_t>(row.size())},
                      row);
  }

  // The first row of `view` for every one of `rows` draws.
  static TensorView Repeat(TensorView view, int64_t rows) {
    view.shape[0] = rows;
    view.stride[0] = 0;
    return view;
  }

  Buffer OnDevice(const void* data, size_t bytes) {
    StatusOr<Buffer> buffer = Buffer::Allocate(device(), bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    EXPECT_TRUE(
        CopyMemory(buffer->data(), device(), data, Device(), bytes, stream())
            .ok());
    return *std::move(buffer);
  }

  Drawn Draw(const TensorView& logits,
             const std::vector<SamplingParams>& sampling,
             bool with_logprobs = true) {
    const int64_t rows = logits.shape[0];
    EXPECT_EQ(rows, static_cast<int64_t>(sampling.size()));
    const Buffer params =
        OnDevice(sampling.data(), sampling.size() * sizeof(SamplingParams));
    TestTensor tokens(device(), DType::kInt32, {rows});
    TestTensor logprobs(device(), DType::kFloat32, {rows});
    TestTensor statuses(device(), DType::kInt32, {rows});
    SamplerParams p;
    p.logits = logits;
    p.params = static_cast<const SamplingParams*>(params.data());
    p.tokens = tokens.view();
    if (with_logprobs) p.logprobs = logprobs.view();
    p.statuses = statuses.view();
    const std::vector<char> scratch(SamplerWorkspaceBytes(p), '\xff');
    const Buffer workspace = OnDevice(scratch.data(), scratch.size());
    p.workspace = workspace.data();
    p.workspace_size = scratch.size();
    const Status status = Sampler(p, stream());
    EXPECT_TRUE(status.ok()) << status.message();
    Finish();
    EXPECT_EQ(tokens.NumStrayWrites() + statuses.NumStrayWrites() +
                  logprobs.NumStrayWrites(),
              0);
    Drawn drawn = {tokens.Integers(), {}, statuses.Integers()};
    if (with_logprobs) drawn.logprobs = logprobs.Values();
    return drawn;
  }

  // `count` draws from one row of logits at consecutive positions.
  Drawn DrawMany(const TensorView& logits, SamplingParams sampling,
                 int64_t count) {
    std::vector<SamplingParams> all(static_cast<size_t>(count), sampling);
    for (int64_t i = 0; i < count; ++i) {
      all[i].position += static_cast<uint64_t>(i);
    }
    return Draw(Repeat(logits, count), all);
  }

  static double Uniform(const SamplingParams& sampling) {
    return UniformAt(sampling.seed, sampling.position, RandomStream::kTarget);
  }

  static reference::Sampling ReferenceOf(const SamplingParams& sampling) {
    reference::Sampling s;
    s.temperature = sampling.temperature;
    s.top_k = sampling.top_k;
    s.top_p = sampling.top_p;
    s.min_p = sampling.min_p;
    s.order = sampling.filter_order == FilterOrder::kJoint
                  ? reference::Order::kJoint
              : sampling.filter_order == FilterOrder::kLlamaCpp
                  ? reference::Order::kLlamaCpp
                  : reference::Order::kSequential;
    if (sampling.typical_p > 0.0f) s.typical_p = sampling.typical_p;
    s.top_n_sigma = sampling.top_n_sigma;
    // Only the certain coin here.
    if (sampling.xtc_probability == 1.0f) {
      s.xtc_threshold = sampling.xtc_threshold;
    }
    return s;
  }

  // Draws `count` tokens and compares each with what float64 draws at the same
  // uniform. Rounding may matter only where the uniform is at the edge between
  // two tokens, or a filter at the edge between two sets. Returns the set of
  // tokens drawn.
  std::set<int64_t> ExpectReferenceTokens(const TestTensor& logits,
                                          SamplingParams sampling,
                                          int64_t count) {
    const reference::Distribution expected = reference::KeptDistribution(
        logits.InitialValues(), ReferenceOf(sampling));
    const reference::Cdf cdf(expected.probability);
    const double rounding =
        1e-6 + (expected.margin < 1e-6 ? expected.margin_mass : 0.0);
    const Drawn drawn = DrawMany(logits.view(), sampling, count);
    std::set<int64_t> tokens;
    for (int64_t i = 0; i < count; ++i) {
      const double uniform = Uniform(sampling);
      const int64_t token = drawn.tokens[i];
      EXPECT_EQ(drawn.statuses[i], 0);
      if (token < 0 || token >= logits.view().shape[1]) {
        ADD_FAILURE() << "token " << token;
        return tokens;
      }
      tokens.insert(token);
      if (sampling.temperature == 0.0f) {
        EXPECT_EQ(expected.probability[token], 1.0);
      } else if (token != cdf.Invert(uniform)) {
        EXPECT_LT(cdf.Distance(token, uniform), rounding)
            << "token " << token << " instead of " << cdf.Invert(uniform)
            << " at " << uniform;
        EXPECT_GT(expected.probability[token] + expected.margin_mass, 0.0);
      }
      EXPECT_NEAR(drawn.logprobs[i], expected.logprob[token],
                  2e-6 + std::abs(expected.logprob[token]) * 2e-7);
      ++sampling.position;
    }
    EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
    return tokens;
  }
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_SAMPLER_TEST_BASE_H_
