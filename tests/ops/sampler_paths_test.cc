#include <cmath>
#include <limits>

#include "ops/sampler/sampler.h"
#include "tests/ops/sampler_call.h"
#include "tests/testing/random.h"

// Rows of every kind through every filter, in numbers that take all ways
// through the kernels: alone, shared by the blocks of a cluster of 8, 2 or 1.
// Small enough for tools that watch each access.

namespace tenon {
namespace {

using testing::Normal;
using testing::SamplerCall;
using testing::SamplerResult;
using testing::SmallOr;
using testing::TestTensor;

constexpr int kKinds = 6;
constexpr int kFilters = 12;

class SamplerPathsTest : public testing::SamplerCallTest {
 protected:
  // Without logits. `first` tells which filters the rows have.
  static SamplerCall MixedCall(int64_t vocab, int64_t rows, int64_t first,
                               bool rich);
  static bool LeavesOut(int64_t vocab, int64_t rows) {
    return testing::SmallTests() && vocab > kOneBlockVocab &&
           rows < kOneBlockRows;
  }
};

std::vector<float> RowOfKind(int64_t kind, int64_t vocab) {
  std::vector<float> x = Normal(vocab, 40 + static_cast<uint64_t>(kind));
  for (int64_t i = 0; i < vocab; ++i) {
    const float id = static_cast<float>(i);
    switch (kind) {
      case 0:  // flat
        break;
      case 1:
        x[i] *= 4.0f;
        break;
      case 2:  // all equal
        x[i] = 1.25f;
        break;
      case 3:  // sorted by id
        x[i] = -1.1f * std::log(id + 1.0f);
        break;
      case 4:  // masked but for a few
        if (i % 100 != 99) x[i] = -std::numeric_limits<float>::infinity();
        break;
      default:  // many ties
        x[i] = std::round(8.0f * x[i]) / 8.0f;
    }
  }
  return x;
}

SamplingParams Filter(int64_t i) {
  SamplingParams s;
  s.seed = static_cast<uint64_t>(1000 + i);
  switch (i % kFilters) {
    case 0:
      s.top_p = 0.9f;
      break;
    case 1:
      s.min_p = 0.05f;
      break;
    case 2:
      s.top_k = 700;
      break;
    case 3:
      s.top_k = 50;
      s.top_p = 0.9f;
      s.min_p = 0.05f;
      break;
    case 4:
      s.typical_p = 0.8f;
      break;
    case 5:
      s.top_p = 0.8f;
      s.xtc_probability = 1.0f;
      s.xtc_threshold = 0.0002f;
      break;
    case 6:
      s.filter_order = FilterOrder::kLlamaCpp;
      s.temperature = 0.8f;
      s.top_p = 0.95f;
      s.typical_p = 0.9f;
      break;
    case 7:
      s.mirostat_tau = 8.0f;
      s.mirostat_eta = 0.1f;
      break;
    case 8:
      s.top_n_sigma = 1.5f;
      s.top_p = 0.9f;
      break;
    case 9:
      s.top_k = 300;
      s.top_p = 0.5f;
      s.filter_order = FilterOrder::kJoint;
      break;
    case 10:  // nearly all: sums that differ in the last places decide
      s.top_p = 0.9999999f;
      break;
    default:
      s.temperature = 0.0f;
  }
  s.num_top_logprobs = static_cast<int32_t>(i % 5);
  return s;
}

SamplerCall SamplerPathsTest::MixedCall(int64_t vocab, int64_t rows,
                                        int64_t first, bool rich) {
  SamplerCall call;
  call.bitmask_words = (vocab + 31) / 32;
  if (rich) {
    call.num_top = 4;
    call.top_kind = static_cast<LogprobKind>(first % 3);
    call.with_probabilities = rows <= 3;
  }
  for (int64_t i = first; i < first + rows; ++i) {
    SamplingParams s = Filter(i);
    call.mirostat_mu.push_back(12.0f);
    if (rich) {
      s.repetition_penalty = 1.2f;
      if (i % 2 == 0) s.flags = kUseBitmask;
      std::vector<LogitEdit> edits;
      for (int32_t id = 3; id < vocab; id += 97) {
        LogitEdit e;
        e.id = id;
        e.state = static_cast<uint32_t>(id % 4);
        if (id % 5 == 0) e.bias = 0.5f;
        if (id % 7 == 0) e.state |= LogitEdit::kBan;
        edits.push_back(e);
      }
      SortEdits(&edits, vocab);
      call.edits.push_back(edits);
      for (int64_t w = 0; w < call.bitmask_words; ++w) {
        call.bitmask.push_back(~(1u << (w + i) % 32));
      }
    }
    call.params.push_back(s);
  }
  return call;
}

// Strict: the bits of the CPU, whatever the device.
TEST_P(SamplerPathsTest, EveryFilterOfEveryKindOfRowGivesTheBitsOfTheCpu) {
  const bool on_gpu = device().type == DeviceType::kCuda;
  for (int64_t vocab : {600, 33000}) {
    std::vector<float> kinds;
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      const std::vector<float> x = RowOfKind(kind, vocab);
      kinds.insert(kinds.end(), x.begin(), x.end());
    }
    for (int64_t rows : {1, 3, 40, 140}) {
      // On the CPU it is the same code twice: that it says the same is enough.
      if (!on_gpu && rows * vocab > 40000) continue;
      // Each time round, kinds shift by one against filters.
      if (LeavesOut(vocab, rows)) continue;
      const int64_t calls =
          rows < 40 ? SmallOr(12, kKinds * kFilters / rows) : SmallOr(1, 2);
      for (int64_t n = 0; n < calls; ++n) {
        const int64_t first = n * rows;
        const bool rich = (n + first / kFilters) % 2 == 1;
        std::vector<float> x;
        for (int64_t i = first; i < first + rows; ++i) {
          const auto row = kinds.begin() + (i + i / kFilters) % kKinds * vocab;
          x.insert(x.end(), row, row + vocab);
        }
        SamplerCall call = MixedCall(vocab, rows, first, rich);
        const TestTensor logits(device(), dtype(), {rows, vocab}, x);
        call.logits = logits.view();
        const SamplerResult result = Run(call);
        const TestTensor host(Device(), dtype(), {rows, vocab}, x);
        call.logits = host.view();
        EXPECT_TRUE(result == RunOn(call, Device()))
            << "vocab " << vocab << ", rows " << rows << " from " << first;
      }
    }
  }
}

TEST_P(SamplerPathsTest, GraphsGiveTheBitsOfSingleCalls) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "CUDA alone";
  constexpr int64_t kGraphVocab = 33000;
  for (int64_t rows : {1, 12, 140}) {
    for (const bool rich : {false, true}) {
      SCOPED_TRACE(StrCat("rows ", rows, " rich ", rich));
      std::vector<float> x;
      for (int64_t i = 0; i < rows; ++i) {
        const std::vector<float> row = RowOfKind(i % kKinds, kGraphVocab);
        x.insert(x.end(), row.begin(), row.end());
      }
      const TestTensor logits(device(), dtype(), {rows, kGraphVocab}, x);
      SamplerCall call = MixedCall(kGraphVocab, rows, 0, rich);
      call.logits = logits.view();
      call.mirostat_mu.clear();
      const SamplerResult result = Run(call);
      EXPECT_TRUE(RunInAGraph(call) == result);
      EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
    }
  }
}

// On CUDA a few sub-tiles tell where top-p may end. Here they mislead: every
// eighth (fourth, where a row has a block) has the likelier logit, as the ones
// that are asked.
TEST_P(SamplerPathsTest, TopPEndsWhereTheSubTilesThatAreAskedMislead) {
  constexpr int64_t kWideVocab = 33000;
  constexpr int64_t kTiles = 129;
  for (const int64_t rows : {1, 70}) {
    if (LeavesOut(kWideVocab, rows)) continue;
    SCOPED_TRACE(rows);
    const int64_t every = rows == 1 ? 8 : 4;
    std::vector<float> x;
    double total = 0.0;
    int64_t likelier = 0;
    for (int64_t id = 0; id < kWideVocab; ++id) {
      const bool is_likelier = id / 16 % kTiles % every == 0;
      x.push_back(id == 0 ? 0.0f : is_likelier ? -1.0f : -2.0f);
      if (id > 0 && is_likelier) ++likelier;
      total += std::exp(double{x.back()});
    }
    double kept = 1.0 + static_cast<double>(likelier) * std::exp(-1.0);
    kept += std::ceil((0.9 * total - kept) * std::exp(2.0)) * std::exp(-2.0);
    const TestTensor logits(device(), dtype(), {1, kWideVocab}, x);
    SamplerCall call;
    const TensorView all = Repeat(logits.view(), rows);
    call.logits = all;
    for (int64_t i = 0; i < rows; ++i) {
      SamplingParams s;
      s.position = static_cast<uint64_t>(i);
      s.top_p = 0.9f;
      call.params.push_back(s);
    }
    const SamplerResult result = Run(call);
    for (int64_t i = 0; i < rows; ++i) {
      ASSERT_GE(result.tokens[i], 0);
      EXPECT_NEAR(result.processed_logprobs[i],
                  x[result.tokens[i]] - std::log(kept), 1e-4);
    }
  }
}

// `fast` may round exponentials in another way: on the CPU it does not, and
// anywhere a token changes only where a uniform is at its very edge.
TEST_P(SamplerPathsTest, FastDrawsAreTheSameWithinRounding) {
  for (int64_t vocab : {300, 33000}) {
    SCOPED_TRACE(vocab);
    const TestTensor logits = Logits(Normal(vocab, 31, 0.0f, 2.0f));
    const std::vector<double> expected =
        reference::KeptDistribution(logits.InitialValues(), {}).logprob;
    std::vector<SamplingParams> params;
    for (uint64_t i = 0; i < 60; ++i) {
      SamplingParams s;
      if (i % 5 == 1) s.top_k = 30;
      if (i % 5 == 2) s.top_p = 0.9f;
      if (i % 5 == 3) s.min_p = 0.02f;
      if (i % 5 == 4) s.temperature = 0.0f;
      s.position = i;
      params.push_back(s);
    }
    SamplerCall call = CallOf(logits.view(), params);
    call.num_top = 3;
    for (SamplingParams& s : call.params) s.num_top_logprobs = 3;
    const SamplerResult strict = Run(call);
    call.fast = true;
    const SamplerResult fast = Run(call);
    if (device().type == DeviceType::kCpu) {
      EXPECT_TRUE(fast == strict);
    }
    EXPECT_EQ(fast.statuses, strict.statuses);
    EXPECT_EQ(fast.top_tokens, strict.top_tokens);
    int others = 0;
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t token = fast.tokens[i];
      ASSERT_GE(token, 0);
      others += token != strict.tokens[i];
      EXPECT_NEAR(fast.logprobs[i], expected[token], 1e-5);
      EXPECT_NEAR(fast.raw_logprobs[i], expected[token], 1e-5);
      if (token == strict.tokens[i]) {
        EXPECT_NEAR(fast.processed_logprobs[i], strict.processed_logprobs[i],
                    1e-5);
      }
    }
    EXPECT_LE(others, 1);
    EXPECT_TRUE(Run(call) == fast);
  }
  // Rows without a token, and those of one, are the same whatever rounds.
  for (float odd : {kNan, kInf, -kInf}) {
    std::vector<float> row(500, -kInf);
    row[123] = odd;
    const TestTensor logits = Logits(row);
    SamplerCall call = CallOf(logits.view(), {SamplingParams()});
    const SamplerResult strict = Run(call);
    call.fast = true;
    EXPECT_TRUE(Run(call) == strict) << odd;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerPathsTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
